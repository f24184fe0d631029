"""A canvas of VQGAN codes, on which TiTok's two-stage decoder paints: it scores the codes, a VQGAN draws them.

Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv 2406.07550, section 3.3.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.cuda.ops import nearest_code
from tokenizers_vis.decoders.canvas import Canvas, Resize
from tokenizers_vis.decoders.conv import ConvDecoder, ConvEncoder


class VQGANCodes(Canvas):
    """y is b k h w, one score (logit) for each of k codes at each place of the grid.

    size: height and width of the images that ``read`` takes.
    encoder: with the VQGAN's own encoder, which gives the "proxy codes" that a first stage of training aims at; the
        whole VQGAN is then frozen, so that targets stay. Without it, in the second stage, codebook and decoder are
        trained, by losses on the pictures that ``paint`` makes of scores.
    codebook_size: k. z_channels: width of a code. The others: see decoders/conv.py.
    """

    def __init__(
        self,
        *,
        size: int,
        resize: Resize = "crop",
        codebook_size: int = 1024,
        z_channels: int = 256,
        ch: int = 128,
        channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        channels: int = 3,
        norm_groups: int = 32,
        encoder: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.resize, self.grid = size, resize, size // 2 ** (len(channel_mult) - 1)
        self.codebook = nn.Parameter(torch.empty(codebook_size, z_channels))
        nn.init.uniform_(self.codebook, -1 / codebook_size, 1 / codebook_size)
        shape = dict(
            ch=ch,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            channels=channels,
            attention=(),
            style="maskgit",
            norm_groups=norm_groups,
        )
        self.decoder = ConvDecoder(**shape)
        self.encoder = ConvEncoder(**shape) if encoder else None
        self.requires_grad_(not encoder)
        self.pictures_only = not encoder

    @property
    def sides(self) -> tuple[int, int]:
        return self.image_size, self.grid

    def read(self, images: Tensor) -> Tensor:
        """images -> themselves, in [0, 1]."""
        return images

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """images -> ids b h w, int64, of the code nearest to what the VQGAN's encoder sees at each place.

        Raises ``ValueError`` without that encoder.
        """
        if self.encoder is None:
            raise ValueError(
                "the target codes of an image come from the VQGAN's encoder, and this canvas has none: build it with "
                "encoder = true and load the VQGAN's encoder too, or train on pictures, paint(y)"
            )
        with torch.autocast(images.device.type, enabled=False):
            z = self.encoder(images.to(self.codebook.dtype))
            ids = nearest_code(rearrange(z, "b d h w -> (b h w) d"), self.codebook)
        return rearrange(ids, "(b h w) -> b h w", b=len(z), h=z.shape[-2])

    def views(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Without the VQGAN's encoder there is no y: the second stage compares pictures."""
        return self.read(images), None if self.pictures_only else self.target(images)

    def paint(self, y: Tensor) -> Tensor:
        """Scores b k h w -> images: each place shows the codes' mean by the probability of each, not the likeliest."""
        if y.ndim != 4 or y.shape[1] != len(self.codebook):
            raise ValueError(f"a canvas of VQGAN codes takes scores b {len(self.codebook)} h w, got {tuple(y.shape)}")
        probability = rearrange(y, "b k h w -> b h w k").float().softmax(dim=-1)
        z = probability.to(self.codebook.dtype) @ self.codebook
        return self.decoder(rearrange(z, "b h w d -> b d h w"))
