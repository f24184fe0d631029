"""Index backpropagation: one of K codes, with a gradient that reaches all of them (Shi et al. 2024, https://arxiv.org/abs/2412.02692).

The soft choice among the codes is attention over the codebook; its fused kernels never hold all n K shares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.cuda.ops import nearest_code, softmax_entropy
from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, weighted
from tokenizers_vis.quantizers.float32 import keep_dtype
from tokenizers_vis.quantizers.soft_vq import mixture


class IBQ(Quantizer):
    """Replaces each vector by the code of the largest inner product, and learns through the softmax over all codes.

    With p = softmax(z C^T) and e the code chosen, the codes that come out are e + p C - sg(p C), where in p C only p
    has a gradient. So every code moves at every step, by the gradient of its share. The value is e.

    dim: width of a code.
    codebook_size: number of codes, 2 or more. They start as standard normal vectors.
    quantization: weight of mse(z, codes), whose gradient runs through p as well.
    commitment: weight of mse(z, sg e), which draws the encoder to the code.
    codebook_weight: weight of mse(e, sg z), which draws the code to the encoder.
    entropy: weight of the sample entropy minus ``gamma`` times the batch entropy, both in nats: each vector
        should be sure of its code, and all vectors together should use all codes. In training only; at 0 it is not
        computed. They are those of softmax(z C^T / entropy_temperature).
    gamma: weight of the batch entropy against the sample entropy's 1.
    entropy_temperature: of that softmax, above 0.
    entropy_eps: the batch entropy is -sum a log(a + eps) over the mean shares a. The published 1e-5 is felt where it
        is not far below 1 / codebook_size: with 2^18 codes in even use it takes 1.29 from 12.48 nats. 0 is exact.

    ids: b n 1, the largest inner product; of equal ones, the lowest id. It is not the nearest code.
    parts: quantization, commitment, codebook (equal in value, unlike in gradient), and sample_entropy, batch_entropy.
    The codebook stays in float32 when the model is cast. Raises ``ValueError`` for options out of range.

    The defaults are the published ones: there beta weighs the codebook's side, as ``codebook_weight`` does here.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        quantization: float = 1.0,
        commitment: float = 1.0,
        codebook_weight: float = 0.25,
        entropy: float = 0.05,
        gamma: float = 1.0,
        entropy_temperature: float = 0.01,
        entropy_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        check_option(quantization >= 0, "quantization is a weight, 0 or more", quantization)
        check_option(commitment >= 0, "commitment is a weight, 0 or more", commitment)
        check_option(codebook_weight >= 0, "codebook_weight is 0 or more", codebook_weight)
        check_option(entropy >= 0, "entropy is a weight, 0 or more", entropy)
        check_option(gamma >= 0, "gamma is a weight, 0 or more", gamma)
        check_option(entropy_temperature > 0, "entropy_temperature is above 0", entropy_temperature)
        check_option(entropy_eps >= 0, "entropy_eps is 0 or more", entropy_eps)
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.quantization = quantization
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.entropy = entropy
        self.gamma = gamma
        self.entropy_temperature = entropy_temperature
        self.entropy_eps = entropy_eps
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim, dtype=torch.float32))

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            ids = nearest_code(rearrange(z.detach(), "b n d -> (b n) d"), self.codebook.detach(), metric="dot")
            ids = rearrange(ids, "(b n) -> b n", b=z.shape[0])
            chosen = F.embedding(ids, self.codebook)
            codes = chosen
            if torch.is_grad_enabled():
                # Only the shares pass a gradient on here; the gradient of the value goes to the code that was chosen.
                rows, codebook = rearrange(z, "b n d -> 1 (b n) d"), self.codebook[None]
                mean = rearrange(mixture(rows, codebook, codebook.detach(), 1.0), "1 (b n) d -> b n d", b=z.shape[0])
                codes = chosen + (mean - mean.detach())  # an exact zero: the value stays the code, bit for bit
            loss, parts = self._loss(z, codes, chosen)
        return Quantized(codes, rearrange(ids, "b n -> b n 1"), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(self.check_ids(ids)[..., 0], self.codebook)

    def _loss(self, z: Tensor, codes: Tensor, chosen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses: dict[str, tuple[float, Tensor]] = {}
        if self.quantization:
            losses["quantization"] = self.quantization, F.mse_loss(codes, z)
        if self.commitment:
            losses["commitment"] = self.commitment, F.mse_loss(z, chosen.detach())
        if self.codebook_weight:
            losses["codebook"] = self.codebook_weight, F.mse_loss(chosen, z.detach())
        if self.entropy and self.training:
            sample, batch = softmax_entropy(
                rearrange(z, "b n d -> (b n) d"),
                self.codebook,
                temperature=self.entropy_temperature,
                metric="dot",
                eps=self.entropy_eps,
            )
            losses["sample_entropy"] = self.entropy, sample
            if self.gamma:
                losses["batch_entropy"] = -self.entropy * self.gamma, batch
        return weighted(losses, z)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IBQ:
        return super()._apply(keep_dtype(fn), recurse)
