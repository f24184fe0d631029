"""Tokens with errors such as a generator makes, for a perturbed FID (RobustTok, https://arxiv.org/abs/2503.08354).

A pFID is the set distance of what a tokenizer decodes from perturbed tokens, averaged over a grid of perturbations. The
paper's own grid is not published, so ours is part of the result (``PerturbedScore``): compare numbers of one grid only.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizers_vis.cuda.ops import nearest_codes
from tokenizers_vis.quantizers.base import Quantizer, check_option
from tokenizers_vis.quantizers.compose import Product, Residual
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.multi_scale import MultiScale
from tokenizers_vis.quantizers.perturb import Perturb
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens

MAX_TABLE = 2**20  # codes of a codebook that is searched; those of digits and bits may be of any size
_ROWS = 256  # codes whose neighbours are searched together
_IDS = 2**16  # ids moved together
_GOLDEN = (math.sqrt(5) - 1) / 2


class Setting(NamedTuple):
    """One perturbation.

    rate: share of the ids of a perturbed image that are drawn anew, 0 to 1; alpha in the paper.
    share: share of the images that are perturbed, 0 to 1; beta.
    strength: an id is drawn among so many codes nearest to its own, that one included; delta. 1 changes nothing.
    """

    rate: float
    share: float
    strength: int


@dataclass(frozen=True)
class Grid:
    """Every combination of these is measured, and the mean over all of them is the score."""

    rates: tuple[float, ...] = (0.5, 1.0)
    shares: tuple[float, ...] = (0.5, 1.0)
    strengths: tuple[int, ...] = (10, 100)

    def __post_init__(self) -> None:
        if not (self.rates and self.shares and self.strengths):
            raise ValueError(f"a grid has a rate, a share and a strength or more of each, got {self}")
        if min(*self.rates, *self.shares) < 0 or max(*self.rates, *self.shares) > 1 or min(self.strengths) < 1:
            raise ValueError(f"rates and shares are from 0 to 1, strengths are 1 or more; got {self}")

    def __iter__(self) -> Iterator[Setting]:
        return itertools.starmap(Setting, itertools.product(self.rates, self.shares, self.strengths))


class Perturbed(NamedTuple):
    """The score of one setting."""

    setting: Setting
    value: float


class PerturbedScore(NamedTuple):
    """mean: of the values of all settings. neighbourhoods: of each codebook, what "nearest" means in it."""

    mean: float
    values: tuple[Perturbed, ...]
    grid: Grid
    seed: int
    neighbourhoods: tuple[str, ...]
    images: int


def perturbed_score(
    tok: Tokenizer, tokens: Tokens, measure: Callable[[Tokens], float], grid: Grid | None = None, seed: int = 0
) -> PerturbedScore:
    """The mean of ``measure`` over perturbations of the tokens, pFID where it decodes them and gives the FID.

    tokens: of all images. measure: of tokens, once for each setting of the grid; None is ``Grid()``, of eight settings.

    Raises ``ValueError`` as ``perturbed_tokens`` does, before anything is measured.
    """
    grid = Grid() if grid is None else grid
    names = neighbourhoods(tok)
    for setting in grid:
        _check(tok, tokens, *setting, seed)
    values = tuple(
        Perturbed(setting, float(measure(perturbed_tokens(tok, tokens, *setting, seed)))) for setting in grid
    )
    mean = math.fsum(value for _, value in values) / len(values)
    return PerturbedScore(mean, values, grid, seed, names, len(tokens))


def neighbourhoods(tok: Tokenizer) -> tuple[str, ...]:
    """What "nearest" means in each codebook. Raises ``ValueError`` for a codebook that is too large to be searched."""
    return tuple(near.name for near in _neighbourhoods(tok.quantizer))


def perturbed_tokens(
    tok: Tokenizer,
    tokens: Tokens,
    rate: float,
    share: float,
    strength: int,
    seed: int = 0,
    *,
    indices: Sequence[int] | None = None,
) -> Tokens:
    """The tokens with some ids swapped for ids of codes near theirs.

    rate, share, strength: see ``Setting``. With several codebooks every id is drawn by itself, within its codebook.
    indices: the number of each image in the whole set; None is 0, 1, 2, ... What happens to an image depends on the
        seed, its index and its own ids, not on what else is in the batch, and a prefix of its tokens is perturbed like
        the whole. A higher rate or share perturbs all that a lower one does and more. Of any run of images the share is
        met to within two images.

    What is near: of digits (FSQ) the L1 distance between them, of bits (LFQ, GFQ, BSQ, Bernoulli) the Hamming distance
    between those of an id, of codes that are equally far any, with equal probability. Else the Euclidean distance
    between codes as the decoder gets them; products and residuals are taken apart. Neighbours in a table are searched
    on every call: perturb many images at once.

    Raises ``ValueError`` for tokens of another tokenizer, a continuous tokenizer, numbers out of range, or a codebook
    that is too large to be searched.
    """
    _check(tok, tokens, rate, share, strength, seed)
    indices = range(len(tokens)) if indices is None else [int(index) for index in indices]
    if len(indices) != len(tokens) or min(indices) < 0:
        raise ValueError(f"indices are a number from 0 for each of {len(tokens)} images, got {list(indices)[:9]}")
    ids = tokens.ids.cpu().numpy().copy()
    chosen = np.zeros(ids.shape, dtype=bool)
    draws = np.zeros((*ids.shape, 2))
    for row, index in enumerate(indices):
        if is_perturbed(index, share, seed):
            # Three numbers for each id, token by token: those of a prefix are the same.
            numbers = np.random.default_rng([seed, index]).random((*ids.shape[1:], 3))
            chosen[row] = (numbers[..., 0] < rate) & (ids[row] >= 0)
            draws[row] = numbers[..., 1:]
    for j, near in enumerate(_neighbourhoods(tok.quantizer)):
        at = chosen[..., j]
        place = (draws[..., j, 0][at] * strength).astype(np.int64)
        ids[..., j][at] = near.pick(ids[..., j][at], place, draws[..., j, 1][at], strength)
    return replace(tokens, ids=torch.from_numpy(ids).to(tokens.ids.device))


def is_perturbed(index: int, share: float, seed: int = 0) -> bool:
    """Whether the image of this number is among the perturbed ones.

    By multiples of the golden ratio, which are spread evenly over [0, 1), wherever one begins and stops.
    """
    start = np.random.default_rng([seed]).random()
    return (start + index * _GOLDEN) % 1 < share


def _check(tok: Tokenizer, tokens: Tokens, rate: float, share: float, strength: int, seed: int) -> None:
    if tok.continuous:
        raise ValueError(f"{tok.name} has vectors in place of ids, and no codes that could be near others")
    if not isinstance(tokens, Tokens) or (tokens.tokenizer, tokens.codebook_sizes) != (tok.codes, tok.codebook_sizes):
        raise ValueError(f"{tok.name} perturbs its own tokens, those of {tok.codes!r}; got {tokens!r}")
    check_option(0 <= rate <= 1, "rate is a share from 0 to 1", rate)
    check_option(0 <= share <= 1, "share is a share from 0 to 1", share)
    check_option(isinstance(seed, int) and seed >= 0, "seed is a whole number, 0 or more", seed)
    smallest = min(tok.codebook_sizes)
    if isinstance(strength, bool) or not isinstance(strength, int) or not 1 <= strength <= smallest:
        raise ValueError(
            f"strength is a number of codes, from 1 to {smallest}, the size of the smallest codebook of {tok.name}; "
            f"got {strength!r}"
        )


# What is near


class _Neighbourhood(ABC):
    name: str

    @abstractmethod
    def pick(self, ids: np.ndarray, place: np.ndarray, within: np.ndarray, strength: int) -> np.ndarray:
        """ids: m; place: m, from 0 to strength - 1; within: m, in [0, 1), for a choice among equals -> m, other ids.

        The code of each id's own is place 0, the nearest other one place 1, and so on.
        """


def _neighbourhoods(quantizer: Quantizer) -> list[_Neighbourhood]:
    """One for each codebook."""
    if isinstance(quantizer, Perturb):
        return _neighbourhoods(quantizer.quantizer)
    if isinstance(quantizer, MultiScale):
        return _neighbourhoods(quantizer.part)
    if isinstance(quantizer, Product):
        return [near for part in quantizer.parts for near in _neighbourhoods(part)]
    if isinstance(quantizer, Residual):
        return [near for level in quantizer.levels for near in _neighbourhoods(level)]
    if isinstance(quantizer, FSQ):
        return [_Digits(quantizer.levels, "L1 distance of digits")]
    if hasattr(quantizer, "bit_ids"):
        return [_Digits((2,) * width, "Hamming distance of bits") for width in quantizer.bit_ids.widths]
    return [_Table(quantizer, j) for j in range(len(quantizer.codebook_sizes))]


class _Table(_Neighbourhood):
    """The Euclidean distance between the codes of codebook j."""

    name = "Euclidean distance of codes"

    def __init__(self, quantizer: Quantizer, j: int) -> None:
        size = quantizer.codebook_sizes[j]
        if size > MAX_TABLE:
            raise ValueError(
                f"a codebook of {size} codes is too large to be searched, {MAX_TABLE} is the most; codes of digits "
                "(fsq) and bits (lfq, gfq, bsq) are not searched, and may be more"
            )
        self.quantizer, self.j = quantizer, j

    def pick(self, ids: np.ndarray, place: np.ndarray, within: np.ndarray, strength: int) -> np.ndarray:
        if not len(ids):
            return ids
        table, picked = self._codes(), np.empty_like(ids)
        # The same blocks of the table for every batch: so rounding, and what is nearest, is the same in every batch.
        block = ids // _ROWS
        for start in np.unique(block) * _ROWS:
            near = nearest_codes(table[start : start + _ROWS], table, strength).cpu().numpy()
            at = block == start // _ROWS
            picked[at] = near[ids[at] - start, place[at]]
        return picked

    @torch.no_grad()
    def _codes(self) -> Tensor:
        """K d. Where there is no table, the codes of all ids, the other codebooks at id 0."""
        if hasattr(self.quantizer, "table"):
            return self.quantizer.table().float()
        sizes = self.quantizer.codebook_sizes
        weights = itertools.chain(self.quantizer.parameters(), self.quantizer.buffers())
        device = next(weights, torch.empty(0)).device
        ids = torch.zeros(1, sizes[self.j], len(sizes), dtype=torch.int64, device=device)
        ids[0, :, self.j] = torch.arange(sizes[self.j], device=device)
        return self.quantizer.lookup(ids)[0].float()


class _Digits(_Neighbourhood):
    """The L1 distance between the digits of ids, the first digit the fastest. Of bits it is the Hamming distance.

    No list of neighbours is made. How many ids are at each distance is counted, by convolution over the digits; a place
    then says the distance, and a uniform number which one of the ids at it.
    """

    def __init__(self, levels: tuple[int, ...], name: str) -> None:
        self.levels, self.name = levels, name
        self.basis = np.array([math.prod(levels[:i]) for i in range(len(levels))], dtype=np.int64)

    def pick(self, ids: np.ndarray, place: np.ndarray, within: np.ndarray, strength: int) -> np.ndarray:
        radius = self._radius(strength)
        parts = [slice(start, start + _IDS) for start in range(0, len(ids), _IDS)]
        return np.concatenate([ids[:0], *(self._pick(ids[p], place[p], within[p], radius) for p in parts)])

    def _pick(self, ids: np.ndarray, place: np.ndarray, within: np.ndarray, radius: int) -> np.ndarray:
        digits = ids[:, None] // self.basis % np.array(self.levels)
        # ways[i][:, r]: in how many ways the digits from i on can be at distance r together.
        ways = [np.zeros((len(ids), radius + 1), dtype=np.int64) for _ in range(len(self.levels) + 1)]
        ways[-1][:, 0] = 1
        for i in reversed(range(len(self.levels))):
            for step in self._steps(i, radius):
                sides = self._sides(digits[:, i], i, step)
                ways[i][:, step:] += sides[:, None] * ways[i + 1][:, : radius + 1 - step]
        rest = (ways[0].cumsum(axis=1) <= place[:, None]).sum(axis=1)  # the distance that is left to go
        row = np.arange(len(ids))
        left = np.minimum((within * ways[0][row, rest]).astype(np.int64), ways[0][row, rest] - 1)
        for i in range(len(self.levels)):
            open_ = np.ones(len(ids), dtype=bool)  # whose step at this digit is not yet known
            old, distance = digits[:, i].copy(), rest.copy()
            for step in self._steps(i, radius):
                beyond = ways[i + 1][row, np.maximum(distance - step, 0)] * (distance >= step)
                sides = self._sides(old, i, step)
                here = open_ & (left < sides * beyond)
                upwards = (left >= beyond) | (old < step)
                digits[:, i] += np.where(here, np.where(upwards, step, -step), 0)
                left = np.where(here, left % np.maximum(beyond, 1), left - open_ * sides * beyond)
                rest = np.where(here, distance - step, rest)
                open_ &= ~here
        return (digits * self.basis).sum(axis=1)

    def _steps(self, i: int, radius: int) -> range:
        return range(min(radius, self.levels[i] - 1) + 1)

    def _sides(self, digit: np.ndarray, i: int, step: int) -> np.ndarray:
        """In how many ways a digit can move by a step: 0, 1 or 2."""
        if step == 0:
            return np.ones_like(digit)
        return (digit >= step).astype(np.int64) + (digit + step < self.levels[i])

    def _radius(self, strength: int) -> int:
        """A distance within which every id has so many neighbours: from a corner, where they are fewest."""
        ways = [1]
        for level in self.levels:  # Python's integers; past ``strength`` it does not matter how many
            ways = [sum(ways[max(0, r - level + 1) : r + 1]) for r in range(min(len(ways) + level - 1, strength + 1))]
        return next(r for r, ball in enumerate(itertools.accumulate(ways)) if ball >= strength)
