"""Binary spherical quantization: signs of a unit vector (Zhao et al. 2024, https://arxiv.org/abs/2406.07548)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizers_vis.cuda.binary import batch_entropy, sample_entropy
from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, straight_through
from tokenizers_vis.quantizers.bits import BitIds
from tokenizers_vis.quantizers.lfq import check_entropy, signed


class BSQ(Quantizer):
    """l2-normalises z to u, and rounds each dimension to 1 / sqrt(bits) or its negative.

    The straight-through gradient is that of u / sqrt(bits): the sign passes it on as it is, the scale does not. (LFQ's
    ``spherical`` passes on the whole, as vector-quantize-pytorch does.)

    bits: width of z and of the codes; a multiple of ``group``.
    group: bits of one id. 36 bits in groups of 9 are four ids below 512, exact at any number of bits.
    commitment: weight of sum_i (u_i - sg c_i)^2, mean over tokens. The authors' configs say 0, but their model's
        constructor puts 0.25 in its place.
    entropy: weight of temperature * (gamma0 * sample_entropy - gamma * batch_entropy), the paper's zeta.
        In training alone.
    gamma0, gamma: of the two entropies.
    temperature: T of the softmax of -|u - c|^2 / T; the official ``inv_temperature`` is 1 / T.
    batch_entropy: "grouped" is the sum over groups of the entropy of each group's average; with ``group=bits``, up to
        28, that of the whole code. "bitwise" is the sum over bits, as if they were independent: what the official code
        does with ``persample_entropy_compute="analytical"``.

    ids: b n k, k = bits / group, each below 2^group; the first dimension is the highest bit. z of 0 counts as negative.
    parts: sample_entropy (the same however the bits are grouped) and batch_entropy, in nats of a token; commitment.
    The official trainer weighs the loss by 0.1 as a whole. Nothing is learned here.
    Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        bits: int,
        group: int = 9,
        commitment: float = 0.25,
        entropy: float = 1.0,
        gamma0: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        batch_entropy: Literal["grouped", "bitwise"] = "grouped",
    ) -> None:
        super().__init__()
        check_option(bits >= 1, "bits is 1 or more", bits)
        check_option(group >= 1 and bits % group == 0, f"group divides bits, {bits}", group)
        check_option(gamma0 >= 0, "gamma0 is a weight, 0 or more", gamma0)
        check_option(batch_entropy in ("grouped", "bitwise"), "batch_entropy is 'grouped' or 'bitwise'", batch_entropy)
        together = group if batch_entropy == "grouped" else 1
        check_entropy(together, entropy, gamma, temperature, commitment)
        self.bit_ids = BitIds((group,) * (bits // group), self.order)
        self.dim = bits
        self.codebook_sizes = self.bit_ids.sizes
        self.together = together  # bits whose distribution over the batch is kept whole
        self.commitment = commitment
        self.entropy = entropy
        self.gamma0 = gamma0
        self.gamma = gamma
        self.temperature = temperature
        self.value = bits**-0.5  # of a code, in each dimension

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z, dim=-1)
            signs = z > 0
            codes = signed(signs, self.value)
            loss, parts = self._loss(z, codes)
            codes = straight_through(codes, self.value * z)
        return Quantized(codes, self.bit_ids.pack(signs), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return signed(self.bit_ids.unpack(self.check_ids(ids)), self.value)

    def _loss(self, z: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = z.new_zeros(()), {}
        if self.training and self.entropy:
            weight = self.entropy * self.temperature
            logits = 4 * self.value / self.temperature * rearrange(z, "b n (g d) -> g (b n) d", d=self.together)
            if self.gamma0:
                parts["sample_entropy"] = sample_entropy(logits).sum()
                loss = loss + weight * self.gamma0 * parts["sample_entropy"]
            if self.gamma:
                parts["batch_entropy"] = batch_entropy(logits).sum()
                loss = loss - weight * self.gamma * parts["batch_entropy"]
        if self.commitment:
            parts["commitment"] = (z - codes).square().sum(dim=-1).mean()
            loss = loss + self.commitment * parts["commitment"]
        return loss, {name: part.detach() for name, part in parts.items()}
