"""Scores by scale: versioned bins, the mean of their means (macro), the mean of all (micro), intervals by bootstrap.

The scale of a word or face is relative to its picture: see ``eval.text`` and ``eval.face``. Bins are data with a name,
for two tables are comparable only when their bins are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenizers_vis.config import did_you_mean

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Bins:
    """edges: ascending; bin i holds edges[i] <= scale < edges[i + 1]. source: who uses them."""

    name: str
    edges: tuple[float, ...]
    source: str

    def index(self, scale: float) -> int | None:
        """The bin of a scale, or None for one below the first or not below the last edge."""
        if not self.edges[0] <= scale < self.edges[-1]:
            return None
        return int(np.searchsorted(self.edges, scale, side="right")) - 1

    @property
    def spans(self) -> list[tuple[float, float]]:
        """From and below, of each bin."""
        return list(zip(self.edges[:-1], self.edges[1:], strict=True))


_FIRST = "TokBench, compute_all_metrics.py at commit a77070c (2025-05)"
_LATER = "TokBench, compute_all_metrics.py later in 2025; the published leaderboard has these"
_COARSE = "ours: for tokenizers that leave only large letters legible"
_TABLE = (
    ("text-256-v1", (0.02, 0.03, 0.04, 1), _FIRST),
    ("text-512-v1", (0.01, 0.02, 0.03, 1), _FIRST),
    ("text-1024-v1", (0.005, 0.01, 0.02, 1), _FIRST),
    ("text-coarse-v1", (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 1), _COARSE),
    ("face-256-v1", (0, 0.1, 0.2, 1), _FIRST),
    ("face-512-v1", (0, 0.05, 0.2, 1), _FIRST),
    ("face-1024-v1", (0, 0.05, 0.1, 1), _FIRST),
    ("face-256-v2", (0.1, 0.2, 0.3, 1), _LATER),
    ("face-512-v2", (0.05, 0.1, 0.2, 1), _LATER),
    ("face-1024-v2", (0.02, 0.05, 0.1, 1), _LATER),
)
BINS = {name: Bins(name, tuple(map(float, edges)), source) for name, edges, source in _TABLE}


def find_bins(name: str) -> Bins:
    """Bins by name. Raises ``ValueError`` that lists the names."""
    if name not in BINS:
        raise ValueError(f"there are no bins {name!r}.{did_you_mean(name, BINS)} There are: {', '.join(BINS)}")
    return BINS[name]


@dataclass(frozen=True)
class Interval:
    """Of a mean, at 95 %."""

    low: float
    high: float


@dataclass(frozen=True)
class BinScore:
    """One bin: from (included) to (excluded), how many instances it has, and their mean, None without any."""

    start: float
    stop: float
    count: int
    mean: float | None


@dataclass(frozen=True)
class Summary:
    """A score over a set of instances.

    macro: the mean of the means of the bins that are not empty; None when all are. TokBench's "mean".
    filled: how many bins went into macro. Compare it only with a macro of the same bins, all filled or the same ones.
    micro: the mean of all instances, also of those outside of the bins; None without any.
    outside: how many are in no bin.
    intervals: by bootstrap over pictures (the words of one picture are not independent); None with fewer than two.
        That of macro is over the draws that fill the same bins.
    """

    bins: Bins
    scores: tuple[BinScore, ...]
    macro: float | None
    filled: int
    micro: float | None
    count: int
    pictures: int
    outside: int
    macro_interval: Interval | None
    micro_interval: Interval | None


def summarise(
    rows: Sequence[Mapping[str, Any]],
    score: str,
    bins: str | Bins,
    *,
    picture: str = "file",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Summary:
    """Rows of instances -> their means.

    rows: each with ``scale``, the score under its name, and the picture it is of.
    seed: of the bootstrap; the same rows in any order and the same seed give the same intervals.

    Raises ``ValueError`` for rows without the score, a score that is not a finite number, or unknown bins.
    """
    bins = find_bins(bins) if isinstance(bins, str) else bins
    for index, row in enumerate(rows):
        missing = [key for key in (score, "scale", picture) if key not in row]
        if missing:
            raise ValueError(f"row {index} has no {missing[0]!r}; it has: {', '.join(row)}")
        if not np.isfinite(row[score]) or not np.isfinite(row["scale"]):
            raise ValueError(
                f"row {index}, of {row[picture]}, has {score} {row[score]} and scale {row['scale']}; both are finite"
            )
    names = sorted({str(row[picture]) for row in rows})
    where = {name: i for i, name in enumerate(names)}
    k = len(bins.spans)
    # Column j < k: bin j. Column k: outside of all. Rows sorted, so that sums do not hang on the order given.
    sums, counts = np.zeros((len(names), k + 1)), np.zeros((len(names), k + 1))
    for row in sorted(rows, key=lambda row: (str(row[picture]), float(row["scale"]), float(row[score]))):
        j = bins.index(row["scale"])
        i = where[str(row[picture])]
        sums[i, k if j is None else j] += row[score]
        counts[i, k if j is None else j] += 1
    total, number = sums.sum(axis=0), counts.sum(axis=0)
    macro, micro = _means(total[None], number[None])
    intervals: list[Interval | None] = [None, None]
    if len(names) > 1:
        drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
        macros, micros = _means(drawn @ sums, drawn @ counts)
        same = ((drawn @ counts > 0) == (number > 0))[:, :k].all(axis=1)
        intervals = [_interval(macros[same]), _interval(micros)]
    return Summary(
        bins=bins,
        scores=tuple(
            BinScore(start, stop, int(n), float(s / n) if n else None)
            for (start, stop), s, n in zip(bins.spans, total, number, strict=False)
        ),
        macro=None if np.isnan(macro[0]) else float(macro[0]),
        filled=int((number[:k] > 0).sum()),
        micro=None if np.isnan(micro[0]) else float(micro[0]),
        count=len(rows),
        pictures=len(names),
        outside=int(number[k]),
        macro_interval=intervals[0],
        micro_interval=intervals[1],
    )


def _means(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sums, counts: r k + 1, the last column outside of the bins -> macro and micro, each r; nan where none is."""
    filled = counts[:, :-1] > 0
    means = np.divide(sums[:, :-1], counts[:, :-1], out=np.zeros_like(sums[:, :-1]), where=filled)
    any_filled, n = filled.sum(axis=1), counts.sum(axis=1)
    nothing = np.full(len(sums), np.nan)
    macro = np.divide(means.sum(axis=1), any_filled, out=nothing.copy(), where=any_filled > 0)
    return macro, np.divide(sums.sum(axis=1), n, out=nothing, where=n > 0)


def _interval(values: np.ndarray) -> Interval | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))
