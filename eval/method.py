"""What every method of reconstruction is: uint8 pictures in, pictures of the same sizes out, with what they cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


class Reconstruction(NamedTuple):
    """What a method makes of one picture.

    pixels: uint8 h w 3, of the size of the original.
    nbytes: of the true file, or of the ids packed without a header; None where nothing is stored.
    bits: n Σ log2 K for the ids of a tokenizer, 8 nbytes for a file; None where nothing is stored.
    encode_seconds, decode_seconds: of this picture, its share of a batch; None where it takes no coding. Fitting a
        picture into a tokenizer's square is not in them.
    ids: n k, int64 on the CPU, where the method is a tokenizer of discrete tokens.
    peak_bytes: of memory, the method's weights and what its batch took beyond them; None where it is not measured.
    """

    pixels: np.ndarray
    nbytes: int | None
    bits: float | None
    encode_seconds: float | None
    decode_seconds: float | None
    ids: torch.Tensor | None = None
    peak_bytes: int | None = None


class Method(ABC):
    """Abstract. ``label`` names it in tables; ``kind`` is tokenizer, codec, resize, identity or folder."""

    label: str
    kind: str

    def prepare(self, names: Sequence[str] = ()) -> None:  # noqa: B027 - most methods lack nothing
        """Before the first picture: gets what the method needs, and finds out what is missing.

        names: of all pictures that will come. Raises ``ValueError`` for weights that cannot be had, a codec that this
        Pillow lacks, or names without a reconstruction.
        """

    def release(self) -> None:  # noqa: B027 - most methods hold nothing
        """Lets go of what it loaded; it is loaded again when it is asked for."""

    @abstractmethod
    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        """images: uint8 h w 3 each, sizes may differ; names: theirs. The result is the same however they are batched.

        Raises ``ValueError`` for other arrays, and what ``prepare`` raises.
        """

    def describe(self) -> dict[str, Any]:
        """Facts for tables, plain values: label, kind, and what only this kind has."""
        return {"label": self.label, "kind": self.kind}


def check_images(images: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Raises ``ValueError`` that names the picture which is no uint8 array h w 3."""
    if len(images) != len(names):
        raise ValueError(f"each picture has a name: got {len(images)} pictures and {len(names)} names")
    for image, name in zip(images, names, strict=True):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            got = f"{image.dtype} {image.shape}" if hasattr(image, "dtype") else type(image).__name__
            raise ValueError(f"{name}: a method takes uint8 arrays h w 3, got {got}; round floats to 8 bit first")
        if image.size == 0:
            raise ValueError(f"{name} has no pixels: shape {image.shape}")


def some_of(names: Sequence[str]) -> str:
    """The first five, for messages."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
