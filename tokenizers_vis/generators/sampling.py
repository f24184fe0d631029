"""From logits to ids: options, guided logits, and draws that depend on nothing but their own random number.

Letters: b batch, m positions, v ids to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizers_vis.generators.guidance import Constant, Guidance
from tokenizers_vis.heads import truncate
from tokenizers_vis.quantizers.base import check_option


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The options of one call.

    temperature: divides the logits; 0 takes the likeliest id.
    top_k: of the likeliest so many remain; 0 is all. top_p: the likeliest remain that together hold this probability.
    guidance: a scale, 1 is none; or how it changes from step to step.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float | Guidance = 1.0

    def __post_init__(self) -> None:
        check_option(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature is 0 or more", self.temperature
        )
        check_option(self.top_k >= 0, "top_k is 0 (all) or more", self.top_k)
        check_option(0 < self.top_p <= 1, "top_p is above 0, at most 1", self.top_p)
        if not isinstance(self.guidance, Guidance):
            object.__setattr__(self, "guidance", Constant(float(self.guidance)))

    def scales(self, steps: int) -> list[float]:
        """The guidance scale of each step."""
        return [self.guidance.at(step, steps) for step in range(steps)]


class Pair(NamedTuple):
    """What a model says with the class and without it. unconditional: None where no guidance is wanted."""

    conditional: Tensor
    unconditional: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, rows: Tensor, b: int, scale: float) -> Pair:
        """rows: of b conditional rows, and maybe as many unconditional ones after them."""
        return cls(rows[:b], rows[b:] if len(rows) > b and scale != 1 else None, scale)

    def map(self, function: object) -> Pair:
        """The same of both, such as logits of hidden states."""
        second = None if self.unconditional is None else function(self.unconditional)
        return Pair(function(self.conditional), second, self.scale)

    def guided(self) -> Tensor:
        """u + scale (c - u), in float32."""
        c = self.conditional.float()
        if self.unconditional is None:
            return c
        u = self.unconditional.float()
        # Ids that are ruled out are -inf in both, and stay so.
        return torch.where(c.isneginf(), c, u + self.scale * (c - u))


class Drawn(NamedTuple):
    """ids: ..., int64. log_prob: ..., float32, of each under the guided law, untempered and with its tail."""

    ids: Tensor
    log_prob: Tensor


def choose(logits: Tensor, uniform: Tensor, options: Sampling) -> Drawn:
    """The ids at which the cumulative probability passes the uniform numbers.

    logits: ... v, guided. uniform: ..., float64 in [0, 1).
    """
    if options.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        kept = truncate(logits / options.temperature, top_k=options.top_k, top_p=options.top_p)
        # In float64, or 2^16 small numbers would not add up to 1. Apple's GPUs have none.
        where = "cpu" if logits.device.type == "mps" else logits.device
        total = kept.softmax(dim=-1).to(where, torch.float64).cumsum(dim=-1)
        target = uniform.to(where)[..., None] * total[..., -1:]
        # The first id whose sum is above the target: one of no probability never is.
        ids = torch.searchsorted(total, target, right=True).squeeze(-1).to(logits.device)
    return Drawn(ids, logits.log_softmax(dim=-1).gather(-1, ids[..., None]).squeeze(-1))


def uniforms(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """b *shape, float64 in [0, 1): row i follows from seeds[i] alone, on every device."""
    rows = [np.random.default_rng(seed).random(shape) for seed in seeds]
    # Below 1 by more than rounding, so that 1 times a sum is never the sum itself.
    return torch.from_numpy(np.minimum(np.stack(rows), 1 - 1e-12))
