"""Finite scalar quantization: no codebook, every dimension is rounded to a few levels (Mentzer et al. 2023, https://arxiv.org/abs/2309.15505)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenizers_vis.quantizers.base import Quantized, Quantizer

# Widens the tanh a little, so that the outermost levels are reached at finite z; up to 1000 levels none is overshot.
EPS = 1e-3
MAX_LEVELS = 1000


class FSQ(Quantizer):
    """Rounds each of ``len(levels)`` dimensions to that many levels; the codebook is their product.

    levels: levels of each dimension, 2 to 1000 each, e.g. (8, 8, 8, 5, 5, 5) for 64000 codes.

    codes: b n d, multiples of 1 / (L // 2) in [-1, 1]; for an even L the top level is 1 - 2 / L.
    ids: b n 1, the levels as digits of one number, the first dimension fastest.
    There is no loss: nothing is learned here.

    Raises ``ValueError`` for levels out of range, or for a product of 2^63 or more (ids are int64).
    """

    def __init__(self, *, levels: tuple[int, ...]) -> None:
        super().__init__()
        levels = tuple(levels)
        if not levels or any(not 2 <= level <= MAX_LEVELS for level in levels):
            raise ValueError(f"levels are one or more whole numbers from 2 to {MAX_LEVELS}, got {levels}")
        size = math.prod(levels)
        if size >= 2**63:
            raise ValueError(
                f"the product of the levels is below 2^63, so that an id fits int64; got {size} from {levels}; "
                f"use fewer dimensions, or split them over two FSQs"
            )
        self.levels = levels
        self.dim = len(levels)
        self.codebook_sizes = (size,)
        # Integers, because module.to(bfloat16) rounds float buffers.
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int64), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int64), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)
            rounded = bounded.detach().round()
            half_width = self._levels // 2
            # Exact: |rounded - bounded| <= 1/2, so that the difference and the sum lose no bit.
            codes = (bounded + (rounded - bounded.detach())) / half_width
            digits = rounded.long() + half_width
            # Summed as int64: float32 would be wrong past 2^24 codes.
            ids = (digits * self._basis).sum(dim=-1, keepdim=True)
        return Quantized(codes, ids, z.new_zeros(()), {})

    def lookup(self, ids: Tensor) -> Tensor:
        ids = self.check_ids(ids).long()
        digits = ids // self._basis % self._levels
        half_width = self._levels // 2
        return (digits - half_width).float() / half_width

    def bound(self, z: Tensor) -> Tensor:
        """z: b n d, float32 -> b n d, between the outermost levels: tanh(z + atanh(o / h)) h - o.

        h is half the span; o shifts an even number of levels by one half, so that z = 0 is a level.
        """
        levels = self._levels.float()
        half = (levels - 1) * (1 + EPS) / 2
        offset = (self._levels % 2 == 0) * 0.5
        return (z + (offset / half).atanh()).tanh() * half - offset

    def extra_repr(self) -> str:
        return f"levels={self.levels}, codebook_size={self.codebook_sizes[0]}"
