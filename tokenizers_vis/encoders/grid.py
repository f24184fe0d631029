"""A convolutional encoder: one token for each cell of a 2D grid, in raster order.

Esser et al. 2020, "Taming Transformers for High-Resolution Image Synthesis", arXiv 2012.09841. MaskGIT (Chang et al.
2022, arXiv 2202.04200) and LlamaGen (Sun et al. 2024, arXiv 2406.06525) use it.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from tokenizers_vis.decoders.conv import ConvEncoder, Style, codes_conv
from tokenizers_vis.decoders.transformer import grid_of
from tokenizers_vis.encoders.base import Encoder, LengthPolicy


class GridEncoder(Encoder):
    """The other arguments are those of ``DownPath`` in decoders/conv.py.

    dim: width of a code; style "maskgit" wants ``z_channels``. size: height and width of the canvas.
    """

    nested = False

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
    ) -> None:
        super().__init__()
        self.dim, self.side, self.lengths = dim, size, LengthPolicy()
        self.max_tokens = grid_of(size, 2 ** (len(channel_mult) - 1)) ** 2
        self.net = ConvEncoder(
            ch=ch,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            channels=channels,
            attention=attention,
            style=style,
            norm_groups=norm_groups,
        )
        self.to_codes = codes_conv(z_channels, dim, style)

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        return rearrange(self.to_codes(self.net(x)), "b d h w -> b (h w) d")[:, :n_tokens]
