"""Pictures of any shape through tokenizers of one: fit into a black square and back, as TokBench does.

https://arxiv.org/abs/2505.18142, and its ``resize_rec.py``. The picture is scaled by Lanczos until its longer side is
the square's, up or down, and pasted in the middle; on the way back the same area is cut out and scaled by Lanczos to
the size it had. Nothing is encoded as a file in between. What the two steps cost alone, without a tokenizer, is
TokBench's row "Resize", the most that any tokenizer of that size can reach.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image


class Placement(NamedTuple):
    """Where a picture lies in its square, in pixels of the square, and the (w, h) that it had."""

    left: int
    top: int
    width: int
    height: int
    original: tuple[int, int]


def fit_square(picture: np.ndarray, size: int) -> tuple[np.ndarray, Placement]:
    """picture: uint8 h w 3 -> uint8 size size 3, black around it, and where it lies.

    Raises ``ValueError`` for another kind of picture, or a size below 1.
    """
    check_picture(picture, "the picture to fit into a square")
    if size < 1:
        raise ValueError(f"the side of the square is at least 1 pixel, got {size}")
    place = placement(picture.shape[1], picture.shape[0], size)
    w, h = place.width, place.height
    square = np.zeros((size, size, 3), np.uint8)
    square[place.top : place.top + h, place.left : place.left + w] = _lanczos(picture, w, h)
    return square, place


def placement(width: int, height: int, size: int) -> Placement:
    """Where a picture of these sides lies in a square of side ``size``."""
    longer = max(height, width)
    # Ceiling division in integers: in floats, 500 * (256 / 500) may come to 256.00000000000006, and the picture to 257.
    w, h = -(-width * size // longer), -(-height * size // longer)
    return Placement((size - w) // 2, (size - h) // 2, w, h, (width, height))


def unfit_square(square: np.ndarray, place: Placement) -> np.ndarray:
    """The way back. square: uint8 s s 3, of the size it was fitted into -> uint8 h w 3, as large as the original.

    Raises ``ValueError`` when the square is smaller than what lies in it.
    """
    check_picture(square, "the square")
    bottom, right = place.top + place.height, place.left + place.width
    if square.shape[0] < bottom or square.shape[1] < right:
        raise ValueError(
            f"the picture lies in the square up to ({right}, {bottom}), but the square is {square.shape[1]} by "
            f"{square.shape[0]}; give it back in the size that fit_square made"
        )
    return _lanczos(square[place.top : bottom, place.left : right], *place.original)


def check_picture(picture: np.ndarray, what: str) -> None:
    """Raises ``ValueError`` unless picture is uint8 h w 3, not empty."""
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{what} is a uint8 array h w 3, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise ValueError(
            f"{what} is a uint8 array h w 3, got {picture.shape} of {picture.dtype}; round floats in [0, 1] to 8 bits "
            "first: (x * 255).round()"
        )


def _lanczos(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
