"""Numbers of a list of counts: entropy, Zipf's law, the length of a Huffman code. Order does not count but for ties."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Zipf:
    """p(r) proportional to r^-exponent over ranks ``first`` to ``last``, fitted by maximum likelihood.

    ks: the largest distance between the distribution functions of the fit and of the counts, 0 to 1.
    held_out: the exponent where one half of each code's counts gives the ranks and the other is fitted, both ways, the
        halves drawn at random with a fixed seed (Piantadosi 2014). Ranks of the same counts always fall, so that even
        for a uniform source ``exponent`` is above 0; this one is not.

    None where there is no fit: one rank, or all counts at an end.
    """

    exponent: float | None
    ks: float | None
    held_out: float | None
    first: int
    last: int


def entropy(counts: np.ndarray) -> float:
    """Of the shares of counts above 0, bits: too low by about (codes - 1) / (2 N ln 2), N their sum."""
    total = int(counts.sum())
    return max(0.0, math.log2(total) - float(np.sum(counts * np.log2(counts))) / total)


def corrected_entropy(counts: np.ndarray) -> float:
    """With that much added for the codes that occurred (Miller and Madow 1955), bits."""
    return entropy(counts) + (len(counts) - 1) / (2 * int(counts.sum()) * math.log(2))


def huffman_bits(counts: Sequence[int]) -> float:
    """Mean bits per symbol of an optimal prefix code; 0 for a single symbol. counts: how often each came, above 0."""
    heap = list(counts)
    heapq.heapify(heap)
    total, bits = sum(heap), 0
    while len(heap) > 1:  # a merged pair costs all that is below it one more bit
        pair = heapq.heappop(heap) + heap[0]
        heapq.heapreplace(heap, pair)
        bits += pair
    return bits / total


def fit_zipf(counts: Sequence[int] | np.ndarray, first: int = 1, last: int | None = None) -> Zipf:
    """Zipf's law over the codes of rank ``first`` to ``last``; None is the last code that occurred.

    counts: how often each code came, in a fixed order. Raises ``ValueError`` for other ranks than there are.
    """
    counts = np.asarray(counts, dtype=np.int64)
    counts = counts[counts > 0]
    last = len(counts) if last is None else last
    if not 1 <= first <= last <= len(counts):
        raise ValueError(f"ranks run from 1 to {len(counts)}, the codes that occurred; got {first} to {last}")
    ranks = slice(first - 1, last)
    falling = np.sort(counts)[::-1]
    exponent, ks = _zipf_exponent(falling[ranks], first), None
    if exponent is not None:
        fitted = _zipf_shares(exponent, np.log(np.arange(first, last + 1)))
        ks = float(np.abs(fitted.cumsum() - falling[ranks].cumsum() / falling[ranks].sum()).max())
    half = np.random.default_rng(0).binomial(counts, 0.5)
    rest = counts - half
    other = half[np.argsort(-rest, kind="stable")] + rest[np.argsort(-half, kind="stable")]
    return Zipf(exponent, ks, _zipf_exponent(other[ranks], first), first, last)


def _zipf_exponent(counts: np.ndarray, first: int) -> float | None:
    """The likelihood is greatest where the mean of ln rank under the law is that of the counts; it falls steadily."""
    log_rank = np.log(np.arange(first, first + len(counts)))
    wanted = float(np.sum(counts * log_rank)) / max(1, int(counts.sum()))
    if not log_rank[0] < wanted < log_rank[-1]:
        return None
    low, high = -64.0, 64.0
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(_zipf_shares(middle, log_rank) * log_rank) > wanted else (low, middle)
    return (low + high) / 2


def _zipf_shares(exponent: float, log_rank: np.ndarray) -> np.ndarray:
    weights = -exponent * log_rank
    weights = np.exp(weights - weights.max())
    return weights / weights.sum()
