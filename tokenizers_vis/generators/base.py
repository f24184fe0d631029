"""What every model of token sequences is: the law of an image's tokens given its class.

Letters: b batch, n tokens, k codebooks, p positions of all tokens, m positions at hand, s ids at one position, d width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokenizers_vis.generators.backbone import Backbone
from tokenizers_vis.generators.codes import Codes
from tokenizers_vis.generators.sampling import Sampling


@dataclass(frozen=True)
class Space:
    """What there is to model: images of ``max_tokens`` tokens with ids of ``codebook_sizes``, in so many classes.

    A label is from 0 to classes; ``classes`` itself stands for no class, which guidance needs.
    """

    codebook_sizes: tuple[int, ...]
    max_tokens: int
    classes: int

    def __post_init__(self) -> None:
        if not self.codebook_sizes or min(self.codebook_sizes) < 2 or self.max_tokens < 1 or self.classes < 0:
            raise ValueError(
                f"codebook_sizes are 2 or more, max_tokens 1 or more and classes 0 or more, got "
                f"{self.codebook_sizes}, {self.max_tokens} and {self.classes}"
            )


class TokenModel(nn.Module, ABC):
    """Abstract. A class vector, a vector for each position, ``Codes`` to read and guess ids by, and a ``Backbone``.

    options: what ``draw`` can be asked for.
    """

    options: ClassVar[type[Sampling]] = Sampling

    def __init__(self, *, space: Space, backbone: Backbone, codes: Codes) -> None:
        super().__init__()
        self.space, self.backbone, self.codes = space, backbone, codes
        self.length = space.max_tokens * codes.per_token
        self.classes = nn.Embedding(space.classes + 1, backbone.width)
        self.places = nn.Parameter(0.02 * torch.randn(self.length, backbone.width))
        nn.init.normal_(self.classes.weight, std=0.02)

    @classmethod
    def kinds(cls) -> Mapping[str, type[TokenModel]]:
        """The models that a config may name by ``kind``."""
        from tokenizers_vis.generators import MODELS

        return MODELS

    @abstractmethod
    def loss(self, ids: Tensor, labels: Tensor, progress: float) -> Tensor:
        """What is trained: mean cross-entropy of a token in nats, a scalar. Draws from torch's global generator.

        ids: b n k, all tokens. labels: b. progress: the part of the run that is done, from 0 to 1.
        """

    @abstractmethod
    def log_prob(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids: b n k, labels: b -> b n, float32: log p of each token in nats; their sum is that of the image.

        Where the model has no exact one, an estimate from fixed random draws whose mean is a lower bound.
        """

    @abstractmethod
    def draw(self, labels: Tensor, n: int, options: Sampling, uniform: Tensor, prefix: Tensor | None) -> Tensor:
        """labels: b -> ids: b n k, int64.

        uniform: b and ``randoms(options)``. prefix: b m k with m < n, tokens that are given and stay.
        """

    @abstractmethod
    def randoms(self, options: Sampling) -> tuple[int, ...]:
        """The shape of the random numbers that one image takes."""

    @abstractmethod
    def forward_passes(self, n: int, options: Sampling, given: int = 0) -> int:
        """How often ``draw`` runs the backbone for n tokens, some of them given. Guidance doubles rows, not runs."""

    def check_prefix(self, given: int) -> None:
        """Raises ``ValueError`` for a number of given tokens that this model cannot go on from."""

    def extra_repr(self) -> str:
        return f"codebook_sizes={self.space.codebook_sizes}, max_tokens={self.space.max_tokens}"


def with_unconditional(labels: Tensor, scales: list[float], nothing: int) -> Tensor:
    """labels: b -> b, or 2 b with as many of no class after them, where any step is guided."""
    if all(scale == 1 for scale in scales):
        return labels
    return torch.cat([labels, torch.full_like(labels, nothing)])


def last_guided(scales: list[float]) -> int:
    """The last step whose scale is not 1, or -1. After it the unconditional rows are of no use."""
    return max((step for step, scale in enumerate(scales) if scale != 1), default=-1)
