"""Images in a data set of Hugging Face's ``datasets``: https://huggingface.co/docs/datasets"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from tokenizers_vis.sources import ImageSource, Part, is_saved_dataset


class _Numbered(Sequence[str]):
    """``split/00000007``: names that take no memory, however many there are."""

    def __init__(self, split: str, count: int) -> None:
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        chosen = range(self.count)[i]
        return f"{self.split}/{chosen:08d}" if isinstance(chosen, int) else [f"{self.split}/{j:08d}" for j in chosen]


class DatasetSource(ImageSource):
    """Rows of a ``datasets.Dataset``; see ``ImageSource``. The image files' own bytes, not decoded.

    split: the first part of every name. The column of images is the first of type ``Image``; classes are the column
    ``label``, or the first of type ``ClassLabel``.

    Raises ``ValueError`` for a data set without images.
    """

    def __init__(self, dataset: Any, split: str) -> None:
        from datasets import ClassLabel, Image

        features = dataset.features
        column = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
        if column is None or not len(dataset):
            columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
            raise ValueError(
                f"the data set has {len(dataset)} rows of {columns or 'no columns'}: a column of type datasets.Image "
                "is needed; cast one with dataset.cast_column(NAME, datasets.Image()) and save it to disk"
            )
        named = next((name for name, feature in features.items() if isinstance(feature, ClassLabel)), None)
        self._label = "label" if "label" in features else named
        kind = features.get(self._label)
        self.classes = tuple(kind.names) if isinstance(kind, ClassLabel) else ()
        self._column, self._split = column, split
        # The library's own hash of where the rows come from and what was done to them; there is no public name for it.
        self._origin = dataset._fingerprint
        self._images = dataset.select_columns([column]).cast_column(column, Image(decode=False))
        self._labels = dataset.select_columns([self._label]) if self._label else None
        self.names = _Numbered(split, len(dataset))
        self.fingerprint = self._fingerprint(0, len(dataset))

    def _fingerprint(self, start: int, stop: int) -> str:
        return hashlib.sha256(f"{self._origin}/{self._split}/{start}/{stop}".encode()).hexdigest()[:16]

    def read(self, i: int) -> bytes:
        found = self._images[i][self._column] or {}
        if found.get("bytes") is not None:
            return found["bytes"]
        if not found.get("path"):
            raise OSError(f"{self.names[i]}: the row holds no image")
        return Path(found["path"]).read_bytes()

    def parts(self, size: int) -> list[Part]:
        edges = [*range(0, len(self), size), len(self)]
        pairs = enumerate(zip(edges, edges[1:], strict=False))
        return [Part(f"{self._split}-{n:05d}", a, b, self._fingerprint(a, b)) for n, (a, b) in pairs]

    def labels(self, start: int, stop: int) -> list[int | str | None]:
        if self._labels is None:
            return [None] * (stop - start)
        values = self._labels[start:stop][self._label]
        if any(not isinstance(value, (int, str, type(None))) for value in values):
            raise ValueError(
                f"the column {self._label} holds {type(values[0]).__name__}; a label is a whole number or a name"
            )
        return [None if value == -1 else value for value in values]  # -1 is how the library writes "not known"


def open_dataset(spec: str) -> DatasetSource:
    """spec: NAME or NAME:SPLIT, NAME on the Hub (downloaded once into the library's cache) or a folder saved to disk.

    Raises ``ValueError`` when ``datasets`` is not installed, or there is no such data set or split.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"hf:{spec} needs {error.name}: pip install 'tokenizers-vis[data]'") from error
    # A drive's colon is none before a split.
    whole = os.path.isdir(spec) or not (match := re.fullmatch(r"((?:[A-Za-z]:[\\/])?[^:]+):(.+)", spec))
    name, split = (spec, "") if whole else match.groups()
    try:
        if is_saved_dataset(name):
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                split = split or "train"
                if split not in found:
                    raise ValueError(f"its splits are {', '.join(found)}, not {split!r}; say one with hf:{name}:SPLIT")
                found = found[split]
            elif split:
                raise ValueError(f"the folder is a single split; leave out :{split}")
        else:
            found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # offline, no such data set or split, a damaged cache: the library raises many kinds
        raise ValueError(
            f"hf:{spec} cannot be opened: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    return DatasetSource(found, re.sub(r"[^\w.+-]", "_", split or str(found.split or "train")))
