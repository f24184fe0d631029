"""What methods are judged on: photographs, pictures with words, pictures with faces. Each a suite of numbered pictures.

A method sees a suite's pictures in one of three views: photographs resized and cropped to one size, as rFID is
measured; pictures fitted into a black square, and cut out of the reconstruction again, as TokBench does; or as they
are.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from tokenizers_vis.eval.face_set import FaceSet
from tokenizers_vis.eval.protocol import Stamp
from tokenizers_vis.eval.squares import Placement, fit_square, unfit_square
from tokenizers_vis.eval.text import TextSet
from tokenizers_vis.images import load_image, to_pil
from tokenizers_vis.sources import ImageSource

QUANTISE = "round to 8 bit"


class Item(NamedTuple):
    """One picture. i: its number in the suite. pixels: uint8 h w 3. boxes: its words or faces."""

    i: int
    name: str
    pixels: np.ndarray
    boxes: tuple[Any, ...] = ()


class Suite(ABC):
    """Abstract. ``kind`` is photos, text or faces; ``size`` is 0 where a method sees the pictures as they are."""

    kind: str
    size: int
    names: Sequence[str]

    @property
    def name(self) -> str:
        """Such as "photos@256", or "text" at native size."""
        return f"{self.kind}@{self.size}" if self.size else self.kind

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, i: int) -> Item:
        """Raises ``ValueError`` or ``OSError`` for a picture that cannot be read."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides which pictures there are and how they look, plain values."""

    @abstractmethod
    def stamp(self, dataset: str, n: int) -> Stamp:
        """Of numbers that were measured on n of its pictures, of which ``dataset`` is the hash."""

    def shown(self, pixels: np.ndarray) -> tuple[np.ndarray, Placement | None]:
        """What a method is given for a picture."""
        return pixels, None

    def restored(self, pixels: np.ndarray, place: Placement | None) -> np.ndarray:
        """What a method gave back, in the picture's own size."""
        return pixels if place is None else unfit_square(pixels, place)


@dataclass(frozen=True)
class Photos(Suite):
    """Photographs of any source. size: the shorter side is resized to it and the middle is cut out; 0 is neither.

    limit: so many at most, evenly spaced over the source.
    """

    source: ImageSource
    size: int = 256
    limit: int = 0

    kind = "photos"

    @property
    def _chosen(self) -> Sequence[int]:
        total = len(self.source)
        count = min(self.limit, total) if self.limit else total
        return range(total) if count == total else _Spaced(total, count)

    @property
    def names(self) -> Sequence[str]:
        chosen = self._chosen
        return self.source.names if isinstance(chosen, range) else [self.source.names[i] for i in chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def load(self, i: int) -> Item:
        from PIL import Image

        at = self._chosen[i]
        with Image.open(io.BytesIO(self.source.read(at))) as picture:
            pixels = to_pil(load_image(picture))
        if self.size:
            pixels = center_crop(pixels, self.size)
        return Item(i, self.source.names[at], np.array(pixels))

    def labels(self) -> list[int | str | None]:
        """The class of each picture, a number or a name; None where the source knows none."""
        labels = self.source.labels(0, len(self.source))
        return [labels[at] for at in self._chosen]

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "fingerprint": self.source.fingerprint, "size": self.size, "pictures": len(self)}

    def stamp(self, dataset: str, n: int) -> Stamp:
        if not self.size:
            return Stamp(dataset, n, quantise=QUANTISE)
        return Stamp(dataset, n, str(self.size), "center", "shorter side, bicubic, antialiased", QUANTISE)


@dataclass(frozen=True)
class Boxed(Suite):
    """Pictures with words or faces in known boxes. size: the side of the black square that they are fitted into."""

    pictures: TextSet | FaceSet
    size: int = 256

    @property
    def kind(self) -> str:
        return "text" if isinstance(self.pictures, TextSet) else "faces"

    @property
    def names(self) -> Sequence[str]:
        return [picture.file for picture in self.pictures.images]

    def boxes(self, i: int) -> tuple[Any, ...]:
        """The words or faces of a picture."""
        picture = self.pictures.images[i]
        return picture.words if isinstance(self.pictures, TextSet) else picture.faces

    def remarks(self) -> list[str]:
        """What became of annotated boxes that are not simply judged."""
        found = []
        if self.pictures.clipped:
            every = sum(len(self.boxes(i)) for i in range(len(self)))
            reach = "reaches over the edge of its" if self.pictures.clipped == 1 else "reach over the edge of their"
            found.append(f"{self.pictures.clipped} of {every} boxes {reach} picture, where it is cut off")
        if isinstance(self.pictures, TextSet) and self.pictures.ignored:
            found.append(f"{self.pictures.ignored} annotated words are not judged: illegible, or of a single character")
        return found

    def load(self, i: int) -> Item:
        picture = self.pictures.images[i]
        return Item(i, picture.file, picture.pixels(), self.boxes(i))

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "fingerprint": self.pictures.fingerprint, "size": self.size, "pictures": len(self)}

    def stamp(self, dataset: str, n: int) -> Stamp:
        fitted = "Lanczos into a black square, and back" if self.size else "none"
        size, extra = str(self.size or "native"), {"annotations": self.pictures.fingerprint[:16]}
        return Stamp(dataset, n, size, "none", fitted, QUANTISE, extra=extra)

    def shown(self, pixels: np.ndarray) -> tuple[np.ndarray, Placement | None]:
        return fit_square(pixels, self.size) if self.size else (pixels, None)


def center_crop(picture: Any, size: int) -> Any:
    """A PIL image -> size x size: the shorter side resized to it (bicubic, antialiased), the middle cut out."""
    from PIL import Image

    width, height = picture.size
    scale = size / min(width, height)
    w, h = max(size, round(width * scale)), max(size, round(height * scale))
    if (w, h) != (width, height):
        picture = picture.resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    return picture.crop((left, top, left + size, top + size))


def as_tensor(pixels: np.ndarray) -> Any:
    """uint8 h w 3 -> a tensor 3 h w, float32 in [0, 1]."""
    import torch

    return torch.from_numpy(rearrange(pixels, "h w c -> c h w").copy()).float() / 255


class _Spaced(Sequence[int]):
    """``count`` of ``total`` numbers, evenly spaced, the first one included."""

    def __init__(self, total: int, count: int) -> None:
        self.total, self.count = total, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> int:
        if not 0 <= k < self.count:
            raise IndexError(k)
        return k * self.total // self.count
