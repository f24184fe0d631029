"""The runner: each method reconstructs each picture of each suite once, and the judge sees the pair.

What it finds are rows on disk (``journal``): OUT/parts/SUITE/METHOD/SHARD.jsonl. What is there is not done again, so a
run that was stopped goes on, and several processes share the work, each with a shard of the pictures. Tables are views
of the rows (``summary``). One method and one batch of pictures are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizers_vis.eval.examples import Examples
from tokenizers_vis.eval.journal import Array, Journal, Row, Stored, finite, read_rows
from tokenizers_vis.eval.judges import Judge
from tokenizers_vis.eval.method import Method, Reconstruction
from tokenizers_vis.eval.protocol import ContentHash
from tokenizers_vis.eval.suites import Item, Suite
from tokenizers_vis.files import write_atomically
from tokenizers_vis.weights import fetch

FORMAT = 1
PARTS = "parts"
ORIGINALS = "originals"  # the folder of what is known of originals, beside those of the methods
_OF_MACHINE = ("device", "dtype")  # facts of a method that may differ: several machines may share the work
_Tick = Callable[[str, int], None]


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 0: the pictures whose number leaves that rest."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a shard is I/N with I from 0 to N - 1, got {self.index}/{self.count}")

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


class Task(NamedTuple):
    """A suite and its judge."""

    suite: Suite
    judge: Judge


class Skipped(NamedTuple):
    """An original that cannot be read. It is left out for every method."""

    suite: str
    picture: str
    reason: str


def run(
    methods: Sequence[Method],
    tasks: Sequence[Task],
    out: Path,
    *,
    shard: Shard | None = None,
    batch_size: int = 8,
    examples: int = 2,
    tick: _Tick = lambda what, n: None,
    more: Callable[[Method, Task], None] = lambda method, task: None,
) -> list[Skipped]:
    """Does what is not done yet. Stopped at any moment, it goes on when it is called again.

    out: the folder of the report; rows go to its ``parts``. shard: of the pictures; None is all.
    batch_size: pictures that a method is given at a time. examples: how many of the worst, the best and the first
        pictures of each method are kept to be shown.
    tick: called with what is done and a number of pictures, as the work goes on.
    more: what else is to be done with a method on a suite, after its reconstructions and before it is let go.

    Raises ``ValueError`` for a folder that holds a benchmark of something else, with the difference named; for a method
    that lacks something, or gives back something other than it should; and when no picture of a suite can be read.
    """
    shard = shard or Shard()
    if not tasks:
        raise ValueError("there is nothing to judge on: give photographs, pictures with words, or with faces")
    _claim(out, {task.suite.name: {**task.suite.facts(), "judge": task.judge.describe()} for task in tasks})
    skipped = [one for task in tasks for one in _read_originals(task, out, shard, batch_size, tick)]
    # All that may be missing is found out before the first hour of work.
    for method in methods:
        _have(method, tasks)
    for number, method in enumerate(methods):
        for task in tasks:
            _reconstruct(method, task, out, shard, batch_size, examples, tick)
            more(method, task)
        if not any(_shares(method, other) for other in methods[number + 1 :]):
            method.release()  # one tokenizer after the other is in memory
    return skipped


def total(methods: int, tasks: Sequence[Task], shard: Shard) -> int:
    """How many ticks a run makes."""
    return sum(len(range(shard.index, len(suite), shard.count)) for suite, _ in tasks) * (methods + 1)


def missing(methods: Sequence[str], tasks: Sequence[Task], out: Path) -> dict[str, int]:
    """For each method's label the pictures that no process has done yet; nothing when all is done."""
    found = {}
    for suite, _ in tasks:
        readable = {row["i"] for row in read_rows(folder_of(out, suite.name, ORIGINALS)) if "error" not in row}
        broken = {row["i"] for row in read_rows(folder_of(out, suite.name, ORIGINALS)) if "error" in row} - readable
        for label in methods:
            done = {row["i"] for row in read_rows(folder_of(out, suite.name, label))}
            if left := len(suite) - len(broken) - len(done & readable):
                found[label] = found.get(label, 0) + left
    return found


def folder_of(out: Path, suite: str, label: str) -> Path:
    """Where the rows of a method on a suite lie."""
    if label != ORIGINALS:
        # Labels hold slashes and colons; two of them must not become one folder, also where case does not count.
        label = f"{re.sub(r'[^0-9A-Za-z.-]+', '_', label)[-48:]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return out / PARTS / suite / label


def ids_array(description: Mapping[str, Any]) -> Array | None:
    """How the ids of a method are kept, n k as one row; None where it has none."""
    sizes = description.get("codebook_sizes")
    return Array(description["tokens"] * len(sizes), "<i8") if sizes else None


def _claim(out: Path, facts: Mapping[str, Any]) -> None:
    """Writes into the folder what it is a benchmark of. Raises ``ValueError`` when that is something else."""
    path = out / PARTS / "run.json"
    mine = finite(json.loads(json.dumps({"format": FORMAT, "suites": dict(facts)}, default=str)))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(mine, indent=1).encode())
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if theirs != mine:
        raise ValueError(
            f"{out} holds a benchmark of something else: {'; '.join(_differences(theirs, mine))}. "
            "Measure in the same way, or give another folder as --out"
        )


def _differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            if there.get(key) != here.get(key):
                yield from _differences(there.get(key), here.get(key), f"{where}.{key}".strip("."))
    else:
        yield f"{where} is {_said(there)} there and {_said(here)} here"


def _said(value: Any) -> str:
    return "nothing" if value is None else "something" if isinstance(value, dict) else str(value)


def _read_originals(task: Task, out: Path, shard: Shard, batch_size: int, tick: _Tick) -> list[Skipped]:
    """Hashes originals and keeps what their judge wants to remember; a picture that cannot be read is a row too."""
    suite, judge = task
    what = f"{suite.name}: {ORIGINALS}"
    folder = folder_of(out, suite.name, ORIGINALS)
    skipped = []
    # What could not be read may have been mended meanwhile.
    done = {row["i"] for row in read_rows(folder) if "error" not in row}
    with Journal(folder / f"{shard}.jsonl", judge.arrays) as journal:
        mine = range(shard.index, len(suite), shard.count)
        tick(what, sum(i in done for i in mine))
        for numbers in _batches([i for i in mine if i not in done], batch_size):
            items, broken = _load(suite, numbers)
            skipped += broken
            rows = []
            for item in items:
                content = ContentHash()
                content.update(item.pixels)
                height, width = item.pixels.shape[:2]
                size = {"width": width, "height": height, "hash": content.hexdigest()}
                rows.append({"i": item.i, "image": item.name, **size})
            if items:
                journal.append(rows, judge.originals(items))
            left = sorted(set(numbers) - {item.i for item in items})
            errors = zip(left, broken, strict=True)
            journal.append([{"i": i, "image": one.picture, "error": one.reason} for i, one in errors])
            tick(what, len(numbers))
    rows = list(read_rows(folder))
    if skipped and len({row["i"] for row in rows}) == len(suite) and all("error" in row for row in rows):
        raise ValueError(f"none of the pictures of {suite.name} can be read, the first because {skipped[0].reason}")
    return skipped


def _load(suite: Suite, numbers: Sequence[int]) -> tuple[list[Item], list[Skipped]]:
    items, broken = [], []
    for i in numbers:
        try:
            items.append(suite.load(i))
        except (ValueError, OSError) as error:
            broken.append(Skipped(suite.name, suite.names[i], str(error)))
    return items, broken


def _reconstruct(
    method: Method, task: Task, out: Path, shard: Shard, batch_size: int, examples: int, tick: _Tick
) -> None:
    suite, judge = task
    what = f"{suite.name}: {method.label}"
    folder = folder_of(out, suite.name, method.label)
    originals = folder_of(out, suite.name, ORIGINALS)
    known = {row["i"]: row["hash"] for row in read_rows(originals) if "error" not in row}
    done = {row["i"] for row in read_rows(folder)}
    mine = [i for i in range(shard.index, len(suite), shard.count) if i in known]
    waiting = [i for i in mine if i not in done]
    tick(what, len(range(shard.index, len(suite), shard.count)) - len(waiting))
    method.prepare(suite.names)
    description = method.describe()
    _same_method(folder, description)
    ids = ids_array(description)
    arrays = judge.arrays | ({"ids": ids} if ids else {})
    stored = {name: Stored(originals, name, array) for name, array in judge.arrays.items()}
    with Journal(folder / f"{shard}.jsonl", arrays) as journal:
        shown = Examples(folder, originals, suite, examples, read_rows(folder))
        for numbers in _batches(waiting, batch_size):
            items = [suite.load(i) for i in numbers]
            _refuse_changed(items, known, suite.name)
            views = [(item.pixels, None) if method.kind == "folder" else suite.shown(item.pixels) for item in items]
            found = method.reconstruct([pixels for pixels, _ in views], [item.name for item in items])
            pictures = []
            for item, (view, place), one in zip(items, views, found, strict=True):
                _check_pixels(method.label, item.name, one.pixels, view.shape)
                pictures.append(suite.restored(one.pixels, place))
            kept = {name: array.at(numbers) for name, array in stored.items()}
            rows, values = judge.judge(items, pictures, kept)
            if ids:
                values |= {"ids": np.stack([one.ids.numpy().ravel() for one in found])}
            rows = [_cost(item, one) | row for item, one, row in zip(items, found, rows, strict=True)]
            # Pictures first: a row says that all of its picture's work is done.
            for item, picture, row in zip(items, pictures, rows, strict=True):
                shown.offer(item, picture, row)
            journal.append(rows, values)
            shown.tidy()
            tick(what, len(numbers))


def _have(method: Method, tasks: Sequence[Task]) -> None:
    """Gets what a method needs. A tokenizer is not loaded yet, for one after the other is in memory."""
    if method.kind != "tokenizer":
        for suite, _ in tasks:
            method.prepare(suite.names)
    elif "family" in method.source.table:
        fetch(*(method.source.table[key] for key in ("hub", "file", "sha256")))


def _shares(method: Method, other: Method) -> bool:
    """Whether the two use one loaded tokenizer."""
    return method.kind == other.kind == "tokenizer" and method.source is other.source


def _cost(item: Item, one: Reconstruction) -> Row:
    h, w = item.pixels.shape[:2]
    row: Row = {"i": item.i, "image": item.name, "width": w, "height": h, "bytes": one.nbytes, "bits": one.bits}
    row["bpp"] = None if one.nbytes is None else 8 * one.nbytes / (w * h)
    for key, seconds in (("encode_ms", one.encode_seconds), ("decode_ms", one.decode_seconds)):
        row[key] = None if seconds is None else 1000 * seconds
    row["peak_mb"] = None if one.peak_bytes is None else one.peak_bytes / 1e6
    return row


def _refuse_changed(items: Sequence[Item], known: Mapping[int, str], suite: str) -> None:
    """Raises ``ValueError`` for an original that is not the one that was first seen under its number."""
    for item in items:
        content = ContentHash()
        content.update(item.pixels)
        if content.hexdigest() != known[item.i]:
            raise ValueError(
                f"{item.name} of {suite} is no longer the picture that the first rows were measured on; give another "
                "folder as --out, or bring the old picture back"
            )


def _check_pixels(label: str, name: str, pixels: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{label} gave back {got} for {name}; a reconstruction is uint8 {shape}, as the original")


def _same_method(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes down what made the rows of a folder. Raises ``ValueError`` when that was something else."""
    path = folder / "method.json"
    mine = finite(json.loads(json.dumps(dict(description), default=str)))
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(mine, indent=1).encode())
        return
    there, here = (
        {key: value for key, value in one.items() if key not in _OF_MACHINE}
        for one in (json.loads(path.read_text(encoding="utf-8")), mine)
    )
    if there != here:
        raise ValueError(
            f"{mine['label']} was another method when its rows in {folder} were measured: "
            f"{'; '.join(_differences(there, here))}. Give another folder as --out, or delete that one"
        )


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    if size < 1:
        raise ValueError(f"batch_size is a whole number from 1, got {size}")
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
