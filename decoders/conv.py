"""The convolutional encoder and decoder of the VQGAN lineage, and the decoder of a grid of codes that is made of them.

Esser et al. 2020, "Taming Transformers for High-Resolution Image Synthesis", arXiv 2012.09841. The weights of its two
living lines want layers that differ:

                                  "taming" (LlamaGen, FQGAN)        "maskgit" (MaskGIT, TiTok, RAR)
    a residual block's convs      have a bias                       have none
    where its width changes       1x1 conv of the block's input     1x1 conv of what the block made; its input is lost
    half the size                 conv of stride 2                  average of 2x2
    middle                        block, attention, block           num_res_blocks blocks
    blocks of a decoder's level   num_res_blocks + 1                num_res_blocks
    an encoder's convs            first with a bias, last 3x3       first without, last 1x1
    codes                         1x1 convs around the quantizer    z itself

Letters: b batch, c channels, h w the grid, n = h w tokens in raster order, d width of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.channels_last import GroupNorm, fast_layout, is_large
from tokenizers_vis.decoders.transformer import grid_of

Style = Literal["taming", "maskgit"]


class ResBlock(nn.Module):
    """Twice group norm, SiLU and a 3x3 conv, around which the input goes: b in h w -> b out h w."""

    def __init__(self, c_in: int, c_out: int, style: Style, norm_groups: int) -> None:
        super().__init__()
        bias = style == "taming"
        self.norm1 = GroupNorm(c_in, norm_groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.norm2 = GroupNorm(c_out, norm_groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        # The published weights of MaskGIT's VQGAN were trained with a shortcut that forgets the block's input.
        self.forgets = style == "maskgit" and c_in != c_out
        kept = c_out if self.forgets else c_in
        self.shortcut = nn.Conv2d(kept, c_out, 1, bias=bias) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(silu(self.norm1(x)))
        y = self.conv2(silu(self.norm2(y)))
        skip = self.shortcut(y if self.forgets else x)
        return skip + y if torch.is_grad_enabled() else y.add_(skip)


class Attention(nn.Module):
    """One head over all places of the grid, around which the input goes: b c h w -> b c h w."""

    def __init__(self, c: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(c, norm_groups)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Halve(nn.Module):
    """b c h w -> b c h/2 w/2."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below alone, as the weights were trained


class Double(nn.Module):
    """Each place four times, then a 3x3 conv: b c h w -> b c 2h 2w."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if is_large(x, growth=4):
            # The same by one transposed conv, 4 products in place of 9: under the kernel lie only 4 places that differ.
            x = x.contiguous(memory_format=torch.channels_last)
            return F.conv_transpose2d(x, upsampling_kernel(self.conv.weight), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one size, each with attention after it or not, then the step to the next size."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        blocks: int,
        style: Style,
        norm_groups: int,
        *,
        attention: bool,
        resample: nn.Module,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_out if i else c_in, c_out, style, norm_groups) for i in range(blocks))
        self.attention = nn.ModuleList(Attention(c_out, norm_groups) for _ in range(blocks if attention else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[i](x)
        return self.resample(x)


class DownPath(nn.Module):
    """A picture b channels H W -> features b width h w, where h = H / 2^(levels - 1).

    ch: width of the first level; each width is ``ch`` times its ``channel_mult`` and a multiple of ``norm_groups``.
    channel_mult: one for each level, from the finest. num_res_blocks: of each level.
    attention: numbers of the levels that have it, 0 for the finest.
    norm_groups: of the norms. Published nets have 32, at 4 channels a group or more. A narrow net wants fewer: a
        channel that is a group of its own loses its mean, and with it colour and brightness.
    """

    def __init__(
        self,
        *,
        ch: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        channels: int,
        attention: Sequence[int],
        style: Style,
        norm_groups: int,
    ) -> None:
        super().__init__()
        widths = [ch * mult for mult in channel_mult]
        _check_levels(widths, attention, norm_groups)
        self.width, last = widths[-1], len(widths) - 1
        self.first = nn.Conv2d(channels, ch, 3, padding=1, bias=style == "taming")
        self.levels = nn.Sequential()
        for i, (c_in, c_out) in enumerate(zip([ch, *widths], widths, strict=False)):
            resample = nn.Identity() if i == last else Halve(c_out) if style == "taming" else nn.AvgPool2d(2)
            options = {"attention": i in attention, "resample": resample}
            self.levels.append(Level(c_in, c_out, num_res_blocks, style, norm_groups, **options))
        self.middle = middle(self.width, num_res_blocks, style, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.levels(self.first(fast_layout(x))))


class UpPath(nn.Module):
    """z b z_channels h w -> features b ch H W, the way of ``DownPath`` back; levels are stored from the coarsest."""

    def __init__(
        self,
        *,
        ch: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        attention: Sequence[int],
        style: Style,
        norm_groups: int,
    ) -> None:
        super().__init__()
        widths = [ch * mult for mult in channel_mult]
        _check_levels(widths, attention, norm_groups)
        self.width, c_in = widths[0], widths[-1]
        self.first = nn.Conv2d(z_channels, c_in, 3, padding=1)
        self.middle = middle(c_in, num_res_blocks, style, norm_groups)
        self.levels = nn.Sequential()
        blocks = num_res_blocks + (style == "taming")
        for i, c_out in reversed(list(enumerate(widths))):
            resample = Double(c_out) if i else nn.Identity()
            options = {"attention": i in attention, "resample": resample}
            self.levels.append(Level(c_in, c_out, blocks, style, norm_groups, **options))
            c_in = c_out

    def forward(self, z: Tensor) -> Tensor:
        return self.levels(self.middle(self.first(fast_layout(z))))


class Head(nn.Module):
    """Group norm, SiLU and the last conv: b in h w -> b out h w."""

    def __init__(self, c_in: int, c_out: int, norm_groups: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm = GroupNorm(c_in, norm_groups)
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(silu(self.norm(x)))


class ConvEncoder(nn.Module):
    """A picture b channels H W -> z b z_channels h w. Arguments as in ``DownPath``."""

    def __init__(self, *, z_channels: int, style: Style, norm_groups: int, **path: Any) -> None:
        super().__init__()
        self.path = DownPath(style=style, norm_groups=norm_groups, **path)
        self.head = Head(self.path.width, z_channels, norm_groups, kernel=3 if style == "taming" else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.path(x))


class ConvDecoder(nn.Module):
    """z b z_channels h w -> a picture b channels H W. Arguments as in ``UpPath``."""

    def __init__(self, *, channels: int, norm_groups: int, **path: Any) -> None:
        super().__init__()
        self.path = UpPath(norm_groups=norm_groups, **path)
        self.head = Head(self.path.width, channels, norm_groups)

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.path(z))


class GridDecoder(Decoder):
    """A grid of codes in raster order -> a picture, in one pass. The other arguments are those of ``UpPath``.

    dim: width of a code; style "maskgit" wants ``z_channels``. size: height and width of the canvas.
    objective: what ``loss`` measures.
    """

    one_pass = True

    def __init__(
        self,
        *,
        dim: int,
        size: int,
        ch: int = 128,
        channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        channels: int = 3,
        attention: tuple[int, ...] = (),
        style: Style = "taming",
        norm_groups: int = 32,
        objective: Literal["l1", "l2"] = "l2",
    ) -> None:
        super().__init__()
        self.grid = grid_of(size, 2 ** (len(channel_mult) - 1))
        self.dim, self.max_tokens, self.side = dim, self.grid**2, size
        self.objective = {"l1": F.l1_loss, "l2": F.mse_loss}[objective]
        self.from_codes = codes_conv(dim, z_channels, style)
        self.net = ConvDecoder(
            ch=ch,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            channels=channels,
            attention=attention,
            style=style,
            norm_groups=norm_groups,
        )

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        if sampling:
            raise ValueError(f"a one-pass decoder takes no sampling options, got {', '.join(sampling)}")
        self.check_codes(codes)
        if codes.shape[1] != self.max_tokens or lengths is not None:
            got = codes.shape[1] if lengths is None else lengths.tolist()
            raise ValueError(f"a grid is decoded whole, from {self.max_tokens} codes; got {got}")
        z = rearrange(codes.to(self.net.head.conv.weight.dtype), "b (h w) d -> b d h w", h=self.grid)
        return self.net(self.from_codes(z))

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        estimate = self(codes, lengths).float()
        return DecoderLoss(self.objective(estimate, target.float()), estimate, target.new_ones(len(target)))


def silu(x: Tensor) -> Tensor:
    """In place where no gradient is wanted: x is always fresh from a norm, and large maps are slow to allocate."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def middle(c: int, num_res_blocks: int, style: Style, norm_groups: int) -> nn.Sequential:
    """What stands at the coarsest size."""
    if style == "taming":
        return nn.Sequential(
            ResBlock(c, c, style, norm_groups), Attention(c, norm_groups), ResBlock(c, c, style, norm_groups)
        )
    return nn.Sequential(*(ResBlock(c, c, style, norm_groups) for _ in range(num_res_blocks)))


def upsampling_kernel(weight: Tensor) -> Tensor:
    """Of a 3x3 conv after nearest upsampling by 2, out in 3 3 -> of the transposed conv that is both, in out 4 4."""
    sums = F.pad(weight, (1, 1, 1, 1)).unfold(2, 2, 1).unfold(3, 2, 1).sum(dim=(-2, -1))
    return rearrange(sums.flip(2, 3), "o i u v -> i o u v")


def codes_conv(c_in: int, c_out: int, style: Style) -> nn.Module:
    """From z to a code, or back. Raises ``ValueError`` where there is nothing between them and their widths differ."""
    if style == "taming":
        return nn.Conv2d(c_in, c_out, 1)
    if c_in != c_out:
        raise ValueError(f"style 'maskgit' quantizes z itself, so dim is z_channels; got {c_in} and {c_out}")
    return nn.Identity()


def _check_levels(widths: Sequence[int], attention: Sequence[int], norm_groups: int) -> None:
    if norm_groups < 1:
        raise ValueError(f"norm_groups is 1 or more, got {norm_groups}")
    if not widths or any(width < norm_groups or width % norm_groups for width in widths):
        raise ValueError(f"ch times each of channel_mult is a multiple of norm_groups ({norm_groups}), got {widths}")
    if any(not 0 <= level < len(widths) for level in attention):
        raise ValueError(f"attention names levels from 0 to {len(widths) - 1}, got {list(attention)}")
