"""Is text still legible: T-ACC and T-NED of words, as TokBench measures them.

https://arxiv.org/abs/2505.18142. A recogniser reads each word in its known box, in the original and in the
reconstruction. T-ACC is the share read exactly (case counts), T-NED is 1 - edit distance / length of the longer; both
are from 0 to 1, higher is better. The recogniser is part of the metric's name: T-ACC[PP-OCRv6-rec-small]. TokBench's
numbers are those of PARSeq and of words that it reads on the original; ``refine`` keeps these.

The scale of a word is its box's longer side, per character, over the picture's longer side. That is what TokBench's
annotations hold as ``ratio``, which is taken where a file has it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_vis.eval.annotations import (
    AnnotationError,
    Box,
    Entry,
    check_box,
    check_pair,
    content_of,
    load_pixels,
    numbers,
    objects,
    read_entries,
    read_text,
    take,
    take_box,
    take_ratio,
    take_size,
)
from tokenizers_vis.eval.bins import Summary, summarise
from tokenizers_vis.eval.text_recognisers import TextRecogniser

MIN_LENGTH = 2  # TokBench has no shorter words: a single letter is often ambiguous without its neighbours
_KNOWN = 2**17  # readings of originals in memory
_NOT_TO_READ = "###"  # ICDAR's mark
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_QUOTED = re.compile(r"\s*(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)[\s,]+\"(.*)\"\s*")


@dataclass(frozen=True)
class Word:
    """box: inside of the picture. clipped: whether the annotated one was not. tags: what else is known of the word."""

    box: Box
    text: str
    scale: float
    clipped: bool = False
    tags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextImage:
    """file: as the annotations call it. path: where it lies. size: (w, h)."""

    file: str
    path: Path
    size: tuple[int, int]
    words: tuple[Word, ...]

    def pixels(self) -> np.ndarray:
        """uint8 h w 3. Raises ``ValueError`` when it cannot be read or has another size than annotated."""
        return load_pixels(self.path, self.size)


@dataclass(frozen=True)
class TextSet:
    """Pictures with words to read. ignored: words that are annotated, but illegible or of a single character."""

    images: tuple[TextImage, ...]
    ignored: int

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[TextImage]:
        return iter(self.images)

    @property
    def words(self) -> int:
        return sum(len(image.words) for image in self.images)

    @property
    def clipped(self) -> int:
        """How many boxes reached over the edge of their picture."""
        return sum(word.clipped for image in self.images for word in image.words)

    @property
    def fingerprint(self) -> str:
        """sha256 of what is annotated, of the pictures their names and sizes; not of the pixels."""
        facts = [(i.file, i.size, [(w.box, w.text, w.scale) for w in i.words]) for i in self.images]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def open_text(path: str | Path, images: str | Path | None = None) -> TextSet:
    """Words in pictures, from one of three kinds of annotations.

    path: a .jsonl file of ours, {"file", "width", "height", "words": [{"box", "text", "legible"}]} a line; TokBench's
        .json, [{"file_name", "height", "width", "annotations": [{"bbox", "rec", "ratio"}]}]; or a folder that holds
        annotations.jsonl, one .json file, or ICDAR's gt_NAME.txt (x1,y1,...,x4,y4,text or x0 y0 x1 y1 "text" a line).
    images: the folder that the names of pictures start from; None is the folder of the annotations.

    Raises ``AnnotationError``, a ``ValueError``, that names file and line.
    """
    path = Path(path)
    root = Path(images) if images is not None else path if path.is_dir() else path.parent
    if path.is_dir():
        texts = sorted(path.glob("gt_*.txt"))
        tables = [path / "annotations.jsonl"] if (path / "annotations.jsonl").is_file() else sorted(path.glob("*.json"))
        if not tables and texts:
            return _collect([_icdar(file, root) for file in texts], path)
        if len(tables) != 1:
            raise AnnotationError(
                f"{path} holds {len(tables)} files of annotations; a folder has annotations.jsonl, one .json file as "
                "TokBench writes it, or ICDAR's gt_NAME.txt files. Give the file itself"
            )
        path = tables[0]
    if not path.is_file():
        raise AnnotationError(f"there is no file or folder {path}")
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise AnnotationError(f"{path}: annotations are .jsonl, .json, or a folder of ICDAR's gt_NAME.txt files")
    read = _ours if path.suffix.lower() == ".jsonl" else _tokbench
    return _collect([read(entry, root) for entry in read_entries(path)], path)


class TextFidelity:
    """Reads the words of originals and reconstructions. A word of an original is read once, however often it comes."""

    def __init__(self, recogniser: TextRecogniser) -> None:
        self.recogniser = recogniser
        self._known: dict[bytes, str] = {}

    @property
    def names(self) -> tuple[str, str]:
        """What the scores ``t_acc`` and ``t_ned`` are called in a table."""
        return f"T-ACC[{self.recogniser.name}]", f"T-NED[{self.recogniser.name}]"

    def describe(self) -> dict[str, Any]:
        """What decides the numbers, for a stamp."""
        return {**self.recogniser.describe(), "crop": "box, rounded outwards", "min_length": MIN_LENGTH}

    def score(
        self, original: np.ndarray, reconstruction: np.ndarray, words: Sequence[Word], file: str = ""
    ) -> list[dict[str, Any]]:
        """A row for each word: file, index, text, scale, box, clipped, tags, what was read, and the scores.

        original, reconstruction: uint8 h w 3, of one size. words: of this picture.
        ``readable`` says whether the original was read rightly; ``t_acc`` (0 or 1) and ``t_ned`` are those of the
        reconstruction against the true text.

        Raises ``ValueError`` for other pictures, or a word outside of them.
        """
        check_pair(original, reconstruction, file)
        height, width = original.shape[:2]
        for word in words:
            check_box(word.box, (width, height), file or "the picture")
        read_before = self._read_originals([crop(original, word.box) for word in words])
        read = self._read([crop(reconstruction, word.box) for word in words])
        return [
            {
                "file": file,
                "index": index,
                "text": word.text,
                "scale": word.scale,
                "box": list(word.box),
                "clipped": word.clipped,
                "tags": dict(word.tags),
                "recogniser": self.recogniser.name,
                "read_original": before,
                "read": after,
                "readable": before == word.text,
                "t_acc": float(after == word.text),
                "t_ned": similarity(after, word.text),
            }
            for index, (word, before, after) in enumerate(zip(words, read_before, read, strict=True))
        ]

    def _read_originals(self, crops: list[np.ndarray]) -> list[str]:
        texts = self._read(crops)
        if len(self._known) > _KNOWN:
            self._known.clear()
        self._known.update(zip(map(content_of, crops), texts, strict=True))
        return texts

    def _read(self, crops: list[np.ndarray]) -> list[str]:
        """A crop that equals one of an original is not read again: what is lossless scores as the original does."""
        keys = [content_of(pixels) for pixels in crops]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        fresh = dict(zip(new, self.recogniser.read([crops[i] for i in new]) if new else [], strict=True))
        return [fresh[i] if i in fresh else self._known[key] for i, key in enumerate(keys)]


def refine(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of words that the recogniser reads rightly on the original: TokBench's set, for this recogniser."""
    return [row for row in rows if row["readable"]]


def summarise_text(
    rows: Sequence[Mapping[str, Any]], bins: str, *, refined: bool = False, seed: int = 0
) -> dict[str, Summary]:
    """Rows of one recogniser -> its T-ACC and T-NED by their full names.

    bins: such as "text-256-v1". refined: of words only that ``refine`` keeps.

    Raises ``ValueError`` for rows of several recognisers, or none.
    """
    names = sorted({str(row["recogniser"]) for row in rows})
    if len(names) != 1:
        raise ValueError(f"a score is of the rows of one recogniser; these are of {', '.join(names) or 'none'}")
    kept = refine(rows) if refined else rows
    return {
        f"T-ACC[{names[0]}]": summarise(kept, "t_acc", bins, seed=seed),
        f"T-NED[{names[0]}]": summarise(kept, "t_ned", bins, seed=seed),
    }


def similarity(a: str, b: str) -> float:
    """1 - edit distance / length of the longer, from 0 to 1; 1 for two empty texts."""
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def text_scale(box: Box, text: str, size: tuple[int, int]) -> float:
    """The box's longer side, per character, over the longer side of the picture (w, h)."""
    x0, y0, x1, y1 = box
    return max(x1 - x0, y1 - y0) / len(text) / max(size)


def crop(picture: np.ndarray, box: Box) -> np.ndarray:
    """The pixels that the box touches, h w 3. For boxes of whole pixels, as TokBench's, these are its very pixels."""
    x0, y0, x1, y1 = box
    height, width = picture.shape[:2]
    columns = slice(max(0, math.floor(x0)), min(width, math.ceil(x1)))
    return np.ascontiguousarray(picture[max(0, math.floor(y0)) : min(height, math.ceil(y1)), columns])


# Readers

Found = tuple[TextImage, int]  # and how many of its words are ignored


def _collect(found: Sequence[Found], path: Path) -> TextSet:
    images = tuple(image for image, _ in found)
    if not any(image.words for image in images):
        raise AnnotationError(f"{path} annotates no legible word of {MIN_LENGTH} characters or more")
    files = [image.file for image in images]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise AnnotationError(f"{path} has the picture {twice} twice; put all of its words into one entry")
    return TextSet(images, sum(ignored for _, ignored in found))


def _word(text: str, box: Box, clipped: bool, size: tuple[int, int], ratio: float | None, tags: dict) -> Word | None:
    if len(text) < MIN_LENGTH or text == _NOT_TO_READ:
        return None
    return Word(box, text, text_scale(box, text, size) if ratio is None else ratio, clipped, tags)


def _image(file: str, root: Path, size: tuple[int, int], words: list[Word | None], where: str) -> Found:
    if not (root / file).is_file():
        raise AnnotationError(f"{where}: there is no picture {root / file}; give the folder of pictures as images")
    legible = tuple(word for word in words if word)
    return TextImage(file, root / file, size, legible), len(words) - len(legible)


def _ours(entry: Entry, root: Path) -> Found:
    size = take_size(entry)
    words = []
    for word in objects(entry, "words", "words"):
        text = take(word, "text", (str, type(None)), "the word, or null for one that is not to be read")
        legible = text is not None and word.values.get("legible", True)
        box, clipped = take_box(word, "box", size)
        tags = word.values.get("tags", {})
        words.append(_word(text, box, clipped, size, take_ratio(word), tags) if legible else None)
    return _image(take(entry, "file", str, "the picture's name"), root, size, words, entry.where)


def _tokbench(entry: Entry, root: Path) -> Found:
    size = take_size(entry)
    words = []
    for word in objects(entry, "annotations", "words"):
        text = take(word, "rec", str, "the word")
        words.append(_word(text, *take_box(word, "bbox", size), size, take_ratio(word), {}))
    return _image(take(entry, "file_name", str, "the picture's name"), root, size, words, entry.where)


def _icdar(file: Path, root: Path) -> Found:
    from PIL import Image

    stem = file.stem.removeprefix("gt_")
    pictures = [root / f"{stem}{suffix}" for suffix in _SUFFIXES if (root / f"{stem}{suffix}").is_file()]
    if len(pictures) != 1:
        raise AnnotationError(f"{file}, line 1: there are {len(pictures)} pictures {root / stem}.*; one belongs to it")
    with Image.open(pictures[0]) as picture:
        size = picture.size
    words = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            where = f"{file}, line {number}"
            text, box = _icdar_line(line, where)
            words.append(_word(text, *check_box(box, size, where), size, None, {}))
    return _image(pictures[0].name, root, size, words, str(file))


def _icdar_line(line: str, where: str) -> tuple[str, Box]:
    if quoted := _QUOTED.fullmatch(line):
        return quoted[5], numbers([int(v) for v in quoted.groups()[:4]], 4, where)
    corners, text = line.split(",", 8)[:8], "".join(line.split(",", 8)[8:])
    try:
        x, y = [float(v) for v in corners[0::2]], [float(v) for v in corners[1::2]]
    except ValueError:
        x, y = [], []
    if len(x) != 4 or len(y) != 4 or not text:
        raise AnnotationError(f'{where}: a line is x1,y1,x2,y2,x3,y3,x4,y4,text or x0 y0 x1 y1 "text"; got {line!r}')
    return text.strip(), numbers([min(x), min(y), max(x), max(y)], 4, where)
