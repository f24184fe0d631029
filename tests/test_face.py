"""Face fidelity: frozen landmarks, aligned crops against dlib and OpenCV, readers that name the line, scores."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenizers_vis.eval.alignment import ARCFACE, DLIB, TEMPLATES, converted, eyes, similarity_transform, warp
from tokenizers_vis.eval.face import FaceFidelity, freeze, landmarks, open_faces, summarise_face
from tokenizers_vis.eval.face_recognisers import FaceRecogniser, Landmarks, OnnxFace, dlib_model, face_recogniser
from tokenizers_vis.eval.face_set import Face, FaceSet, face_scale
from tokenizers_vis.eval.squares import fit_square, unfit_square

needs_dlib = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("dlib", "face_recognition_models"))), reason="needs the extra faces"
)
# A net of one average pooling: 3 112 112 -> the means of 48 tiles of 28 by 28.
POOLING = (
    "CAgSADqGAQo8CgF4EgFwIgtBdmVyYWdlUG9vbCoVCgxrZXJuZWxfc2hhcGVAHEAcoAEHKhAKB3N0cmlkZXNAHEAcoAEHCg8KAXASAXkiB0ZsYXR0"
    "ZW4SAWdaHAoBeBIXChUIARIRCgMSAWIKAggDCgIIcAoCCHBiFAoBeRIPCg0IARIJCgMSAWIKAggwQgQKABAN"
)
KPS = [[40, 40], [60, 42], [50, 55], [42, 65], [58, 66]]


class Colour(FaceRecogniser):
    """Describes a face by the mean colour of its box, so that it needs neither weights nor landmarks."""

    name = "colour"
    by_landmarks = False

    def __init__(self) -> None:
        self.looked_at = 0

    def cut(self, picture: np.ndarray, box: tuple, landmarks: Landmarks | None) -> np.ndarray:
        x0, y0, x1, y1 = map(int, box)
        return picture[y0:y1, x0:x1]

    def embed(self, crops: Any) -> np.ndarray:
        self.looked_at += len(crops)
        return np.array([crop.mean(axis=(0, 1)) for crop in crops])

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name}


def picture(path: Path, width: int = 100, height: int = 80) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def ours(tmp_path: Path, *lines: Any) -> Path:
    picture(tmp_path / "a.png")
    file = tmp_path / "annotations.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def entry(*faces: Any, **more: Any) -> dict[str, Any]:
    return {"file": "a.png", "width": 100, "height": 80, "faces": list(faces)} | more


FACE = {"box": [30, 30, 70, 75], "landmarks": {"scheme": ARCFACE, "points": KPS}}


@pytest.fixture(scope="module")
def astronaut(photos: list[Path]) -> FaceSet:
    """The one of the package's photographs with a face, in a box drawn by hand."""
    (path,) = (path for path in photos if path.stem == "astronaut")
    from tokenizers_vis.eval.face_set import FaceImage

    box = (88.0, 32.0, 140.0, 84.0)
    return FaceSet((FaceImage(path.name, path, (256, 256), (Face(box, face_scale(box, (256, 256))),)),))


# Alignment


@given(scale=st.floats(0.1, 10), angle=st.floats(-3.1, 3.1), x=st.floats(-100, 100), y=st.floats(-100, 100))
def test_a_similarity_is_found_again(scale: float, angle: float, x: float, y: float) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = TEMPLATES[ARCFACE] @ turn.T + [x, y]
    np.testing.assert_allclose(similarity_transform(TEMPLATES[ARCFACE], moved), np.c_[turn, [x, y]], atol=1e-9)


def test_a_similarity_is_the_nearest() -> None:
    """Against linear least squares for x' = a x - b y + c, y' = b x + a y + d; mirrored points get no mirroring."""
    rng = np.random.default_rng(0)
    for target in (rng.normal(size=(5, 2)) * 40, TEMPLATES[ARCFACE] * [-1, 1]):
        source = TEMPLATES[ARCFACE]
        x, y, one, nil = source[:, 0], source[:, 1], np.ones(5), np.zeros(5)
        rows = np.concatenate([np.c_[x, -y, one, nil], np.c_[y, x, nil, one]])
        a, b, c, d = np.linalg.lstsq(rows, target.T.reshape(-1), rcond=None)[0]
        found = similarity_transform(source, target)
        np.testing.assert_allclose(found, [[a, -b, c], [b, a, d]], atol=1e-8)
        assert np.linalg.det(found[:, :2]) >= 0


@pytest.mark.parametrize(("scheme", "to"), [(DLIB, ARCFACE), (ARCFACE, DLIB)])
def test_converted_points_have_the_same_eyes(scheme: str, to: str) -> None:
    points = TEMPLATES[scheme] * (80 if scheme == DLIB else 1) @ np.array([[0.9, 0.2], [-0.2, 0.9]]) + [30, 20]
    there = converted(points, scheme, to)
    np.testing.assert_allclose(eyes(there, to), eyes(points, scheme), atol=1e-9)
    assert eyes(there, to)[0, 0] < eyes(there, to)[1, 0], "the left of the picture first"
    assert there[:, 1].max() > eyes(there, to)[:, 1].max() + 10, "the nose is below the eyes"
    assert converted(points, scheme, scheme) is points


def test_warp_is_that_of_opencv(photos: list[Path]) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = np.asarray(Image.open(photos[0]).convert("RGB"))
    matrix = similarity_transform(np.array(KPS, float) * 3, TEMPLATES[ARCFACE])
    mine, theirs = warp(pixels, matrix, 112), cv2.warpAffine(pixels, matrix, (112, 112), borderValue=0.0)
    difference = np.abs(mine.astype(int) - theirs)
    assert difference.mean() < 0.25 and difference.max() <= 8, "theirs has coordinates of 1/32 pixel"
    shifted = warp(pixels, np.array([[1.0, 0, -10], [0, 1, -20]]), 64)
    np.testing.assert_array_equal(shifted, pixels[20:84, 10:74])
    assert not warp(pixels, np.array([[1.0, 0, 300], [0, 1, 0]]), 64).any(), "black outside of the picture"


# Readers


def test_ours_is_read(tmp_path: Path) -> None:
    ours(tmp_path, entry(FACE, {"box": [60, 50, 120, 90], "tags": {"age": 40}}))
    found = open_faces(tmp_path)
    (image,) = found
    assert (len(found), found.faces, found.clipped, found.frozen) == (1, 2, 1, False)
    assert image.faces[0].scale == pytest.approx(0.45) and image.faces[1].box == (60, 50, 100, 80)
    assert image.faces[0].landmarks == Landmarks(ARCFACE, tuple((float(x), float(y)) for x, y in KPS))
    assert image.faces[1].tags == {"age": 40} and image.pixels().shape == (80, 100, 3)
    flat = ours(tmp_path, {"file": "a.png", "width": 100, "height": 80, "box": [30, 30, 70, 75], "identity": "ann"})
    (image,) = open_faces(flat)
    assert image.faces == (Face((30, 30, 70, 75), 0.45, tags={"identity": "ann"}),)
    assert open_faces(flat).fingerprint != found.fingerprint


def test_tokbench_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "0--Parade" / "x.jpg")
    face = {"kps": KPS, "box": [30, 30, 70, 75], "ratio": 0.31, "gt": 1}
    image = {"image_name": "0--Parade/x.jpg", "img_height": 80, "img_width": 100, "faces": [face]}
    (tmp_path / "face_meta.json").write_text(json.dumps([image]))
    found = open_faces(tmp_path, tmp_path / "images")
    assert found.frozen and found.images[0].faces[0].scale == 0.31
    assert found.images[0].faces[0].landmarks.scheme == ARCFACE


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([entry(FACE), entry(FACE, file="b.png")], "line 2: there is no picture .*b.png"),
        ([{"file": "a.png", "width": 100, "height": 80}], "line 1: no 'box'"),
        ([entry({"landmarks": FACE["landmarks"]})], r"line 1, faces\[0\]: no 'box'"),
        ([entry(FACE | {"box": [70, 30, 30, 75]})], r"line 1, faces\[0\]: the box .* has no area"),
        ([entry(FACE | {"box": [0, 80, 30, 95]})], r"line 1, faces\[0\]: .* outside of the picture of 100 by 80"),
        ([entry(FACE | {"landmarks": KPS})], r"line 1, faces\[0\]: 'landmarks' is an object"),
        (
            [entry(FACE | {"landmarks": {"scheme": "68", "points": KPS}})],
            r"faces\[0\], landmarks: the scheme is one of dlib-5, arcface-5, got '68'",
        ),
        ([entry(FACE | {"landmarks": {"scheme": DLIB, "points": KPS[:4]}})], "5 points .*, got 4"),
        ([entry(FACE | {"landmarks": {"scheme": DLIB, "points": [*KPS[:4], [1]]}})], r"points\[4\] is 2 numbers"),
        ([entry(FACE | {"landmarks": {"scheme": DLIB, "points": [KPS[0]] * 5}})], "5 different points"),
        ([entry(FACE), entry(FACE)], "has the picture a.png twice"),
        ([entry()], "annotates no face"),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path: Path, lines: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"annotations.jsonl.*{said}"):
        open_faces(ours(tmp_path, *lines))


def test_a_folder_without_annotations_says_what_to_do(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="tokenizers-vis landmarks"):
        open_faces(tmp_path)
    with pytest.raises(ValueError, match="annotations of faces are .jsonl"):
        open_faces(tmp_path / "a.png")


# Scores


def test_rows_are_of_faces() -> None:
    page = np.zeros((20, 40, 3), np.uint8)
    page[:, :20] = (200, 100, 50)
    page[:, 20:] = (10, 10, 10)
    other = page.copy()
    other[:, 20:] = (10, 0, 0)
    faces = [Face((0, 0, 20, 20), 0.5), Face((20, 0, 40, 20), 0.15, clipped=True, tags={"identity": "ann"})]
    recogniser = Colour()
    fidelity = FaceFidelity(recogniser)
    first, second = fidelity.score(page, other, faces, "page.png")
    assert first["f_sim"] == 1.0 and second["f_sim"] == pytest.approx(1 / 3**0.5), "the cosine of grey and red"
    assert second["clipped"] and second["tags"] == {"identity": "ann"} and second["landmarks"] is None
    assert recogniser.looked_at == 3, "what equals an original is not looked at again"
    assert json.loads(json.dumps([first, second])) == [first, second]
    summary = summarise_face([first, second], "face-256-v2")["F-Sim[colour]"]
    assert [b.mean for b in summary.scores] == [second["f_sim"], None, 1.0] and summary.filled == 2
    assert fidelity.score(page, other, []) == [] and fidelity.names == ("F-Sim[colour]",)
    with pytest.raises(ValueError, match="outside of the picture of 40 by 20"):
        fidelity.score(page, other, [Face((50, 0, 60, 20), 0.5)])
    with pytest.raises(ValueError, match="reconstruction of x has 30 by 20 pixels"):
        fidelity.score(page, other[:, :30], faces, "x")


def test_a_net_of_insightface_sees_an_aligned_crop(tmp_path: Path) -> None:
    """RGB in [-1, 1], the five points at ArcFace's places; the tiles of a pooling net show both."""
    pytest.importorskip("onnxruntime")
    file = tmp_path / "pooling.onnx"
    file.write_bytes(base64.b64decode(POOLING))
    recogniser = OnnxFace("pooling", file, hashlib.sha256(file.read_bytes()).hexdigest(), "none")
    red = np.zeros((120, 120, 3), np.uint8)
    red[:, :, 0] = 255
    points = Landmarks(ARCFACE, tuple(map(tuple, TEMPLATES[ARCFACE] * 0.5 + 20)))
    crop = recogniser.cut(red, (20, 20, 76, 76), points)
    np.testing.assert_array_equal(crop, red[:112, :112])
    red[20:34, 20:34] = 255  # what is one tile of 28 when the face of 56 pixels becomes 112
    tiles = recogniser.embed([recogniser.cut(red, (20, 20, 76, 76), points)] * 17).reshape(17, 3, 4, 4)
    assert (tiles == tiles[0]).all()
    np.testing.assert_allclose(tiles[0, 0], 1, atol=1e-6)
    assert tiles[0, 2, 0, 0] > 0.9 and (tiles[0, 1:].reshape(2, -1)[:, 6:] == -1).all()
    with pytest.raises(ValueError, match="expected 000"):
        OnnxFace("pooling", file, "0" * 64, "none")


def test_a_missing_recogniser_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'facenet'"):
        face_recogniser("face-net")
    with pytest.raises(ValueError, match="dlib has weights of its own"):
        face_recogniser("dlib", "weights.dat")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"antelopev2.zip .* or give the path of glintr100.onnx"):
        face_recogniser("antelopev2")
    with pytest.raises(ValueError, match="no-deps facenet-pytorch|there is no .*nowhere.pt"):
        face_recogniser("facenet", tmp_path / "nowhere.pt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tokenizers-vis\[faces\]'"):
        face_recogniser("dlib")


@needs_dlib
def test_dlib_describes_a_face_as_dlib_does(astronaut: FaceSet) -> None:
    import dlib

    (image,) = freeze(astronaut)
    pixels, face = image.pixels(), image.faces[0]
    recogniser = face_recogniser("dlib")
    predictor = dlib.shape_predictor(str(recogniser._path.parent / "shape_predictor_5_face_landmarks.dat"))
    shape = predictor(pixels, dlib.rectangle(*map(int, face.box)))
    assert [(p.x, p.y) for p in shape.parts()] == list(face.landmarks.points)
    crop = recogniser.cut(pixels, face.box, face.landmarks)
    np.testing.assert_array_equal(crop, dlib.get_face_chip(pixels, shape, size=150, padding=0.25))
    theirs = np.array(dlib.face_recognition_model_v1(str(recogniser._path)).compute_face_descriptor(pixels, shape))
    np.testing.assert_allclose(recogniser.embed([crop])[0], theirs, atol=1e-6)
    # From the eyes alone, as TokBench's points would give it, the crop is nearly the same, and so is the person.
    eyes_only = Landmarks(ARCFACE, tuple(map(tuple, face.landmarks.as_(ARCFACE))))
    other = recogniser.embed([recogniser.cut(pixels, face.box, eyes_only)])
    assert recogniser.similarity(other, theirs[None])[0] > 0.7


@needs_dlib
def test_landmarks_are_written_once(astronaut: FaceSet, tmp_path: Path) -> None:
    (image,) = astronaut
    Image.open(image.path).save(tmp_path / "astronaut.png")
    assert landmarks(tmp_path) == tmp_path / "landmarks.jsonl"
    (found,) = open_faces(tmp_path)
    assert found.file == "astronaut.png" and len(found.faces) == 1, "found by the detector"
    centre = np.array(found.faces[0].box).reshape(2, 2).mean(axis=0)
    assert (np.abs(centre - np.array(image.faces[0].box).reshape(2, 2).mean(axis=0)) < 15).all()
    with pytest.raises(ValueError, match="landmarks are frozen"):
        landmarks(tmp_path)
    (tmp_path / "landmarks.jsonl").unlink()

    line = {"file": "astronaut.png", "width": 256, "height": 256, "box": list(image.faces[0].box), "identity": "ec"}
    (tmp_path / "annotations.jsonl").write_text(json.dumps(line))
    out = landmarks(tmp_path, tmp_path / "points.jsonl")
    (again,) = open_faces(out, tmp_path)
    assert again.faces[0].box == image.faces[0].box and again.faces[0].tags == {"identity": "ec"}
    assert again.faces == freeze(open_faces(tmp_path)).images[0].faces
    (empty := tmp_path / "empty").mkdir()
    picture(empty / "a.png")
    with pytest.raises(ValueError, match="dlib finds no face in the 1 pictures"):
        landmarks(empty)


@needs_dlib
def test_scores_fall_along_the_ladder(astronaut: FaceSet) -> None:
    (image,) = freeze(astronaut)
    pixels, fidelity = image.pixels(), FaceFidelity(face_recogniser())
    with pytest.raises(ValueError, match="tokenizers-vis landmarks"):
        fidelity.score(pixels, pixels, astronaut.images[0].faces, "a")
    scores = []
    for size in (256, 128, 96, 64, 32):
        (row,) = fidelity.score(pixels, unfit_square(*fit_square(pixels, size)), image.faces, image.file)
        scores.append(row["f_sim"])
    assert scores[0] == 1.0 and row["landmarks"] == DLIB and row["recogniser"] == "dlib-resnet-v1"
    assert all(a > b for a, b in pairwise(scores)) and scores[-1] < 0.5, scores


@needs_dlib
def test_people_are_told_apart(shared: Path) -> None:
    """24 people in 2 photographs each: the score of one person is above that of two."""
    found = open_faces(shared / "data" / "faces-eval")
    assert (len(found), found.faces, found.frozen) == (200, 200, False)
    of: dict[str, list] = {}
    for image in found:
        of.setdefault(image.faces[0].tags["identity"], []).append(image)
    pairs = [images[:2] for name, images in of.items() if name.startswith("lfw/")]
    assert len(pairs) == 24
    recogniser = face_recogniser()
    described = []
    for side in zip(*pairs, strict=True):
        crops = [recogniser.cut(i.pixels(), i.faces[0].box, i.faces[0].landmarks) for i in freeze(FaceSet(side))]
        described.append(recogniser.embed(crops))
    same = recogniser.similarity(*described)
    different = recogniser.similarity(described[0], np.roll(described[1], 1, axis=0))
    assert np.median(same) > 0.55 and np.median(different) < 0.3
    assert np.mean(same[:, None] > different[None]) > 0.98, "the area under the curve"


@needs_dlib
def test_a_damaged_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has no nothing.dat"):
        dlib_model("nothing.dat", "0" * 64)
    with pytest.raises(ValueError, match="expected 000"):
        dlib_model("shape_predictor_5_face_landmarks.dat", "0" * 64)
