"""The finished rows of a benchmark on disk: appended as they come, whole after a kill at any moment.

One journal is what one process found with one method on one suite: ``NAME.jsonl``, a line per image, and beside it what
is too large for JSON, such as features or ids: ``NAME.ARRAY``, n d numbers, row after row. Arrays are on the disk
before the line that counts them is, so a line that is whole has its numbers. Journals of several processes lie side by
side in one folder; their union is the result.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

Row = dict[str, Any]
PLACE = "at"  # the key of a row that says which row of its journal's arrays is its own


class Array(NamedTuple):
    """Width and type of the rows of an array: "<f4" for features, "<i8" for ids."""

    dim: int
    dtype: str = "<f4"

    @property
    def row_bytes(self) -> int:
        return self.dim * np.dtype(self.dtype).itemsize


class Journal:
    """Appends rows to one journal. A context manager; a second one on the same file is a ``ValueError``.

    path: the .jsonl file; it and its folder are made. arrays: what each row has besides, by name.

    What a kill left half-written is cut off on opening.
    """

    def __init__(self, path: Path, arrays: Mapping[str, Array]) -> None:
        self.path, self.arrays = path, dict(arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = _open(path)
        self._files = {name: _open(_array_of(path, name)) for name in arrays}
        try:
            _lock(self._rows, path)
            self._count = self._recover()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, rows: Sequence[Row], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """rows: JSON values; a float that is not finite becomes null. arrays: each b d; all of them, or none.

        They are on the disk when this returns.
        """
        if arrays:
            for name, file in self._files.items():
                values = np.ascontiguousarray(arrays[name], dtype=self.arrays[name].dtype)
                if values.shape != (len(rows), self.arrays[name].dim):
                    raise ValueError(f"{name} is {(len(rows), self.arrays[name].dim)} here, got {values.shape}")
                file.write(values.tobytes())
                _sync(file)
            rows = [{**row, PLACE: self._count + k} for k, row in enumerate(rows)]
            self._count += len(rows)
        lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows]
        self._rows.write("".join(lines).encode())
        _sync(self._rows)

    def close(self) -> None:
        for file in (self._rows, *self._files.values()):
            file.close()

    def _recover(self) -> int:
        """Cuts off what is not whole, and gives the number of rows of the arrays."""
        held = [os.fstat(f.fileno()).st_size // self.arrays[name].row_bytes for name, f in self._files.items()]
        end, count = 0, 0
        self._rows.seek(0)
        for line in self._rows:
            row = _parse(line)
            if row is None or row.get(PLACE, -1) >= min(held, default=math.inf):
                break
            end += len(line)
            count += PLACE in row
        self._rows.truncate(end)
        self._rows.seek(end)
        for name, file in self._files.items():
            file.truncate(count * self.arrays[name].row_bytes)
            file.seek(0, os.SEEK_END)
        return count


def read_rows(folder: Path) -> Iterator[Row]:
    """The whole rows of all journals in a folder, journal by journal; nothing for a folder that is not there."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from _rows_of(path)


class Stored:
    """An array over all journals of a folder, n d, read from the disk as it is used: ``at(numbers)``, ``numbers``.

    Its rows are known by the value that the JSON rows have under ``key``, so that it does not matter how many processes
    wrote them. What is appended after this is made is not seen.
    """

    def __init__(self, folder: Path, name: str, array: Array, key: str = "i") -> None:
        self.dim = array.dim
        self._dtype = np.dtype(array.dtype)
        self._files: list[np.ndarray] = []
        self._places: dict[Any, tuple[int, int]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            rows = {row[key]: row[PLACE] for row in _rows_of(path) if PLACE in row}
            if rows:
                size = (max(rows.values()) + 1, array.dim)
                self._places |= {value: (len(self._files), place) for value, place in rows.items()}
                self._files.append(np.memmap(_array_of(path, name), dtype=array.dtype, mode="r", shape=size))

    @property
    def numbers(self) -> list[Any]:
        """Of all rows, ascending."""
        return sorted(self._places)

    def at(self, numbers: Sequence[Any]) -> np.ndarray:
        """len(numbers) d. Raises ``KeyError`` for one that is not there."""
        found = np.empty((len(numbers), self.dim), dtype=self._dtype)
        for k, number in enumerate(numbers):
            file, place = self._places[number]
            found[k] = self._files[file][place]
        return found


def finite(value: Any) -> Any:
    """The value with null in place of every float that is not finite: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _rows_of(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is None:
                return
            yield row


def _parse(line: bytes) -> Row | None:
    """The row of a whole line; None for a part of one."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _array_of(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}.{name}")


def _open(path: Path) -> IO[bytes]:
    path.touch()
    return path.open("rb+")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lock(file: IO[bytes], path: Path) -> None:
    """Until the file is closed or the process ends. Where the system has no such locks, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"{path} is being written by another process: wait for it, or give each process a --shard of its own"
        ) from error
