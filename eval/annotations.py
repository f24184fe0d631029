"""Annotation files read so that what is wrong in them is named by file and line: JSON lists, JSON lines, boxes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tokenizers_vis.eval.squares import check_picture

Box = tuple[float, float, float, float]  # x0 y0 x1 y1 in pixels, from the top left; x1 and y1 excluded


class AnnotationError(ValueError):
    """An annotation file that does not say what it should; the message starts with its file and line."""


class Entry(NamedTuple):
    """One object of a file, and where it stands: "annotations.jsonl, line 7"."""

    values: dict[str, Any]
    where: str


def read_entries(path: Path) -> Iterator[Entry]:
    """The objects of a .jsonl file, one a line, or of the list that a .json file holds.

    Raises ``AnnotationError`` for a missing or empty file, one that is no UTF-8, and JSON of another shape.
    """
    text = read_text(path)
    entries = _of_lines(text, path) if path.suffix.lower() == ".jsonl" else _of_list(text, path)
    count = 0
    for count, (line, values) in enumerate(entries, 1):  # noqa: B007 - the count is used after the loop
        where = f"{path}, line {line}"
        if not isinstance(values, dict):
            raise AnnotationError(f"{where}: there is a {type(values).__name__} where an object is: {{...}}")
        yield Entry(values, where)
    if not count:
        raise AnnotationError(f"{path}, line 1: the file holds no entry")


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte order mark. Raises ``AnnotationError``."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise AnnotationError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from error
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror or error}") from error


def take(entry: Entry, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """The value of a key, of the kind that it must have; what says which, for people.

    Raises ``AnnotationError`` when the key is not there or holds something else.
    """
    if key not in entry.values:
        raise AnnotationError(f"{entry.where}: no {key!r}, {what}; there is: {', '.join(entry.values) or 'nothing'}")
    value = entry.values[key]
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise AnnotationError(f"{entry.where}: {key!r} is {what}, got {_shown(value)}")
    return value


def objects(entry: Entry, key: str, what: str) -> Iterator[Entry]:
    """The objects of a list in an entry. Raises ``AnnotationError``."""
    for index, values in enumerate(take(entry, key, list, f"a list of {what}")):
        if not isinstance(values, Mapping):
            raise AnnotationError(f"{entry.where}: {key}[{index}] is an object, got {_shown(values)}")
        yield Entry(dict(values), f"{entry.where}, {key}[{index}]")


def take_size(entry: Entry, width: str = "width", height: str = "height") -> tuple[int, int]:
    """(w, h) of the picture. Raises ``AnnotationError``."""
    size = tuple(take(entry, key, int, "a number of pixels") for key in (width, height))
    if min(size) < 1:
        raise AnnotationError(f"{entry.where}: a picture has at least 1 by 1 pixels, got {size[0]} by {size[1]}")
    return size


def take_ratio(entry: Entry) -> float | None:
    """The relative scale under ``ratio``, above 0, or None where the entry has none. Raises ``AnnotationError``."""
    if "ratio" not in entry.values:
        return None
    ratio = float(take(entry, "ratio", (int, float), "a relative scale"))
    if not 0 < ratio < math.inf:
        raise AnnotationError(f"{entry.where}: 'ratio' is a number above 0, got {ratio}")
    return ratio


def take_box(entry: Entry, key: str, size: tuple[int, int]) -> tuple[Box, bool]:
    """The box under a key, inside of the picture, and whether it was clipped to it.

    A box that reaches over the edge is clipped: such are in most published sets. One without a pixel inside, or without
    an area, is an ``AnnotationError``.
    """
    values = take(entry, key, (list, tuple), "a box [x0, y0, x1, y1] in pixels")
    return check_box(numbers(values, 4, f"{entry.where}: {key!r}"), size, entry.where)


def check_box(box: Box, size: tuple[int, int], where: str) -> tuple[Box, bool]:
    """The box inside of a picture of (w, h), and whether it was clipped. Raises ``AnnotationError``."""
    x0, y0, x1, y1 = box
    width, height = size
    if x0 >= x1 or y0 >= y1:
        raise AnnotationError(f"{where}: the box {list(box)} has no area; it is [x0, y0, x1, y1] with x0 < x1, y0 < y1")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise AnnotationError(f"{where}: the box {list(box)} is outside of the picture of {width} by {height} pixels")
    inside = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    return inside, inside != box


def numbers(values: Any, count: int, where: str) -> tuple[float, ...]:
    """``count`` finite numbers of a list. Raises ``AnnotationError``."""
    good = isinstance(values, (list, tuple)) and len(values) == count
    if not good or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise AnnotationError(f"{where} is {count} numbers, got {_shown(values)}")
    if not all(map(math.isfinite, values)):
        raise AnnotationError(f"{where} is {count} finite numbers, got {_shown(values)}")
    return tuple(map(float, values))


def load_pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The picture, uint8 h w 3, upright.

    Raises ``ImageError`` when it cannot be read, and ``ValueError`` when its size is not the annotated (w, h).
    """
    from tokenizers_vis.images import load_image

    image = load_image(path)
    if (image.shape[2], image.shape[1]) != size:
        raise ValueError(
            f"{path} has {image.shape[2]} by {image.shape[1]} pixels, its annotation says {size[0]} by {size[1]}; "
            "boxes fit only the picture that they were drawn on"
        )
    return to_pixels(image)


def to_pixels(image: Tensor) -> np.ndarray:
    """3 h w, as ``load_image`` gives it -> uint8 h w 3."""
    from tokenizers_vis.images import to_pil

    return np.array(to_pil(image))


def check_pair(original: np.ndarray, reconstruction: np.ndarray, file: str) -> None:
    """Raises ``ValueError`` unless both are uint8 h w 3 and of one size."""
    check_picture(original, f"the original {file}".rstrip())
    check_picture(reconstruction, f"the reconstruction {file}".rstrip())
    if original.shape != reconstruction.shape:
        raise ValueError(
            f"the reconstruction of {file or 'the picture'} has {reconstruction.shape[1]} by "
            f"{reconstruction.shape[0]} pixels, the original {original.shape[1]} by {original.shape[0]}; boxes fit "
            "only the original's size: scale it back first"
        )


def content_of(pixels: np.ndarray) -> bytes:
    """A short hash of a crop: what equals it need not be looked at again."""
    return hashlib.blake2b(pixels.tobytes() + repr(pixels.shape).encode(), digest_size=16).digest()


def _of_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise AnnotationError(f"{path}, line {number}: no JSON: {error.msg} at column {error.colno}") from error


def _of_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Entry by entry, for json.loads does not tell on which lines they stand."""
    decoder = json.JSONDecoder()
    at, line = _skip(text, 0), 1
    line += text.count("\n", 0, at)
    if text[at : at + 1] != "[":
        raise AnnotationError(f"{path}, line {line}: the file is a JSON list of objects, [...]; it begins otherwise")
    before, at = at, _skip(text, at + 1)
    while True:
        line += text.count("\n", before, at)
        if text[at : at + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise AnnotationError(
                f"{path}, line {error.lineno}: no JSON: {error.msg} at column {error.colno}"
            ) from error
        yield line, value
        before, at = at, _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", before, at)
            raise AnnotationError(f"{path}, line {line}: no JSON: there is no ',' or ']' after an entry of the list")


def _skip(text: str, at: int) -> int:
    """Past white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
