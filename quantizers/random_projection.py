"""Random projection: frozen, random ids as targets to predict (BEST-RQ, Chiu et al. 2022, https://arxiv.org/abs/2202.01855)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from tokenizers_vis.cuda.ops import nearest_code
from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, straight_through
from tokenizers_vis.quantizers.float32 import keep_dtype


class RandomProjection(Quantizer):
    """Projects each vector at random to a few numbers, and names the random code whose direction is nearest.

    dim: width of z.
    codebook_size: codes of each codebook, 2 or more.
    codebook_dim: width of a code, to which z is projected.
    codebooks: so many projections and codebooks, each with an id of its own.
    norm: layer-normalises z first, without which most vectors may get the same few ids.

    ids: b n codebooks, argmin over c of | normalize(c) - normalize(A z) |. They are what this quantizer is for: targets
    that another network predicts at masked places.
    codes: b n dim, what the ids say of z's direction: the shortest vector that A projects to the chosen unit code (by
    A's pseudo-inverse), and its mean over the codebooks. This is ours: the paper has ids only.

    The gradient of the codes passes straight through to z, as in VQ. There is no loss, and nothing is ever learned: A
    (Xavier) and the codes (normal, then normalised) are drawn once from torch's global random state, saved with the
    state, and stay in float32 when the model is cast. vector-quantize-pytorch (1.32) puts one more random linear layer
    before the lookup where there are several codebooks; here each sees its own projection alone, as the paper has it.
    Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int = 8192,
        codebook_dim: int = 16,
        codebooks: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        check_option(codebook_dim >= 1, "codebook_dim is 1 or more", codebook_dim)
        check_option(codebooks >= 1, "codebooks is 1 or more", codebooks)
        self.dim = dim
        self.codebook_sizes = (codebook_size,) * codebooks
        self.norm = norm
        projection = torch.empty(codebooks, dim, codebook_dim, dtype=torch.float32)
        for one in projection:
            nn.init.xavier_normal_(one)
        codebook = F.normalize(torch.randn(codebooks, codebook_size, codebook_dim, dtype=torch.float32), dim=-1)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", codebook)
        inverse = torch.empty(codebooks, codebook_dim, dim, dtype=torch.float32)
        self.register_buffer("inverse", inverse, persistent=False)
        self._invert()
        self.register_load_state_dict_post_hook(_loaded)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            x = z.detach()
            if self.norm:
                x = F.layer_norm(x, (self.dim,))
            projected = einsum(x, self.projection, "b n d, k d e -> k b n e")
            ids = nearest_code(rearrange(projected, "k b n e -> k (b n) e"), self.codebook, metric="cosine")
            ids = rearrange(ids, "k (b n) -> b n k", b=z.shape[0])
            codes = straight_through(self._codes(ids), z)
        return Quantized(codes, ids, z.new_zeros(()), {})

    def lookup(self, ids: Tensor) -> Tensor:
        ids = self.check_ids(ids)
        with torch.autocast(ids.device.type, enabled=False):
            return self._codes(ids)

    def _codes(self, ids: Tensor) -> Tensor:
        # All codes are mapped back, and then chosen from: so a code has the same bits in every batch.
        tables = F.normalize(self.codebook, dim=-1) @ self.inverse
        return sum(F.embedding(ids[..., j], table) for j, table in enumerate(tables)) / len(tables)

    @torch.no_grad()
    def _invert(self) -> None:
        projection = self.projection
        if self.norm:  # z has mean 0 then, and so do the codes
            projection = projection - projection.mean(dim=1, keepdim=True)
        self.inverse.copy_(torch.linalg.pinv(projection))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomProjection:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, codebook_dim={self.codebook.shape[-1]}, norm={self.norm}"


def _loaded(quantizer: RandomProjection, keys: Any) -> None:
    """After load_state_dict: the inverse follows the projection."""
    quantizer._invert()
