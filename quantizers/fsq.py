"""Finite scalar quantization: no codebook, every dimension is rounded to a few levels (Mentzer et al. 2023, https://arxiv.org/abs/2309.15505).

With ``form="symmetric"`` as in Stable Codec (Parker et al. 2024, https://arxiv.org/abs/2411.19842), with
``form="ifsq"`` as in iFSQ (Lin et al. 2026, https://arxiv.org/abs/2601.17124).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_ids, check_option, straight_through
from tokenizers_vis.quantizers.integers import Order

# Widens the plain tanh a little, so that the outermost levels are reached at finite z; up to 1000 levels none is
# overshot.
EPS = 1e-3
MAX_LEVELS = 1000
IFSQ_SLOPE = 1.6  # makes 2 sigmoid(1.6 z) - 1 of a standard normal z nearly uniform; 2.0 would be tanh


class FSQ(Quantizer):
    """Rounds each of ``len(levels)`` dimensions to that many levels; the codebook is their product.

    levels: levels L of each dimension, 2 to 1000 each, e.g. (8, 8, 8, 5, 5, 5) for 64000 codes.
    form: how z becomes a level.
        "plain" (Mentzer et al., FlexTok): round(tanh(z + s) h - o), codes are multiples of 1 / (L // 2) in [-1, 1]; for
        an even L the top level is 1 - 2 / L.
        "symmetric" (Stable Codec, eq. 2): 2 / (L - 1) floor((L - 1) (tanh(z) + 1) / 2 + 1 / 2) - 1, so that codes run
        from -1 to 1 and lie symmetric about 0 for an even L too.
        "ifsq": round((2 sigmoid(1.6 z) - 1) (L - 1) / 2), which uses all levels of a normal z about equally. L is odd.
    noise_dropout: probability, for each number on its own, of uniform noise in place of rounding: the code is the
        bounded z plus U(-1/2, 1/2) of the distance between two levels (Stable Codec, eq. 3). In training only.
    bypass: probability, for each image as a whole, that its codes are the bounded z, not rounded (FlexTok). In training
        only. The ids are those of rounding in either case. Both draw from torch's global random state.

    codes: b n d.
    ids: b n 1, the levels as digits of one number, the first dimension fastest; ``digits`` takes them apart.
    There is no loss: nothing is learned here.

    vector-quantize-pytorch (1.32) adds U(-1/2, 1/2) to codes that are rounded already, whatever the number of levels,
    and to half of the numbers, whatever its ``noise_dropout``; Stable Codec's own code draws once per example. Here it
    is the paper's noise, drawn for each number.

    Raises ``ValueError`` for options out of range, or for a product of 2^63 or more (ids are int64).
    """

    order: Order = "lsb"

    def __init__(
        self,
        *,
        levels: tuple[int, ...],
        form: Literal["plain", "symmetric", "ifsq"] = "plain",
        noise_dropout: float = 0.0,
        bypass: float = 0.0,
    ) -> None:
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
        check_option(form in ("plain", "symmetric", "ifsq"), "form is 'plain', 'symmetric' or 'ifsq'", form)
        if form == "ifsq" and any(level % 2 == 0 for level in levels):
            raise ValueError(f"form 'ifsq' takes odd levels, got {levels}; make them odd, or take form 'symmetric'")
        check_option(0 <= noise_dropout <= 1, "noise_dropout is a probability from 0 to 1", noise_dropout)
        check_option(0 <= bypass <= 1, "bypass is a probability from 0 to 1", bypass)
        self.levels = levels
        self.form = form
        self.noise_dropout = noise_dropout
        self.bypass = bypass
        self.dim = len(levels)
        self.codebook_sizes = (size,)
        # Integers, because module.to(bfloat16) rounds float buffers. A code is (2 digit - span) / span.
        span = [level - 1 if form == "symmetric" else level // 2 * 2 for level in levels]
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int64), persistent=False)
        self.register_buffer("_span", torch.tensor(span, dtype=torch.int64), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int64), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)
            if self.form == "symmetric":
                digits = (bounded.detach() + self._levels / 2).floor().long()
            else:
                digits = bounded.detach().round().long() + self._levels // 2
            soft = 2 * bounded / self._span
            codes = self._codes(digits)
            if self.training:
                codes = self._loosen(codes, soft.detach())
            codes = straight_through(codes, soft)
        return Quantized(codes, self._ids(digits), z.new_zeros(()), {})

    def lookup(self, ids: Tensor) -> Tensor:
        return self._codes(self.digits(ids))

    def digits(self, ids: Tensor) -> Tensor:
        """The level of each dimension: ids, b n 1 -> b n d, int64, from 0 to levels[i] - 1.

        id = sum of digit[i] prod(levels[:i]). A generator with one head per dimension predicts these.
        """
        return self.check_ids(ids) // self._basis % self._levels

    def from_digits(self, digits: Tensor) -> Tensor:
        """The inverse of ``digits``: b n d -> b n 1, int64. Raises ``ValueError`` for a digit out of its levels."""
        check_ids(digits, self.levels)
        return self._ids(digits.long())

    def bound(self, z: Tensor) -> Tensor:
        """z: b n d, float32 -> b n d, between the outermost levels, which are 1 apart and centred on 0.

        plain: tanh(z + atanh(o / h)) h - o, where h is half the span and o shifts an even number of levels by one half,
        so that z = 0 is a level.
        """
        levels = self._levels.float()
        if self.form == "symmetric":
            return z.tanh() * ((levels - 1) / 2)
        if self.form == "ifsq":
            return (2 * (IFSQ_SLOPE * z).sigmoid() - 1) * ((levels - 1) / 2)
        half = (levels - 1) * (1 + EPS) / 2
        offset = (self._levels % 2 == 0) * 0.5
        return (z + (offset / half).atanh()).tanh() * half - offset

    def _loosen(self, codes: Tensor, soft: Tensor) -> Tensor:
        """Noise dropout and bypass. codes, soft: b n d, with and without rounding -> b n d."""
        if self.noise_dropout > 0:
            chosen = torch.rand_like(codes) < self.noise_dropout
            codes = torch.where(chosen, soft + (2 * torch.rand_like(codes) - 1) / self._span, codes)
        if self.bypass > 0:
            chosen = torch.rand_like(codes[:, :1, :1]) < self.bypass
            codes = torch.where(chosen, soft, codes)
        return codes

    def _codes(self, digits: Tensor) -> Tensor:
        return (2 * digits - self._span).float() / self._span

    def _ids(self, digits: Tensor) -> Tensor:
        # Summed as int64: float32 would be wrong past 2^24 codes.
        return (digits * self._basis).sum(dim=-1, keepdim=True)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, codebook_size={self.codebook_sizes[0]}, form={self.form}"
