"""From rows to tables: what ``results.json`` holds. Nothing is measured here but distances between sets of features.

A cell is {"value", "low", "high", "n", "note"}: a number (or "inf", which JSON lacks), its 95 % interval by bootstrap
over pictures where there is one, and of how many pictures or instances it is. Every column carries the stamp under
which it was measured.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_vis.eval.benchmark import ORIGINALS, Task, folder_of, ids_array
from tokenizers_vis.eval.bins import BINS, Summary
from tokenizers_vis.eval.columns import COST, QUALITY, Column, pair_column, set_column
from tokenizers_vis.eval.examples import FOLDER
from tokenizers_vis.eval.journal import Row, Stored, finite, read_rows
from tokenizers_vis.eval.judges import BoxJudge, PictureJudge
from tokenizers_vis.eval.protocol import ContentHash, Stamp, refuse_mixture
from tokenizers_vis.files import write_atomically

Cell = dict[str, Any]
FORMAT = 1
PSNR_CAP = 100.0  # dB, of a picture that comes back exactly, in a mean with others that do not
RESAMPLES = 1000
_CHUNK = 1024


def summarise(
    descriptions: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    out: Path,
    *,
    refined: bool = False,
    samples: int = 100,
) -> dict[str, Any]:
    """The tables of a finished benchmark, as plain values.

    descriptions: of the methods, in the order of rows. refined: text only of words that the recogniser reads on the
    original. samples: of the bootstrap of set distances; 0 is none.

    Raises ``StampError`` when methods were measured on different pictures.
    """
    labels = [description["label"] for description in descriptions]
    suites = []
    for task in tasks:
        table = _Table(task, out, {one["label"]: one for one in descriptions})
        for label in labels:
            table.add(label, samples, refined)
        suites.append(table.finished())
    return finite({"format": FORMAT, "methods": list(descriptions), "suites": suites})


class _Table:
    """One suite: a row for each method."""

    def __init__(self, task: Task, out: Path, descriptions: Mapping[str, Mapping[str, Any]]) -> None:
        self.suite, self.judge = task
        self.out, self.descriptions = out, descriptions
        rows = list(read_rows(folder_of(out, self.suite.name, ORIGINALS)))
        self.hashes = {row["i"]: row["hash"] for row in rows if "error" not in row}
        self.broken = {row["image"]: row["error"] for row in rows if "error" in row and row["i"] not in self.hashes}
        self.columns: dict[str, Column] = {}
        self.stamps: dict[str, dict[str, Stamp]] = {}
        self.rows: list[Row] = []
        self.scales: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, label: str, samples: int, refined: bool) -> None:
        folder = folder_of(self.out, self.suite.name, label)
        rows = {row["i"]: row for row in read_rows(folder) if row["i"] in self.hashes}
        ordered = [rows[i] for i in sorted(rows)]
        dataset = ContentHash()
        for i in rows:
            dataset.merge(self.hashes[i])
        stamp = self.suite.stamp(dataset.hexdigest(), len(rows))
        cells: dict[str, Cell] = {}
        found, known = _pictures(ordered), {column.key for column in QUALITY}
        self._take(label, cells, QUALITY, {key: found.pop(key) for key in list(found) if key in known}, stamp)
        self._take(label, cells, [pair_column(key) for key in found], found, stamp)
        if isinstance(self.judge, PictureJudge):
            originals = folder_of(self.out, self.suite.name, ORIGINALS)
            names = {row["i"]: row["image"] for row in ordered}
            for net in self.judge.nets.values():
                of_net = replace(stamp, features=net.name, feature_hash=net.sha256, extra={"resize": net.resize})
                found = _set_distances(folder, originals, net, names, of_net, samples)
                self._take(label, cells, [set_column(key, net.name) for key in found], found, of_net)
        elif isinstance(self.judge, BoxJudge):
            instances = [one for row in ordered for one in row["instances"]]
            self._by_scale(label, cells, instances, stamp, refined)
        self._take(label, cells, COST, _costs(ordered, self.descriptions[label], folder), stamp)
        kind = self.descriptions[label]["kind"]
        self.rows.append({"label": label, "kind": kind, "cells": cells, "examples": _examples(folder, ordered)})

    def finished(self) -> dict[str, Any]:
        for key, stamps in self.stamps.items():
            refuse_mixture(f"{key} on {self.suite.name}", stamps)
        # The rate first; then what the suite is for, which for text and faces is not the error of pixels.
        scores = [] if self.suite.kind == "photos" else [key for key in self.columns if "[" in key]
        order = ["bytes", *scores, *(column.key for column in QUALITY), *self.columns, *(column.key for column in COST)]
        groups = ("quality", "sets", "cost")
        keys = sorted(
            self.columns,
            key=lambda key: (key != "bytes", groups.index(self.columns[key].group), order.index(key)),
        )
        columns = [
            {**asdict(self.columns[key]), "stamp": next(iter(self.stamps[key].values())).to_dict()} for key in keys
        ]
        return {
            "name": self.suite.name,
            "kind": self.suite.kind,
            "size": self.suite.size,
            "pictures": len(self.hashes),
            "skipped": self.broken,
            "columns": columns,
            "rows": self.rows,
            "scales": list(self.scales.values()),
        }

    def _take(
        self, label: str, cells: dict[str, Cell], columns: Iterable[Column], found: Mapping[str, Cell], stamp: Stamp
    ) -> None:
        for column in columns:
            if column.key in found:
                self.columns.setdefault(column.key, column)
                self.stamps.setdefault(column.key, {})[label] = stamp
                cells[column.key] = found[column.key]

    def _by_scale(
        self, label: str, cells: dict[str, Cell], instances: Sequence[Row], stamp: Stamp, refined: bool
    ) -> None:
        from tokenizers_vis.eval.face import summarise_face
        from tokenizers_vis.eval.text import summarise_text

        text = self.suite.kind == "text"
        kept = [one for one in instances if one["readable"]] if refined and text else instances
        for number, bins in enumerate(bins_for(self.suite.kind, self.suite.size)):
            found = summarise_text(instances, bins, refined=refined) if text else summarise_face(instances, bins)
            for metric, summary in found.items():
                of_bins = replace(
                    stamp,
                    extra={**stamp.extra, "judge": self.judge.describe(), "bins": bins, "refined": refined and text},
                )
                if not number:
                    macro, micro = _summary_cells(summary)
                    what = f"mean of the means of {summary.filled} bins of {bins}" + ", refined" * refined
                    columns = [
                        Column(metric, metric, "higher", 3, "quality", what),
                        Column(f"{metric} micro", f"{metric} micro", "higher", 3, "quality", "mean of all instances"),
                    ]
                    self._take(label, cells, columns, {metric: macro, f"{metric} micro": micro}, of_bins)
                spans = [[score.start, score.stop] for score in summary.scores]
                facts = {"metric": metric, "bins": bins, "source": summary.bins.source, "spans": spans, "rows": {}}
                scale = self.scales.setdefault((metric, bins), facts)
                scale["rows"][label] = {
                    "bins": [{"count": score.count, "mean": score.mean} for score in summary.scores],
                    "macro": summary.macro,
                    "micro": summary.micro,
                    "outside": summary.outside,
                    "instances": len(kept),
                }


def bins_for(kind: str, size: int) -> list[str]:
    """Those of the suite's size first, the published ones; then coarser or older ones."""
    if kind == "text":
        return [name for name in (f"text-{size}-v1", "text-coarse-v1") if name in BINS]
    size = size or 1024
    return [name for name in (f"face-{size}-v2", f"face-{size}-v1") if name in BINS] or ["face-256-v1"]


def mean_cell(values: np.ndarray, seed: int = 0) -> Cell:
    """The mean of n numbers and its interval by bootstrap; n is of any size, memory is that of the numbers."""
    n = len(values)
    low = high = None
    if n > 1 and np.isfinite(values).all():
        draw = np.random.default_rng(seed)
        means = [values[draw.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
        low, high = (float(value) for value in np.quantile(means, [0.025, 0.975]))
    return {"value": float(values.mean()), "low": low, "high": high, "n": n}


def decibels(errors: np.ndarray) -> np.ndarray:
    """PSNR of mean squared errors; exact pictures count as 100 dB, unless all are exact."""
    with np.errstate(divide="ignore"):
        values = -10 * np.log10(errors)
    return values if not errors.any() else np.minimum(values, PSNR_CAP)


def _number(value: float) -> float | str:
    return "inf" if value == math.inf else value


def _pictures(rows: Sequence[Row]) -> dict[str, Cell]:
    """Means over pictures of all that the judge wrote down of each."""
    if not rows:
        return {}
    errors = np.array([row["mse"] for row in rows])
    psnr = mean_cell(decibels(errors))
    pooled = decibels(errors.mean(keepdims=True))[0]
    found = {
        "psnr": psnr | {"value": _number(psnr["value"])},
        "psnr_pooled": {"value": _number(pooled), "n": len(rows)},
    }
    # A number that some pictures lack (too small for the window) would be of other pictures than the rest.
    numbers = [key for key, value in rows[0].items() if isinstance(value, float) and key not in _NOT_METRICS]
    for key in numbers:
        values = [row.get(key) for row in rows]
        if all(isinstance(value, (int, float)) for value in values):
            found[key] = mean_cell(np.array(values, dtype=np.float64))
    if energy := sum(row.get("energy_original") or 0.0 for row in rows):
        found["sharpness"] = {"value": sum(row["energy"] for row in rows) / energy, "n": len(rows)}
    return found


_NOT_METRICS = {"mse", "psnr", "bits", "bpp", "encode_ms", "decode_ms", "energy", "energy_original"}


def _costs(rows: Sequence[Row], description: Mapping[str, Any], folder: Path) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for key in ("bytes", "bpp", "bits", "encode_ms", "decode_ms"):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            found[key] = {"value": float(np.mean(values)), "n": len(values)}
    for key in ("tokens", "decode_passes", "parameters", "licence"):
        if description.get(key) is not None:
            found[key] = {"value": description[key]}
    if ids := ids_array(description):
        from torch import from_numpy

        from tokenizers_vis.eval.metrics import CodebookUsage

        usage = CodebookUsage(tuple(description["codebook_sizes"]))
        stored = Stored(folder, "ids", ids)
        for numbers in _chunks(stored.numbers):
            batch = stored.at(numbers)
            usage.update(from_numpy(batch).reshape(len(batch), description["tokens"], -1))
        books = usage.compute()
        counted = f"of {books[0].tokens} ids"
        found["used"] = {"value": min(book.used for book in books), "n": books[0].tokens, "note": counted}
        entropy = sum(book.entropy for book in books)
        found["entropy"] = {"value": entropy, "n": books[0].tokens, "note": counted}
    return found


def _set_distances(
    folder: Path, originals: Path, net: Any, names: Mapping[int, str], stamp: Stamp, samples: int
) -> dict[str, Cell]:
    """Of the features that are kept; computed once for a stamp."""
    from torch import from_numpy

    from tokenizers_vis.eval.journal import Array
    from tokenizers_vis.eval.set_distance import SetDistance, SmallSampleWarning

    if len(names) < 2:
        return {}
    path = folder / f"sets-{net.name}-{samples}-{stamp.key()[:16]}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    gathered = SetDistance(net)
    before, after = (Stored(where, net.name, Array(net.dim)) for where in (originals, folder))
    for numbers in _chunks(sorted(names)):
        gathered.update(from_numpy(before.at(numbers)), from_numpy(after.at(numbers)), [names[i] for i in numbers])
    statistics = originals / f"moments-{net.name}-{stamp.key()[:16]}.npz"
    if not statistics.is_file():
        replace(gathered.moments()[0], stamp=stamp).save(statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallSampleWarning)  # it is the note of the cell
        found = {name: dict(measured._asdict()) for name, measured in gathered.compute(samples=samples).items()}
    write_atomically(path, json.dumps(finite(found)).encode())
    return found


def _summary_cells(summary: Summary) -> tuple[Cell, Cell]:
    cells = []
    for value, interval in ((summary.macro, summary.macro_interval), (summary.micro, summary.micro_interval)):
        ends = {"low": interval.low, "high": interval.high} if interval else {"low": None, "high": None}
        cells.append({"value": value, **ends, "n": summary.count})
    return cells[0], cells[1]


def _examples(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """What is kept to be shown, worst pictures first, each with what is said of it."""
    by_number = {row["i"]: row for row in rows}
    found = []
    for path in (folder / FOLDER).glob("*.png"):
        i, _, index = path.stem.partition("-")
        if (row := by_number.get(int(i))) is None:
            continue
        one: Row = {"file": path.name, "image": row["image"], "bytes": row["bytes"], "mse": row["mse"]}
        one["psnr"] = _number(float(decibels(np.array([row["mse"]]))[0]))
        if index:
            one["instance"] = row["instances"][int(index)]
        found.append(one)
    return sorted(found, key=lambda one: (one.get("instance", {}).get("scale", 0), -one["mse"], one["file"]))


def _chunks(numbers: Sequence[int]) -> Iterable[Sequence[int]]:
    return (numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK))
