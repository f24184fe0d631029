"""A critic that looks through a frozen vision transformer: StyleGAN-T's, Sauer et al. 2023,
https://arxiv.org/abs/2301.09515. VAR, ImageFolder and UniTok train tokenizers with it on DINO.

Letters: b batch, h w height and width, l places of the transformer's grid, d its width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tokenizers_vis.train.frozen import Bearer, steady, timm_at


@dataclass(frozen=True)
class FeatureCriticConfig:
    """model: a vision transformer of timm. weights: a local file; "" is timm's own, from its cache or the network.

    size: side of the square that it sees; 0 is its own. blocks: those whose output a head judges, beside their input.
    augment: chance that a batch is shifted, and that its colours change, and that a square is cut out of each picture.
    """

    model: str = "vit_small_patch16_224.dino"
    weights: str = ""
    size: int = 0
    blocks: tuple[int, ...] = (2, 5, 8, 11)
    augment: float = 1.0

    def __post_init__(self) -> None:
        if not self.blocks or list(self.blocks) != sorted({*self.blocks}) or self.blocks[0] < 0:
            raise ValueError(f"blocks are numbers of blocks from 0, rising; got {self.blocks}")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment is a chance from 0 to 1, got {self.augment}")


class FeatureNet(Bearer):
    """Pictures b 3 h w, about [0, 1] -> logits b (heads l). The transformer is frozen, the heads learn.

    Raises ``ValueError`` for a model that timm does not have or that is no vision transformer, and for weights that
    cannot be had or are of another model.
    """

    least = 1

    def __init__(self, config: FeatureCriticConfig) -> None:
        super().__init__()
        net, (mean, std, self.size) = timm_at(config.model, config.weights, config.size)
        if not isinstance(getattr(net, "blocks", None), nn.Sequential | nn.ModuleList) or not hasattr(net, "embed_dim"):
            raise ValueError(f"{config.model} is no vision transformer, whose blocks the critic's heads look at")
        if config.blocks[-1] >= len(net.blocks):
            raise ValueError(f"{config.model} has blocks 0 to {len(net.blocks) - 1}, got {config.blocks}")
        self.first, self.augment = net.num_prefix_tokens, config.augment
        self.register_buffer("mean", rearrange(torch.tensor(mean), "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(torch.tensor(std), "c -> c 1 1"), persistent=False)
        self.bear("net", net)
        self.seen: list[Tensor] = []
        net.blocks[0].register_forward_pre_hook(lambda block, inputs: self.seen.append(inputs[0]))
        for i in config.blocks:
            net.blocks[i].register_forward_hook(lambda block, inputs, output: self.seen.append(output))
        self.heads = nn.ModuleList(Head(net.embed_dim) for _ in (0, *config.blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training and self.augment:
            x = (augmented(2 * x - 1, self.augment) + 1) / 2
        with steady(x.device):
            self.borne["net"].forward_features((self._fitted(x) - self.mean) / self.std)
        seen, self.seen[:] = [*self.seen], []
        # The heads are small, and the norm of their weights is estimated: float32.
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([head(self._readout(y)) for head, y in zip(self.heads, seen, strict=True)], dim=1)

    def _fitted(self, x: Tensor) -> Tensor:
        """To the transformer's size; of a larger picture every second time a part, at a random place."""
        size, (h, w) = self.size, x.shape[-2:]
        if h <= size or w <= size:
            return F.interpolate(x, size=(size, size), mode="bicubic")
        if not self.training or torch.rand(()) > 0.5:
            return F.interpolate(x, size=(size, size), mode="area")
        top, left = (int(torch.randint(side - size + 1, ())) for side in (h, w))
        return x[..., top : top + size, left : left + size]

    def _readout(self, y: Tensor) -> Tensor:
        """b (first l) d -> b d l: each place beside the class token, where there is one."""
        y = y.float()
        patches = y[:, self.first :]
        return rearrange(patches + y[:, :1] if self.first else patches, "b l d -> b d l")


class Head(nn.Module):
    """b d l -> logits b l: two convolutions along the places in raster order, as if these were a ring."""

    def __init__(self, dim: int, kernel: int = 9) -> None:
        super().__init__()
        self.place, self.around = Convolution(dim, 1), Convolution(dim, kernel)
        self.to_logits = spectral_norm(nn.Conv1d(dim, 1, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.place(x)
        return rearrange(self.to_logits((self.around(x) + x) * 0.5**0.5), "b 1 l -> b l")


class Convolution(nn.Module):
    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, padding_mode="circular")
        self.conv, self.norm = spectral_norm(conv, eps=1e-12), GroupedBatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class GroupedBatchNorm(nn.Module):
    """Batch norm by the statistics of up to 8 images of the batch at a time, in evaluation too. x: b d l."""

    def __init__(self, dim: int, images: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.images, self.eps = images, eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        groups = -(-len(x) // self.images)
        while len(x) % groups:
            groups += 1
        y = rearrange(x.float(), "(g b) d l -> g b d l", g=groups)
        variance, mean = torch.var_mean(y, dim=(1, 3), keepdim=True, correction=0)
        y = rearrange((y - mean) * torch.rsqrt(variance + self.eps), "g b d l -> (g b) d l")
        return y * self.weight[:, None] + self.bias[:, None]


def augmented(x: Tensor, chance: float, cut: float = 0.2) -> Tensor:
    """Differentiable augmentation, Zhao et al. 2020, https://arxiv.org/abs/2006.10738. x: b 3 h w in [-1, 1].

    With its own ``chance`` each, for the whole batch: a shift by up to 1/8 of the sides, zeros behind it; brightness,
    saturation and contrast; a square of ``cut`` times the sides becomes zero.
    """
    shift, colour, hole = (torch.rand(3) <= chance).tolist()
    b, _, h, w = x.shape
    random = torch.rand(7, b, 1, 1, device=x.device)
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    if shift:
        far_h, far_w = round(h / 8), round(w / 8)
        down = (random[0] * (2 * far_h + 1)).floor().long() - far_h
        right = (random[1] * (2 * far_w + 1)).floor().long() - far_w
        image = torch.arange(b, device=x.device)[:, None, None]
        # A margin of one pixel stands for all that is outside.
        padded = rearrange(F.pad(x, (1, 1, 1, 1)), "b c h w -> b h w c")
        moved = padded[image, (rows + down + 1).clamp(0, h + 1), (columns + right + 1).clamp(0, w + 1)]
        x = rearrange(moved, "b h w c -> b c h w")
    if colour:
        brightness, saturation, contrast = (random[i][..., None] for i in (2, 3, 4))
        x = x + (brightness - 0.5)
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * (2 * saturation) + grey
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * (contrast + 0.5) + mean
    if hole:
        inside = []
        for at, share, side in ((rows, random[5], h), (columns, random[6], w)):
            length = round(side * cut)
            start = (share * (side + 1 - length % 2)).floor().long() - length // 2
            inside.append((at >= start) & (at < start + length))
        x = x * ~(inside[0] & inside[1])[:, None]
    return x
