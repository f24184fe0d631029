"""Where pictures live: how images become what an encoder reads and a decoder aims at, and back.

Pixels, VAE latents and VQGAN codes differ only here. Images at this door are b 3 h w, floats in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Resize = Literal["crop", "pad", "exact"]


class Canvas(nn.Module, ABC):
    """Abstract. ``image_size`` is the height and width of the square images that ``read`` takes and ``paint`` gives.

    ``read_size`` is that of images of which the encoder sees all there is. ``pictures_only`` says that training has no
    y to aim at here (``views``), so that losses on pictures do it all.
    """

    image_size: int
    resize: Resize
    pictures_only: bool = False

    @classmethod
    def kinds(cls) -> Mapping[str, type[Canvas]]:
        """The canvases that a config may name by ``kind``."""
        from tokenizers_vis.decoders import CANVASES

        return CANVASES

    @property
    def read_size(self) -> int:
        return self.image_size

    def fit(self, image: Tensor, resize: Resize | None = None) -> Tensor:
        """One image 3 h w of any size, uint8 or float in [0, 1] -> 3 s s, float32 in [0, 1]; s is ``image_size``.

        crop: the shorter side becomes s and the middle is kept. pad: the longer side becomes s, grey fills the rest.
        exact: both sides become s, whatever the aspect. Bicubic with antialiasing; raises ``ValueError``.
        """
        return self._fitted(image, resize, self.image_size)

    def see(self, image: Tensor, resize: Resize | None = None) -> Tensor:
        """The image as an encoder is given it: ``fit``, but s is ``read_size``. ``read`` takes either."""
        return self._fitted(image, resize, self.read_size)

    def _fitted(self, image: Tensor, resize: Resize | None, size: int) -> Tensor:
        how = resize or self.resize
        if how not in get_args(Resize):
            raise ValueError(f"resize is one of {', '.join(get_args(Resize))}; got {how!r}")
        return fit(image, size, how)

    @property
    def sides(self) -> tuple[int, int | None]:
        """Height and width of x, and of y (None where it has no y of its own)."""
        return self.image_size, self.image_size

    @abstractmethod
    def read(self, images: Tensor) -> Tensor:
        """images -> x, what the encoder sees."""

    @abstractmethod
    def target(self, images: Tensor) -> Tensor:
        """images -> y, what the decoder aims at."""

    def views(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """images -> x and y, for training, which needs both. y is None where only pictures can be compared."""
        return self.read(images), self.target(images)

    @abstractmethod
    def paint(self, y: Tensor) -> Tensor:
        """y -> images, not clamped: the gradient of a loss on pictures passes through."""


class Pixels(Canvas):
    """The pixels themselves. span: "signed" shows them in [-1, 1], "unit" in [0, 1] as they come.

    size: of the pictures that are decoded. read_size: of what the encoder reads; 0 is ``size``. With a smaller one the
    decoder draws larger pictures than the encoder has seen.
    """

    def __init__(
        self,
        *,
        size: int,
        read_size: int = 0,
        resize: Resize = "crop",
        span: Literal["signed", "unit"] = "signed",
    ) -> None:
        super().__init__()
        if not 0 <= read_size <= size:
            raise ValueError(f"read_size is at most size {size}, or 0 for the same; got {read_size}")
        self.image_size, self.resize, self.span = size, resize, span
        self._read_size = read_size or size

    @property
    def read_size(self) -> int:
        return self._read_size

    @property
    def sides(self) -> tuple[int, int]:
        return self.read_size, self.image_size

    def reads_like(self, other: Canvas) -> bool:
        """Whether an encoder sees the same in both."""
        if not isinstance(other, Pixels):
            return False
        return (self.read_size, self.resize, self.span) == (other.read_size, other.resize, other.span)

    def read(self, images: Tensor) -> Tensor:
        if self.read_size < self.image_size == images.shape[-1]:
            sides = (self.read_size, self.read_size)
            images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)
        return self._spanned(images)

    def target(self, images: Tensor) -> Tensor:
        return self._spanned(images)

    def _spanned(self, images: Tensor) -> Tensor:
        return images if self.span == "unit" else images * 2 - 1

    def paint(self, y: Tensor) -> Tensor:
        return y if self.span == "unit" else (y + 1) / 2


def fit(image: Tensor, size: int, how: Resize) -> Tensor:
    """See ``Canvas.fit``."""
    h, w = image.shape[-2:]
    if how == "crop" and max(h, w) > 8 * min(h, w):
        # Of a very long picture only the middle is seen: scaling up all of it would take gigabytes.
        kept = 8 * min(h, w)
        image = image[:, max(0, (h - kept) // 2) :, max(0, (w - kept) // 2) :][:, :kept, :kept]
        h, w = image.shape[-2:]
    image = image.float() / 255 if not image.is_floating_point() else image.float()
    if how == "exact":
        new_h, new_w = size, size
    else:
        scale = size / (min(h, w) if how == "crop" else max(h, w))
        new_h, new_w = max(1, round(h * scale)), max(1, round(w * scale))
    if (new_h, new_w) != (h, w):
        image = F.interpolate(image[None], (new_h, new_w), mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (new_h - size) // 2, (new_w - size) // 2
    if how == "crop":
        return image[:, top : top + size, left : left + size].contiguous()
    # Negative offsets are the margins to fill.
    margins = (-left, size - new_w + left, -top, size - new_h + top)
    return F.pad(image, margins, value=0.5) if any(margins) else image
