from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from tokenizers_vis.images import ImageError, find_images, load_image, load_images, to_pil

# A picture without any symmetry, so that a wrong turn or a swapped channel shows.
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PICTURE).permute(2, 0, 1)


def channels_last(tensor):
    return rearrange(tensor, "c h w -> h w c").numpy()


def forms(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    return [path, str(path), Image.fromarray(PICTURE), PICTURE, PICTURE[:, ::-1][:, ::-1], TENSOR]


def test_every_form_gives_the_same_uint8(tmp_path):
    for form in forms(tmp_path):
        loaded = load_image(form)
        assert loaded.dtype == torch.uint8 and torch.equal(loaded, TENSOR)
    assert all(torch.equal(one, TENSOR) for one in load_images(forms(tmp_path)))
    assert load_image(PICTURE).is_contiguous()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_arrays_and_tensors(dtype):
    array = (PICTURE / 255).astype(dtype)
    loaded = load_image(array)
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(channels_last(loaded), PICTURE / 255, atol=1e-3)
    if dtype != ">f4":
        assert torch.equal(load_image(torch.from_numpy(array).permute(2, 0, 1)), loaded)
    assert load_image(TENSOR.bfloat16() / 256).dtype == torch.float32


def test_a_loaded_array_is_a_copy_and_a_slight_overshoot_is_clamped():
    array = PICTURE.copy()
    array.setflags(write=False)
    load_image(array).zero_()
    assert np.array_equal(array, PICTURE)
    for overshoot in (np.array([[[-5e-4, 0.5, 1.0005]]], np.float32), torch.tensor([-5e-4, 0.5, 1.0005]).view(3, 1, 1)):
        assert load_image(overshoot).flatten().tolist() == [0, 0.5, 1]


def test_grey_becomes_three_equal_channels():
    grey = PICTURE[..., 0]
    expected = TENSOR[:1].expand(3, -1, -1)
    for form in (grey, grey[..., None], TENSOR[:1], Image.fromarray(grey)):
        assert torch.equal(load_image(form), expected)


def test_alpha_is_laid_over_white():
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7, 1) * 7
    a = alpha / 255
    expected = PICTURE * a + 255 * (1 - a)
    rgba = np.concatenate([PICTURE, alpha], -1)
    for form in (rgba, Image.fromarray(rgba)):
        assert np.abs(channels_last(load_image(form)) - expected).max() <= 0.5001
    np.testing.assert_allclose(channels_last(load_image(rgba / 255)) * 255, expected, atol=1e-3)
    la = np.concatenate([PICTURE[..., :1], alpha], -1)
    for form in (la, Image.fromarray(la)):
        assert np.abs(channels_last(load_image(form)) - expected[..., :1]).max() <= 0.5001


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    grey = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)
    expected = np.rint(grey / 257)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "a.tif")
    as_i = Image.fromarray(grey.astype(np.int32))
    assert as_i.mode == "I"
    big_endian = Image.frombytes("I;16B", (7, 5), grey.astype(">u2").tobytes())
    for form in (grey, grey.astype(">u2"), tmp_path / "a.png", tmp_path / "a.tif", as_i, big_endian):
        assert np.array_equal(load_image(form)[1].numpy(), expected)
    colour = np.stack([grey, grey[::-1], grey], -1)
    assert np.array_equal(load_image(colour)[1].numpy(), expected[::-1])
    with pytest.raises(ImageError, match="-1 to 65535"):
        load_image(Image.fromarray(grey.astype(np.int32) - (grey == 0)))


def test_a_clear_value_of_sixteen_bit_grey_becomes_white(tmp_path):
    image = Image.fromarray(np.array([[1000, 2000]], np.uint16))
    image.save(tmp_path / "a.png", transparency=1000)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.info["transparency"] == 1000
    assert load_image(tmp_path / "a.png")[0].tolist() == [[255, round(2000 / 257)]]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_has_the_right_colour(mode):
    grey = mode in ("1", "L", "LA", "La")
    colours = [(0, 0, 0), (255, 255, 255)] if grey else [(0, 0, 0), (255, 255, 255), (250, 30, 30), (20, 40, 220)]
    for colour in colours:
        image = Image.new("RGB", (4, 3), colour)
        if mode == "La":
            image = image.convert("LA").convert("La")
        elif mode == "RGBa":
            image = image.convert("RGBA").convert("RGBa")
        elif mode == "PA":
            image = image.convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
        elif mode == "LAB":
            from PIL import ImageCms

            lab = ImageCms.createProfile("LAB")
            image = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
        elif mode == "P":
            image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        else:
            image = image.convert(mode)
        assert image.mode == mode
        found = load_image(image).float().mean(dim=(1, 2))
        assert (found - torch.tensor(colour)).abs().max() <= 8, colour  # LAB of 8 bits is coarse


@pytest.mark.parametrize(
    ("suffix", "mode"), [("jpg", "CMYK"), ("jpg", "YCbCr"), ("tif", "CMYK"), ("png", "1"), ("gif", "P")]
)
def test_files_of_other_modes(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    colour = (255, 255, 255) if mode == "1" else (200, 60, 40)
    Image.new("RGB", (16, 16), colour).convert(mode).save(path)
    assert (load_image(path).float().mean(dim=(1, 2)) - torch.tensor(colour)).abs().max() < 12


def test_palettes_and_clear_colours_of_files(tmp_path):
    index = Image.new("P", (2, 1))
    index.putpalette([10, 20, 30, 200, 100, 50])
    index.putdata([0, 1])
    cases = {
        "plain.png": ({}, [[10, 20, 30], [200, 100, 50]]),
        "one.png": ({"transparency": 1}, [[10, 20, 30], [255, 255, 255]]),
        "many.png": ({"transparency": bytes([255, 0])}, [[10, 20, 30], [255, 255, 255]]),
        "one.gif": ({"transparency": 0}, [[255, 255, 255], [200, 100, 50]]),
    }
    for name, (options, expected) in cases.items():
        index.save(tmp_path / name, **options)
        assert channels_last(load_image(tmp_path / name))[0].tolist() == expected, name
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    rgb.save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert channels_last(load_image(tmp_path / "rgb.png"))[0].tolist() == [[255, 255, 255], [4, 5, 6]]


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, suffix, orientation):
    # How a camera held in this orientation stores the upright picture.
    stored = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: np.rot90(PICTURE),
        7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PICTURE, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(
        path, exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    assert torch.equal(load_image(path), TENSOR)
    with Image.open(path) as opened:
        assert torch.equal(load_image(opened), TENSOR)


def test_a_broken_exif_block_does_not_hide_the_picture(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    assert torch.equal(load_image(tmp_path / "a.png"), TENSOR)


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    with pytest.raises(ImageError, match=r"bomb\.png.*2500000000 pixels.*limit"):
        load_image(path)
    # Between Pillow's warning and Pillow's error the limit is ours, and no warning leaks.
    path.write_bytes(png_header(12_000, 10_000))
    with pytest.raises(ImageError, match=r"12000 x 10000, 120000000 pixels; the limit is 100000000"):
        load_image(path, max_pixels=100_000_000)
    for form in forms(tmp_path)[:3]:
        assert load_image(form, max_pixels=35).shape == (3, 5, 7)
        with pytest.raises(ImageError, match="7 x 5, 35 pixels; the limit is 34"):
            load_image(form, max_pixels=34)


def test_every_cut_and_every_unreadable_file_is_named(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "bmp", "webp", "tif"):
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(noise).save(whole)
        data = whole.read_bytes()
        for keep in (1, 10, 30, len(data) // 2, int(len(data) * 0.9)):
            path = tmp_path / f"cut.{suffix}"
            path.write_bytes(data[:keep])
            with pytest.raises(ImageError, match=rf"cut\.{suffix}"):
                load_image(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"cut\.tif is empty"):
        load_image(path)
    path.write_bytes(b"this is text")
    with pytest.raises(ImageError, match=r"cut\.tif is not an image"):
        load_image(path)
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    for missing in (tmp_path / "missing.png", "x" * 5000, "a\0b"):
        with pytest.raises(ImageError, match="there is no file"):
            load_image(missing)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.linspace(-1, 1, 12).view(3, 2, 2), r"-1 to 1.*\(x \+ 1\) / 2"),
        (torch.linspace(0, 255, 12).view(3, 2, 2), r"0 to 255.*x / 255"),
        (torch.linspace(-2.1, 2.6, 12).view(3, 2, 2), "normalisation"),
        (torch.full((3, 2, 2), torch.inf), "inf"),
        (torch.tensor([0.0, torch.nan, 1.0]).view(3, 1, 1), "NaN"),
        (np.full((2, 2, 3), np.nan), "NaN"),
        (np.linspace(0, 255, 12).reshape(2, 2, 3), "x / 255"),
        (torch.zeros(2, 2), r"\(2, 2\)"),
        (torch.zeros(4, 3, 2, 2), "load_images"),
        (torch.zeros(4, 4, 3), "rearrange"),
        (torch.zeros(3, 0, 2), "no pixels"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "int64"),
        (np.zeros((3, 8, 8)), "channels come last"),
        (np.zeros((2, 8, 8, 3)), "load_images"),
        (np.zeros(3), r"\(3,\)"),
        (np.zeros((0, 2, 3)), "no pixels"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.zeros((2, 2, 3), bool), "bool"),
        (Image.new("RGB", (0, 3)), "no pixels"),
        (Image.fromarray(np.full((2, 2), 3.0, np.float32)), "3 to 3"),
        (None, "NoneType"),
        (b"bytes", "bytes"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    for load in (load_image, load_images):
        if load is load_images and getattr(wrong, "ndim", 0) == 4:
            continue
        with pytest.raises(ImageError, match=message):
            load(wrong)


def test_batches_and_lists(tmp_path):
    batch = torch.stack([TENSOR, TENSOR.flip(2)])
    for form in (batch, rearrange(batch, "b c h w -> b h w c").numpy(), [TENSOR, TENSOR.flip(2)], tuple(batch)):
        first, second = load_images(form)
        assert torch.equal(first, TENSOR) and torch.equal(second, TENSOR.flip(2))
    assert [one.shape[0] for one in load_images([batch, *forms(tmp_path)])] == [3] * 8
    assert [tuple(one.shape) for one in load_images([TENSOR, TENSOR[:, :2]])] == [(3, 5, 7), (3, 2, 7)]
    for empty in ([], (), torch.zeros(0, 3, 2, 2)):
        with pytest.raises(ImageError, match="at least one"):
            load_images(empty)
    with pytest.raises(ImageError, match=r"image 1 of 2.*missing\.png"):
        load_images([TENSOR, tmp_path / "missing.png"])
    with pytest.raises(ImageError, match=r"image 0 of 1.*list"):
        load_images([[TENSOR]])


def test_find_images(tmp_path):
    names = ["b.PNG", "a/c.jpeg", "a/d/e.Tiff", "f.avif", ".hidden.png", ".git/g.png", "a/notes.txt", "png"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = find_images(tmp_path)
    assert found == sorted(tmp_path / name for name in names[:4]) == find_images(str(tmp_path))
    assert find_images(tmp_path / "a" / "notes.txt") == [tmp_path / "a" / "notes.txt"]
    with pytest.raises(ImageError, match="there is no file or folder"):
        find_images(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no image"):
        find_images(tmp_path / "empty")


def test_to_pil_is_the_way_back():
    for tensor in (TENSOR, TENSOR / 255, (TENSOR / 255).double(), (TENSOR / 255).requires_grad_()):
        picture = to_pil(tensor)
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), PICTURE)
    pictures = to_pil(torch.stack([TENSOR, TENSOR.flip(2)]))
    assert len(pictures) == 2 and np.array_equal(np.asarray(pictures[1]), PICTURE[:, ::-1])
    values = torch.tensor([-3.0, 0.499 / 255, 0.501 / 255, 7.0]).expand(3, 1, 4)
    assert np.asarray(to_pil(values))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert to_pil(torch.zeros(0, 3, 2, 2)) == []


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 2), torch.zeros(1, 2, 2), torch.zeros(3, 0, 2), torch.zeros(3, 2, 2).long(), PICTURE]
)
def test_to_pil_refuses(wrong):
    with pytest.raises(ImageError, match="to_pil takes"):
        to_pil(wrong)
    with pytest.raises(ImageError, match="NaN"):
        to_pil(torch.full((3, 2, 2), torch.nan))
