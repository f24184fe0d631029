"""The baseline that every tokenizer has to beat: the same bytes spent on a plain, small, uncompressed picture."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHANNELS = 3


class Thumbnail(NamedTuple):
    """reconstruction: b 3 h w, float32 in [0, 1]; size: (w, h) of the thumbnail in pixels, w * h * 3 bytes."""

    reconstruction: Tensor
    size: tuple[int, int]


def thumbnail(images: Tensor, n_bytes: int, *, no_fewer: bool = False) -> Thumbnail:
    """Shrinks to a thumbnail of ``n_bytes``, rounds to 8 bits, and enlarges again.

    images: b 3 h w, floats in [0, 1].
    n_bytes: what a picture may cost: one byte per channel and pixel, no header.
    no_fewer: a thumbnail of at least ``n_bytes`` instead of at most: the baseline is then never given less.

    Both ways by antialiased bicubic interpolation, clamped to [0, 1]. Raises ``ValueError`` for images of another kind,
    or fewer than 3 bytes, too few for a single pixel.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are b 3 h w, floats in [0, 1]; got {tuple(images.shape)} of {images.dtype}")
    height, width = images.shape[-2:]
    w, h = thumbnail_size(width, height, n_bytes, no_fewer=no_fewer)
    small = _resize(images.float(), (h, w))
    stored = (small * 255).round().to(torch.uint8)
    return Thumbnail(_resize(stored.float() / 255, (height, width)), (w, h))


def thumbnail_size(width: int, height: int, n_bytes: int, *, no_fewer: bool = False) -> tuple[int, int]:
    """(w, h) of the thumbnail of a width x height picture, never larger than the picture.

    One pixel of the thumbnail covers a cell of the picture. The thumbnail chosen is the one with the shortest cell
    diagonal: on photographs PSNR follows the diagonal rather than the pixel count, so 96 bytes are 5 x 6 and not the
    longish 4 x 8 for a square picture (192 bytes: 8 x 8). Of two equal ones it is the taller: photographs change more
    from top to bottom. With ``no_fewer`` it is the thumbnail of fewest pixels whose cells are no longer than that.

    Raises ``ValueError`` for too few bytes.
    """
    least = 1 if no_fewer else _CHANNELS
    if n_bytes < least:
        raise ValueError(
            f"a thumbnail of at {'least' if no_fewer else 'most'} {n_bytes} bytes: one pixel takes {_CHANNELS} bytes; "
            f"n_bytes is {least} or more" + ("" if no_fewer else ", or ask with no_fewer=True")
        )

    def diagonal(w: int, h: int) -> float:
        return (width / w) ** 2 + (height / h) ** 2

    most = max(1, n_bytes // _CHANNELS)
    fitting = [(w, min(most // w, height)) for w in range(1, min(width, most) + 1)]
    # Rounded, so that two equal diagonals are a tie; w last: the taller one.
    best = min(fitting, key=lambda size: (round(diagonal(*size), 9), size[0]))
    if not no_fewer:
        return best

    pixels = min(-(-n_bytes // _CHANNELS), width * height)
    bound = diagonal(*best) * (1 + 1e-9)
    enough = []
    for w in range(1, width + 1):
        rest = bound - (width / w) ** 2
        if rest > 0:
            h = max(-(-pixels // w), math.ceil(height / math.sqrt(rest)))
            if h <= height:
                enough.append((w, h))
    return min(enough, key=lambda size: (size[0] * size[1], round(diagonal(*size), 9), size[0]))


def _resize(x: Tensor, to: tuple[int, int]) -> Tensor:
    """b c h w in [0, 1] -> the size ``to`` (h, w)."""
    # antialias also when enlarging: it selects Pillow's bicubic kernel, which rings less than torch's own.
    return F.interpolate(x, size=to, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
