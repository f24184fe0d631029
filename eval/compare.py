"""Two reports side by side: for each method that both have, what changed, where both measured in the same way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizers_vis.eval.protocol import Stamp, StampError
from tokenizers_vis.eval.report import RESULTS
from tokenizers_vis.eval.tables import written

_RESAMPLES = 1000


class Change(NamedTuple):
    """One number in both reports. low, high: of the difference, at 95 %, by bootstrap over pictures; None without."""

    suite: str
    method: str
    title: str
    digits: int
    before: float
    after: float
    low: float | None
    high: float | None


class Comparison(NamedTuple):
    """refused: a line for each column that the two measured in different ways."""

    changes: list[Change]
    refused: list[str]

    def __str__(self) -> str:
        """Markdown; a difference that its interval parts from 0 is marked."""
        heads = ["suite", "method", "metric", "first", "second", "difference", "95 %"]
        lines = [heads, ["---"] * 3 + ["---:"] * 4]
        for one in self.changes:
            digits = one.digits
            span, mark = "", ""
            if one.low is not None and one.high is not None:
                span = f"{one.low:+.{digits}f} to {one.high:+.{digits}f}"
                mark = " *" if one.low > 0 or one.high < 0 else ""
            numbers = [written(one.before, digits), written(one.after, digits)]
            difference = f"{one.after - one.before:+,.{digits}f}{mark}"
            lines.append([one.suite, f"`{one.method}`", one.title, *numbers, difference, span])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Folders of reports, or their results.json.

    Raises ``ValueError`` for what is no report, for two that share no method on a suite, and ``StampError`` that names
    the differences when no column of theirs was measured in the same way.
    """
    (one, one_at), (two, two_at) = _read(first), _read(second)
    changes: list[Change] = []
    refused: list[str] = []
    shared = 0
    for suite in one["suites"]:
        other = next((found for found in two["suites"] if found["name"] == suite["name"]), None)
        if other is None:
            continue
        theirs = {row["label"]: row for row in other["rows"]}
        common = [row for row in suite["rows"] if row["label"] in theirs]
        shared += len(common)
        for column in suite["columns"] if common else []:
            same = next((found for found in other["columns"] if found["key"] == column["key"]), None)
            # How long it took is the machine's, not in the stamp; what a stored picture costs is the method's.
            if same is None or not column["better"] or (column["group"] == "cost" and column["key"] != "bytes"):
                continue
            difference = Stamp.from_dict(column["stamp"]).difference(Stamp.from_dict(same["stamp"]))
            if difference:
                refused.append(f"{suite['name']}, {column['title']}: {difference}")
                continue
            for row in common:
                cells = (row["cells"].get(column["key"]), theirs[row["label"]]["cells"].get(column["key"]))
                values = [cell and cell.get("value") for cell in cells]
                if all(isinstance(value, (int, float)) for value in values):
                    pairs = list(_pairs(one_at, two_at, suite["name"], row["label"], column["key"]))
                    changes.append(
                        Change(suite["name"], row["label"], column["title"], column["digits"], *values, *_span(pairs))
                    )
    if not shared:
        raise ValueError(
            f"{first} and {second} have no method in common on the same suite: there is nothing to compare"
        )
    if refused and not changes:
        raise StampError(f"{first} and {second} were measured in different ways: {refused[0]}")
    return Comparison(changes, refused)


def _read(path: str | Path) -> tuple[dict[str, Any], Path]:
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no report {path}; give a folder that tokenizers-vis eval wrote, or its {RESULTS}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no report: {error}") from error
    if not isinstance(results, dict) or results.get("format") != 1 or "suites" not in results:
        raise ValueError(f"{path} is no report of this program (format 1)")
    return results, path.parent


def _pairs(one: Path, two: Path, suite: str, label: str, key: str) -> Iterator[tuple[float, float]]:
    """The two numbers of each picture, where the column is a mean of such and the rows are at hand."""
    first, second = (_rows(folder, suite, label, key) for folder in (one, two))
    for picture in sorted(set(first) & set(second)):
        yield first[picture], second[picture]


def _rows(folder: Path, suite: str, label: str, key: str) -> Mapping[str, float]:
    path = folder / "images.jsonl"
    if not path.is_file():
        return {}
    found = {}
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["suite"] == suite and row["method"] == label and isinstance(row.get(key), (int, float)):
                found[row["image"]] = row[key]
    return found


def _span(pairs: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    if len(pairs) < 2:
        return None, None
    differences = np.array([after - before for before, after in pairs])
    draw = np.random.default_rng(0)
    n = len(differences)
    means = [differences[draw.integers(n, size=n)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
