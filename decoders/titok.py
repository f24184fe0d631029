"""TiTok's decoder: mask tokens and latent tokens through a ViT; the mask tokens become pixels, or scores of codes.

Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv 2406.07550.
With ``text_dim`` it is TA-TiTok's (Kim et al. 2025, arXiv 2501.07730), which reads a text beside the tokens. A shorter
prefix is a shorter sequence, as in One-D-Piece (Miwa et al. 2025, arXiv 2501.10064).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.clip_text import clip_text
from tokenizers_vis.decoders.transformer import (
    Transformer,
    grid_of,
    init_linear,
    learned,
    placed,
    prefix_mask,
    scattered,
)


class TiTokDecoder(Decoder):
    """dim: width of a code. size: height and width of the canvas.

    head: "pixels" paints b channels size size, loss l2; "logits" scores ``codebook_size`` codes at each place of the
        grid, b codebook_size h w, for a canvas of VQGAN codes, loss cross entropy.
    text_dim: width of the vectors of a text, 0 for a decoder that reads none. text_tokens: vectors of a text.
    """

    one_pass = True

    def __init__(
        self,
        *,
        dim: int,
        max_tokens: int,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        channels: int = 3,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        head: Literal["pixels", "logits"] = "pixels",
        codebook_size: int = 1024,
        text_dim: int = 0,
        text_tokens: int = 77,
    ) -> None:
        super().__init__()
        self.dim, self.max_tokens, self.grid = dim, max_tokens, grid_of(size, patch)
        self.side = size if head == "pixels" else self.grid
        self.text_shape = (text_tokens, text_dim) if text_dim else None
        self.read_codes = nn.Linear(dim, width)
        self.token_positions = scattered(max_tokens, self.grid, width)
        self.class_token = learned(1, width)
        self.mask_token = learned(1, width)
        self.positions = placed(self.grid, width)
        if text_dim:
            self.read_text = nn.Linear(text_dim, width)
            self.text_positions = learned(text_tokens, width)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, depth, heads, mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm, affine=True, bias=True
        )
        self.norm_out = nn.LayerNorm(width)
        self.head = PixelHead(width, patch, channels) if head == "pixels" else LogitHead(width, codebook_size)
        for module in (self.read_codes, self.read_text) if text_dim else (self.read_codes,):
            module.apply(init_linear)

    def forward(
        self,
        codes: Tensor,
        lengths: Tensor | None = None,
        text: Tensor | Sequence[str] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """text: b t w, vectors of a text for each image, as ``clip_text`` gives; or the texts themselves.

        Raises ``ValueError`` when this decoder reads a text and there is none, or the other way round.
        """
        if sampling:
            raise ValueError(f"a one-pass decoder takes no sampling options, got {', '.join(sampling)}")
        self.check_codes(codes)
        b, n, _ = codes.shape
        dtype = self.mask_token.dtype
        tokens = self.read_codes(codes.to(dtype)) + self.token_positions[:n]
        image = torch.cat([self.class_token, self.mask_token.expand(self.grid**2, -1)]) + self.positions
        # Attention knows no order but by the positions added: the text may stand before the tokens, and a mask then
        # hides the end of the sequence alone.
        before = [image.expand(b, -1, -1), *self._text_vectors(text, b)]
        mask = prefix_mask(lengths, n, before=sum(part.shape[1] for part in before))
        sequence = self.norm_in(torch.cat([*before, tokens], dim=1))
        x = self.norm_out(self.transformer(sequence, mask, keep=slice(1, 1 + self.grid**2)))
        return self.head(rearrange(x, "b (h w) d -> b d h w", h=self.grid))

    def loss(
        self,
        codes: Tensor,
        target: Tensor | None,
        lengths: Tensor | None = None,
        text: Tensor | Sequence[str] | None = None,
    ) -> DecoderLoss:
        """target: a picture b c h w; with logits the ids b h w of its codes, or None in the second stage, in which
        losses on the picture that the canvas paints of the scores do it all, and the loss here is 0.

        The estimate is what comes out.
        """
        estimate = self(codes, lengths, text).float()
        loss = self.head.loss(estimate, target)
        return DecoderLoss(loss, estimate, estimate.new_ones(len(estimate)))

    def _text_vectors(self, text: Tensor | Sequence[str] | None, b: int) -> list[Tensor]:
        """The text as a part of the sequence, b t width; none for a decoder that reads none."""
        if self.text_shape is None:
            if text is not None:
                raise ValueError("this decoder reads no text; decode without it")
            return []
        t, w = self.text_shape
        if text is None:
            raise ValueError(
                f"this decoder reads a text beside the tokens: hand in text=, floats b {t} {w} (the last hidden states "
                f"of CLIP's text encoder), or the texts themselves, one for each image, where open_clip is installed"
            )
        device, dtype = self.text_positions.device, self.text_positions.dtype
        if not isinstance(text, Tensor):
            text = clip_text(text, device)
        if tuple(text.shape) != (b, t, w) or not text.is_floating_point():
            raise ValueError(
                f"text is floats {b} {t} {w} (images, tokens, width), got {text.dtype} {tuple(text.shape)}"
            )
        return [self.read_text(text.to(device, dtype)) + self.text_positions]


class PixelHead(nn.Module):
    """b d h w -> b channels H W: a patch at each place, then a conv that sees over the patches' borders."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.patch = patch
        self.to_patches = nn.Conv2d(width, patch * patch * channels, 1)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        # Small, so that the first steps are not spent on unlearning noise.
        nn.init.trunc_normal_(self.to_patches.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.to_patches.bias)
        nn.init.dirac_(self.smooth.weight)
        nn.init.zeros_(self.smooth.bias)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.to_patches(x)
        return self.smooth(rearrange(patches, "b (p q c) h w -> b c (h p) (w q)", p=self.patch, q=self.patch))

    def loss(self, estimate: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(estimate, target.float())


class LogitHead(nn.Module):
    """b d h w -> b codes h w: the score of each code at each place."""

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(width, 2 * width, 1)
        self.to_logits = nn.Conv2d(2 * width, codebook_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_logits(self.hidden(x).tanh())

    def loss(self, estimate: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return estimate.new_zeros(())
        if target.is_floating_point() or target.shape != estimate[:, 0].shape:
            raise ValueError(
                f"scores of codes are trained on ids {tuple(estimate[:, 0].shape)} (images, rows, columns), int64, as "
                f"the canvas 'vqgan_codes' gives them with encoder = true; got {target.dtype} {tuple(target.shape)}"
            )
        return F.cross_entropy(estimate, target)
