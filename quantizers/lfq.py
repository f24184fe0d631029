"""Lookup-free quantization: every dimension is one bit, its sign (Yu et al. 2023, MAGVIT-2, https://arxiv.org/abs/2310.05737).

GFQ is the same in groups, for 2^128 codes and more (WeTok, https://arxiv.org/abs/2508.05599). What keeps the codes in
use is an entropy loss: each z sure of its code, H[q(c|z)] low, and all codes used alike, H[E q(c|z)] high. Both are
computed exactly and without a table of codes; see ``tokenizers_vis.cuda.binary``.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizers_vis.cuda.binary import MAX_BITS, batch_entropy, sample_entropy
from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, straight_through
from tokenizers_vis.quantizers.bits import BitIds
from tokenizers_vis.quantizers.integers import Order


class LFQ(Quantizer):
    """The sign of each of ``bits`` dimensions: one code of 2^bits.

    bits: width of z and of the codes.
    codebooks: bits of each id, summing to ``bits``: (6, 12) is how Open-MAGVIT2 cuts 18 bits for its generator; None is
        one id of all bits. It changes the ids only: the entropy is always that of the whole code.
    bit_order: "msb" makes the first dimension the highest bit of an id (vector-quantize-pytorch), "lsb" the lowest
        (Open-MAGVIT2).
    entropy: weight of sample_entropy - gamma * batch_entropy. In training alone, and for up to 28 bits: the batch
        entropy holds 2^bits numbers (of gamma 0, none).
    gamma: how much the diversity of the batch counts in it.
    temperature: T of the softmax of -|z - c|^2 / T over the codes.
    commitment: weight of mse(z, sg c).
    scale: a code is -scale or scale in each dimension; below 1 for the later levels of a residual quantizer.
    spherical: z is l2-normalised to length ``scale`` and the codes too, scale / sqrt(bits) in each dimension.
    eps: the batch entropy as -sum a log(a + eps). 0 is exact; Open-MAGVIT2 has 1e-5, which near uniform halves its
        gradient at 2^18 codes.

    ids: b n k, k the number of ``codebooks``. z of 0 is the negative sign.
    parts: sample_entropy and batch_entropy in nats, commitment. The batch is that of this process.
    Nothing is learned here. Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        bits: int,
        codebooks: tuple[int, ...] | None = None,
        bit_order: Order = "lsb",
        entropy: float = 0.1,
        gamma: float = 1.0,
        temperature: float = 0.01,
        commitment: float = 0.25,
        scale: float = 1.0,
        spherical: bool = False,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        check_option(bits >= 1, "bits is 1 or more", bits)
        codebooks = (bits,) if codebooks is None else tuple(codebooks)
        check_option(sum(codebooks) == bits, f"codebooks are the bits of each id and sum to bits, {bits}", codebooks)
        check_option(scale > 0, "scale is above 0", scale)
        check_entropy(bits, entropy, gamma, temperature, commitment, eps)
        self.bit_ids = BitIds(codebooks, bit_order)
        self.dim = bits
        self.codebook_sizes = self.bit_ids.sizes
        self.order = bit_order
        self.entropy = entropy
        self.gamma = gamma
        self.temperature = temperature
        self.commitment = commitment
        self.scale = scale
        self.spherical = spherical
        self.eps = eps
        self.value = scale / bits**0.5 if spherical else scale  # of a code, in each dimension

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            if self.spherical:
                z = self.scale * F.normalize(z, dim=-1)
            signs = z > 0
            codes = signed(signs, self.value)
            loss, parts = self._loss(z, codes)
            codes = straight_through(codes, z)
        return Quantized(codes, self.bit_ids.pack(signs), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return signed(self.bit_ids.unpack(self.check_ids(ids)), self.value)

    def _loss(self, z: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = z.new_zeros(()), {}
        if self.training and self.entropy:
            logits = 4 * self.value / self.temperature * rearrange(z, "b n d -> (b n) d")
            parts["sample_entropy"] = sample_entropy(logits)
            loss = loss + self.entropy * parts["sample_entropy"]
            if self.gamma:
                parts["batch_entropy"] = batch_entropy(logits, eps=self.eps)
                loss = loss - self.entropy * self.gamma * parts["batch_entropy"]
        if self.commitment:
            parts["commitment"] = F.mse_loss(z, codes)
            loss = loss + self.commitment * parts["commitment"]
        return loss, {name: part.detach() for name, part in parts.items()}


class GFQ(Quantizer):
    """Group-wise LFQ: ``groups`` codes of ``bits`` bits each, with an id and an entropy per group.

    groups: the width of z and of the codes is groups * bits, e.g. 4 x 8 in WeTok's ImageNet model, 16 x 8 for 2^128.
    bits: of one group.
    batch_entropy: "pooled" is the entropy of one average over all rows and groups, as WeTok has it: every group is to
        use its codes as the others do. "grouped" averages each group on its own and takes the mean of their entropies,
        as vector-quantize-pytorch does with several codebooks. (BSQ, too, keeps groups apart, but sums.)
    bit_order: "msb" makes the first dimension of a group the highest bit of its id, "lsb" the lowest (WeTok).
    entropy, gamma, temperature, commitment, eps: as in ``LFQ``; the sample entropy is the mean over groups.

    ids: b n groups, each below 2^bits. z of 0 is the negative sign; codes are -1 or 1.
    parts: sample_entropy and batch_entropy in nats of one group, commitment. The batch is that of this process.
    Nothing is learned here. Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        groups: int,
        bits: int = 8,
        batch_entropy: Literal["pooled", "grouped"] = "pooled",
        bit_order: Order = "lsb",
        entropy: float = 0.1,
        gamma: float = 1.0,
        temperature: float = 0.01,
        commitment: float = 0.25,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        check_option(groups >= 1, "groups is 1 or more", groups)
        check_option(bits >= 1, "bits is 1 or more", bits)
        check_option(batch_entropy in ("pooled", "grouped"), "batch_entropy is 'pooled' or 'grouped'", batch_entropy)
        check_entropy(bits, entropy, gamma, temperature, commitment, eps)
        self.bit_ids = BitIds((bits,) * groups, bit_order)
        self.dim = groups * bits
        self.codebook_sizes = self.bit_ids.sizes
        self.order = bit_order
        self.bits = bits
        self.batch_entropy = batch_entropy
        self.entropy = entropy
        self.gamma = gamma
        self.temperature = temperature
        self.commitment = commitment
        self.eps = eps

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            signs = z > 0
            codes = signed(signs, 1.0)
            loss, parts = self._loss(z, codes)
            codes = straight_through(codes, z)
        return Quantized(codes, self.bit_ids.pack(signs), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return signed(self.bit_ids.unpack(self.check_ids(ids)), 1.0)

    def _loss(self, z: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = z.new_zeros(()), {}
        if self.training and self.entropy:
            # Pooled, the groups of a row are rows of one group.
            pattern = "b n (g d) -> 1 (b n g) d" if self.batch_entropy == "pooled" else "b n (g d) -> g (b n) d"
            logits = 4 / self.temperature * rearrange(z, pattern, d=self.bits)
            parts["sample_entropy"] = sample_entropy(logits).mean()
            loss = loss + self.entropy * parts["sample_entropy"]
            if self.gamma:
                parts["batch_entropy"] = batch_entropy(logits, eps=self.eps).mean()
                loss = loss - self.entropy * self.gamma * parts["batch_entropy"]
        if self.commitment:
            parts["commitment"] = F.mse_loss(z, codes)
            loss = loss + self.commitment * parts["commitment"]
        return loss, {name: part.detach() for name, part in parts.items()}


def signed(signs: Tensor, value: float) -> Tensor:
    """``value`` where signs are true and ``-value`` elsewhere, float32."""
    return (2 * signs.float() - 1) * value


def check_entropy(
    bits: int, entropy: float, gamma: float, temperature: float, commitment: float, eps: float = 0.0
) -> None:
    """Raises ``ValueError`` for options out of range, or for an entropy over more codes than can be held."""
    check_option(entropy >= 0, "entropy is a weight, 0 or more", entropy)
    check_option(gamma >= 0, "gamma is a weight, 0 or more", gamma)
    check_option(temperature > 0, "temperature is above 0", temperature)
    check_option(commitment >= 0, "commitment is a weight, 0 or more", commitment)
    check_option(eps >= 0, "eps is 0 or more", eps)
    if entropy and gamma and bits > MAX_BITS:
        raise ValueError(
            f"the batch entropy is over 2^bits codes, for up to {MAX_BITS} bits, got {bits}; cut them into groups "
            "(kind 'gfq' or 'bsq'), or set entropy or gamma to 0"
        )
