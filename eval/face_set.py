"""Faces in pictures, as annotation files have them: ours, TokBench's, and files of frozen landmarks.

The scale of a face is its box's longer side over the picture's longer side, or the ``ratio`` that a file has, as
TokBench's does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_vis.eval.alignment import ARCFACE, TEMPLATES
from tokenizers_vis.eval.annotations import (
    AnnotationError,
    Box,
    Entry,
    load_pixels,
    numbers,
    objects,
    read_entries,
    take,
    take_box,
    take_ratio,
    take_size,
)
from tokenizers_vis.eval.face_recognisers import Landmarks

LANDMARKS = "landmarks.jsonl"


@dataclass(frozen=True)
class Face:
    """box: inside of the picture. clipped: whether the annotated one was not. tags: such as the identity."""

    box: Box
    scale: float
    landmarks: Landmarks | None = None
    clipped: bool = False
    tags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FaceImage:
    """file: as the annotations call it. path: where it lies. size: (w, h)."""

    file: str
    path: Path
    size: tuple[int, int]
    faces: tuple[Face, ...]

    def pixels(self) -> np.ndarray:
        """uint8 h w 3. Raises ``ValueError`` when it cannot be read or has another size than annotated."""
        return load_pixels(self.path, self.size)


@dataclass(frozen=True)
class FaceSet:
    """Pictures with faces to recognise."""

    images: tuple[FaceImage, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[FaceImage]:
        return iter(self.images)

    @property
    def faces(self) -> int:
        return sum(len(image.faces) for image in self.images)

    @property
    def clipped(self) -> int:
        """How many boxes reached over the edge of their picture."""
        return sum(face.clipped for image in self.images for face in image.faces)

    @property
    def frozen(self) -> bool:
        """Whether all faces have landmarks."""
        return all(face.landmarks for image in self.images for face in image.faces)

    @property
    def fingerprint(self) -> str:
        """sha256 of what is annotated, landmarks too, of the pictures their names and sizes; not of the pixels."""
        facts = [(i.file, i.size, [(f.box, f.scale, f.landmarks) for f in i.faces]) for i in self.images]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def open_faces(path: str | Path, images: str | Path | None = None) -> FaceSet:
    """Faces in pictures.

    path: a .jsonl file of ours, a line a picture: {"file", "width", "height", "faces": [{"box", "landmarks"}]}, as
        ``landmarks`` writes it, or with the "box" of its only face in the place of "faces"; TokBench's .json,
        [{"image_name", "img_height", "img_width", "faces": [{"kps", "box", "ratio"}]}]; or a folder that holds
        landmarks.jsonl, annotations.jsonl or one .json file, in this order.
    images: the folder that the names of pictures start from; None is the folder of the annotations.

    Raises ``AnnotationError``, a ``ValueError``, that names file and line.
    """
    path = Path(path)
    root = Path(images) if images is not None else path if path.is_dir() else path.parent
    if path.is_dir():
        found = [path / name for name in (LANDMARKS, "annotations.jsonl") if (path / name).is_file()]
        found = found[:1] or sorted(path.glob("*.json"))
        if len(found) != 1:
            raise AnnotationError(
                f"{path} holds {len(found)} files of annotations; a folder has {LANDMARKS}, annotations.jsonl or one "
                f".json file as TokBench writes it. For pictures without any: tokenizers-vis landmarks {path}"
            )
        path = found[0]
    if not path.is_file():
        raise AnnotationError(f"there is no file or folder {path}")
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise AnnotationError(f"{path}: annotations of faces are .jsonl, or TokBench's .json")
    read = _ours if path.suffix.lower() == ".jsonl" else _tokbench
    pictures = tuple(read(entry, root) for entry in read_entries(path))
    if not any(picture.faces for picture in pictures):
        raise AnnotationError(f"{path} annotates no face")
    files = [picture.file for picture in pictures]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise AnnotationError(f"{path} has the picture {twice} twice; put all of its faces into one entry")
    return FaceSet(pictures)


def face_scale(box: Box, size: tuple[int, int]) -> float:
    """The box's longer side over the longer side of the picture (w, h)."""
    x0, y0, x1, y1 = box
    return max(x1 - x0, y1 - y0) / max(size)


def _image(file: str, root: Path, size: tuple[int, int], faces: list[Face], where: str) -> FaceImage:
    if not (root / file).is_file():
        raise AnnotationError(f"{where}: there is no picture {root / file}; give the folder of pictures as images")
    return FaceImage(file, root / file, size, tuple(faces))


def _face(entry: Entry, size: tuple[int, int], points: Landmarks | None, tags: Mapping[str, Any]) -> Face:
    box, clipped = take_box(entry, "box", size)
    ratio = take_ratio(entry)
    return Face(box, face_scale(box, size) if ratio is None else ratio, points, clipped, tags)


def _ours(entry: Entry, root: Path) -> FaceImage:
    size = take_size(entry)
    several = "faces" in entry.values
    faces = []
    for face in objects(entry, "faces", "faces") if several else [entry]:
        points = None
        if "landmarks" in face.values:
            found = Entry(take(face, "landmarks", dict, 'an object {"scheme", "points"}'), f"{face.where}, landmarks")
            points = _points(found, "points", take(found, "scheme", str, f"one of {', '.join(TEMPLATES)}"))
        tags = face.values.get("tags", {})
        if not several and "identity" in entry.values:
            tags = {"identity": entry.values["identity"]} | tags
        faces.append(_face(face, size, points, tags))
    return _image(take(entry, "file", str, "the picture's name"), root, size, faces, entry.where)


def _tokbench(entry: Entry, root: Path) -> FaceImage:
    size = take_size(entry, "img_width", "img_height")
    faces = [_face(face, size, _points(face, "kps", ARCFACE), {}) for face in objects(entry, "faces", "faces")]
    return _image(take(entry, "image_name", str, "the picture's name"), root, size, faces, entry.where)


def _points(entry: Entry, key: str, scheme: str) -> Landmarks:
    if scheme not in TEMPLATES:
        raise AnnotationError(f"{entry.where}: the scheme is one of {', '.join(TEMPLATES)}, got {scheme!r}")
    values = take(entry, key, list, "5 points [x, y]")
    if len(values) != 5:
        raise AnnotationError(f"{entry.where}: {key!r} is 5 points [x, y], got {len(values)}")
    points = tuple(numbers(point, 2, f"{entry.where}: {key}[{i}]") for i, point in enumerate(values))
    if len(set(points)) < 5:
        raise AnnotationError(f"{entry.where}: {key!r} is 5 different points, got {values}")
    return Landmarks(scheme, points)
