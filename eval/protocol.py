"""Under which conditions a number was measured. Numbers of different stamps do not stand in one column.

Published rFIDs of one checkpoint differ by a factor of 2 because crops, resizes and references differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np


class StampError(ValueError):
    """Numbers that were measured in different ways and are to be compared all the same."""


@dataclass(frozen=True)
class Stamp:
    """The protocol of a number.

    dataset: hash of the originals, such as ``ContentHash.hexdigest()`` or the fingerprint of a source.
    n: how many originals were used.
    size: of the compared pictures, "256" or "native".
    crop: "center", "none", ...
    resize: how the originals came to that size, "bicubic, antialiased", "none", ...
    quantise: what was done to float pictures, "round to 8 bit", ...
    features: name of the net whose features are compared; "" where there is none.
    feature_hash: sha256 of its weights; "" where there is none.
    extra: anything else that changes the number, such as {"bins": "2025-09", "ddof": 1}; order does not count.
    """

    dataset: str
    n: int
    size: str = "native"
    crop: str = "none"
    resize: str = "none"
    quantise: str = "round to 8 bit"
    features: str = ""
    feature_hash: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def difference(self, other: Stamp) -> str:
        """What differs, such as "n: 100 against 200; crop: center against none"; "" when nothing does."""
        mine, theirs = ({**stamp.to_dict(), "extra": None, **_extra(stamp)} for stamp in (self, other))
        keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        return "; ".join(f"{key}: {_said(mine, key)} against {_said(theirs, key)}" for key in keys)

    def key(self) -> str:
        """32 hex digits, the same for equal stamps: a name for files of what was measured under it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "extra": json.loads(json.dumps(dict(self.extra), sort_keys=True))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stamp:
        """The inverse of ``to_dict``. Raises ``StampError`` for unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        if not {"dataset", "n"} <= set(values) <= known:
            raise StampError(f"a stamp has dataset, n and of {', '.join(sorted(known))}; got {', '.join(values)}")
        return cls(**values)


def refuse_mixture(column: str, stamps: Mapping[str, Stamp]) -> None:
    """Raises ``StampError`` that names the difference, when rows of a column were measured under different stamps.

    stamps: the stamp of each row, by the row's label.
    """
    rows = list(stamps.items())
    for label, stamp in rows[1:]:
        if difference := rows[0][1].difference(stamp):
            raise StampError(
                f"{column} of {rows[0][0]} and of {label} were measured in different ways and cannot stand in one "
                f"column: {difference}. Measure both in the same way, or make two tables"
            )


class ContentHash:
    """A hash of a set of pictures by their pixels, the same in whichever order and batches they come.

    The sum of the sha256 of all pictures: parts that were hashed apart, on several machines say, can be merged.
    """

    def __init__(self, state: str = "0") -> None:
        """state: hex digits from another one's ``hexdigest()``, to go on from there."""
        self._sum = int(state, 16)

    def update(self, pixels: np.ndarray) -> None:
        """pixels: one picture, uint8 h w 3."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3:
            raise ValueError(f"a picture is uint8 h w 3, got {pixels.dtype} {pixels.shape}")
        digest = hashlib.sha256(f"{pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels))
        self.merge(digest.hexdigest())

    def merge(self, state: str) -> None:
        """Adds what another one has seen: its ``hexdigest()``."""
        self._sum = (self._sum + int(state, 16)) % 2**256

    def hexdigest(self) -> str:
        """64 hex digits."""
        return f"{self._sum:064x}"


def _extra(stamp: Stamp) -> dict[str, Any]:
    return {f"extra.{key}": value for key, value in stamp.to_dict()["extra"].items()}


def _said(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return "nothing" if value in (None, "") else str(value)
