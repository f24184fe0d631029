"""The whole benchmark in one call: methods by name, pictures by path, a report in a folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers_vis.eval.benchmark import ORIGINALS, Shard, Skipped, Task, folder_of, missing, run, total
from tokenizers_vis.eval.method import Method
from tokenizers_vis.eval.methods import parse_methods
from tokenizers_vis.eval.perturbation import Grid
from tokenizers_vis.eval.tokenizer_method import TokenizerMethod
from tokenizers_vis.presets import usable_device

_WAIT = 1.0  # seconds between two looks at what the other processes have done
_PACKAGES = ("tokenizers-vis", "torch", "torchvision", "timm", "numpy", "pillow", "rapidocr", "dlib-bin")


class Evaluation(NamedTuple):
    """results: as ``results.json`` holds them; None while other processes have pictures left to do.

    left: pictures that are not done, by method. skipped: originals that cannot be read.
    """

    results: dict[str, Any] | None
    left: dict[str, int]
    skipped: list[Skipped]


def evaluate(
    methods: Sequence[str],
    out: str | Path,
    *,
    data: str | None = None,
    text: str | Path | None = None,
    faces: str | Path | None = None,
    size: int = 256,
    text_sizes: Sequence[int] = (256,),
    face_sizes: Sequence[int] = (256,),
    limit: int = 0,
    nets: Mapping[str, str] | None = None,
    distances: Mapping[str, str] | None = None,
    recogniser: str = "pp-ocr",
    recogniser_weights: str | Path | None = None,
    face_recogniser: str = "dlib",
    face_recogniser_weights: str | Path | None = None,
    refine: bool = False,
    tokens: bool = False,
    perturb: Grid | None = None,
    sampling: Mapping[str, Any] | None = None,
    device: str | None = None,
    batch_size: int = 8,
    examples: int = 2,
    samples: int = 100,
    shard: Shard | None = None,
    command: str = "",
    start: Callable[[int], Callable[[str, int], None]] = lambda total: lambda what, n: None,
) -> Evaluation:
    """Measures what is not measured yet, and writes the report when all is.

    methods: as ``parse_methods`` takes them. out: the folder of the report; a stopped run goes on in it.
    data: photographs, as ``open_source`` takes them. text, faces: as ``open_text`` and ``open_faces`` take them.
    size: of photographs, see ``suites.Photos``. text_sizes, face_sizes: sides of the squares that pictures are fitted
        into, a suite for each; 0 is as they are. limit: photographs at most; 0 is all.
    nets, distances: for set distances and cosines, and for perceptual distances: name -> file of weights, or "".
    recogniser_weights, face_recogniser_weights: files, for the recognisers that come without.
    refine: text only of words that the recogniser reads on the original.
    tokens: statistics of the ids on the photographs, and probes of the classes where the photographs have any.
    perturb: errors in ids whose decoded pictures are measured by the nets, as pFID; None is none.
    shard: None is all pictures, or this process's part of them where accelerate or torchrun started several. Of those
        the first then waits for the others, and writes the report.
    samples: of the bootstrap of set distances; 0 is none.
    start: is told how many steps there will be; what it gives is called with what is done and a number of steps.

    Raises ``ValueError`` for whatever is missing or wrong in what was given.
    """
    from tokenizers_vis.eval import perturbed
    from tokenizers_vis.eval.report import write_report
    from tokenizers_vis.eval.rows import write_rows
    from tokenizers_vis.eval.summary import summarise

    out = Path(out)
    launched = shard is None and int(os.environ.get("WORLD_SIZE", "1")) > 1
    shard = shard or _own_shard()
    if device is None and "LOCAL_RANK" in os.environ and usable_device(None).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    found: list[Method] = parse_methods(methods, device=device, sampling=sampling)
    tasks: list[Task] = []
    if data is not None:
        tasks.append(_photos(data, size, limit, nets or {}, distances or {}, device))
    if text is not None:
        tasks += _texts(text, text_sizes, recogniser, recogniser_weights)
    if faces is not None:
        tasks += _faces(faces, face_sizes, face_recogniser, face_recogniser_weights)
    labels = [method.label for method in found]
    of_tokens = [method for method in found if isinstance(method, TokenizerMethod)]
    photos = tasks[:1] if data is not None else []
    disturbed = photos if nets and perturb else []
    steps = total(len(found), tasks, shard)
    steps += sum(perturbed.ticks(len(of_tokens), task, shard, perturb) for task in disturbed)
    tick = start(steps + len(of_tokens) * len(photos) * tokens)

    def more(method: Method, task: Task) -> None:
        if task in disturbed and isinstance(method, TokenizerMethod):
            perturbed.perturb(method, task, out, shard, perturb, batch_size=batch_size, examples=examples, tick=tick)

    def left_to_do() -> dict[str, int]:
        if left := missing(labels, tasks, out):
            return left
        names = [method.label for method in of_tokens]
        return {} if not disturbed else perturbed.missing_perturbed(names, disturbed[0], out, perturb)

    skipped = run(found, tasks, out, shard=shard, batch_size=batch_size, examples=examples, tick=tick, more=more)
    if launched and shard.index:
        return Evaluation(None, left_to_do(), skipped)
    while left := left_to_do():
        if not launched:
            return Evaluation(None, left, skipped)
        tick("waiting for the other processes", 0)
        time.sleep(_WAIT)
    described = [_description(out, tasks[0].suite.name, label) for label in labels]
    studies = {task.suite.name: _studies(of_tokens, task, out, tick) for task in photos if tokens}
    tick("summing up", 0)
    grid = perturb if disturbed else None
    results = summarise(described, tasks, out, refined=refine, samples=samples, studies=studies, grid=grid)
    results |= {"command": command, "versions": _versions()}
    written = write_rows(out, [task.suite.name for task in tasks], labels)
    write_report(results, out, [path.name for path in written])
    return Evaluation(results, {}, skipped)


def _studies(
    methods: Sequence[TokenizerMethod], task: Task, out: Path, tick: Callable[[str, int], None]
) -> dict[str, Any]:
    """What the ids of each tokenizer of ids say, by its label."""
    from tokenizers_vis.eval.journal import read_rows
    from tokenizers_vis.eval.protocol import ContentHash
    from tokenizers_vis.eval.token_study import TokenStudy

    dataset, numbers = ContentHash(), []
    for row in read_rows(folder_of(out, task.suite.name, ORIGINALS)):
        if "error" not in row:
            dataset.merge(row["hash"])
            numbers.append(row["i"])
    study, found = TokenStudy(task.suite, numbers, dataset.hexdigest()), {}
    for number, method in enumerate(methods):
        tick(f"{task.suite.name}: tokens of {method.label}", 0)
        description = _description(out, task.suite.name, method.label)
        if description["codebook_sizes"]:
            folder = folder_of(out, task.suite.name, method.label)
            found[method.label] = study.of(folder, description, method.source.get)
        if not any(method.source is other.source for other in methods[number + 1 :]):
            method.release()
        tick(f"{task.suite.name}: tokens of {method.label}", 1)
    return found


def _photos(
    data: str, size: int, limit: int, nets: Mapping[str, str], distances: Mapping[str, str], device: str | None
) -> Task:
    from tokenizers_vis.eval.features import feature_net
    from tokenizers_vis.eval.judges import PictureJudge
    from tokenizers_vis.eval.perceptual import perceptual
    from tokenizers_vis.eval.suites import Photos
    from tokenizers_vis.sources import open_source

    suite = Photos(open_source(data), size, limit)
    of_sets = [feature_net(name, weights) for name, weights in nets.items()]
    of_pairs = [perceptual(name, weights) for name, weights in distances.items()]
    return Task(suite, PictureJudge(of_sets, of_pairs, usable_device(device)))


def _texts(path: str | Path, sizes: Sequence[int], recogniser: str, weights: str | Path | None) -> list[Task]:
    from tokenizers_vis.eval.judges import BoxJudge
    from tokenizers_vis.eval.suites import Boxed
    from tokenizers_vis.eval.text import TextFidelity, open_text
    from tokenizers_vis.eval.text_recognisers import text_recogniser

    judge = BoxJudge(TextFidelity(text_recogniser(recogniser, weights)))
    words = open_text(path)
    return [Task(Boxed(words, size), judge) for size in sizes]


def _faces(path: str | Path, sizes: Sequence[int], recogniser: str, weights: str | Path | None) -> list[Task]:
    from tokenizers_vis.eval.face import FaceFidelity, freeze, open_faces
    from tokenizers_vis.eval.face_recognisers import face_recogniser
    from tokenizers_vis.eval.judges import BoxJudge
    from tokenizers_vis.eval.suites import Boxed

    judge = BoxJudge(FaceFidelity(face_recogniser(recogniser, weights)))
    faces = open_faces(path)
    if judge.fidelity.recogniser.by_landmarks:
        faces = freeze(faces)
    return [Task(Boxed(faces, size), judge) for size in sizes]


def _own_shard() -> Shard:
    """This process's, where accelerate or torchrun started it with others."""
    return Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _description(out: Path, suite: str, label: str) -> dict[str, Any]:
    return json.loads((folder_of(out, suite, label) / "method.json").read_text(encoding="utf-8"))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
