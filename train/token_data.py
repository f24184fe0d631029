"""Batches of ids for training a generator, in an order that a run can resume exactly.

Batch i is a pure function of (seed, batch size, i), as in ``train.data``. Letters: b batch, n tokens, k codebooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizers_vis.token_shards import TokenShards

# What a random stream is for; the first word after the seed.
_ORDER, _CROP = range(2)


class TokenBatch(NamedTuple):
    """ids: b n k, int64. labels: b, int64, -1 for none."""

    ids: Tensor
    labels: Tensor

    @property
    def data(self) -> TokenBatch:
        return self

    @property
    def skipped(self) -> list[str]:
        """None: what could not be read was left out when the shards were made."""
        return []


class TokenBatches(Iterator[TokenBatch]):
    """An endless stream of batches; batch i is a function of (seed, batch_size, i). ``position`` is the next one's i.

    In each epoch every image comes once, in a new order, and one of its crops, drawn anew.

    batch_size: b of all processes together. start: the first batch number. rank, world: this process gets its b / world
    rows of each batch; together they see what one process would.
    """

    def __init__(
        self, shards: TokenShards, *, batch_size: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if min(batch_size, world) < 1 or min(seed, start) < 0:
            raise ValueError(
                f"batch_size and world are at least 1, seed and start at least 0; got {batch_size}, {world}, {seed} "
                f"and {start}"
            )
        if not 0 <= rank < world or batch_size % world:
            raise ValueError(
                f"rank is from 0 to below world, which divides batch_size; got {rank}, {world}, {batch_size}"
            )
        self.shards, self.batch_size, self.seed, self.position = shards, batch_size, seed, start
        share = batch_size // world
        self._rows = slice(rank * share, (rank + 1) * share)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __next__(self) -> TokenBatch:
        first = self.position * self.batch_size
        crops = np.random.default_rng((self.seed, _CROP, self.position)).integers(
            self.shards.crops, size=self.batch_size
        )
        images = np.array([self._index(sample) for sample in range(first, first + self.batch_size)[self._rows]])
        self.position += 1
        labels = torch.from_numpy(self.shards.labels[images].astype(np.int64))
        return TokenBatch(self.shards.gather(images, crops[self._rows]), labels)

    def _index(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self.shards))
        if self._order[0] != epoch:
            random = np.random.default_rng((self.seed, _ORDER, epoch))
            self._order = (epoch, random.permutation(len(self.shards)))
        return int(self._order[1][place])

    def __enter__(self) -> TokenBatches:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open; a ``with`` block is for those that take any stream."""
