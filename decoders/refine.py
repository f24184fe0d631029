"""A small convolutional net behind a transformer's patches, which sees over their borders.

A linear layer writes each patch by itself: neighbours meet in seams, and texture repeats in a grid. What follows works
at half the picture's size, where a convolution costs a quarter and sees twice as far.

Letters: b batch, c channels, d width of the transformer, g patches along a side, h w height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

READ = 8  # channels that the transformer tells the net at every place


class Refine(nn.Module):
    """Adds to a picture what ``channels`` channels at half its size see in it, and in what the transformer knew.

    patch: even. depth: residual blocks of two 3 x 3 convolutions. At first it adds nothing, so that a trained decoder
    can have it later.
    """

    def __init__(self, *, width: int, patch: int, channels: int, colors: int = 3, depth: int = 2) -> None:
        super().__init__()
        if patch % 2 or channels < 1:
            raise ValueError(f"a net that refines works at half the size: patch is even, got {patch} and {channels}")
        self.half = patch // 2
        self.read = nn.Linear(width, self.half**2 * READ)
        self.first = nn.Conv2d(4 * colors + READ, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(depth)
        )
        self.last = nn.Conv2d(channels, 4 * colors, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, picture: Tensor, features: Tensor) -> Tensor:
        """picture: b c h w. features: b (g g) d, of its patches. -> b c h w."""
        grid = picture.shape[-1] // (2 * self.half)
        told = rearrange(
            self.read(features), "b (i j) (p q r) -> b r (i p) (j q)", i=grid, p=self.half, q=self.half, r=READ
        )
        seen = F.pixel_unshuffle(picture, 2).to(told.dtype)
        x = self.first(torch.cat([seen, told], dim=1).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = x + block(x)
        return picture + F.pixel_shuffle(self.last(F.silu(x)), 2)
