"""Soft vector quantization: each vector becomes a mixture of codes (Chen et al. 2024, https://arxiv.org/abs/2412.10958)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.cuda.ops import nearest_code, softmax_entropy
from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option
from tokenizers_vis.quantizers.float32 import keep_dtype

ENTROPY_EPS = 1e-6  # the batch entropy is -sum a log(a + eps), as published
ALIGNED = 8  # floats: fused attention kernels want widths that are a multiple of it


class SoftVQ(Quantizer):
    """Replaces each vector by softmax(z C^T / tau) C, a mixture of the codes C weighted by how well they fit.

    The gradient is the true one, and no straight-through: to z through the shares, to C as the values that are mixed,
    not as what z is compared with.

    dim: width of a code.
    codebook_size: codes of one codebook, 2 or more.
    codebooks: how many. The n vectors of an image are cut into as many equal runs, the first run for the first
        codebook; so n is a multiple of it. The released models have 4.
    l2_norm: z and the codes are l2-normalised first. A mixture is shorter than 1 then; it is not normalised again.
    tau: temperature of the mixture, above 0.
    entropy: weight of the sample entropy minus the batch entropy, in nats, of softmax(z C^T / entropy_temperature):
        each vector should be sure of its code, and all vectors together should use all codes. The gradient goes to z
        alone. The mean shares are pooled over the codebooks: code i of one counts as code i of any other. In training
        only; at 0 it is not computed.
    entropy_temperature: of that softmax, above 0.

    codes: b n d. They hold more than the ids (``discrete`` is false): a decoder wants the codes.
    ids: b n 1, the code with the largest share, from 0 in every codebook; of equal shares the lowest id. ``lookup``
        gives that code alone. It finds the codebook by the place in n, so it takes all n ids of an image.
    parts: sample_entropy, batch_entropy.

    The mixture is attention over the codebook, and comes from ``scaled_dot_product_attention``: its fused kernels never
    hold the n x K shares. The codebooks stay in float32 when the model is cast.
    Raises ``ValueError`` for options out of range, and for an n that the codebooks do not divide.
    """

    discrete = False

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebooks: int = 1,
        l2_norm: bool = True,
        tau: float = 0.07,
        entropy: float = 0.01,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        check_option(codebooks >= 1, "codebooks is 1 or more", codebooks)
        check_option(tau > 0, "tau is above 0", tau)
        check_option(entropy >= 0, "entropy is a weight, 0 or more", entropy)
        check_option(entropy_temperature > 0, "entropy_temperature is above 0", entropy_temperature)
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.codebooks = codebooks
        self.l2_norm = l2_norm
        self.tau = tau
        self.entropy = entropy
        self.entropy_temperature = entropy_temperature
        codebook = torch.empty(codebooks, codebook_size, dim, dtype=torch.float32)
        codebook.uniform_(-1 / codebook_size, 1 / codebook_size)
        # At length 1, because the gradient through the normalisation grows as the length shrinks.
        self.codebook = nn.Parameter(F.normalize(codebook, dim=-1) if l2_norm else codebook)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        b, n, _ = z.shape
        self._check_n(n)
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z, dim=-1) if self.l2_norm else z
            z = rearrange(z, "b (k n) d -> k (b n) d", k=self.codebooks)
            table = self._table()
            codes = mixture(z, table.detach(), table, self.tau)
            ids = nearest_code(z.detach(), table.detach(), metric="dot")
            loss, parts = self._loss(z, table.detach())
        codes = rearrange(codes, "k (b n) d -> b (k n) d", b=b)
        return Quantized(codes, rearrange(ids, "k (b n) -> b (k n) 1", b=b), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        ids = self.check_ids(ids)
        self._check_n(ids.shape[1])
        first = torch.arange(self.codebooks, device=ids.device) * self.codebook_sizes[0]
        ids = rearrange(ids, "b (k n) 1 -> b k n", k=self.codebooks) + first[:, None]
        with torch.autocast(ids.device.type, enabled=False):
            return F.embedding(rearrange(ids, "b k n -> b (k n)"), rearrange(self._table(), "k c d -> (k c) d"))

    def _table(self) -> Tensor:
        """The codes that are mixed, one table per codebook."""
        return F.normalize(self.codebook, dim=-1) if self.l2_norm else self.codebook

    def _check_n(self, n: int) -> None:
        if n % self.codebooks:
            raise ValueError(
                f"{self.codebooks} codebooks share the vectors of an image evenly, got {n} of them; "
                f"use a multiple of {self.codebooks}, or another number of codebooks"
            )

    def _loss(self, z: Tensor, table: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z: k n d, one row of vectors per codebook."""
        if not self.entropy or not self.training:
            return z.new_zeros(()), {}
        # One pool of shares from k tables: each vector is put in its codebook's own d of k d coordinates, 0 elsewhere,
        # so that its inner product with the codes laid side by side is that with its own codebook.
        eye = torch.eye(self.codebooks, device=z.device)
        rows = rearrange(z[:, :, None] * eye[:, None, :, None], "k n e d -> (k n) (e d)")
        sample, batch = softmax_entropy(
            rows,
            rearrange(table, "k c d -> c (k d)"),
            temperature=self.entropy_temperature,
            metric="dot",
            eps=ENTROPY_EPS,
        )
        parts = {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
        return self.entropy * (sample - batch), parts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftVQ:
        return super()._apply(keep_dtype(fn), recurse)


def mixture(z: Tensor, keys: Tensor, values: Tensor, tau: float) -> Tensor:
    """softmax(z K^T / tau) V for each of k codebooks. z: k n d. keys, values: k c d. Returns k n d.

    Differentiable in all three, without the n x c shares where torch has a fused kernel: on CPU and CUDA.
    """
    d = z.shape[-1]
    pad = (0, -d % ALIGNED)  # zeros change no inner product, and the scale does not follow the width
    z, keys, values = (F.pad(x, pad)[None] for x in (z, keys, values))
    return F.scaled_dot_product_attention(z, keys, values, scale=1 / tau)[0, ..., :d]
