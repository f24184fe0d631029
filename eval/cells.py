"""The cells of a benchmark's tables, from rows on the disk: means with intervals, costs, distances between sets."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_vis.eval.benchmark import ids_array
from tokenizers_vis.eval.bins import Summary
from tokenizers_vis.eval.columns import Cell
from tokenizers_vis.eval.features import FeatureNet
from tokenizers_vis.eval.journal import Row, Stored, finite
from tokenizers_vis.eval.protocol import Stamp
from tokenizers_vis.files import write_atomically

PSNR_CAP = 100.0  # dB, of a picture that comes back exactly, in a mean with others that do not
RESAMPLES = 1000
_CHUNK = 1024


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


def psnr_of(error: float) -> float | str:
    """Of one mean squared error, as a cell has it."""
    return _number(float(decibels(np.array([error]))[0]))


def _number(value: float) -> float | str:
    return "inf" if value == math.inf else value


def picture_cells(rows: Sequence[Row]) -> dict[str, Cell]:
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


_NOT_METRICS = {"mse", "psnr", "bits", "bpp", "encode_ms", "decode_ms", "peak_mb", "energy", "energy_original"}


def cost_cells(rows: Sequence[Row], description: Mapping[str, Any], folder: Path) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    # The first batch of a net is slow, and takes memory that later ones find ready: hence the median, and the largest.
    kinds = {"bytes": np.mean, "bpp": np.mean, "bits": np.mean, "encode_ms": np.median, "decode_ms": np.median}
    for key, one_of in {**kinds, "peak_mb": np.max}.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            found[key] = {"value": float(one_of(values)), "n": len(values)}
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


def set_cells(
    folder: Path, originals: Path, net: FeatureNet, names: Mapping[int, str], stamp: Stamp, samples: int
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


def summary_cells(summary: Summary) -> tuple[Cell, Cell]:
    cells = []
    for value, interval in ((summary.macro, summary.macro_interval), (summary.micro, summary.micro_interval)):
        ends = {"low": interval.low, "high": interval.high} if interval else {"low": None, "high": None}
        cells.append({"value": value, **ends, "n": summary.count})
    return cells[0], cells[1]


def _chunks(numbers: Sequence[int]) -> Iterable[Sequence[int]]:
    return (numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK))
