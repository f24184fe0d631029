"""Models that go token by token: what the raster and the random-order one share, which is all of sampling.

Letters: b batch, n tokens, k codebooks, p positions of all tokens, m positions at hand, s ids at one position, d width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tokenizers_vis.generators.backbone import KeyValues, causal_after
from tokenizers_vis.generators.base import TokenModel, last_guided, with_unconditional
from tokenizers_vis.generators.fused import FusedBackbone
from tokenizers_vis.generators.sampling import Pair, Sampling


class Sequential(TokenModel):
    """Abstract. The law of a position follows from the class and the positions before it."""

    @abstractmethod
    def prompt(self, labels: Tensor) -> Tensor:
        """labels: b -> b 1 d, the input that the first position is guessed from."""

    @abstractmethod
    def read(self, stream: Tensor, start: int) -> Tensor:
        """stream: b m s, the ids at positions start, start + 1 ... -> b m d, inputs that the next are guessed from."""

    def session(self, labels: Tensor, length: int | None = None) -> Session:
        """An open sequence that can be read into, step by step. length: room, in positions; all when None."""
        return Session(self, labels, self.length if length is None else length)

    def hidden(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids: b n k -> b p d, what each position is guessed from, in one pass without a cache."""
        stream = self.codes.to_stream(ids)
        x = torch.cat([self.prompt(labels), self.read(stream[:, :-1], 0)], dim=1)
        return self.backbone(x, torch.arange(x.shape[1], device=x.device))

    def log_prob(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.codes.to_stream(ids)
        places = torch.arange(stream.shape[1], device=ids.device)
        log_prob = self.codes.log_prob(self.hidden(ids, labels), stream, places)
        return log_prob.unflatten(1, (-1, self.codes.per_token)).sum(dim=-1)

    def draw(self, labels: Tensor, n: int, options: Sampling, uniform: Tensor, prefix: Tensor | None) -> Tensor:
        length = n * self.codes.per_token
        given = None if prefix is None else self.codes.to_stream(prefix)
        first = 0 if given is None else given.shape[1]
        # Of the whole sequence, whatever n, so that fewer tokens are a prefix of more.
        scales = options.scales(self.length)[:length]
        last = last_guided(scales)
        session = self.session(with_unconditional(labels, scales[first:], self.space.classes), length)
        stream, hidden = [], session.hidden
        if given is not None:
            stream.append(given)
            hidden = session.advance(given)
        for place in range(first, length):
            pair = Pair.of(hidden[:, -1:], len(labels), scales[place])
            at = torch.tensor([place], device=labels.device)
            stream.append(self.codes.draw(pair, at, uniform[:, place, None], options).ids)
            if place >= last:
                session.keep(len(labels))
            if place + 1 < length:
                hidden = session.advance(stream[-1])
        return self.codes.from_stream(torch.cat(stream, dim=1))

    def randoms(self, options: Sampling) -> tuple[int, ...]:
        return (self.length, self.codes.draws)

    def forward_passes(self, n: int, options: Sampling, given: int = 0) -> int:
        """The class alone, then each position but the last; given tokens are one pass together."""
        return (n - given) * self.codes.per_token + (given > 0)


class Session:
    """A batch of sequences that were read up to some position, and the cache that reading on needs.

    labels: of the sequences, in any mixture of classes and none. hidden: rows 1 d, what position 0 is guessed from.
    """

    def __init__(self, model: Sequential, labels: Tensor, length: int) -> None:
        self.model, self.rows, self.length = model, len(labels), length
        self._cache, self._backbone = KeyValues(length), FusedBackbone(model.backbone)
        self.hidden = self._run(model.prompt(labels))

    @property
    def filled(self) -> int:
        """Positions read so far."""
        return self._cache.filled - 1

    def advance(self, stream: Tensor) -> Tensor:
        """stream: b m s, the ids at the next m positions -> rows m d, what each position after these is guessed from.

        b is the number of rows or divides it: then the same ids are read with each part of the labels, as with a class
        and with none.
        """
        start = self.filled
        if start + stream.shape[1] >= self.length:
            raise ValueError(
                f"{start + stream.shape[1]} positions leave nothing to guess: the session has {self.length}"
            )
        stream = stream.repeat(self.rows // len(stream), 1, 1)
        return self._run(self.model.read(stream, start))

    def rewind(self, filled: int) -> None:
        """Forgets what was read from position ``filled`` on."""
        if not 0 <= filled <= self.filled:
            raise ValueError(f"a session of {self.filled} positions goes back to 0 to {self.filled}, got {filled}")
        self._cache.filled = filled + 1

    def keep(self, rows: int) -> None:
        """Goes on with the first rows alone."""
        if rows < self.rows:
            self.rows = rows
            self._cache.keep(rows)

    @torch.no_grad()
    def _run(self, x: Tensor) -> Tensor:
        filled = self._cache.filled
        at = torch.arange(filled, filled + x.shape[1], device=x.device)
        return self._backbone(x, at, cache=self._cache, mask=causal_after(filled, x.shape[1], x.device))
