"""One index into several codebooks, one for each half of a vector: meaning and pixels (TokenFlow, Qu et al. 2024, https://arxiv.org/abs/2412.03069)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.cuda.ops import nearest_code, softmax_entropy
from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, straight_through, weighted
from tokenizers_vis.quantizers.float32 import keep_dtype


class SharedIndex(Quantizer):
    """Splits z along d into halves (two or more) and gives all of them the one index whose codes fit them best.

    The index is the argmin over i of ``sum_j weights[j] |z_j - c_ji|^2`` (eq. 3). That is the nearest row of one table:
    z and the codes beside each other, each half scaled by the root of its weight.

    dims: widths of the halves, e.g. (32, 8) for 32 of meaning and 8 of pixels.
    codebook_size: number of codes, 2 or more; each codebook has that many.
    weights: of the halves' distances, above 0; none given is 1 for each, as published.
    distance: "cosine": each half of z and of a code is l2-normalised by itself, also in what comes out, so that a
        half's squared distance is 2 - 2 cos, from 0 to 4, whatever its width. "euclidean": they stay as they are.
    commitment: weight of mse(z, sg c), which draws the encoder to the codes.
    codebook_weight: weight of mse(c, sg z), which draws the codes to the encoder.
    entropy: weight of the sample entropy minus the batch entropy, both in nats, of softmax(-distance / temperature).
        In training only; at 0, which is published, it is not computed.
    entropy_temperature: of that softmax, above 0.
    entropy_eps: the batch entropy is -sum a log(a + eps) over the mean shares a; 0 is exact.

    codes: b n d, the halves beside each other; ``halves`` gives them apart, for their two decoders.
    ids: b n 1.
    parts: commitment_0, commitment_1, ..., codebook_0, ...: of each half. In ``loss`` a half counts by its share of d,
        so that together they are the mean over all of d, as published. And sample_entropy, batch_entropy.

    The codebooks stay in float32 when the model is cast. Raises ``ValueError`` for options out of range.

    The authors' code cannot run without l2-normalisation (it reads a table that does not exist); here it does.
    """

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        codebook_size: int,
        weights: tuple[float, ...] = (),
        distance: Literal["cosine", "euclidean"] = "cosine",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        entropy: float = 0.0,
        entropy_temperature: float = 0.01,
        entropy_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        dims = tuple(dims)
        weights = tuple(weights) or (1.0,) * len(dims)
        check_option(len(dims) >= 2 and min(dims) >= 1, "dims are two or more widths, 1 or more each", dims)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        check_option(
            len(weights) == len(dims) and min(weights) > 0, f"weights are {len(dims)} numbers above 0, or none", weights
        )
        check_option(distance in ("cosine", "euclidean"), "distance is 'cosine' or 'euclidean'", distance)
        check_option(commitment >= 0, "commitment is 0 or more", commitment)
        check_option(codebook_weight >= 0, "codebook_weight is 0 or more", codebook_weight)
        check_option(entropy >= 0, "entropy is a weight, 0 or more", entropy)
        check_option(entropy_temperature > 0, "entropy_temperature is above 0", entropy_temperature)
        check_option(entropy_eps >= 0, "entropy_eps is 0 or more", entropy_eps)
        self.dim = sum(dims)
        self.dims = dims
        self.codebook_sizes = (codebook_size,)
        self.weights = weights
        self.distance = distance
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.entropy = entropy
        self.entropy_temperature = entropy_temperature
        self.entropy_eps = entropy_eps
        codebook = torch.empty(codebook_size, self.dim, dtype=torch.float32)
        codebook.uniform_(-1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(self._norm(codebook))

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            z, codebook = self._norm(z), self._norm(self.codebook)
            rows = rearrange(self._scale(z), "b n d -> (b n) d")
            ids = nearest_code(rows.detach(), self._scale(codebook).detach())
            ids = rearrange(ids, "(b n) -> b n", b=z.shape[0])
            codes = F.embedding(ids, codebook)
            loss, parts = self._loss(z, codes, rows, codebook)
        return Quantized(straight_through(codes, z), rearrange(ids, "b n -> b n 1"), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(self.check_ids(ids)[..., 0], self._norm(self.codebook))

    def halves(self, codes: Tensor) -> tuple[Tensor, ...]:
        """codes: ... d -> the codes of each codebook, ... dims[j]."""
        return codes.split(self.dims, dim=-1)

    def _norm(self, z: Tensor) -> Tensor:
        """Each half of z, ... d, on its unit sphere."""
        if self.distance == "euclidean":
            return z
        return torch.cat([F.normalize(half, dim=-1) for half in self.halves(z)], dim=-1)

    def _scale(self, z: Tensor) -> Tensor:
        """Each half of z, ... d, times the root of its weight: so plain squared distances become the weighted ones."""
        if set(self.weights) == {1.0}:
            return z
        return torch.cat([half * w**0.5 for half, w in zip(self.halves(z), self.weights, strict=True)], dim=-1)

    def _loss(self, z: Tensor, codes: Tensor, rows: Tensor, codebook: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses: dict[str, tuple[float, Tensor]] = {}
        for j, (half, code) in enumerate(zip(self.halves(z), self.halves(codes), strict=True)):
            share = self.dims[j] / self.dim
            losses[f"commitment_{j}"] = self.commitment * share, F.mse_loss(half, code.detach())
            losses[f"codebook_{j}"] = self.codebook_weight * share, F.mse_loss(code, half.detach())
        losses = {name: pair for name, pair in losses.items() if pair[0] > 0}
        if self.entropy and self.training:
            sample, batch = softmax_entropy(
                rows, self._scale(codebook), temperature=self.entropy_temperature, eps=self.entropy_eps
            )
            losses["sample_entropy"] = self.entropy, sample
            losses["batch_entropy"] = -self.entropy, batch
        return weighted(losses, z)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedIndex:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, codebook_size={self.codebook_sizes[0]}, distance={self.distance}"
