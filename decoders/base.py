"""What every decoder is: codes in, a picture on its canvas out, and a training loss.

Letters: b batch, n tokens, d width of a code; y is b c h w in the canvas' own space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class DecoderLoss(NamedTuple):
    """The result of one training pass.

    loss: scalar, what the decoder itself minimises.
    estimate: b c h w, the picture it would give now, with gradient: for losses on pictures. A one-pass decoder's is its
        output; a flow decoder's is the clean picture that its velocity points at.
    weight: b, how far the estimate deserves a loss on pictures: 1, or less where it was made from much noise.
    """

    loss: Tensor
    estimate: Tensor
    weight: Tensor


class Decoder(nn.Module, ABC):
    """Abstract. ``lengths`` (b, int64) says how many leading tokens of each image count; None is all.

    ``one_pass`` says whether a picture takes one evaluation of the network; the others take ``steps`` of them.
    ``side`` is the height and width of y, for a canvas that fits; None where it is any.
    ``tables`` names what in its state has a row for each token.
    """

    tables: ClassVar[tuple[str, ...]] = ()

    dim: int
    max_tokens: int
    one_pass: bool
    side: int | None = None

    @classmethod
    def kinds(cls) -> Mapping[str, type[Decoder]]:
        """The decoders that a config may name by ``kind``."""
        from tokenizers_vis.decoders import DECODERS

        return DECODERS

    @abstractmethod
    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        """codes: b n d. target: b c h w, from ``canvas.target``."""

    @abstractmethod
    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        """codes: b n d -> y: b c h w. Raises ``ValueError`` for a sampling option that it does not take."""

    def check_codes(self, codes: Tensor) -> None:
        if codes.ndim != 3 or codes.shape[-1] != self.dim or not 1 <= codes.shape[1] <= self.max_tokens:
            raise ValueError(
                f"{type(self).__name__} takes codes b n {self.dim} with n from 1 to {self.max_tokens}, "
                f"got {tuple(codes.shape)}"
            )
