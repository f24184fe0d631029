"""Classic file codecs, through Pillow, of a picture as it is or scaled down first: their true bytes, and what is left.

At its native size no JPEG gets as small as the tokens of an image; from a smaller picture it does.
"""

from __future__ import annotations

import io
import time
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

# Pillow's format, and the options of its encoder beside quality. Chroma is at half resolution in all three.
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {"optimize": True}),
    "webp": ("WEBP", {"method": 6}),
    "avif": ("AVIF", {"speed": 6}),
}
QUALITIES = (1, 100)


class Coded(NamedTuple):
    """pixels: uint8 h w 3, of the size that was given. nbytes: of the file, headers included. Seconds with scaling."""

    pixels: np.ndarray
    nbytes: int
    encode_seconds: float
    decode_seconds: float


def check_codec(codec: str) -> None:
    """Raises ``ValueError`` when this Pillow cannot write the codec's files."""
    name = CODECS[codec][0]
    Image.init()
    if name not in Image.SAVE:
        raise ValueError(
            f"this Pillow ({PIL.__version__}) was built without {name}; Pillow's own wheels have JPEG, WebP and, from "
            f"11.3, AVIF: pip install --upgrade pillow, or leave {codec} out"
        )


def through_codec(pixels: np.ndarray, codec: str, quality: int, long_side: int | None = None) -> Coded:
    """A picture written to a file and read again.

    pixels: uint8 h w 3. codec: a key of ``CODECS``. quality: 1 to 100, the codec's own scale.
    long_side: the picture is scaled down to this first, and up again after (Lanczos, 8 bit); one that is smaller stays
        as it is.

    Raises ``ValueError`` when the codec is not at hand or cannot take the picture.
    """
    check_codec(codec)
    name, options = CODECS[codec]
    h, w = pixels.shape[:2]
    start = time.perf_counter()
    small = Image.fromarray(pixels)
    if long_side is not None and long_side < (longer := max(h, w)):
        # Rounded up, in whole numbers: no side becomes 0, and none a pixel too long by a float's last bit.
        small = small.resize((-(-w * long_side // longer), -(-h * long_side // longer)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    try:
        small.save(file, name, quality=quality, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot hold a picture of {small.width} x {small.height} pixels: {error}") from error
    encoded = time.perf_counter()
    decoded = Image.open(file).convert("RGB")
    result = np.array(decoded if small.size == (w, h) else decoded.resize((w, h), Image.Resampling.LANCZOS))
    return Coded(result, file.getbuffer().nbytes, encoded - start, time.perf_counter() - encoded)
