"""Masked generation: all tokens at once, the surest kept, the rest guessed again (MaskGIT, Chang et al. 2022, https://arxiv.org/abs/2202.04200).

Training hides a random part of the tokens and asks for them; every token sees every other. Sampling starts with all
hidden and unmasks more of them in each round, by how likely they were and some noise.

1d-tokenizer's MaskGIT ranks by the raw logit of the id that was drawn, and draws ids at the annealed temperature too.
Here, as in the paper, ids are drawn at a temperature of their own and ranked by log probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokenizers_vis.generators.backbone import Backbone
from tokenizers_vis.generators.base import Space, TokenModel, with_unconditional
from tokenizers_vis.generators.codes import Codes
from tokenizers_vis.generators.sampling import Pair, Sampling, uniforms
from tokenizers_vis.quantizers.base import check_option


@dataclass(frozen=True, kw_only=True)
class MaskedSampling(Sampling):
    """steps: rounds of unmasking. choice_temperature: of the noise in which tokens stay; it falls to 0 by the last."""

    steps: int = 12
    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option(self.steps >= 1, "steps is 1 or more", self.steps)
        check_option(self.choice_temperature >= 0, "choice_temperature is 0 or more", self.choice_temperature)


class Masked(TokenModel):
    """Every token given some of the others. A shorter sample is the start of a whole one, and takes as long."""

    options: ClassVar[type[Sampling]] = MaskedSampling

    def __init__(self, *, space: Space, backbone: Backbone, codes: Codes) -> None:
        super().__init__(space=space, backbone=backbone, codes=codes)
        self.mask = nn.Parameter(0.02 * torch.randn(backbone.width))

    def hidden(self, stream: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """stream: b p s, of which those that are masked, b p booleans, do not count -> b p d."""
        read = torch.where(masked[..., None], self.mask.to(self.places.dtype), self.codes.embed(stream))
        x = torch.cat([self.classes(labels)[:, None], read + self.places], dim=1)
        return self.backbone(x, torch.arange(x.shape[1], device=x.device), causal=False)[:, 1:]

    def loss(self, ids: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Mean over the masked tokens; how many are masked follows from the arccos of a uniform number."""
        stream = self.codes.to_stream(ids)
        u, order = torch.rand(len(ids), device=ids.device), torch.rand(len(ids), self.length, device=ids.device)
        counts = (self.length * torch.acos(u) / (math.pi / 2)).round().clamp_min(1)
        masked = order.argsort(dim=1) < counts[:, None]
        log_prob = self.codes.log_prob(self.hidden(stream, masked, labels), stream, self._all(ids))
        return -(log_prob * masked).sum() / masked.sum() * self.codes.per_token

    def log_prob(self, ids: Tensor, labels: Tensor) -> Tensor:
        """With a uniformly random number of tokens masked, as in a random order; a lower bound in the mean."""
        stream = self.codes.to_stream(ids)
        random = uniforms(range(len(ids)), (self.length + 1,)).float().to(ids.device)
        counts = (random[:, :1] * self.length).floor() + 1
        masked = random[:, 1:].argsort(dim=1) < counts
        log_prob = self.codes.log_prob(self.hidden(stream, masked, labels), stream, self._all(ids))
        # Each masked one stands for all, of which it is one of ``counts``.
        log_prob = log_prob * masked * (self.length / counts)
        return log_prob.unflatten(1, (-1, self.codes.per_token)).sum(dim=-1)

    def draw(self, labels: Tensor, n: int, options: Sampling, uniform: Tensor, prefix: Tensor | None) -> Tensor:
        b, device = len(labels), labels.device
        rounds = self._rounds(options, 0 if prefix is None else prefix.shape[1])
        scales = options.scales(options.steps)
        ids = torch.zeros(b, self.space.max_tokens, len(self.space.codebook_sizes), dtype=torch.int64, device=device)
        masked = torch.ones(b, self.length, dtype=torch.bool, device=device)
        if prefix is not None:
            ids[:, : prefix.shape[1]] = prefix
            masked[:, : prefix.shape[1] * self.codes.per_token] = False
        stream = self.codes.to_stream(ids)
        for step, left in enumerate(rounds):
            rows = with_unconditional(labels, scales[step : step + 1], self.space.classes)
            repeats = len(rows) // b
            hidden = self.hidden(stream.repeat(repeats, 1, 1), masked.repeat(repeats, 1), rows)
            pair = Pair.of(hidden, b, scales[step])
            drawn = self.codes.draw(pair, self._all(ids), uniform[:, step, :, :-1], options)
            stream = torch.where(masked[..., None], drawn.ids, stream)
            warmth = options.choice_temperature * (1 - (step + 1) / options.steps)
            noise = gumbel(uniform[:, step, :, -1].to(device, torch.float32))
            masked = still_masked(drawn.log_prob + warmth * noise, masked, left)
        return self.codes.from_stream(stream)[:, :n]

    def randoms(self, options: Sampling) -> tuple[int, ...]:
        return (options.steps, self.length, self.codes.draws + 1)

    def forward_passes(self, n: int, options: Sampling, given: int = 0) -> int:
        return len(self._rounds(options, given))

    def _rounds(self, options: Sampling, given: int) -> list[int]:
        """How many positions are still masked after each round; at least one is unmasked in each."""
        left = self.length - given * self.codes.per_token
        rounds = []
        for step in range(options.steps):
            left = masked_count(step, options.steps, self.length - given * self.codes.per_token, left)
            rounds.append(left)
            if left == 0:
                break
        return rounds

    def _all(self, ids: Tensor) -> Tensor:
        return torch.arange(self.length, device=ids.device)


def masked_count(step: int, steps: int, length: int, masked: int) -> int:
    """How many of ``length`` positions are masked after round ``step`` (from 0), of those that are masked before it.

    floor(length 2 / pi arccos((step + 1) / steps)), but at most 1 less than before and at least 1; 0 after the last.
    """
    if step == steps - 1 or masked <= 1:
        return 0
    count = math.floor(length * math.acos((step + 1) / steps) / (math.pi / 2))
    return max(1, min(masked - 1, count))


def still_masked(confidence: Tensor, masked: Tensor, count: int) -> Tensor:
    """b p booleans: the ``count`` least confident of those that are masked. confidence: b p."""
    ranks = confidence.masked_fill(~masked, float("inf")).argsort(dim=1).argsort(dim=1)
    return ranks < count


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers."""
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
