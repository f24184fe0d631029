"""Counting models of token sequences: what a generator has to beat. Absolute discounting (Ney et al. 1994, https://doi.org/10.1006/csla.1994.1001).

P(v | c) = (n(c v) - D) / n(c) + D d(c) / n(c) P(v | shorter c), where d(c) is how many different ids followed the
context c and D = (n1 + 1) / (n1 + 2 n2 + 2) of the pairs that came once and twice. Below the empty context all ids are
equally likely.

Letters: b sequences, l ids of each (those of all codebooks, one after the other), v ids that there are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

# What a context is made of, from the most to the least specific; each backs off to the next, and at last to nothing.
CONTEXTS = {
    "zero_order": (),
    "position": ("place",),
    "bigram": ("previous",),
    "position_bigram": ("place previous", "previous", "place"),
}
Kind = Literal["zero_order", "position", "bigram", "position_bigram"]


class _Counts(NamedTuple):
    """Of one kind of context, sorted. pairs: context * v + id, and how often each came; contexts: how often each came,
    how many ids followed it, and how many pairs of all contexts come before its own. discount: D.
    """

    pairs: np.ndarray
    ends: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    starts: np.ndarray
    discount: float


class NGram:
    """kind: "zero_order" (no context), "position" (the place in the sequence), "bigram" (the id before), or
    "position_bigram" (both). ids: b l, int64, from 0 to below v: the sequences to count.
    """

    def __init__(self, ids: np.ndarray, v: int, kind: Kind) -> None:
        if ids.ndim != 2 or not ids.size or ids.min() < 0 or ids.max() >= v:
            raise ValueError(f"ids are b l, from 0 to {v - 1}, at least one; got {ids.shape}")
        self.v, self.length, self.kind = v, ids.shape[1], kind
        self.levels = [self._count(self._context(ids, name), ids) for name in (*CONTEXTS[kind], "")]

    def log_prob(self, ids: np.ndarray) -> np.ndarray:
        """ids: b l -> b l, the natural logarithm of each one's probability given those before it."""
        p = np.full(ids.shape, 1 / self.v)
        for counts, name in reversed(list(zip(self.levels, (*CONTEXTS[self.kind], ""), strict=True))):
            context = self._context(ids, name)
            here = _look_up(counts.pairs, context * self.v + ids, np.diff(counts.ends, prepend=0))
            total, kinds = (_look_up(counts.contexts, context, values) for values in (counts.totals, counts.kinds))
            kept = np.maximum(here - counts.discount, 0) + counts.discount * kinds * p
            p = np.where(total > 0, kept / np.maximum(total, 1), p)
        return np.log(p)

    def bits(self, ids: np.ndarray) -> float:
        """Mean bits of an id."""
        return float(-self.log_prob(ids).mean() / np.log(2))

    def sample(self, b: int, seed: int = 0) -> np.ndarray:
        """b l new sequences."""
        random = np.random.default_rng(seed)
        ids = np.zeros((b, self.length), dtype=np.int64)
        for place in range(self.length):
            chosen, open_ = random.integers(self.v, size=b), np.ones(b, dtype=bool)
            for counts, name in zip(self.levels, (*CONTEXTS[self.kind], ""), strict=True):
                context = self._context(ids, name)[:, place]
                total = _look_up(counts.contexts, context, counts.totals)
                at = _look_up(counts.contexts, context, counts.starts) + (random.random(b) * total).astype(np.int64)
                pair = np.minimum(np.searchsorted(counts.ends, at, side="right"), len(counts.pairs) - 1)
                # A pair is drawn as often as it came, and given up for a shorter context D times in as many.
                came = np.diff(counts.ends, prepend=0)[pair]
                taken = open_ & (total > 0) & (random.random(b) * came >= counts.discount)
                chosen, open_ = np.where(taken, counts.pairs[pair] % self.v, chosen), open_ & ~taken
            ids[:, place] = chosen
        return ids

    def _context(self, ids: np.ndarray, name: str) -> np.ndarray:
        """A number for the context of each id: b l."""
        place = np.broadcast_to(np.arange(self.length), ids.shape)
        # Before the first id stands one that there is not.
        previous = np.concatenate([np.full_like(ids[:, :1], self.v), ids[:, :-1]], axis=1)
        return {"": place * 0, "place": place, "previous": previous, "place previous": place * (self.v + 1) + previous}[
            name
        ]

    def _count(self, context: np.ndarray, ids: np.ndarray) -> _Counts:
        pairs, pair_counts = np.unique(context * self.v + ids, return_counts=True)
        contexts, first, kinds = np.unique(pairs // self.v, return_index=True, return_counts=True)
        totals = np.add.reduceat(pair_counts, first)
        once, twice = (int((pair_counts == count).sum()) for count in (1, 2))
        # Never 0, so that what never came is possible too.
        discount = (once + 1) / (once + 2 * twice + 2)
        return _Counts(pairs, pair_counts.cumsum(), contexts, totals, kinds, totals.cumsum() - totals, discount)


def _look_up(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 for one that is not among the sorted keys."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
