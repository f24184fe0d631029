"""Nets that tell reconstructions from originals, by small parts of a picture. Each gives logits, high for an original.

Letters: b batch, c channels, h w height and width; pictures are b 3 h w, about [0, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1


class PatchNet(nn.Module):
    """PatchGAN's, "NLayerDiscriminator" in taming-transformers: Isola et al. 2017, https://arxiv.org/abs/1611.07004,
    in tokenizers since VQGAN, https://arxiv.org/abs/2012.09841.

    width: channels after the first convolution, doubled by each further one up to 8 times. depth: how many halve
    the picture. Pictures b 3 h w -> logits b 1 i j. ``least``: the smallest side that leaves one.
    """

    def __init__(self, *, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.least = 3 * 2**depth
        widths = [width * min(2**i, 8) for i in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
            stride = 2 if i < depth else 1
            layers += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(2 * x - 1)


class Blur(nn.Module):
    """Halves a map after the filter 1 3 3 1 in both directions: Zhang 2019, https://arxiv.org/abs/1904.11486."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / row.sum() ** 2)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        margins = []
        for side in (x.shape[-1], x.shape[-2]):
            missing = max(0, 2 * (math.ceil(side / 2) - 1) + 4 - side)
            margins += [missing // 2, missing - missing // 2]
        c = x.shape[1]
        return F.conv2d(F.pad(x, margins), self.kernel.to(x.dtype).expand(c, -1, -1, -1), stride=2, groups=c)


class BlurNet(nn.Module):
    """The critic of TiTok and MaskBit (Weber et al. 2024, https://arxiv.org/abs/2409.16211), 1.9 M weights.

    width: channels after the first convolution, a multiple of 32. depth: stages, each of which halves the picture and,
    but for the first, doubles the channels. Pictures b 3 h w -> logits b 1 16 16.
    """

    least = 1

    def __init__(self, *, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        if width % 32:
            raise ValueError(f"this critic normalises 32 groups of channels: width is a multiple of 32, got {width}")
        widths = [width, *(width * 2**i for i in range(depth))]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(SLOPE)]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), Blur(), nn.GroupNorm(32, after), nn.LeakyReLU(SLOPE)]
        layers += [nn.AdaptiveMaxPool2d(16), nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
