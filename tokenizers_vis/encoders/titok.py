"""TiTok's encoder: patches and latent queries through a ViT; only the queries survive.

Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv 2406.07550.
TA-TiTok's is the same (Kim et al. 2025, arXiv 2501.07730).
With a length policy it is One-D-Piece's (Miwa et al. 2025, arXiv 2501.10064): the tail of the tokens is dropped.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.transformer import Transformer, grid_of, init_linear, learned, patchify, placed, scattered
from tokenizers_vis.encoders.base import Encoder, LengthPolicy
from tokenizers_vis.encoders.flextok import Standard


class TiTokEncoder(Encoder):
    """dim: width of a code. size: height and width of the canvas.

    The sequence is a class token, the patches, the latent queries; every one sees every other.
    scrambled: the numbers of the queries, K of width W, are read row by row as W rows of K, without a transpose, before
        each of the K columns becomes a code. The weights of TiTok's paper were trained so (``is_legacy``).
    standardize: see ``FlexTokEncoder``; for a start without a teacher, which TiTok has in its first stage.
    """

    def __init__(
        self,
        *,
        dim: int,
        max_tokens: int,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        channels: int = 3,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        scrambled: bool = False,
        standardize: bool = False,
        lengths: LengthPolicy = LengthPolicy(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.dim, self.max_tokens, self.patch, self.scrambled = dim, max_tokens, patch, scrambled
        lengths.check(max_tokens)
        self.lengths, self.nested, self.side = lengths, lengths.nested, size
        self.read_patches = nn.Linear(patch * patch * channels, width)
        self.class_token = learned(1, width)
        self.positions = placed(grid_of(size, patch), width)
        self.queries = learned(max_tokens, width)
        self.query_positions = scattered(max_tokens, grid_of(size, patch), width)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, depth, heads, mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm, affine=True, bias=True
        )
        self.norm_out = nn.LayerNorm(width)
        self.to_codes = nn.Linear(width, dim)
        self.read_patches.apply(init_linear)
        self.to_codes.apply(init_linear)
        self.standard = Standard(max_tokens, dim) if standardize else nn.Identity()

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        patches = self.read_patches(patchify(x, self.patch))
        first = self.class_token.to(patches.dtype).expand(len(x), -1, -1)
        image = torch.cat([first, patches], dim=1) + self.positions
        queries = (self.queries + self.query_positions).to(image.dtype).expand(len(x), -1, -1)
        sequence = self.norm_in(torch.cat([image, queries], dim=1))
        z = self.norm_out(self.transformer(sequence, keep=slice(-self.max_tokens, None)))
        if self.scrambled:
            z = rearrange(rearrange(z, "b k w -> b (k w)"), "b (w k) -> b k w", k=self.max_tokens)
        # All queries see each other, so the prefix is cut only now.
        return self.standard(self.to_codes(z))[:, :n_tokens]
