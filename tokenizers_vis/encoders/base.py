"""What every encoder is: what the canvas shows in, one vector per latent token out.

Letters: b batch, n tokens, d width of a code; x is b c h w in the canvas' own space.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

DRAWN = ("full", "uniform", "pow2", "uniform_pow2", "levels")  # what a mixture is made of


@dataclass(frozen=True)
class LengthPolicy:
    """How many leading tokens an image keeps in training (nested dropout; Rippel et al. 2014, arXiv 1402.0915).

    kind: "full" keeps all; "uniform" draws from 1 to all (One-D-Piece, arXiv 2501.10064); "pow2" draws from 1, 2, 4 ...
        all; "uniform_pow2" rounds what "uniform" draws up to one of these (FlexTok, arXiv 2502.13967, has all three);
        "levels" draws from ``levels``; "mixture" first draws one of these kinds by the weights in ``mixture``.
    full: probability of keeping all, whatever the kind. A fifth of the steps shortened already makes prefixes usable;
        each further one costs quality at full length.
    per: one length per "image", or one for the whole "batch", which makes the sequences themselves shorter.
    levels: the lengths of "levels", rising. ResTok's are 4, 8, 16, 32, 64 with weights 1, 2, 4, 8, 16 and full = 0.8.
    weights: how often each level is drawn, relative to the others; without them all are drawn equally often.
    mixture: how often each kind is drawn, relative to the others, such as {uniform = 1.0, pow2 = 3.0}.
    """

    kind: Literal["full", "uniform", "pow2", "uniform_pow2", "levels", "mixture"] = "full"
    full: float = 0.0
    per: Literal["image", "batch"] = "image"
    levels: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    mixture: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*DRAWN, "mixture") or self.per not in ("image", "batch"):
            raise ValueError(
                f"kind is one of {', '.join(DRAWN)}, mixture, per is 'image' or 'batch'; "
                f"got {self.kind!r}, {self.per!r}"
            )
        if not 0 <= self.full <= 1:
            raise ValueError(f"full is a probability from 0 to 1, got {self.full}")
        mixture = self.mixture or {}
        if (self.kind == "mixture") != bool(mixture):
            raise ValueError(f"kind 'mixture' alone comes with a mixture, its kinds; got {self.kind!r} and {mixture}")
        if unknown := set(mixture) - set(DRAWN):
            raise ValueError(f"a mixture is of {', '.join(DRAWN)}; got {', '.join(sorted(unknown))}")
        if ("levels" in (self.kind, *mixture)) != bool(self.levels):
            raise ValueError(f"kind 'levels' alone comes with levels, its lengths; got {self.kind!r}, {self.levels}")
        if self.levels and (self.levels[0] < 1 or any(a >= b for a, b in pairwise(self.levels))):
            raise ValueError(f"levels are lengths from 1 that rise, got {self.levels}")
        if self.weights and len(self.weights) != len(self.levels):
            raise ValueError(f"weights are one for each level; got {self.weights} for {self.levels}")
        for what, given in (("weights", self.weights), ("mixture", tuple(mixture.values()))):
            if given and not (min(given) >= 0 and 0 < sum(given) < math.inf):
                raise ValueError(f"{what}: how often each is drawn is 0 or more, of one above 0; got {given}")

    @property
    def nested(self) -> bool:
        """Whether prefixes are to become codes of their own: every kind but "full"."""
        return self.kind != "full"

    def check(self, max_tokens: int) -> None:
        """For the encoder that has it: raises ``ValueError`` for levels past the last token."""
        if self.levels and self.levels[-1] > max_tokens:
            raise ValueError(f"lengths.levels go up to max_tokens, {max_tokens}; got {self.levels}")

    def sample(self, b: int, max_tokens: int) -> Tensor | None:
        """Lengths: b, int64 on the CPU, from torch's global generator; None when all tokens are kept."""
        if not self.nested:
            return None
        draws = b if self.per == "image" else 1
        if self.mixture:
            # All kinds draw, then one of them is taken for each length.
            drawn = torch.stack([self._draw(kind, draws, max_tokens) for kind in self.mixture])
            lengths = drawn.gather(0, chosen(tuple(self.mixture.values()), draws)[None])[0]
        else:
            lengths = self._draw(self.kind, draws, max_tokens)
        lengths = torch.where(torch.rand(draws) < self.full, max_tokens, lengths)
        return lengths.expand(b).contiguous()

    def _draw(self, kind: str, draws: int, max_tokens: int) -> Tensor:
        if kind == "full":
            return torch.full((draws,), max_tokens)
        if kind == "levels":
            return torch.tensor(self.levels)[chosen(self.weights or (1.0,) * len(self.levels), draws)]
        choices = torch.tensor(powers_of_two(max_tokens))
        if kind == "pow2":
            return choices[torch.randint(len(choices), (draws,))]
        lengths = torch.randint(1, max_tokens + 1, (draws,))
        return choices[torch.searchsorted(choices, lengths)] if kind == "uniform_pow2" else lengths


class Encoder(nn.Module, ABC):
    """Abstract. ``nested`` says whether a prefix of the tokens is a code of its own.

    ``side`` is the height and width of x, for a canvas that fits; None where it is any.
    ``causal`` says whether a token depends on no later one, so that a short encoding runs a short sequence; where it is
    false training encodes all tokens, whatever the decoder is then told of them.
    ``tables`` names what in its state has a row for each token; a causal encoder that is cut or grown in these alone
    makes the same first tokens.
    """

    tables: ClassVar[tuple[str, ...]] = ()

    dim: int
    max_tokens: int
    nested: bool
    side: int | None = None
    causal: bool = False
    lengths: LengthPolicy

    @classmethod
    def kinds(cls) -> Mapping[str, type[Encoder]]:
        """The encoders that a config may name by ``kind``."""
        from tokenizers_vis.encoders import ENCODERS

        return ENCODERS

    @abstractmethod
    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        """x: b c h w -> z: b n_tokens d, the first ``n_tokens`` latent tokens."""

    def keep(self, n_tokens: int) -> None:
        """Lets nothing be learned but the tables' rows after the first ``n_tokens``, so that these tokens stay."""
        raise ValueError(f"{type(self).__name__} cannot keep its first tokens and learn more; a FlexTok encoder can")


def powers_of_two(max_tokens: int) -> list[int]:
    """1, 2, 4 ... and ``max_tokens`` itself as the last."""
    return [2**i for i in range((max_tokens - 1).bit_length())] + [max_tokens]


def chosen(weights: tuple[float, ...], draws: int) -> Tensor:
    """Places in ``weights``, each as often as its weight says: draws, int64, from torch's global generator."""
    return torch.multinomial(torch.tensor(weights, dtype=torch.float64), draws, replacement=True)
