"""Vision transformers with the details that the weights of CLIP, SigLIP and BEiT were trained with.

                                            layer norm's eps    GELU
    CLIP    (Radford 2021, arXiv 2103.00020)     1e-5           "quick": x sigmoid(1.702 x)
    SigLIP  (Zhai 2023, arXiv 2303.15343)        1e-6           "tanh": its approximation
    BEiT v2 (Peng 2022, arXiv 2208.06366)        1e-6           "exact"
    FQGAN   (Bai 2024, arXiv 2411.16681)         1e-5           "exact"

Letters: b batch, n tokens, d width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.transformer import Attention

Gelu = Literal["exact", "tanh", "quick"]


class MLP(nn.Module):
    """Two layers with a GELU of one of three kinds between."""

    def __init__(self, width: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.gelu = gelu
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gelu == "quick":
            return self.down(x * torch.sigmoid(1.702 * x))
        return self.down(F.gelu(x, approximate="tanh" if self.gelu == "tanh" else "none"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), everything with a bias."""

    def __init__(self, width: int, heads: int, hidden: int, gelu: Gelu, eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, qk_norm=False, bias=True)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Blocks(nn.Module):
    """A stack of blocks of one kind: b n d -> b n d."""

    def __init__(self, width: int, depth: int, heads: int, *, hidden: int, gelu: Gelu, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, hidden, gelu, eps) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def resized(positions: Tensor, grid: int) -> Tensor:
    """Positions of a class token and of a square grid, (1 + h h) d -> those of another grid, (1 + grid grid) d.

    Bicubic, in DINO's way: samples lie as if the grid were a tenth of a place larger. Weights that saw such positions
    in training want them so.
    """
    side = round((len(positions) - 1) ** 0.5)
    if side == grid:
        return positions
    places = rearrange(positions[1:], "(h w) d -> 1 d h w", h=side)
    places = F.interpolate(places, scale_factor=(grid + 0.1) / side, mode="bicubic")
    return torch.cat([positions[:1], rearrange(places, "1 d h w -> (h w) d")])
