"""Is a face still the same person's: F-Sim of faces, as TokBench measures it.

https://arxiv.org/abs/2505.18142. A recogniser describes each face in the original and in the reconstruction; F-Sim is
how alike the two descriptions are, 1 for equal ones, higher is better. Both are cut out by the same landmarks, found
once on the original and kept in a file (``landmarks``), so that no detector stands between picture and score. The
recogniser is part of the metric's name: F-Sim[dlib-resnet-v1]. TokBench's numbers are those of antelopev2.

Sets of faces and their scales are in ``eval.face_set``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_vis.eval.alignment import DLIB
from tokenizers_vis.eval.annotations import Box, check_box, check_pair, content_of, to_pixels
from tokenizers_vis.eval.bins import Summary, summarise
from tokenizers_vis.eval.face_recognisers import FaceRecogniser, Landmarks, dlib_model
from tokenizers_vis.eval.face_set import LANDMARKS, Face, FaceImage, FaceSet, face_scale, open_faces
from tokenizers_vis.files import write_atomically
from tokenizers_vis.images import find_images, load_image

_PREDICTOR = "shape_predictor_5_face_landmarks.dat"
_PREDICTOR_SHA256 = "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888"
_KNOWN = 2**15  # descriptions of originals in memory


class FaceFidelity:
    """Describes the faces of originals and reconstructions. A face of an original is looked at once."""

    def __init__(self, recogniser: FaceRecogniser) -> None:
        self.recogniser = recogniser
        self._known: dict[bytes, np.ndarray] = {}

    @property
    def names(self) -> tuple[str]:
        """What the score ``f_sim`` is called in a table."""
        return (f"F-Sim[{self.recogniser.name}]",)

    def describe(self) -> dict[str, Any]:
        """What decides the numbers, for a stamp."""
        return {**self.recogniser.describe(), "cut": "landmarks" if self.recogniser.by_landmarks else "box"}

    def score(
        self, original: np.ndarray, reconstruction: np.ndarray, faces: Sequence[Face], file: str = ""
    ) -> list[dict[str, Any]]:
        """A row for each face: file, index, scale, box, clipped, tags, landmarks (their scheme), recogniser, f_sim.

        original, reconstruction: uint8 h w 3, of one size. faces: of this picture.

        Raises ``ValueError`` for other pictures, a face outside of them, or one without the landmarks that it takes.
        """
        check_pair(original, reconstruction, file)
        height, width = original.shape[:2]
        for face in faces:
            check_box(face.box, (width, height), file or "the picture")
            if self.recogniser.by_landmarks and face.landmarks is None:
                raise ValueError(
                    f"a face of {file or 'the picture'} has no landmarks, which {self.recogniser.name} cuts it out by: "
                    "write them once, tokenizers-vis landmarks FOLDER"
                )
        if not faces:
            return []
        before = self._describe([self.recogniser.cut(original, face.box, face.landmarks) for face in faces], keep=True)
        after = self._describe([self.recogniser.cut(reconstruction, face.box, face.landmarks) for face in faces])
        return [
            {
                "file": file,
                "index": index,
                "scale": face.scale,
                "box": list(face.box),
                "clipped": face.clipped,
                "tags": dict(face.tags),
                "recogniser": self.recogniser.name,
                "landmarks": face.landmarks.scheme if face.landmarks and self.recogniser.by_landmarks else None,
                "f_sim": score,
            }
            for index, (face, score) in enumerate(
                zip(faces, self.recogniser.similarity(before, after).tolist(), strict=True)
            )
        ]

    def _describe(self, crops: list[np.ndarray], keep: bool = False) -> np.ndarray:
        """n d. A crop that equals one of an original is not looked at again."""
        keys = [content_of(crop) for crop in crops]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        fresh = dict(zip(new, self.recogniser.embed([crops[i] for i in new]) if new else [], strict=True))
        described = [fresh[i] if i in fresh else self._known[key] for i, key in enumerate(keys)]
        if keep:
            if len(self._known) > _KNOWN:
                self._known.clear()
            self._known.update(zip(keys, described, strict=True))
        return np.stack(described)


def summarise_face(rows: Sequence[Mapping[str, Any]], bins: str, *, seed: int = 0) -> dict[str, Summary]:
    """Rows of one recogniser -> its F-Sim by its full name. bins: such as "face-256-v2".

    Raises ``ValueError`` for rows of several recognisers, or none.
    """
    names = sorted({str(row["recogniser"]) for row in rows})
    if len(names) != 1:
        raise ValueError(f"a score is of the rows of one recogniser; these are of {', '.join(names) or 'none'}")
    return {f"F-Sim[{names[0]}]": summarise(rows, "f_sim", bins, seed=seed)}


# Landmarks, once and for all


def freeze(faces: FaceSet) -> FaceSet:
    """Landmarks for the faces that have none: dlib's 5-point predictor inside of the box, on the original.

    Raises ``ValueError`` when dlib or its predictor is missing.
    """
    if faces.frozen:
        return faces
    predictor = _predictor()

    def landmarked(image: FaceImage) -> FaceImage:
        if all(face.landmarks for face in image.faces):
            return image
        pixels = image.pixels()
        found = [face.landmarks or _predict(predictor, pixels, face.box) for face in image.faces]
        return replace(image, faces=tuple(map(lambda f, p: replace(f, landmarks=p), image.faces, found)))

    return FaceSet(tuple(map(landmarked, faces.images)))


def landmarks(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes the frozen landmarks of all faces in a folder, once: a .jsonl that ``open_faces`` reads.

    folder: with annotations, of which boxes and landmarks are kept; or of pictures alone, where dlib's detector of
        frontal faces looks for them. A picture without a face has an empty list.
    out: None is landmarks.jsonl in the folder. The names of pictures start from the folder, wherever the file lies.

    Raises ``ValueError`` when the file is there already, and as ``open_faces`` and ``freeze`` do.
    """
    folder = Path(folder)
    target = Path(out) if out is not None else folder / LANDMARKS
    if target.exists():
        raise ValueError(f"{target} is there: landmarks are frozen. Delete it, or write others to another file")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    annotated = (folder / "annotations.jsonl").is_file() or any(folder.glob("*.json"))
    faces = freeze(open_faces(folder)) if annotated else _detect(folder)
    lines = [json.dumps(_to_dict(image), ensure_ascii=False) for image in faces]
    write_atomically(target, ("\n".join(lines) + "\n").encode())
    return target


def _predictor() -> Any:
    path = dlib_model(_PREDICTOR, _PREDICTOR_SHA256)
    import dlib

    return dlib.shape_predictor(str(path))


def _predict(predictor: Any, pixels: np.ndarray, box: Box) -> Landmarks:
    import dlib

    shape = predictor(pixels, dlib.rectangle(*(round(v) for v in box)))
    return Landmarks(DLIB, tuple((float(p.x), float(p.y)) for p in shape.parts()))


def _detect(folder: Path) -> FaceSet:
    """All frontal faces that dlib finds in pictures at twice their size, those of 40 pixels and more."""
    predictor = _predictor()
    import dlib

    detector = dlib.get_frontal_face_detector()
    images = []
    for path in find_images(folder):
        pixels = to_pixels(load_image(path))
        size = (pixels.shape[1], pixels.shape[0])
        faces = []
        for found in detector(pixels, 1):
            whole = (float(found.left()), float(found.top()), float(found.right() + 1), float(found.bottom() + 1))
            box, clipped = check_box(whole, size, str(path))
            faces.append(Face(box, face_scale(box, size), _predict(predictor, pixels, whole), clipped))
        images.append(FaceImage(path.relative_to(folder).as_posix(), path, size, tuple(faces)))
    if not any(image.faces for image in images):
        raise ValueError(f"dlib finds no face in the {len(images)} pictures of {folder}; annotate their boxes")
    return FaceSet(tuple(images))


def _to_dict(image: FaceImage) -> dict[str, Any]:
    faces = [
        {
            "box": list(face.box),
            "ratio": face.scale,
            "landmarks": {"scheme": face.landmarks.scheme, "points": [list(point) for point in face.landmarks.points]},
            "tags": dict(face.tags),
        }
        for face in image.faces
    ]
    return {"file": image.file, "width": image.size[0], "height": image.size[1], "faces": faces}
