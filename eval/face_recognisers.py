"""What tells faces apart: dlib (weights in face_recognition_models), TokBench's antelopev2, FaceNet.

Each cuts a face out by landmarks or a box that it is given and never looks for it again. Nothing is downloaded here.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from tokenizers_vis.config import did_you_mean
from tokenizers_vis.eval.alignment import ARCFACE, DLIB, TEMPLATES, converted, similarity_transform, warp
from tokenizers_vis.eval.text_recognisers import onnx_session, sha256_of
from tokenizers_vis.weights import check_sha256

BATCH = 16  # faces at a time


class Landmarks(NamedTuple):
    """points: 5 pairs x y in pixels. scheme: "dlib-5" or "arcface-5", see ``eval.alignment``."""

    scheme: str
    points: tuple[tuple[float, float], ...]

    def as_(self, scheme: str) -> np.ndarray:
        """5 2, float64, in a scheme."""
        return converted(np.array(self.points, dtype=np.float64), self.scheme, scheme)


class FaceRecogniser(ABC):
    """Abstract. ``name`` goes into the metric's name, and stands for exact weights.

    by_landmarks: whether ``cut`` goes by landmarks, or by the box.
    """

    name: str
    by_landmarks = True

    @abstractmethod
    def cut(
        self, picture: np.ndarray, box: tuple[float, float, float, float], landmarks: Landmarks | None
    ) -> np.ndarray:
        """picture: uint8 h w 3 -> the face as the net wants it, uint8 s s 3. landmarks are given if it goes by them."""

    @abstractmethod
    def embed(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """Crops of ``cut`` -> n d, float64."""

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """n d twice -> n, 1 for equal ones: the cosine."""
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return 1 - ((a - b) ** 2).sum(axis=1) / 2  # the same as the product, and exactly 1 for equal ones

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """recogniser, weights (their sha256), the score and the licence, for a stamp."""


class DlibFace(FaceRecogniser):
    """dlib's ResNet of 2017, 128 numbers (http://blog.dlib.net/2017/02/high-quality-face-recognition-with-deep.html).

    The score is 1 - L2 distance: 1 for equal faces, about 0.6 for photographs of one person, 0.2 for two people. Its
    cosine is near 1 for any two faces and says nothing.

    Raises ``ValueError`` when dlib or face_recognition_models is not installed, or has other weights.
    """

    name = "dlib-resnet-v1"
    file = "dlib_face_recognition_resnet_model_v1.dat"
    sha256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
    size, padding = 150, 0.25

    def __init__(self) -> None:
        self._path = dlib_model(self.file, self.sha256)

    def cut(
        self, picture: np.ndarray, box: tuple[float, float, float, float], landmarks: Landmarks | None
    ) -> np.ndarray:
        import dlib

        points = landmarks.as_(DLIB).round().astype(int)
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        shape = dlib.full_object_detection(
            dlib.rectangle(int(left), int(top), int(right), int(bottom)),
            [dlib.point(int(x), int(y)) for x, y in points],
        )
        return dlib.get_face_chip(picture, shape, size=self.size, padding=self.padding)

    def embed(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        found = [np.array(self._net.compute_face_descriptor(list(part))) for part in _parts(crops)]
        return np.concatenate(found).astype(np.float64)

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return 1 - np.linalg.norm(a - b, axis=1)

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name, "weights": self.sha256, "score": "1 - L2", "licence": "CC0"}

    @cached_property
    def _net(self) -> Any:
        import dlib

        return dlib.face_recognition_model_v1(str(self._path))


class OnnxFace(FaceRecogniser):
    """A net of insightface's kind: 5 points to ArcFace's places in 112 pixels, RGB in [-1, 1]; the score is the cosine.

    Raises ``ValueError`` when the file is missing or has another sha256.
    """

    size = 112

    def __init__(self, name: str, weights: str | Path, sha256: str, licence: str) -> None:
        path = Path(weights).expanduser()
        if not importlib.util.find_spec("onnxruntime"):
            raise ValueError(f"{name} needs onnxruntime: pip install onnxruntime")
        if not path.is_file():
            raise ValueError(f"there is no {path}, the weights of {name}; give their path as weights")
        check_sha256(path, sha256)
        self.name, self._path, self._sha256, self._licence = name, path, sha256, licence

    def cut(
        self, picture: np.ndarray, box: tuple[float, float, float, float], landmarks: Landmarks | None
    ) -> np.ndarray:
        return warp(picture, similarity_transform(landmarks.as_(ARCFACE), TEMPLATES[ARCFACE]), self.size)

    def embed(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        for part in _parts(crops):
            x = rearrange((np.stack(part).astype(np.float32) - 127.5) / 127.5, "b h w c -> b c h w")
            found.append(self._session.run(None, {self._session.get_inputs()[0].name: x})[0])
        return np.concatenate(found).astype(np.float64)

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name, "weights": self._sha256, "score": "cosine", "licence": self._licence}

    @cached_property
    def _session(self) -> Any:
        return onnx_session(self._path)


def antelopev2(weights: str | Path | None = None) -> OnnxFace:
    """TokBench's recogniser: glintr100.onnx of insightface's pack antelopev2. Its licence is non-commercial.

    weights: the file; None is where insightface keeps it, ~/.insightface/models/antelopev2.
    """
    file = Path.home() / ".insightface" / "models" / "antelopev2" / "glintr100.onnx"
    if weights is None and not file.is_file():
        raise ValueError(
            f"there is no {file}; get antelopev2.zip from https://github.com/deepinsight/insightface/releases (v0.7) "
            "and unpack it there, or give the path of glintr100.onnx as weights"
        )
    sha256 = "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"
    return OnnxFace("antelopev2", weights or file, sha256, "non-commercial research")


class FaceNet(FaceRecogniser):
    """facenet-pytorch's InceptionResnetV1, VGGFace2: the box, scaled to 160 pixels (https://arxiv.org/abs/1503.03832).

    weights: 20180402-114759-vggface2.pt; None is where facenet-pytorch keeps it. The score is the cosine.

    Raises ``ValueError`` when the package or the file is missing.
    """

    name = "FaceNet-vggface2"
    by_landmarks = False
    file = "20180402-114759-vggface2.pt"
    size = 160

    def __init__(self, weights: str | Path | None = None) -> None:
        try:
            from facenet_pytorch import InceptionResnetV1
        except ImportError as error:
            raise ValueError(
                f"{self.name} needs facenet-pytorch ({error}): pip install --no-deps facenet-pytorch, for it asks for "
                "an older torch than it needs"
            ) from error
        import torch

        from tokenizers_vis.eval.perceptual import read_weights

        cache = Path(torch.hub.get_dir()).parent / "checkpoints"
        path = Path(weights).expanduser() if weights is not None else cache / self.file
        if not path.is_file():
            raise ValueError(
                f"there is no {path}; fetch {self.file} from https://github.com/timesler/facenet-pytorch/releases "
                "(v2.2.9) and put it there, or give its path as weights"
            )
        self._sha256 = sha256_of(path)
        self._net = InceptionResnetV1(pretrained=None)
        state = {key: value for key, value in read_weights(path)[0].items() if not key.startswith("logits.")}
        try:
            self._net.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a file of InceptionResnetV1: {error}") from error
        self._net.eval()

    def cut(
        self, picture: np.ndarray, box: tuple[float, float, float, float], landmarks: Landmarks | None
    ) -> np.ndarray:
        from PIL import Image

        x0, y0, x1, y1 = map(int, box)
        inside = Image.fromarray(picture).crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
        return np.asarray(inside.resize((self.size, self.size), Image.Resampling.BILINEAR))

    def embed(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        import torch

        found = []
        for part in _parts(crops):
            x = rearrange((torch.from_numpy(np.stack(part)).float() - 127.5) / 128, "b h w c -> b c h w")
            with torch.inference_mode():
                found.append(self._net(x).numpy())
        return np.concatenate(found).astype(np.float64)

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name, "weights": self._sha256, "score": "cosine", "licence": "MIT"}


FACE_RECOGNISERS: dict[str, Callable[..., FaceRecogniser]] = {
    "dlib": DlibFace,
    "antelopev2": antelopev2,
    "facenet": FaceNet,
}


def face_recogniser(name: str = "dlib", weights: str | Path | None = None) -> FaceRecogniser:
    """A recogniser by name: "dlib" (offline), "antelopev2" (TokBench's) or "facenet".

    weights: a file for the last two; dlib has its own.

    Raises ``ValueError`` for an unknown name, and what the recogniser raises when something is missing.
    """
    if name not in FACE_RECOGNISERS:
        hint = did_you_mean(name, FACE_RECOGNISERS)
        raise ValueError(f"there is no recogniser {name!r}.{hint} There are: {', '.join(FACE_RECOGNISERS)}")
    if weights is None:
        return FACE_RECOGNISERS[name]()
    if name == "dlib":
        raise ValueError("dlib has weights of its own; a file can be given for antelopev2 and facenet")
    return FACE_RECOGNISERS[name](weights)


def dlib_model(file: str, sha256: str) -> Path:
    """A model that face_recognition_models carries. Raises ``ValueError`` when that, or dlib, is missing.

    The package is found, not imported: its code needs pkg_resources, which new versions of setuptools do not have.
    """
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or spec.origin is None or not importlib.util.find_spec("dlib"):
        raise ValueError("dlib's faces need dlib-bin and face_recognition_models: pip install 'tokenizers-vis[faces]'")
    path = Path(spec.origin).parent / "models" / file
    if not path.is_file():
        raise ValueError(f"this face_recognition_models has no {file}; 0.3.0 has: pip install face_recognition_models")
    check_sha256(path, sha256)
    return path


def _parts(crops: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
    if not crops:
        raise ValueError("there is no face to look at: the list is empty")
    return [crops[start : start + BATCH] for start in range(0, len(crops), BATCH)]
