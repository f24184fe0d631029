"""Feature maps with channels last in memory, where that makes convolutions on a CPU faster and no less exact.

In half precision that is always. In float32 oneDNN's convolutions then add up their products in one chain, with 3 times
the rounding, and gain only where maps are large; so what is small, and what ids are made of, keeps channels first.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

LARGE = 2**22  # numbers in the map of one image, 16 MB: from about there malloc takes fresh pages from the system


def fast_layout(x: Tensor) -> Tensor:
    """b c h w in the memory layout to start with, whatever it came in, so that this does not change a result."""
    last = x.device.type == "cpu" and x.dtype != torch.float32
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def is_large(x: Tensor, growth: int) -> bool:
    """Whether a map ``growth`` times the size of x, b c h w, is worth the change, for inference in float32 on a CPU.

    It depends on one image alone, so that no picture hangs on the batch it is in.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and growth * x[0].numel() >= LARGE
        and not torch.is_grad_enabled()
    )


class GroupNorm(nn.GroupNorm):
    """Group normalisation of VQGANs, with eps 1e-6, as exact with channels last as otherwise."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__(groups, c, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if x.dtype == torch.float32 and x.device.type == "cpu" and last and not torch.is_grad_enabled():
            return self._by_bands(x)
        return super().forward(x)

    def _by_bands(self, x: Tensor) -> Tensor:
        """torch adds up a float32 map with channels last in one chain, 40 times less exact at 256 px than otherwise.

        So bands of a few rows are normalised first, each to mean 0 and variance 1; the statistics of the bands,
        combined, then say by what scale and shift each must still change.
        """
        b, c, h, w = x.shape
        rows = 4 if h % 4 == 0 else 1
        bands = rearrange(x, "b c (n r) w -> (b n) c r w", r=rows)
        y, mean, rstd = torch.native_group_norm(bands, None, None, len(bands), c, rows * w, self.num_groups, self.eps)
        mean, rstd = (rearrange(part, "(b n) g -> b n g 1", b=b) for part in (mean, rstd))
        centre = mean.mean(dim=1, keepdim=True)
        variance = (rstd**-2 - self.eps + (mean - centre) ** 2).mean(dim=1, keepdim=True)
        total = (variance + self.eps).rsqrt()
        weight, bias = (rearrange(part, "(g c) -> g c", g=self.num_groups) for part in (self.weight, self.bias))
        scale = rearrange(total / rstd * weight, "b n g c -> (b n) (g c) 1 1")
        shift = rearrange((mean - centre) * total * weight + bias, "b n g c -> (b n) (g c) 1 1")
        torch.addcmul(shift, y, scale, out=y)
        # By way of b h w c: for one image, the direct way gives strides that a conv does not take for channels last.
        return rearrange(rearrange(y, "(b n) c r w -> b (n r) w c", b=b), "b h w c -> b c h w")
