"""The canvas: images of any shape fit its square, what it reads it can paint again."""

from __future__ import annotations

import pytest
import torch

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.canvas import Canvas, Pixels, fit

WIDE = torch.arange(12.0).div(11).expand(3, 4, 12)  # 4 x 12, brightness grows to the right


def test_crop_keeps_the_middle():
    assert torch.equal(fit(WIDE, 4, "crop"), WIDE[:, :, 4:8])
    assert torch.equal(fit(WIDE.mT, 4, "crop"), WIDE.mT[:, 4:8])
    # Enlarged twofold: still the middle.
    big = fit(WIDE, 8, "crop")
    assert big.shape == (3, 8, 8)
    torch.testing.assert_close(big.mean(), WIDE[:, :, 4:8].mean(), atol=1e-3, rtol=0)


def test_pad_keeps_all_between_grey():
    image = fit(WIDE, 12, "pad")
    assert torch.equal(image[:, 4:8], WIDE)
    assert (image[:, :4] == 0.5).all() and (image[:, 8:] == 0.5).all()
    assert torch.equal(fit(WIDE.mT, 12, "pad"), image.mT)
    odd = fit(torch.ones(3, 3, 6), 6, "pad")[0, :, 0]  # 3 grey rows cannot be halved
    assert odd.tolist() in ([0.5, 1, 1, 1, 0.5, 0.5], [0.5, 0.5, 1, 1, 1, 0.5])
    small = fit(WIDE, 6, "pad")
    assert small.shape == (3, 6, 6) and (small[:, [0, 1, 4, 5]] == 0.5).all() and (small[:, 2:4] != 0.5).all()


def test_exact_stretches():
    image = fit(WIDE, 6, "exact")
    assert image.shape == (3, 6, 6)
    torch.testing.assert_close(image.mean(), WIDE.mean(), atol=1e-3, rtol=0)
    assert (image[:, :, 1:] > image[:, :, :-1]).all()
    torch.testing.assert_close(fit(WIDE.mT, 6, "exact"), image.mT)


@pytest.mark.parametrize("how", ["crop", "pad", "exact"])
@pytest.mark.parametrize("size", [(9, 9), (5, 30), (30, 5), (1, 40), (40, 1), (1, 1), (9, 10), (63, 64), (300, 7)])
def test_every_shape_fits(how, size):
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    image = fit(pixels, 9, how)
    assert image.shape == (3, 9, 9) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    torch.testing.assert_close(fit(pixels.float() / 255, 9, how), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(fit(pixels.double() / 255, 9, how), image, rtol=0, atol=1e-6)
    if size == (9, 9):
        assert torch.equal(image, pixels.float() / 255)


def test_a_flat_picture_stays_flat():
    for how in ("crop", "exact"):
        torch.testing.assert_close(fit(torch.full((3, 37, 50), 0.3), 16, how), torch.full((3, 16, 16), 0.3))


def test_the_canvas_chooses_how_and_the_call_may_choose_otherwise():
    canvas = build(Canvas, {"kind": "pixels", "size": 12, "resize": "pad"})
    assert isinstance(canvas, Pixels) and canvas.image_size == 12
    assert torch.equal(canvas.fit(WIDE), fit(WIDE, 12, "pad"))
    assert torch.equal(canvas.fit(WIDE, "exact"), fit(WIDE, 12, "exact"))
    assert torch.equal(build(Canvas, {"kind": "pixels", "size": 12}).fit(WIDE), fit(WIDE, 12, "crop"))
    with pytest.raises(ValueError, match="resize is one of crop, pad, exact; got 'stretch'"):
        canvas.fit(WIDE, "stretch")
    with pytest.raises(ConfigError, match="resize is one of"):
        build(Canvas, {"kind": "pixels", "size": 12, "resize": "stretch"})


def test_pixels_read_and_paint_are_inverse():
    canvas, images = Pixels(size=4), torch.rand(2, 3, 4, 4)
    assert torch.equal(canvas.read(images), canvas.target(images))
    assert canvas.read(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]
    torch.testing.assert_close(canvas.paint(canvas.target(images)), images)
    assert canvas.paint(torch.tensor([3.0])).item() == 2.0  # not clamped


def test_a_very_long_picture_is_cut_before_it_is_scaled():
    image = torch.rand(3, 2, 4000)
    seen = Pixels(size=16).fit(image)
    assert seen.shape == (3, 16, 16)
    # The middle 2 x 2 pixels, with what the bicubic filter sees around them.
    torch.testing.assert_close(seen, Pixels(size=16).fit(image[:, :, 1990:2010]))
