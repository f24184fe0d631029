"""Bernoulli binary latents: each token is 64 to 128 bits, drawn at random in training (Instella-T2I, https://arxiv.org/abs/2506.21022).

The straight-through gradient is that of the bits' probabilities, as in binary latent diffusion
(https://arxiv.org/abs/2304.04820).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, straight_through
from tokenizers_vis.quantizers.bits import BitIds
from tokenizers_vis.quantizers.float32 import keep_dtype


class Bernoulli(Quantizer):
    """l = W z + w are the log-odds of ``bits`` bits; the code is the sum of the embeddings of the bits that are 1.

    dim: width of z and of the codes; the two linear maps between it and the bits are learned here, as in Instella.
    bits: of one token, e.g. 64 or 128.
    bits_per_id: 1 gives an id per bit, as Instella's binary heads predict them. Up to 62 gives words: 8 makes 64 bits
        eight ids below 256.
    temperature: T of the draw in training, from Bernoulli(sigmoid(l / T)) with torch's global random state. In eval
        bit i is 1 where l_i > 0.
    variance: weight of mean(p (1 - p)), p = sigmoid(l), which makes the bits sure of themselves. The official code
        returns it un-weighted, and its training code is not published.

    ids: b n k, k = bits / bits_per_id; the first bit is the highest.
    Both maps stay in float32 when the model is cast. Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self, *, dim: int, bits: int = 64, bits_per_id: int = 1, temperature: float = 0.1, variance: float = 1.0
    ) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(bits >= 1, "bits is 1 or more", bits)
        check_option(bits_per_id >= 1 and bits % bits_per_id == 0, f"bits_per_id divides bits, {bits}", bits_per_id)
        check_option(temperature > 0, "temperature is above 0", temperature)
        check_option(variance >= 0, "variance is a weight, 0 or more", variance)
        self.bit_ids = BitIds((bits_per_id,) * (bits // bits_per_id), self.order)
        self.dim = dim
        self.codebook_sizes = self.bit_ids.sizes
        self.temperature = temperature
        self.variance = variance
        self.project = nn.Linear(dim, bits, dtype=torch.float32)
        # Codes start with variance 1, that of a fair bit being a quarter: small ones drown in the decoder's positions.
        self.embeddings = nn.Parameter(2 * bits**-0.5 * torch.randn(bits, dim, dtype=torch.float32))

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            logits = self.project(z)
            p = logits.sigmoid()
            if self.training:
                bits = torch.bernoulli((logits / self.temperature).sigmoid()).bool()
                codes = straight_through(bits.float(), p) @ self.embeddings
            else:
                bits = logits > 0
                soft = p @ self.embeddings.detach()
                codes = self._embed(bits) + (soft - soft.detach())
            loss, parts = z.new_zeros(()), {}
            if self.variance:
                part = (p * (1 - p)).mean()
                loss, parts = self.variance * part, {"variance": part.detach()}
        return Quantized(codes, self.bit_ids.pack(bits), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return self._embed(self.bit_ids.unpack(self.check_ids(ids)))

    def _embed(self, bits: Tensor) -> Tensor:
        """bits: b n k, bool -> b n d. In one order of summation: a matrix product's depends on how many rows it has."""
        codes = self.embeddings.new_zeros((*bits.shape[:-1], self.dim))
        for bit, embedding in zip(bits.unbind(dim=-1), self.embeddings, strict=True):
            codes = torch.addcmul(codes, bit[..., None].to(codes.dtype), embedding)
        return codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bernoulli:
        return super()._apply(keep_dtype(fn), recurse)
