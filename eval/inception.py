"""The Inception of FID, as TensorFlow's graph of 2015-12-05 computes it: https://arxiv.org/abs/1706.08500.

torchvision's Inception v3 but for what differs in that graph: average pools leave the padding out, the last block
pools by maximum, there are 1008 classes, and pictures come to 299 pixels by TensorFlow 1's bilinear resize.
Parameters have the names of pytorch-fid and torch-fidelity (https://github.com/toshas/torch-fidelity), the de-facto
references, so that their file of weights fits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as parts

SIZE = 299
DIM = 2048
_CLASSES = 1008


def tf1_bilinear(x: Tensor, size: int) -> Tensor:
    """TensorFlow 1's resize_bilinear, align_corners off: x b c h w -> b c size size. Pixel 0 stays at place 0."""

    def places(side: int) -> tuple[Tensor, Tensor, Tensor]:
        # The scale is rounded to float32 first, as there: otherwise a place that is whole may fall just below itself.
        at = torch.arange(size, device=x.device, dtype=x.dtype) * torch.tensor(side / size, dtype=torch.float32).item()
        low = at.long()
        return low, (low + 1).clamp(max=side - 1), at - low

    low, high, share = places(x.shape[3])
    x = x[..., low] + (x[..., high] - x[..., low]) * share
    low, high, share = places(x.shape[2])
    return x[:, :, low] + (x[:, :, high] - x[:, :, low]) * share[:, None]


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


class _A(parts.InceptionA):
    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class _C(parts.InceptionC):
    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], dim=1)


class _E(parts.InceptionE):
    def __init__(self, in_channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__(in_channels)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, dim=1)


class FIDInception(nn.Module):
    """Untrained as it is built; ``features.InceptionFeatures`` fills it with the weights that make it the FID's."""

    def __init__(self) -> None:
        super().__init__()
        conv = parts.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.maxpool1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.maxpool2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = _A(192, pool_features=32)
        self.Mixed_5c = _A(256, pool_features=64)
        self.Mixed_5d = _A(288, pool_features=64)
        self.Mixed_6a = parts.InceptionB(288)
        self.Mixed_6b = _C(768, channels_7x7=128)
        self.Mixed_6c = _C(768, channels_7x7=160)
        self.Mixed_6d = _C(768, channels_7x7=160)
        self.Mixed_6e = _C(768, channels_7x7=192)
        self.Mixed_7a = parts.InceptionD(768)
        self.Mixed_7b = _E(1280, _average)
        self.Mixed_7c = _E(DIM, _maximum)
        self.fc = nn.Linear(DIM, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x: b 3 299 299, float32 from 0 to 255 -> the pooled features b 2048."""
        x = (x - 128) / 128
        for name, layer in self.named_children():  # in the order in which they were made
            if name != "fc":
                x = layer(x)
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """b 2048 -> b 1008, without the bias, as the Inception Score has them."""
        return features @ self.fc.weight.T
