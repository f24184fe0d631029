"""FQGAN's encoder: one convolutional net, then a branch for each of several codebooks.

Bai et al. 2024, "Factorized Visual Tokenization and Generation", arXiv 2411.16681.

Letters: c channels, h w the grid.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.conv import DownPath, Head
from tokenizers_vis.decoders.transformer import Transformer, grid_of, learned
from tokenizers_vis.encoders.base import Encoder, LengthPolicy


class Adapter(nn.Module):
    """A transformer over the places of the grid: b c h w -> b c h w."""

    def __init__(self, width: int, grid: int, depth: int, heads: int) -> None:
        super().__init__()
        self.positions = learned(grid**2, width, std=width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, depth, heads, mlp="gelu", mlp_ratio=4.0, qk_norm=False, affine=True, bias=True
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_in(rearrange(x, "b c h w -> b (h w) c") + self.positions)
        return rearrange(self.norm_out(self.transformer(y)), "b (h w) c -> b c h w", h=x.shape[-2])


class Branch(nn.Module):
    """Features b c h w -> what one codebook quantizes, b d h w."""

    def __init__(
        self, dim: int, z_channels: int, width: int, grid: int, depth: int, heads: int, norm_groups: int
    ) -> None:
        super().__init__()
        self.adapter = Adapter(width, grid, depth, heads)
        self.head = Head(width, z_channels, norm_groups)
        self.to_codes = nn.Conv2d(z_channels, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_codes(self.head(self.adapter(x)))


class FactorizedEncoder(Encoder):
    """dim: width of a code, all factors beside each other. size: height and width of the canvas.

    branches: how many factors, each of ``dim / branches`` numbers, for a product of as many quantizers.
    depth, heads: of each branch's transformer. The other arguments are those of ``DownPath`` in decoders/conv.py; the
    coarsest level has attention.
    """

    nested = False

    def __init__(
        self,
        *,
        dim: int,
        size: int,
        branches: int = 2,
        ch: int = 128,
        channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        channels: int = 3,
        depth: int = 6,
        heads: int = 8,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if branches < 1 or dim % branches:
            raise ValueError(f"dim is a multiple of branches, 1 or more; got dim {dim} and branches {branches}")
        grid = grid_of(size, 2 ** (len(channel_mult) - 1))
        self.dim, self.side, self.max_tokens, self.lengths = dim, size, grid**2, LengthPolicy()
        self.path = DownPath(
            ch=ch,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            channels=channels,
            attention=(len(channel_mult) - 1,),
            style="taming",
            norm_groups=norm_groups,
        )
        self.branches = nn.ModuleList(
            Branch(dim // branches, z_channels, self.path.width, grid, depth, heads, norm_groups)
            for _ in range(branches)
        )

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        features = self.path(x)
        z = torch.cat([branch(features) for branch in self.branches], dim=1)
        return rearrange(z, "b d h w -> b (h w) d")[:, :n_tokens]
