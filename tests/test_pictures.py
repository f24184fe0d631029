from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_vis.pictures import contact_sheet

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, size=(40, 40)):
    return Image.new("RGB", size, colour)


def extent(sheet, colour):
    """left, top, right, bottom of all pixels of one colour, or None."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def test_pictures_of_every_kind_stand_in_their_grid():
    green = torch.tensor(GREEN).view(3, 1, 1).expand(3, 40, 40)
    sheet = contact_sheet([[plain(RED), green.float() * 1.2 - 0.1], [None, np.full((40, 40, 3), BLUE, np.uint8)]])
    red, green, blue = (extent(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert all(right - left == bottom - top == 96 for left, top, right, bottom in (red, green, blue))
    assert red[1] == green[1] and green[0] == blue[0] > red[2] and blue[1] > green[3]
    gap = green[0] - red[2]
    assert red[0] == red[1] == gap == sheet.width - green[2] == sheet.height - blue[3]  # even margins
    empty = np.asarray(sheet)[blue[1] : blue[3], red[0] : red[2]]
    assert (empty == 255).all()


@pytest.mark.parametrize("cell", [None, 64, 200])
def test_the_longer_side_is_the_cell_and_the_aspect_stays(cell):
    sheet = contact_sheet([[plain(RED, (120, 60)), plain(GREEN, (30, 60))]], cell=cell)
    side = cell or 120
    red, green = extent(sheet, RED), extent(sheet, GREEN)
    assert (red[2] - red[0], red[3] - red[1]) == (side, side // 2)
    assert (green[2] - green[0], green[3] - green[1]) == (side // 2, side)
    assert red[1] + red[3] == green[1] + green[3]  # centred in the row


@pytest.mark.parametrize(("background", "ink_is_dark"), [("white", True), ("#101014", False)])
def test_texts_lie_outside_the_pictures_and_can_be_read(background, ink_is_dark):
    bare = contact_sheet([[plain(RED), plain(GREEN)]], background=background)
    texts = {"columns": ["original", "8 tokens"], "captions": [["a cat", None]], "row_labels": ["one"]}
    for key, value in texts.items():
        sheet = contact_sheet([[plain(RED), plain(GREEN)]], background=background, **{key: value})
        assert sheet.width * sheet.height > bare.width * bare.height
        red = extent(sheet, RED)
        assert red[2] - red[0] == red[3] - red[1] == 96
        pixels = np.asarray(sheet).astype(int)
        assert (pixels == RED).all(-1).sum() == 96 * 96
        other = ~(pixels == RED).all(-1) & ~(pixels == GREEN).all(-1)
        ink = pixels[other & (pixels != pixels[0, 0]).any(-1)].mean(-1)
        assert len(ink) > 20
        assert ink.min() < 90 if ink_is_dark else ink.max() > 180


def test_long_texts_wrap_inside_their_cell():
    caption = "a long caption of many words " * 3 + "andoneendlesswordthatfitsnowhereatall" * 2
    sheet = contact_sheet([[plain(RED), plain(GREEN)]], captions=[[caption, ""]])
    assert sheet.width == contact_sheet([[plain(RED), plain(GREEN)]]).width
    ink = np.nonzero((np.asarray(sheet)[extent(sheet, RED)[3] :].mean(-1) < 200).any(0))[0]
    assert ink.min() >= extent(sheet, RED)[0] - 1 and ink.max() <= extent(sheet, RED)[2] + 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one"),
        ([[None]], {}, "at least one"),
        (torch.zeros(2, 3, 4, 4), {}, "tensor"),
        ([[plain(RED)]], {"columns": ["a", "b"]}, "1 columns, got 2"),
        ([[plain(RED)]], {"row_labels": []}, "1 rows, got 0"),
        ([[plain(RED)]], {"captions": [["a", "b"]]}, r"\[1\] texts; got \[2\]"),
        ([[plain(RED)]], {"cell": 0}, "at least 1"),
        ([[torch.full((3, 2, 2), torch.nan)]], {}, "NaN"),
    ],
)
def test_wrong_sheets_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(rows, **options)
