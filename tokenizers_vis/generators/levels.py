"""Several tokens in one pass: level by level (ResTok, https://arxiv.org/abs/2601.03955) or group by group (DetailFlow, https://arxiv.org/abs/2505.21473).

How many tokens come in each pass is data: ``levels = [1, 1, 1, 1, 4, 8, 16, 32, 64]`` is ResTok's generator (9 passes
for 128 tokens), eight ones and then eights is DetailFlow's (8 + (N - 8) / 8 passes). All ones are token by token.

A level is asked for by query vectors, one for each of its positions, that see all tokens of the levels before. In
training one pass holds the tokens and, after them, the queries of all levels. Both papers have their own ways to ask:
ResTok leaves its queries in the sequence for later levels to see, DetailFlow asks at the tokens of the group before.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

import torch
from torch import Tensor, nn

from tokenizers_vis.generators.backbone import Backbone, KeyValues
from tokenizers_vis.generators.base import Space, TokenModel, last_guided, with_unconditional
from tokenizers_vis.generators.codes import Codes
from tokenizers_vis.generators.fused import FusedBackbone
from tokenizers_vis.generators.sampling import Pair, Sampling
from tokenizers_vis.quantizers.base import check_option


class Levels(TokenModel):
    """levels: the tokens of each pass; they add up to all tokens. The tokens of one level are drawn apart."""

    def __init__(self, *, space: Space, backbone: Backbone, codes: Codes, levels: tuple[int, ...]) -> None:
        super().__init__(space=space, backbone=backbone, codes=codes)
        check_option(
            bool(levels) and min(levels) >= 1 and sum(levels) == space.max_tokens,
            f"levels are numbers of 1 or more that add up to max_tokens, {space.max_tokens}",
            levels,
        )
        self.levels, self.ends = tuple(levels), tuple(accumulate(levels))
        self.query = nn.Parameter(0.02 * torch.randn(backbone.width))
        self.register_buffer("mask", level_mask(tuple(level * codes.per_token for level in levels)), persistent=False)

    def hidden(self, stream: Tensor, labels: Tensor) -> Tensor:
        """stream: b p s, all positions -> b p d, what each is guessed from."""
        x = torch.cat([self._content(stream, labels), self._queries(0, self.length, len(stream))], dim=1)
        at = torch.arange(self.length + 1, device=x.device)
        return self.backbone(x, torch.cat([at, at[1:]]), mask=self.mask)[:, 1 + self.length :]

    def loss(self, ids: Tensor, labels: Tensor, progress: float) -> Tensor:
        return -self.log_prob(ids, labels).mean()

    def log_prob(self, ids: Tensor, labels: Tensor) -> Tensor:
        n = ids.shape[1]
        # A token sees no query and no query sees its own level's tokens: what fills up the last level is not seen.
        stream = self.codes.to_stream(nn.functional.pad(ids, (0, 0, 0, self.space.max_tokens - n)))
        places = torch.arange(self.length, device=ids.device)
        log_prob = self.codes.log_prob(self.hidden(stream, labels), stream, places)
        return log_prob.unflatten(1, (-1, self.codes.per_token)).sum(dim=-1)[:, :n]

    def draw(self, labels: Tensor, n: int, options: Sampling, uniform: Tensor, prefix: Tensor | None) -> Tensor:
        b, per = len(labels), self.codes.per_token
        # Of all levels, whatever n, so that fewer tokens are a prefix of more.
        scales = options.scales(len(self.levels))[: self._passes(n)]
        last = last_guided(scales)
        first = self._passes(0 if prefix is None else prefix.shape[1])
        rows = with_unconditional(labels, scales[first:], self.space.classes)
        cache, backbone = KeyValues(1 + self.length), FusedBackbone(self.backbone)
        none = labels.new_zeros(b, 0, len(self.space.codebook_sizes))
        stream = self.codes.to_stream(none if prefix is None else prefix)
        for level in range(first, len(scales)):
            if level > last and len(rows) > b:
                rows = rows[:b]
                cache.keep(b)
            start, end = ((self.ends[level] - self.levels[level]) * per, self.ends[level] * per)
            # What was drawn last, which the cache does not hold yet, and the queries, which it shall not keep.
            known = self._content(stream.repeat(len(rows) // b, 1, 1), rows)[:, cache.filled :]
            x = torch.cat([known, self._queries(start, end, len(rows))], dim=1)
            own = torch.arange(1 + start, 1 + end, device=x.device)
            seen = torch.cat([torch.arange(1 + start, device=x.device), own + self.length])
            mask = self.mask[seen[cache.filled :]][:, seen]
            at = torch.cat([torch.arange(cache.filled, 1 + start, device=x.device), own])
            hidden = backbone(x, at, cache=cache, mask=mask)[:, -len(own) :]
            cache.filled = 1 + start
            drawn = self.codes.draw(Pair.of(hidden, b, scales[level]), own - 1, uniform[:, start:end], options)
            stream = torch.cat([stream, drawn.ids], dim=1)
        return self.codes.from_stream(stream)[:, :n]

    def randoms(self, options: Sampling) -> tuple[int, ...]:
        return (self.length, self.codes.draws)

    def forward_passes(self, n: int, options: Sampling, given: int = 0) -> int:
        return self._passes(n) - self._passes(given)

    def check_prefix(self, given: int) -> None:
        if given not in (0, *self.ends):
            raise ValueError(
                f"this generator draws levels of {self.levels} tokens, a prefix is of whole ones: "
                f"{', '.join(map(str, self.ends[:-1]))} tokens; got {given}"
            )

    def _passes(self, n: int) -> int:
        """How many levels n tokens are in."""
        return bisect_left(self.ends, n) + 1 if n else 0

    def _content(self, stream: Tensor, labels: Tensor) -> Tensor:
        """The class, and the tokens so far: b (1 + m) d."""
        return torch.cat([self.classes(labels)[:, None], self.codes.embed(stream) + self.places[: stream.shape[1]]], 1)

    def _queries(self, start: int, end: int, b: int) -> Tensor:
        return (self.query + self.places[start:end]).expand(b, -1, -1)


def level_mask(levels: tuple[int, ...]) -> Tensor:
    """Who sees whom in training: (1 + 2 p) (1 + 2 p) booleans for the class, p tokens and p queries, row sees column.

    levels: positions of each. A token sees the class and the tokens of its level and those before; a query the class,
    the tokens of levels before its own, and the queries of its own.
    """
    level = torch.arange(len(levels)).repeat_interleave(torch.tensor(levels))
    mine, other = level[:, None], level[None, :]
    p = len(level)
    mask = torch.zeros(1 + 2 * p, 1 + 2 * p, dtype=torch.bool)
    mask[:, 0] = True
    mask[1 : 1 + p, 1 : 1 + p] = other <= mine
    mask[1 + p :, 1 : 1 + p] = other < mine
    mask[1 + p :, 1 + p :] = other == mine
    return mask
