"""TokenFlow's encoder: a vision transformer for meaning and a convolutional net for pixels, on one grid.

Qu et al. 2024, "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation", arXiv 2412.03069.

Letters: n places of the grid in raster order, d width of a code, w width of the transformer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.vision import Blocks, resized
from tokenizers_vis.encoders.base import Encoder, LengthPolicy
from tokenizers_vis.encoders.grid import GridEncoder


class VisionTower(nn.Module):
    """A picture b 3 size size in [-1, 1] -> a feature for each whole patch, b n w.

    patch: side of a patch; what is left at the right and below belongs to none. width, depth, heads: of the
    transformer; hidden: of its MLPs. positions: side of the grid that its positions were learned on; 0 is that of
    ``size``, which "siglip" wants.

    style          "clip"                    "siglip"
    patches        without a bias            with one
    class token    yes, not in the result    none
    norms          before and after          none: the last layer and what follows it are left out
    pictures       as they come              normalised by ``mean`` and ``std``, which the weights hold
    """

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        positions: int = 0,
        style: Literal["clip", "siglip"] = "clip",
    ) -> None:
        super().__init__()
        clip = style == "clip"
        self.size, self.grid, self.style = size, size // patch, style
        side = positions or self.grid
        if not clip and side != self.grid:
            raise ValueError(f"style 'siglip' has positions for its own grid, of side {self.grid}; got {side}")
        self.read_patches = nn.Conv2d(3, width, patch, stride=patch, bias=not clip)
        self.positions = nn.Parameter(torch.randn(side**2 + clip, width) * width**-0.5)
        if clip:
            self.class_token = nn.Parameter(torch.randn(1, width) * width**-0.5)
            self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        else:
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
            self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))
        gelu, eps = ("quick", 1e-5) if clip else ("tanh", 1e-6)
        self.transformer = Blocks(width, depth, heads, hidden=hidden, gelu=gelu, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "siglip":
            # By way of 0 to 255 as the authors: the rounding is theirs.
            x = (((x + 1) * 127.5).clamp(0, 255) / 255 - self.mean) / self.std
        patches = rearrange(self.read_patches(x), "b w i j -> b (i j) w")
        if self.style == "siglip":
            return self.transformer(patches + self.positions)
        first = self.class_token.expand(len(x), -1, -1)
        y = self.norm_in(torch.cat([first, patches], dim=1) + resized(self.positions, self.grid))
        return self.norm_out(self.transformer(y)[:, 1:])


class DualEncoder(Encoder):
    """semantic: sees the picture as it is. semantic_dim: numbers of a code that hold its meaning; they come first.

    pixels: makes the other numbers. It sees the picture at the size at which its grid is that of ``semantic``; where
    that is not the canvas', the picture is resized, bicubic.
    """

    nested = False

    def __init__(self, *, semantic: VisionTower, pixels: GridEncoder, semantic_dim: int = 32) -> None:
        super().__init__()
        if semantic.grid**2 != pixels.max_tokens:
            raise ValueError(
                f"both encoders look at one grid: the transformer's is {semantic.grid} x {semantic.grid}, and pixels "
                f"gives {pixels.max_tokens} places; give pixels a size of {semantic.grid} times what it shrinks by"
            )
        self.dim, self.max_tokens, self.lengths = semantic_dim + pixels.dim, pixels.max_tokens, LengthPolicy()
        self.side = semantic.size
        self.pixel_size = semantic.grid * 2 ** (len(pixels.net.path.levels) - 1)
        self.semantic = semantic
        width = semantic.positions.shape[-1]
        self.to_meaning = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, semantic_dim))
        self.pixels = pixels

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        meaning = self.to_meaning(self.semantic(x))
        if x.shape[-1] != self.pixel_size:
            x = F.interpolate(x, size=(self.pixel_size, self.pixel_size), mode="bicubic")
        return torch.cat([meaning, self.pixels(x, self.max_tokens)], dim=-1)[:, :n_tokens]
