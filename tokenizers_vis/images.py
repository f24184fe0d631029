"""What a user may hand in (path, PIL image, array, tensor, list of these) as tensors 3 h w, and the way back.

Letters: b batch, h height, w width. A colour tensor is 3 h w, uint8 or float32 in [0, 1]. Colour profiles are not
applied: the numbers in the file are taken as sRGB, as every common image data set is read.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")

# How far outside [0, 1] a float picture may lie: resampling and half precision overshoot by this much.
_TOLERANCE = 1e-3

# EXIF orientation -> what makes the picture upright. 1 is upright already.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# warnings.catch_warnings changes state of the whole process; data loaders open files from many threads.
_OPEN_LOCK = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be read, or a value that is no image."""


def load_image(image: Any, *, max_pixels: int = 200_000_000) -> Tensor:
    """One image as a tensor 3 h w: uint8, or float32 in [0, 1] where floats were given.

    image: one of
      - a path. The file's first frame, upright by its EXIF orientation.
      - a PIL image of any mode, treated as a file is. Transparency is laid over white; 16-bit grey (mode I is read as
        such) is scaled to 8 bits.
      - a numpy array h w, h w 1 (grey), h w 2 (grey, alpha), h w 3 or h w 4: uint8, uint16, or float in [0, 1].
      - a tensor 3 h w or 1 h w: uint8, or float in [0, 1]. It stays on its device.
    max_pixels: an image file or PIL image with more is refused by its header, before it is decoded. Pillow's own
      limit, ``2 * PIL.Image.MAX_IMAGE_PIXELS``, holds as well.

    Raises ``ImageError`` that names the file or the form, what is wrong, and what to do.
    """
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, "the array")
    if isinstance(image, Image.Image):
        return _from_pil(image, "the PIL image", max_pixels)
    if isinstance(image, (str, os.PathLike)):
        return _from_file(Path(image), max_pixels)
    raise ImageError(
        f"an image is a path, a PIL image, a numpy array h w 3 or a tensor 3 h w; got {type(image).__name__}"
    )


def load_images(images: Any) -> list[Tensor]:
    """One or many images as a list of tensors 3 h w, each as ``load_image`` gives it; sizes may differ.

    images: one image in any form, a tensor b 3 h w, an array b h w 3, or a list or tuple of these.

    Raises ``ImageError``, also for an empty list or batch.
    """
    if not isinstance(images, (list, tuple)):
        loaded = [load_image(image) for image in _split_batch(images)]
    else:
        loaded = []
        for index, item in enumerate(images):
            try:
                loaded += [load_image(image) for image in _split_batch(item)]
            except ImageError as error:
                raise ImageError(f"image {index} of {len(images)}: {error}") from error
    if not loaded:
        raise ImageError("there is no image in what was given; hand in at least one")
    return loaded


def find_images(path: str | Path) -> list[Path]:
    """The image files below a folder, sorted; a path to a file gives that file.

    A file is an image by its suffix, in any case: .jpg .jpeg .png .webp .bmp .tif .tiff .gif .avif. Hidden files and
    folders are skipped; links to folders are followed.

    Raises ``ImageError`` when the path is missing or the folder holds no image.
    """
    path = Path(path)
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ImageError(f"there is no file or folder {path}")
    found, seen = [], set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would otherwise be walked for ever
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(folder, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not found:
        raise ImageError(f"the folder {path} holds no image file ({' '.join(SUFFIXES)})")
    return sorted(found)


def to_pil(images: Tensor) -> Image.Image | list[Image.Image]:
    """A tensor 3 h w as a PIL image, or b 3 h w as a list of them.

    images: uint8, or float, of which everything outside [0, 1] is clamped. Values are rounded, not cut off.

    Raises ``ImageError`` for another shape or dtype, or NaN.
    """
    if not isinstance(images, Tensor):
        raise ImageError(f"to_pil takes a tensor 3 h w or b 3 h w, got {type(images).__name__}")
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        raise ImageError(f"to_pil takes 3 h w or b 3 h w, got {tuple(images.shape)}")
    images = images.detach()
    if images.is_floating_point():
        if images.isnan().any():
            raise ImageError("to_pil: the images hold NaN; look for the step that made it")
        images = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise ImageError(f"to_pil takes uint8, or float in [0, 1]; got {images.dtype}")
    if images.ndim == 4:
        return [Image.fromarray(array) for array in rearrange(images, "b c h w -> b h w c").cpu().contiguous().numpy()]
    return Image.fromarray(rearrange(images, "c h w -> h w c").cpu().contiguous().numpy())


def _split_batch(images: Any) -> Iterator[Any]:
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        yield from images
    else:
        yield images


def _from_file(path: Path, max_pixels: int) -> Tensor:
    # os.path, because Path.is_file raises on a name that is too long.
    if os.path.isdir(path):
        raise ImageError(f"{path} is a folder, not an image; find_images lists the images in it")
    if not os.path.isfile(path):
        raise ImageError(f"there is no file {path}")
    # A damaged file makes Pillow's readers raise nearly anything (OSError, SyntaxError, struct.error, ...).
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes)")
        with _OPEN_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            opened = Image.open(path)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: {error} Shrink it first") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image in a format that Pillow reads") from error
    except Exception as error:
        raise ImageError(f"{path} cannot be read: {error}") from error
    with opened:
        return _from_pil(opened, str(path), max_pixels)


def _from_pil(image: Image.Image, where: str, max_pixels: int) -> Tensor:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{where} is {width} x {height}, {width * height} pixels; the limit is {max_pixels}. "
            "Shrink it first, or raise max_pixels"
        )
    if width * height == 0:
        raise ImageError(f"{where} has no pixels ({width} x {height})")
    try:
        image.load()
        array = _pil_to_array(_upright(image), where)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{where} is damaged and cannot be decoded: {error}") from error
    return _from_array(array, where)


def _upright(image: Image.Image) -> Image.Image:
    # Only called once the image is loaded: TIFF files turn themselves while loading and then drop the tag.
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block is no reason to refuse the pixels, which are whole
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _pil_to_array(image: Image.Image, where: str) -> np.ndarray:
    """h w, h w 2, h w 3 or h w 4; uint8, uint16 or float32."""
    if image.mode.startswith("I"):
        # convert("RGB") would cut everything above 255 to white.
        grey = np.asarray(image)
        low, high = int(grey.min()), int(grey.max())
        if low < 0 or high > 65535:
            raise ImageError(
                f"{where} (mode {image.mode}) runs from {low} to {high}; 16-bit grey is 0 to 65535: scale it"
            )
        grey = grey.astype(np.uint16)
        clear = image.info.get("transparency")
        return np.where(grey == clear, np.uint16(65535), grey) if isinstance(clear, int) else grey
    if image.mode == "F":
        return np.asarray(image)
    if image.mode in ("L", "RGB", "LA", "RGBA") and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode == "La":  # the only mode without a way to RGBA
        return np.asarray(image.convert("LA"))
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _from_array(array: np.ndarray, where: str) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        raise ImageError(
            f"{where} has shape {array.shape}; an array is h w, h w 1, h w 2, h w 3 or h w 4: channels come last"
            + ("; load_images takes a batch" if array.ndim == 4 else "")
        )
    if array.size == 0:
        raise ImageError(f"{where} has no pixels: shape {array.shape}")
    if array.dtype.kind == "f":
        _check_range(float(array.min()), float(array.max()), where)
        array = array.astype(np.float32).clip(0, 1)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"{where} holds {array.dtype}; an array is uint8, uint16, or float in [0, 1]")
    if array.shape[-1] in (2, 4):
        array = _over_white(array[..., :-1], array[..., -1:])
    pixels = torch.from_numpy(np.array(rearrange(array, "h w c -> c h w"), order="C"))
    return pixels if len(pixels) == 3 else repeat(pixels, "1 h w -> 3 h w").contiguous()


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    if colour.dtype != np.uint8:
        return colour * alpha + (1 - alpha)
    alpha = alpha.astype(np.uint16)  # the largest sum, 255 * 255 + 127, still fits
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _from_tensor(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        hint = "; load_images takes a batch" if image.ndim == 4 else ""
        if image.ndim == 3 and image.shape[-1] == 3:
            hint = "; rearrange h w 3 to 3 h w"
        raise ImageError(f"the tensor has shape {tuple(image.shape)}; one image is 3 h w or 1 h w{hint}")
    if image.numel() == 0:
        raise ImageError(f"the tensor has no pixels: shape {tuple(image.shape)}")
    if image.is_floating_point():
        low, high = image.detach().aminmax()
        _check_range(low.item(), high.item(), "the tensor")
        image = image.float().clamp(0, 1)
    elif image.dtype != torch.uint8:
        raise ImageError(f"the tensor holds {image.dtype}; an image is uint8, or float in [0, 1]")
    return image if image.shape[0] == 3 else repeat(image, "1 h w -> 3 h w").contiguous()


def _check_range(low: float, high: float, where: str) -> None:
    if math.isnan(low) or math.isnan(high):
        raise ImageError(f"{where} holds NaN; float images run from 0 to 1. Look for the step that made it")
    if low >= -_TOLERANCE and high <= 1 + _TOLERANCE:
        return
    if low >= -1 - _TOLERANCE and high <= 1 + _TOLERANCE:
        remedy = "if it runs from -1 to 1, give (x + 1) / 2"
    elif low >= 0 and high <= 255:
        remedy = "if it runs from 0 to 255, give x / 255 or make it uint8"
    else:
        remedy = "undo its normalisation, or clamp it, before handing it in"
    raise ImageError(f"{where} runs from {low:.4g} to {high:.4g}; float images run from 0 to 1: {remedy}")
