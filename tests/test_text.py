"""Text fidelity: readers that name the line, recognisers against their own packages, scores by hand and on ladders."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenizers_vis.eval.bins import BINS, Bins, find_bins, summarise
from tokenizers_vis.eval.squares import fit_square, unfit_square
from tokenizers_vis.eval.text import (
    TextFidelity,
    Word,
    crop,
    edit_distance,
    open_text,
    refine,
    similarity,
    summarise_text,
    text_scale,
)
from tokenizers_vis.eval.text_recognisers import PPOCR, TextRecogniser, text_recogniser
from tokenizers_vis.eval.words import Look, render_page, render_word

needs_ocr = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime"))), reason="needs the extra ocr"
)


class Shade(TextRecogniser):
    """Reads "dark", "grey" or "light" from the mean of a crop."""

    name = "shade"

    def __init__(self) -> None:
        self.looked_at = 0

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        self.looked_at += len(crops)
        return [("dark", "grey", "light")[min(2, int(pixels.mean() // 85))] for pixels in crops]

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name}


def picture(path: Path, width: int = 100, height: int = 50, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (grey, grey, grey)).save(path)
    return path


def ours(tmp_path: Path, *lines: Any) -> Path:
    picture(tmp_path / "a.png")
    file = tmp_path / "annotations.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def entry(*words: Any, **more: Any) -> dict[str, Any]:
    return {"file": "a.png", "width": 100, "height": 50, "words": list(words)} | more


WORD = {"box": [10, 10, 40, 20], "text": "word"}


# Squares


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 100), (37, 37), (1, 90), (500, 499), (49, 48)])
@pytest.mark.parametrize("size", [256, 49, 1])
def test_a_picture_fills_its_square_from_side_to_side(width: int, height: int, size: int) -> None:
    white = np.full((height, width, 3), 255, np.uint8)
    square, place = fit_square(white, size)
    assert square.shape == (size, size, 3) and max(place.width, place.height) == size
    inside = np.zeros((size, size), bool)
    inside[place.top : place.top + place.height, place.left : place.left + place.width] = True
    assert (square[inside] == 255).all() and (square[~inside] == 0).all()
    margins = [place.left, size - place.width - place.left, place.top, size - place.height - place.top]
    assert min(margins) >= 0 and max(margins[1] - margins[0], margins[3] - margins[2]) <= 1
    np.testing.assert_array_equal(unfit_square(square, place), white)


def test_a_square_of_the_longer_side_changes_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    square, place = fit_square(noise, 64)
    np.testing.assert_array_equal(square[12:52], noise)
    np.testing.assert_array_equal(unfit_square(square, place), noise)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="round floats"):
        fit_square(np.zeros((4, 4, 3), np.float32), 8)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        fit_square(np.zeros((4, 4, 3), np.uint8), 0)
    _, place = fit_square(np.zeros((4, 4, 3), np.uint8), 8)
    with pytest.raises(ValueError, match="the square is 7 by 7"):
        unfit_square(np.zeros((7, 7, 3), np.uint8), place)


# Scores


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_its_definition(a: str, b: str) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = a[i - 1] == b[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    assert edit_distance(a, b) == distance(len(a), len(b))


def test_similarity_is_that_of_tokbench() -> None:
    assert similarity("gas", "Please") == pytest.approx(0.33333333333333337, abs=1e-15)  # from its published log
    assert similarity("Word", "word") == 0.75 and similarity("", "word") == 0 and similarity("", "") == 1


def test_scale_is_that_of_tokbench() -> None:
    """Two words of ICDAR 2015 with the ratio in TokBench's log: a wide box, and one that is taller than wide."""
    assert text_scale((27, 17, 106, 47), "Please", (1280, 720)) == pytest.approx(0.010286458333333333)
    assert text_scale((678, 74, 737, 135), "197", (1280, 720)) == pytest.approx(61 / 3 / 1280)


def test_bins_are_half_open() -> None:
    bins = find_bins("text-256-v1")
    assert [bins.index(x) for x in (0.0199, 0.02, 0.03, 0.0399, 0.04, 0.99, 1.0)] == [None, 0, 1, 1, 2, 2, None]
    assert all(list(b.edges) == sorted(set(b.edges)) and b.source for b in BINS.values())
    assert find_bins("face-512-v1").edges != find_bins("face-512-v2").edges
    with pytest.raises(ValueError, match="Did you mean 'text-256-v1'"):
        find_bins("text-256")


def test_macro_is_the_mean_of_filled_bins() -> None:
    bins = Bins("mine", (0.1, 0.2, 0.3, 1.0), "a test")
    rows = [
        {"file": "a", "scale": 0.1, "t_acc": 1.0},
        {"file": "a", "scale": 0.15, "t_acc": 0.0},
        {"file": "b", "scale": 0.15, "t_acc": 0.0},
        {"file": "b", "scale": 0.5, "t_acc": 1.0},
        {"file": "b", "scale": 0.05, "t_acc": 1.0},
    ]
    found = summarise(rows, "t_acc", bins)
    assert [(b.count, b.mean) for b in found.scores] == [(3, 1 / 3), (0, None), (1, 1.0)]
    assert found.macro == pytest.approx(2 / 3) and found.filled == 2
    assert found.micro == pytest.approx(3 / 5) and (found.count, found.pictures, found.outside) == (5, 2, 1)
    assert summarise(rows[::-1], "t_acc", bins) == found
    alone = summarise(rows[:2], "t_acc", bins)
    assert alone.micro_interval is None and alone.macro_interval is None
    nothing = summarise([], "t_acc", bins)
    assert nothing.macro is None and nothing.micro is None and nothing.count == 0


def test_intervals_are_of_pictures_not_of_words() -> None:
    """100 words in 2 pictures, all right in one and all wrong in the other, say as little as 2 words do."""
    rows = [{"file": file, "scale": 0.5, "t_acc": float(file == "a")} for file in "ab" for _ in range(50)]
    wide = summarise(rows, "t_acc", "text-256-v1").micro_interval
    assert (wide.low, wide.high) == (0, 1)
    spread = [row | {"file": f"{row['file']}{i}"} for i, row in enumerate(rows)]
    narrow = summarise(spread, "t_acc", "text-256-v1").micro_interval
    # Two standard deviations of a mean of 100 throws of a coin: 0.5 +- 0.098.
    assert 0.37 < narrow.low < 0.43 and 0.57 < narrow.high < 0.63
    assert summarise(spread, "t_acc", "text-256-v1", seed=1).micro_interval != narrow


def test_rows_without_a_score_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 has no 't_acc'"):
        summarise([{"file": "a", "scale": 0.1}], "t_acc", "text-256-v1")
    with pytest.raises(ValueError, match="of a, has t_acc nan"):
        summarise([{"file": "a", "scale": 0.1, "t_acc": float("nan")}], "t_acc", "text-256-v1")
    with pytest.raises(ValueError, match="these are of none"):
        summarise_text([], "text-256-v1")


def test_rows_say_what_was_read() -> None:
    page = np.zeros((20, 100, 3), np.uint8)
    page[:, 50:] = 255
    words = [Word((0, 0, 50, 20), "dark", 0.1), Word((50, 0, 100, 20), "Light", 0.1, True, {"height": 20})]
    reader = Shade()
    fidelity = TextFidelity(reader)
    grey = np.full_like(page, 120)
    first, second = fidelity.score(page, grey, words, "page.png")
    assert first["readable"] and not second["readable"]
    assert (first["read_original"], first["read"], first["t_acc"]) == ("dark", "grey", 0.0)
    assert first["t_ned"] == pytest.approx(similarity("grey", "dark"))
    assert second["clipped"] and second["tags"] == {"height": 20} and second["file"] == "page.png"
    assert fidelity.names == ("T-ACC[shade]", "T-NED[shade]")
    assert refine([first, second]) == [first]
    assert json.loads(json.dumps([first, second])) == [first, second]

    before = reader.looked_at
    same = fidelity.score(page, page, words, "page.png")
    assert reader.looked_at == before, "a word of an original is read once, and so is what equals it"
    scores = summarise_text(same, "text-256-v1", refined=True)
    assert scores["T-ACC[shade]"].micro == 1.0 and scores["T-NED[shade]"].macro == 1.0
    assert scores["T-ACC[shade]"].count == 1


def test_pictures_that_do_not_fit_are_refused() -> None:
    fidelity, page = TextFidelity(Shade()), np.zeros((20, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="reconstruction of x.png has 20 by 20 pixels, the original 40 by 20"):
        fidelity.score(page, page[:, :20], [], "x.png")
    with pytest.raises(ValueError, match="float64"):
        fidelity.score(page, page / 255, [])
    with pytest.raises(ValueError, match="x.png: the box .* is outside of the picture of 40 by 20"):
        fidelity.score(page, page, [Word((41, 0, 50, 9), "word", 0.1)], "x.png")


def test_a_crop_is_rounded_outwards() -> None:
    page = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    np.testing.assert_array_equal(crop(page, (2.6, 1.0, 5.2, 4.0)), page[1:4, 2:6])


# Readers


def test_ours_is_read(tmp_path: Path) -> None:
    file = ours(
        tmp_path,
        entry(
            WORD,
            {"box": [0, 0, 10, 10], "text": None},
            {"box": [0, 0, 10, 10], "text": "no", "legible": False},
            {"box": [0, 0, 10, 10], "text": "x"},
            {"box": [90, 40, 110, 60], "text": "edge", "tags": {"height": 8}},
        ),
    )
    found = open_text(tmp_path)
    assert (len(found), found.words, found.ignored, found.clipped) == (1, 2, 3, 1)
    (image,) = found
    assert image.words[0] == Word((10, 10, 40, 20), "word", 30 / 4 / 100)
    assert image.words[1].box == (90, 40, 100, 50) and image.words[1].tags == {"height": 8}
    assert image.pixels().shape == (50, 100, 3)
    assert open_text(file, tmp_path).fingerprint == found.fingerprint
    other = ours(tmp_path, entry(WORD | {"text": "Word"}))
    assert open_text(other).fingerprint != found.fingerprint


def test_tokbench_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "img_10.jpg", 1280, 720)
    word = {"bbox": [27, 17, 106, 47], "rec": "Please", "ratio": 0.0123}
    image = {"file_name": "img_10.jpg", "height": 720, "width": 1280, "annotations": [word]}
    (tmp_path / "ic15.json").write_text(json.dumps([image], indent=2))
    (found,) = open_text(tmp_path, tmp_path / "images")
    assert found.words == (Word((27, 17, 106, 47), "Please", 0.0123),) and found.size == (1280, 720)


def test_icdar_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "img_1.jpg")
    picture(tmp_path / "img_2.png")
    lines = "\ufeff10,10,40,12,40,20,10,18,a,b\r\n0,0,9,0,9,9,0,9,###\r\n"
    (tmp_path / "gt_img_1.txt").write_bytes(lines.encode())
    (tmp_path / "gt_img_2.txt").write_text('10, 10, 40, 20, "It\'s"\n20 20 30 30 "two"\n')
    found = open_text(tmp_path)
    assert [word.text for image in found for word in image.words] == ["a,b", "It's", "two"]
    assert found.images[0].words[0].box == (10, 10, 40, 20) and found.ignored == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([entry(WORD), "{"], "line 2: no JSON"),
        ([entry(WORD), "", "[]"], "line 3: there is a list where an object is"),
        ([entry(WORD, width="100")], "line 1: 'width' is a number of pixels, got '100'"),
        ([{"file": "a.png", "width": 100, "height": 50}], "line 1: no 'words', a list of words; there is: file"),
        ([entry({"text": "word"})], r"line 1, words\[0\]: no 'box'"),
        ([entry(WORD, {"box": [1, 2, 3], "text": "word"})], r"line 1, words\[1\]: 'box' is 4 numbers, got \[1, 2, 3\]"),
        ([entry(WORD | {"box": [40, 10, 10, 20]})], r"line 1, words\[0\]: the box .* has no area"),
        (
            [entry(WORD | {"box": [100, 10, 140, 20]})],
            r"line 1, words\[0\]: the box .* is outside of the picture of 100",
        ),
        ([entry(WORD | {"text": 3})], r"line 1, words\[0\]: 'text' is the word, or null"),
        ([entry(WORD | {"ratio": 0})], r"line 1, words\[0\]: 'ratio' is a number above 0"),
        ([entry("word")], r"line 1: words\[0\] is an object, got 'word'"),
        ([entry(WORD), entry(WORD, file="b.png")], "line 2: there is no picture .*b.png"),
        ([entry(WORD), entry(WORD)], "has the picture a.png twice"),
        ([entry()], "annotates no legible word"),
        (["", ""], "line 1: the file holds no entry"),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path: Path, lines: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"annotations.jsonl.*{said}"):
        open_text(ours(tmp_path, *lines))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"file_name": 1}', "line 1: the file is a JSON list"),
        ('[\n {"file_name": "a.png"},\n {"file_name" "b.png"}\n]', "line 2: no 'width'"),
        ('[\n\n {"file_name" "b.png"}\n]', "line 3: no JSON"),
        ("[\n]", "line 1: the file holds no entry"),
        ("[\n3\n]", "line 2: there is a int"),
    ],
)
def test_the_line_of_a_json_list_is_named(tmp_path: Path, text: str, said: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json, {said}"):
        open_text(tmp_path / "a.json")


def test_the_line_of_an_icdar_file_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "img_1.jpg")
    (tmp_path / "gt_img_1.txt").write_text("10,10,40,10,40,20,10,20,good\n10,10,40,10,word\n")
    with pytest.raises(ValueError, match="gt_img_1.txt, line 2: a line is x1,y1"):
        open_text(tmp_path)
    (tmp_path / "gt_img_1.txt").write_bytes(b"10,10,40,10,40,20,10,20,good\n10,10,40,10,40,20,10,20,\xe9t\xe9\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        open_text(tmp_path)
    (tmp_path / "img_1.jpg").unlink()
    with pytest.raises(ValueError, match="there are 0 pictures"):
        open_text(tmp_path)


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    found = open_text(ours(tmp_path, entry(WORD)))
    picture(tmp_path / "a.png", 50, 100)
    with pytest.raises(ValueError, match="50 by 100 pixels, its annotation says 100 by 50"):
        found.images[0].pixels()
    with pytest.raises(ValueError, match="there is no file or folder"):
        open_text(tmp_path / "nowhere")
    (tmp_path / "annotations.jsonl").unlink()
    with pytest.raises(ValueError, match="holds 0 files of annotations"):
        open_text(tmp_path)


# Recognisers


def test_a_missing_recogniser_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'parseq'"):
        text_recogniser("parsec")
    with pytest.raises(ValueError, match="a file can be given for parseq"):
        text_recogniser("pp-ocr", "weights.onnx")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="install the program tesseract-ocr"):
        text_recogniser("tesseract")
    monkeypatch.setenv("DOCTR_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="python-doctr|parseq-56125471.pt and put it there"):
        text_recogniser("parseq")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tokenizers-vis\[ocr\]'"):
        text_recogniser("pp-ocr")


@needs_ocr
def test_the_weights_are_in_the_wheel() -> None:
    """Nothing is downloaded: the file is one that pip put there."""
    from importlib.metadata import files

    path = PPOCR().path
    assert path.resolve() in {Path(file.locate()).resolve() for file in files("rapidocr")}


@needs_ocr
def test_ppocr_reads_as_rapidocr_does() -> None:
    """One crop at a time: in a batch, RapidOCR pads a crop to the longest of its neighbours."""
    from rapidocr import RapidOCR
    from rapidocr.ch_ppocr_rec.typings import TextRecInput

    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Rec.rec_batch_num": 1,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    looks = [Look(7), Look(9, 0.3, 10.0), Look(13, 0.5), Look(30, 1.0, -20.0)]
    texts = [
        "Pencil",
        "ELEVEN",
        "a-b.c,d",
        "a rather long line of several words",
        "%",
        "longer-than-320-pixels,48-high",
    ]
    crops = [render_word(text, look) for text in texts for look in looks]
    read = engine._load_rec_model()  # without what RapidOCR does to whole pages
    theirs = read(TextRecInput(img=[pixels[:, :, ::-1] for pixels in crops], return_word_box=False))
    ours = PPOCR().read(crops)
    assert ours == list(theirs.txts)
    assert PPOCR().read(crops[::-1]) == ours[::-1] and PPOCR().read(crops[3:4]) == ours[3:4]
    assert PPOCR().read([]) == []
    assert "Pencil" in ours and len(set(ours)) > len(texts), "some are read wrongly, so that equality says something"


@needs_ocr
def test_scores_fall_along_the_ladder() -> None:
    """Rendered words at the sizes 512 (as they are) to 64: T-ACC and T-NED fall at each step."""
    page, words = render_page(Look(24), count=12)
    boxes = [Word(tuple(map(float, w["box"])), w["text"], text_scale(w["box"], w["text"], (512, 512))) for w in words]
    fidelity = TextFidelity(text_recogniser())
    exact, near = [], []
    for size in (512, 256, 160, 128, 64):
        rows = fidelity.score(page, unfit_square(*fit_square(page, size)), boxes, "page")
        found = summarise_text(rows, "text-coarse-v1", refined=True)
        exact.append(found["T-ACC[PP-OCRv6-rec-small]"].micro)
        near.append(found["T-NED[PP-OCRv6-rec-small]"].micro)
    assert exact[0] == near[0] == 1.0
    assert all(a >= b for a, b in pairwise(exact)) and all(a > b for a, b in pairwise(near[1:])), (exact, near)
    assert exact[-1] < 0.2


@needs_ocr
def test_photographs_of_text(shared: Path) -> None:
    found = open_text(shared / "data" / "text-eval")
    assert (len(found), found.words, found.ignored, found.clipped) == (76, 330, 458, 0)
    fidelity = TextFidelity(text_recogniser())
    few = sorted(found, key=lambda image: -max(word.scale for word in image.words))[:12]
    scores = []
    for size in (1024, 512, 256, 128):
        rows = []
        for image in few:
            pixels = image.pixels()
            rows += fidelity.score(pixels, unfit_square(*fit_square(pixels, size)), image.words, image.file)
        scores.append(summarise_text(rows, "text-coarse-v1", refined=True)["T-ACC[PP-OCRv6-rec-small]"].micro)
    assert scores[0] == 1.0, "pictures of 1024 pixels in a square of 1024 are themselves"
    assert all(a > b for a, b in pairwise(scores)) and scores[1] > 0.8 and scores[-1] < 0.4, scores
