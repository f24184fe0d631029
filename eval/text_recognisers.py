"""What reads a word: PP-OCR (weights in the wheel of rapidocr), PARSeq as TokBench has it, Tesseract.

Each reads crops of single words, one at a time as far as the result goes: how they are batched changes nothing. Nothing
is downloaded here.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from tokenizers_vis.config import did_you_mean
from tokenizers_vis.weights import check_sha256

BATCH = 16  # crops at a time


class TextRecogniser(ABC):
    """Abstract. ``name`` goes into the metric's name, and stands for exact weights."""

    name: str

    @abstractmethod
    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        """crops: uint8 h w 3, RGB, one word each, sizes may differ -> the texts, "" where nothing is seen."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """recogniser, weights (their sha256, or a version) and licence, for a stamp."""


class PPOCR(TextRecogniser):
    """PP-OCRv6, the small recogniser, as RapidOCR 3.10 runs it on one crop (https://github.com/RapidAI/RapidOCR).

    The crop is scaled to 48 pixels of height, bilinear, and padded with grey to a width of 320 or, where it is longer,
    its own. On one thread: more of them in several processes slow each other down.

    Raises ``ValueError`` when rapidocr is not installed, or has other weights.
    """

    name = "PP-OCRv6-rec-small"
    sha256 = "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"
    height, width = 48, 320

    def __init__(self) -> None:
        spec = importlib.util.find_spec("rapidocr")
        if spec is None or spec.origin is None or not importlib.util.find_spec("onnxruntime"):
            raise ValueError(
                f"{self.name} needs rapidocr 3.10, which has its weights, and onnxruntime: "
                "pip install 'tokenizers-vis[ocr]'"
            )
        self.path = Path(spec.origin).parent / "models" / "PP-OCRv6_rec_small.onnx"
        if not self.path.is_file():
            raise ValueError(f"this rapidocr has no {self.path.name}; 3.10 has: pip install 'rapidocr==3.10.*'")
        check_sha256(self.path, self.sha256)

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        prepared = [self._prepare(crop) for crop in crops]
        texts = [""] * len(crops)
        # Only equal widths share a batch: RapidOCR pads to the longest of six, and the result hangs on the neighbours.
        for width in sorted({x.shape[-1] for x in prepared}):
            group = [i for i, x in enumerate(prepared) if x.shape[-1] == width]
            for start in range(0, len(group), BATCH):
                part = group[start : start + BATCH]
                (scores,) = self._session.run(None, {self._input: np.stack([prepared[i] for i in part])})
                for i, best in zip(part, scores.argmax(axis=-1), strict=True):
                    texts[i] = self._decode(best)
        return texts

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name, "weights": self.sha256, "licence": "Apache-2.0"}

    def _prepare(self, crop: np.ndarray) -> np.ndarray:
        """uint8 h w 3 -> float32 3 48 w in [-1, 1], blue first."""
        import cv2

        ratio = crop.shape[1] / crop.shape[0]
        width = int(self.height * max(self.width / self.height, ratio))
        scaled = cv2.resize(crop[:, :, ::-1], (min(width, math.ceil(self.height * ratio)), self.height))
        padded = np.zeros((3, self.height, width), np.float32)
        padded[:, :, : scaled.shape[1]] = rearrange((scaled.astype(np.float32) / 255 - 0.5) / 0.5, "h w c -> c h w")
        return padded

    def _decode(self, best: np.ndarray) -> str:
        """CTC: a run of one class is one character, class 0 is none."""
        kept = best[np.flatnonzero(np.diff(best, prepend=-1))]
        return "".join(self._characters[i] for i in kept if i)

    @cached_property
    def _session(self) -> Any:
        return onnx_session(self.path)

    @cached_property
    def _input(self) -> str:
        return self._session.get_inputs()[0].name

    @cached_property
    def _characters(self) -> list[str]:
        listed = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        return ["", *listed, " "]


class PARSeq(TextRecogniser):
    """TokBench's recogniser: docTR's PARSeq with its French vocabulary (https://github.com/mindee/doctr).

    weights: docTR's parseq-56125471.pt; None is where docTR keeps it, ~/.cache/doctr/models.

    Raises ``ValueError`` when docTR or the file is missing, or the file is another one.
    """

    name = "PARSeq"
    file, hashed = "parseq-56125471.pt", "56125471"
    url = "https://doctr-static.mindee.com/models?id=v0.7.0/parseq-56125471.pt"

    def __init__(self, weights: str | Path | None = None) -> None:
        try:
            from doctr.models.recognition import parseq
        except ImportError as error:
            raise ValueError(f"{self.name} needs docTR ({error}): pip install 'python-doctr[torch]'") from error
        from tokenizers_vis.eval.perceptual import read_weights

        path = Path(weights).expanduser() if weights is not None else _doctr_cache() / self.file
        if not path.is_file():
            raise ValueError(f"there is no {path}; fetch {self.url} and put it there, or give its path as weights")
        self.sha256 = sha256_of(path)
        if not self.sha256.startswith(self.hashed):
            raise ValueError(
                f"{path} has sha256 {self.sha256}, {self.file} has {self.hashed}...; fetch {self.url} again"
            )
        self._model = parseq(pretrained=False)
        self._model.load_state_dict(read_weights(path)[0])
        self._model.eval()

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        import torch

        texts: list[str] = []
        for start in range(0, len(crops), BATCH):
            x = torch.stack([parseq_input(crop) for crop in crops[start : start + BATCH]])
            with torch.inference_mode():
                texts += [text for text, _ in self._model(x, return_preds=True)["preds"]]
        return texts

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name, "weights": self.sha256, "licence": "Apache-2.0"}


def parseq_input(crop: np.ndarray) -> Any:
    """uint8 h w 3 -> float32 3 32 128: scaled to fit (bilinear, antialiased), black to the right and below."""
    import torch
    import torch.nn.functional as F

    height, width = 32, 128
    x = rearrange(torch.tensor(crop, dtype=torch.float32) / 255, "h w c -> 1 c h w")
    if crop.shape[0] / crop.shape[1] > height / width:
        size = (height, max(int(height * crop.shape[1] / crop.shape[0]), 1))
    else:
        size = (max(int(width * crop.shape[0] / crop.shape[1]), 1), width)
    x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    x = F.pad(x, (0, width - size[1], 0, height - size[0]))[0]
    mean, std = torch.tensor((0.694, 0.695, 0.693)), torch.tensor((0.299, 0.296, 0.301))
    return (x - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")


class Tesseract(TextRecogniser):
    """Tesseract, told that a crop is a single word. Its version is part of the name; it is meant for printed pages.

    Raises ``ValueError`` when pytesseract or the program is missing.
    """

    def __init__(self) -> None:
        try:
            import pytesseract

            version = pytesseract.get_tesseract_version()
        except (ImportError, OSError) as error:  # the program missing is an OSError
            raise ValueError(
                f"Tesseract cannot be run ({type(error).__name__}): install the program tesseract-ocr with its English "
                "data, and pip install pytesseract"
            ) from error
        self.name = f"Tesseract-{version}"

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        import pytesseract
        from PIL import Image

        return [pytesseract.image_to_string(Image.fromarray(crop), config="--psm 8").strip() for crop in crops]

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name, "weights": "eng, of the installed program", "licence": "Apache-2.0"}


TEXT_RECOGNISERS: dict[str, Callable[..., TextRecogniser]] = {"pp-ocr": PPOCR, "parseq": PARSeq, "tesseract": Tesseract}


def text_recogniser(name: str = "pp-ocr", weights: str | Path | None = None) -> TextRecogniser:
    """A recogniser by name: "pp-ocr" (offline), "parseq" (TokBench's) or "tesseract".

    weights: a file for parseq; the others have theirs.

    Raises ``ValueError`` for an unknown name, and what the recogniser raises when something is missing.
    """
    if name not in TEXT_RECOGNISERS:
        hint = did_you_mean(name, TEXT_RECOGNISERS)
        raise ValueError(f"there is no recogniser {name!r}.{hint} There are: {', '.join(TEXT_RECOGNISERS)}")
    if weights is None:
        return TEXT_RECOGNISERS[name]()
    if name != "parseq":
        raise ValueError(f"{name} has weights of its own; a file can be given for parseq")
    return PARSeq(weights)


def onnx_session(path: Path) -> Any:
    """An onnxruntime session on one CPU thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sha256_of(path: Path) -> str:
    """64 hex digits."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _doctr_cache() -> Path:
    import os

    return Path(os.environ.get("DOCTR_CACHE_DIR", Path.home() / ".cache" / "doctr")) / "models"
