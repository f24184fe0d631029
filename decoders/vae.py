"""A canvas of VAE latents: a frozen AutoencoderKL of the library diffusers turns pixels into a small grid and back.

Rombach et al. 2021, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752. Needs the extra
``latents``: pip install 'tokenizers-vis[latents]'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizers_vis.decoders.canvas import Canvas, Resize

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


class VAELatents(Canvas):
    """x and y are b latent_channels h w, h = w = size / 2 ** (len(block_out_channels) - 1).

    size: height and width of the images that ``read`` takes.
    scaling_factor: what the latents are multiplied by. A shift is not applied, nor is it by FlexTok.
    sample_posterior: whether latents are drawn from the posterior, with torch's global generator, or are its mean.
    The others: the shape, by diffusers' names; the defaults are those of SDXL with FlexTok's 16 channels.

    The VAE is always in eval mode, in its own dtype whatever autocast says, and no gradient reaches its weights;
    through ``paint`` it reaches y. Latents and pictures are float32.
    """

    def __init__(
        self,
        *,
        size: int,
        scaling_factor: float,
        resize: Resize = "crop",
        sample_posterior: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        down_block_types: tuple[str, ...] = (DOWN, DOWN, DOWN, DOWN),
        up_block_types: tuple[str, ...] = (UP, UP, UP, UP),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError(
                "this tokenizer paints on VAE latents, which need diffusers: pip install 'tokenizers-vis[latents]'"
            ) from error
        factor = 2 ** (len(block_out_channels) - 1)
        if size % factor:
            raise ValueError(f"size is a multiple of {factor}, by which the VAE shrinks images; got {size}")
        self.image_size, self.resize, self.latent_size = size, resize, size // factor
        self.scaling_factor, self.sample_posterior = scaling_factor, sample_posterior
        self.vae = AutoencoderKL(
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
        ).requires_grad_(False)

    @property
    def sides(self) -> tuple[int, int]:
        return self.latent_size, self.latent_size

    def train(self, mode: bool = True) -> VAELatents:
        super().train(mode)
        self.vae.eval()
        return self

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode((images.float() * 2 - 1).to(self.vae.dtype)).latent_dist
            latents = posterior.sample() if self.sample_posterior else posterior.mode()
            return latents.float() * self.scaling_factor

    def target(self, images: Tensor) -> Tensor:
        return self.read(images)

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One encoding serves both, and with ``sample_posterior`` it is one draw."""
        latents = self.read(images)
        return latents, latents

    def paint(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return (self.vae.decode((y.float() / self.scaling_factor).to(self.vae.dtype)).sample.float() + 1) / 2
