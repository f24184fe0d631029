"""Rendered words: what is said of them is so, and the same call draws the same pixels."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tokenizers_vis.eval.text import TextFidelity, Word, open_text, summarise_text
from tokenizers_vis.eval.text_recognisers import text_recogniser
from tokenizers_vis.eval.words import HEIGHTS, Look, render_page, render_word, write_words

LOOKS = [Look(8), Look(20, 0.4), Look(32, 1.0, 15.0), Look(64, 0.2, -30.0)]


def ink(pixels: np.ndarray) -> tuple[int, int]:
    """(w, h) of what differs from the ground by more than a quarter of the greatest difference."""
    difference = np.abs(pixels[:, :, 0].astype(int) - int(pixels[0, 0, 0]))
    rows, columns = np.nonzero(difference > difference.max() / 4)
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


@pytest.mark.parametrize("height", HEIGHTS)
def test_the_height_is_that_of_a_line(height: int) -> None:
    """A capital of Aileron is 70 of its em, a line 120; p reaches down to the baseline's 20."""
    _, capital = ink(render_word("H", Look(height)))
    assert capital == pytest.approx(height * 70 / 120, abs=1)
    _, line = ink(render_word("Hp", Look(height)))
    assert capital < line <= height


@pytest.mark.parametrize("contrast", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("dark_on_light", [True, False])
def test_the_contrast_is_that_of_the_greys(contrast: float, dark_on_light: bool) -> None:
    pixels = render_word("HHH", Look(64, contrast), dark_on_light=dark_on_light).astype(float)
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all() and (pixels[:, :, 0] == pixels[:, :, 2]).all()
    ground, word = pixels[0, 0, 0], np.median(pixels[np.abs(pixels - pixels[0, 0, 0]) > contrast * 200])
    assert abs(word - ground) / 255 == pytest.approx(contrast, abs=0.01)
    assert (word < ground) == dark_on_light and (word + ground) / 2 == pytest.approx(127.5, abs=1)


def test_a_turned_word_is_turned() -> None:
    w, h = ink(render_word("HHHHHHHH", Look(24)))
    upright = ink(render_word("HHHHHHHH", Look(24, 1.0, 90.0)))
    assert upright == pytest.approx((h, w), abs=1)
    turned = render_word("HHHHHHHH", Look(24, 1.0, 30.0))
    angle = np.deg2rad(30)
    expected = (w * np.cos(angle) + h * np.sin(angle), w * np.sin(angle) + h * np.cos(angle))
    assert ink(turned) == pytest.approx(expected, abs=2)
    # Counter-clockwise: the left end is low.
    dark = turned[:, :, 0] < 128
    left, right = dark[:, : dark.shape[1] // 4], dark[:, -dark.shape[1] // 4 :]
    assert np.nonzero(left)[0].mean() > np.nonzero(right)[0].mean()


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_a_page_is_its_words(look: Look) -> None:
    page, words = render_page(look, size=512)
    again, same = render_page(look, size=512)
    np.testing.assert_array_equal(page, again)
    assert words == same and 2 <= len(words) <= 20
    other, _ = render_page(look, size=512, seed=1)
    assert (other != page).any()
    outside = np.ones(page.shape[:2], bool)
    for word in words:
        x0, y0, x1, y1 = word["box"]
        assert 0 < x0 < x1 < 512 and 0 < y0 < y1 < 512
        assert page[y0:y1, x0:x1].std() > 0 and (page[y0, x0] == page[0, 0]).all()
        assert word["tags"] == {"height": look.height, "contrast": look.contrast, "rotation": look.rotation}
        outside[y0:y1, x0:x1] = False
    assert (page[outside] == page[0, 0]).all()
    for a, b in combinations([word["box"] for word in words], 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1], "boxes do not touch"


def test_a_set_is_written_and_read(tmp_path: Path) -> None:
    table = write_words(tmp_path, heights=(10, 24), contrasts=(0.5,), rotations=(0.0,), count=5, size=256)
    found = open_text(tmp_path)
    assert len(found) == 2 and found.words == 10 and found.ignored == found.clipped == 0
    for image, height in zip(found, (10, 24), strict=True):
        page, words = render_page(Look(height, 0.5), count=5, size=256)
        np.testing.assert_array_equal(image.pixels(), page)
        assert [word.text for word in image.words] == [word["text"] for word in words]
        assert {word.tags["height"] for word in image.words} == {height}
    with pytest.raises(ValueError, match="is there already"):
        write_words(tmp_path)
    write_words(tmp_path / "again", heights=(10, 24), contrasts=(0.5,), rotations=(0.0,), count=5, size=256)
    assert (tmp_path / "again" / "annotations.jsonl").read_bytes() == table.read_bytes()
    for name in ("images/words-h10-c0.5-r0.png", "images/words-h24-c0.5-r0.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("wrong", [(3, 1.0, 0.0), (20, 0.0, 0.0), (20, 1.5, 0.0), (20, 1.0, 120.0)])
def test_a_look_that_cannot_be_is_refused(wrong: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="a word is 4 pixels high or more"):
        Look(*wrong)


def test_a_page_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="no word 64 pixels high fits on a page of 48"):
        render_page(Look(64), size=48)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime"))), reason="needs the extra ocr")
def test_clean_words_are_read() -> None:
    """Upright words from 12 pixels on: nearly all; at 6 pixels, where capitals have less than 4: fewer."""
    fidelity = TextFidelity(text_recogniser())

    def read(height: int) -> float:
        page, words = render_page(Look(height), count=20)
        boxes = [Word(tuple(map(float, word["box"])), word["text"], 0.03) for word in words]
        return summarise_text(fidelity.score(page, page, boxes), "text-256-v1")["T-ACC[PP-OCRv6-rec-small]"].micro

    assert min(read(12), read(24)) >= 0.95
    assert read(6) < 0.9
