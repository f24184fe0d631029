"""From rows to tables: what ``results.json`` holds. Nothing is measured here but distances between sets of features.

Every column carries the stamp under which it was measured. What is in a cell says ``columns``, how it is found,
``cells``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers_vis.eval.benchmark import ORIGINALS, Task, folder_of
from tokenizers_vis.eval.bins import BINS
from tokenizers_vis.eval.cells import cost_cells, picture_cells, psnr_of, set_cells, summary_cells
from tokenizers_vis.eval.columns import COST, QUALITY, TOKENS, Cell, Column, pair_column, set_column
from tokenizers_vis.eval.examples import FOLDER
from tokenizers_vis.eval.journal import Row, finite, read_rows
from tokenizers_vis.eval.judges import MS_SSIM_SIDE, SSIM_SIDE, BoxJudge, PictureJudge
from tokenizers_vis.eval.perturbation import Grid
from tokenizers_vis.eval.perturbed import metric_of, perturbed_scores, stamp_of
from tokenizers_vis.eval.protocol import ContentHash, Stamp, refuse_mixture
from tokenizers_vis.eval.set_distance import out_of_reach
from tokenizers_vis.eval.suites import Boxed
from tokenizers_vis.eval.token_study import cells_of

FORMAT = 1
Studies = Mapping[str, Mapping[str, Any]]  # of a suite: label -> what ``TokenStudy.of`` found


def summarise(
    descriptions: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    out: Path,
    *,
    refined: bool = False,
    samples: int = 100,
    studies: Mapping[str, Studies] | None = None,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """The tables of a finished benchmark, as plain values.

    descriptions: of the methods, in the order of rows. refined: text only of words that the recogniser reads on the
    original. samples: of the bootstrap of set distances; 0 is none. studies: of tokens, by the name of the suite.
    grid: of what ``perturbed.perturb`` decoded; None is nothing.

    Raises ``StampError`` when methods were measured on different pictures.
    """
    labels = [description["label"] for description in descriptions]
    suites = []
    for task in tasks:
        of_tokens = (studies or {}).get(task.suite.name, {})
        table = _Table(task, out, {one["label"]: one for one in descriptions}, of_tokens, grid)
        for label in labels:
            table.add(label, samples, refined)
        suites.append(table.finished())
    return finite({"format": FORMAT, "methods": list(descriptions), "suites": suites})


class _Table:
    """One suite: a row for each method."""

    def __init__(
        self, task: Task, out: Path, descriptions: Mapping[str, Mapping[str, Any]], studies: Studies, grid: Grid | None
    ) -> None:
        self.task, self.suite, self.judge = task, task.suite, task.judge
        self.out, self.descriptions, self.studies, self.grid = out, descriptions, studies, grid
        rows = list(read_rows(folder_of(out, self.suite.name, ORIGINALS)))
        self.hashes = {row["i"]: row["hash"] for row in rows if "error" not in row}
        self.sizes = [(row["width"], row["height"]) for row in rows if "error" not in row]
        self.broken = {row["image"]: row["error"] for row in rows if "error" in row and row["i"] not in self.hashes}
        self.columns: dict[str, Column] = {}
        self.stamps: dict[str, dict[str, Stamp]] = {}
        self.rows: list[Row] = []
        self.tokens: list[Row] = []
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
        found, known = picture_cells(ordered), {column.key for column in QUALITY}
        self._take(label, cells, QUALITY, {key: found.pop(key) for key in list(found) if key in known}, stamp)
        if isinstance(self.judge, PictureJudge):
            self._by_nets(label, cells, ordered, found, stamp, samples)
        elif isinstance(self.judge, BoxJudge):
            instances = [one for row in ordered for one in row["instances"]]
            self._by_scale(label, cells, instances, stamp, refined)
        self._take(label, cells, COST, cost_cells(ordered, self.descriptions[label], folder), stamp)
        kind = self.descriptions[label]["kind"]
        self.rows.append({"label": label, "kind": kind, "cells": cells, "examples": _examples(folder, ordered)})

    def finished(self) -> dict[str, Any]:
        for key, stamps in self.stamps.items():
            refuse_mixture(f"{key} on {self.suite.name}", stamps)
        # The rate first; then what the suite is for, which for text and faces is not the error of pixels.
        scores = [] if self.suite.kind == "photos" else [key for key in self.columns if "[" in key]
        order = ["bytes", *scores, *(column.key for column in QUALITY), *self.columns, *(column.key for column in COST)]
        groups = ("quality", "sets", "cost", "tokens")
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
            "tokens": self.tokens,
            "remarks": self._remarks(),
        }

    def _remarks(self) -> list[str]:
        """What is not in the table though it might be, and what became of boxes."""
        if isinstance(self.suite, Boxed):
            return self.suite.remarks()
        assert isinstance(self.judge, PictureJudge)
        least = {"ssim": ("SSIM", SSIM_SIDE), "ms_ssim": ("MS-SSIM", MS_SSIM_SIDE)}
        least |= {one.name: (one.name, one.least) for one in self.judge.distances if not one.size}
        found = []
        for key, (name, side) in least.items():
            small = sum(min(size) < side for size in self.sizes)
            if key not in self.columns and small:
                found.append(f"no {name}: it takes {side} pixels, and {small} of {len(self.sizes)} pictures have fewer")
        for net in self.judge.nets.values():
            found += out_of_reach(len(self.hashes), net)
        return list(dict.fromkeys(found))

    def _take(
        self, label: str, cells: dict[str, Cell], columns: Iterable[Column], found: Mapping[str, Cell], stamp: Stamp
    ) -> None:
        for column in columns:
            if column.key in found:
                self.columns.setdefault(column.key, column)
                self.stamps.setdefault(column.key, {})[label] = stamp
                cells[column.key] = found[column.key]

    def _by_nets(
        self,
        label: str,
        cells: dict[str, Cell],
        rows: Sequence[Row],
        of_pairs: Mapping[str, Cell],
        stamp: Stamp,
        samples: int,
    ) -> None:
        """What nets say of photographs: pairs, sets, and tokens."""
        assert isinstance(self.judge, PictureJudge)
        folder, originals = (folder_of(self.out, self.suite.name, name) for name in (label, ORIGINALS))
        names = {row["i"]: row["image"] for row in rows}
        for distance in self.judge.distances:
            of_net = replace(stamp, features=distance.name, feature_hash=distance.sha256)
            self._take(label, cells, [pair_column(distance.name)], of_pairs, of_net)
        for net in self.judge.nets.values():
            of_net = replace(stamp, features=net.name, feature_hash=net.sha256, extra={"resize": net.resize})
            self._take(label, cells, [pair_column(net.metric("cosine"))], of_pairs, of_net)
            found = set_cells(folder, originals, net, names, of_net, samples)
            self._take(label, cells, [set_column(key, net.name) for key in found], found, of_net)
        if (study := self.studies.get(label)) is None:
            return
        self._take(label, cells, TOKENS, cells_of(study), stamp)
        self.tokens.append({"label": label, **study})
        if self.grid and self.judge.nets:
            found = perturbed_scores(label, self.task, self.out, self.grid, names, stamp)
            self.tokens[-1]["perturbed"] = found
            for net in self.judge.nets.values():
                key = metric_of(net)
                cell: Cell = {"value": found.get("means", {}).get(key), "n": len(names), "note": _perturbed_said(found)}
                of_net = stamp_of(self.grid, stamp, net)
                self._take(label, cells, [set_column(key, net.name)], {key: cell}, of_net)

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
                    macro, micro = summary_cells(summary)
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


def _examples(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """What is kept to be shown, worst pictures first, each with what is said of it."""
    by_number = {row["i"]: row for row in rows}
    found = []
    for path in (folder / FOLDER).glob("*.png"):
        i, _, index = path.stem.partition("-")
        if (row := by_number.get(int(i))) is None:
            continue
        one: Row = {"file": path.name, "image": row["image"], "bytes": row["bytes"], "mse": row["mse"]}
        one["psnr"] = psnr_of(row["mse"])
        if index:
            one["instance"] = row["instances"][int(index)]
        found.append(one)
    return sorted(found, key=lambda one: (one.get("instance", {}).get("scale", 0), -one["mse"], one["file"]))


def _perturbed_said(found: Mapping[str, Any]) -> str:
    return found.get("reason") or f"nearest by {', '.join(dict.fromkeys(found['neighbourhoods']))}"
