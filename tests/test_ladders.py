"""Every metric falls in order along ladders of damage, on real photographs, words and faces: Spearman 1.0 on each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tokenizers_vis.eval.benchmark import Task, run
from tokenizers_vis.eval.face import FaceFidelity, freeze, open_faces
from tokenizers_vis.eval.features import feature_net
from tokenizers_vis.eval.judges import BoxJudge, PictureJudge
from tokenizers_vis.eval.method import Method, Reconstruction
from tokenizers_vis.eval.methods import parse_methods
from tokenizers_vis.eval.perceptual import perceptual
from tokenizers_vis.eval.suites import Boxed, Photos
from tokenizers_vis.eval.summary import summarise
from tokenizers_vis.eval.text import TextFidelity, open_text
from tokenizers_vis.sources import open_source

WEIGHTS = "mobilenetv2_100_same_imagenet1001.fp16.safetensors"
# Worse from rung to rung. Blur is the radius in pixels; pictures of words are four times as large as the others.
SMALL = {"blur": (0.5, 1, 2, 4), "jpeg": (60, 25, 10, 3), "resize": (128, 64, 32, 16)}
LARGE = {"blur": (1, 2, 4, 8), "jpeg": (50, 20, 8, 3), "resize": (256, 128, 64, 32)}
FALLING = ("kid", "kd", "fd", "mobilenetv2_100")  # the others rise with quality


class Blur(Method):
    kind = "resize"

    def __init__(self, radius: float) -> None:
        self.label, self.radius = f"blur@{radius:g}", radius

    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        blur = ImageFilter.GaussianBlur(self.radius)
        return [
            Reconstruction(np.array(Image.fromarray(image).filter(blur)), None, None, None, None) for image in images
        ]


def climb(task: Task, out: Path, ladders: dict[str, Sequence[float]], metrics: Sequence[str]) -> None:
    """Measures all rungs, and holds that each metric is strictly worse on every rung than on the one before."""
    named = {
        "blur": [Blur(radius) for radius in ladders["blur"]],
        "jpeg": parse_methods([f"jpeg@q{q}" for q in ladders["jpeg"]]),
        "resize": parse_methods([f"resize@{side}" for side in ladders["resize"]]),
    }
    (identity,) = parse_methods(["identity"])
    methods = [identity, *(method for some in named.values() for method in some)]
    run(methods, [task], out, examples=0)
    results = summarise([method.describe() for method in methods], [task], out, samples=0)
    (suite,) = results["suites"]
    cells = {row["label"]: row["cells"] for row in suite["rows"]}
    assert set(metrics) <= {column["key"] for column in suite["columns"]}
    wrong = {}
    for name, rungs in named.items():
        for metric in metrics:
            values = [number(cells[method.label][metric]["value"]) for method in (identity, *rungs)]
            steps = np.diff(values) if metric.startswith(FALLING) else -np.diff(values)
            if not (steps > 0).all():
                wrong[f"{metric} along {name}"] = values
    assert not wrong, json.dumps(wrong, indent=1)


def number(value: Any) -> float:
    return np.inf if value == "inf" else value


def some(ladders: dict[str, Sequence[float]], whole: bool) -> dict[str, Sequence[float]]:
    return ladders if whole else {name: rungs[1::2] for name, rungs in ladders.items()}


SIZES = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"])


@SIZES
def test_photographs(whole: bool, shared: Path, tmp_path: Path) -> None:
    file = shared / "weights" / WEIGHTS
    if not file.is_file():
        pytest.skip(f"needs {file}")
    source = open_source(str(shared / "data" / "photos-160" / "val.tar"))
    judge = PictureJudge([feature_net("mobilenetv2", file)], [perceptual("mobilenetv2_100", str(file))])
    task = Task(Photos(source, 176, limit=64 if whole else 6), judge)
    metrics = ("psnr", "psnr_pooled", "ssim", "ms_ssim", "mobilenetv2_100", "cosine_mobilenetv2")
    climb(task, tmp_path, some(SMALL, whole), (*metrics, "fd_mobilenetv2", "kd_mobilenetv2"))


@SIZES
def test_words(whole: bool, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("rapidocr", reason="reads words: pip install 'tokenizers-vis[ocr]'")
    words = open_text(shared / "data" / "text-eval")
    if not whole:  # the pictures of the largest words: a few that are read at all
        ranked = sorted(words.images, key=lambda image: -max((word.scale for word in image.words), default=0))
        words = replace(words, images=tuple(ranked[:12]))
    metrics = [f"{kind}[PP-OCRv6-rec-small] micro" for kind in ("T-ACC", "T-NED")]
    climb(Task(Boxed(words, 0), BoxJudge(TextFidelity(_text()))), tmp_path, some(LARGE, whole), metrics)


@SIZES
def test_faces(whole: bool, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("dlib", reason="recognises faces: pip install 'tokenizers-vis[faces]'")
    from tokenizers_vis.eval.face_recognisers import face_recogniser

    faces = open_faces(shared / "data" / "faces-eval")
    faces = replace(faces, images=faces.images[:: 4 if whole else 25])
    metrics = ["F-Sim[dlib-resnet-v1]", "F-Sim[dlib-resnet-v1] micro"] if whole else ["F-Sim[dlib-resnet-v1] micro"]
    climb(
        Task(Boxed(freeze(faces), 0), BoxJudge(FaceFidelity(face_recogniser()))), tmp_path, some(SMALL, whole), metrics
    )


def _text() -> Any:
    from tokenizers_vis.eval.text_recognisers import text_recogniser

    return text_recogniser()
