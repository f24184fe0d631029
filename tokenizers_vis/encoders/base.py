"""What every encoder is: what the canvas shows in, one vector per latent token out.

Letters: b batch, n tokens, d width of a code; x is b c h w in the canvas' own space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LengthPolicy:
    """How many leading tokens an image keeps in training (nested dropout; Rippel et al. 2014, arXiv 1402.0915).

    kind: "full" keeps all; "uniform" draws from 1 to all; "pow2" draws from 1, 2, 4 ... all; "uniform_pow2" rounds what
        "uniform" draws up to one of these.
    full: probability of keeping all, whatever the kind. A fifth of the steps shortened already makes prefixes usable;
        each further one costs quality at full length.
    per: one length per "image", or one for the whole "batch", which makes the sequences themselves shorter.
    """

    kind: Literal["full", "uniform", "pow2", "uniform_pow2"] = "full"
    full: float = 0.0
    per: Literal["image", "batch"] = "image"

    def __post_init__(self) -> None:
        if self.kind not in ("full", "uniform", "pow2", "uniform_pow2") or self.per not in ("image", "batch"):
            raise ValueError(
                f"kind is 'full', 'uniform', 'pow2' or 'uniform_pow2', per is 'image' or 'batch'; "
                f"got {self.kind!r}, {self.per!r}"
            )
        if not 0 <= self.full <= 1:
            raise ValueError(f"full is a probability from 0 to 1, got {self.full}")

    def sample(self, b: int, max_tokens: int) -> Tensor | None:
        """Lengths: b, int64 on the CPU, from torch's global generator; None when all tokens are kept."""
        if self.kind == "full":
            return None
        draws = b if self.per == "image" else 1
        choices = torch.tensor(powers_of_two(max_tokens))
        if self.kind == "pow2":
            lengths = choices[torch.randint(len(choices), (draws,))]
        else:
            lengths = torch.randint(1, max_tokens + 1, (draws,))
        if self.kind == "uniform_pow2":
            lengths = choices[torch.searchsorted(choices, lengths)]
        lengths = torch.where(torch.rand(draws) < self.full, max_tokens, lengths)
        return lengths.expand(b).contiguous()


class Encoder(nn.Module, ABC):
    """Abstract. ``nested`` says whether a prefix of the tokens is a code of its own."""

    dim: int
    max_tokens: int
    nested: bool
    lengths: LengthPolicy

    @classmethod
    def kinds(cls) -> Mapping[str, type[Encoder]]:
        """The encoders that a config may name by ``kind``."""
        from tokenizers_vis.encoders import ENCODERS

        return ENCODERS

    @abstractmethod
    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        """x: b c h w -> z: b n_tokens d, the first ``n_tokens`` latent tokens."""


def powers_of_two(max_tokens: int) -> list[int]:
    """1, 2, 4 ... and ``max_tokens`` itself as the last."""
    return [2**i for i in range((max_tokens - 1).bit_length())] + [max_tokens]
