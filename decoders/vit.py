"""The one-pass decoder: mask tokens and latent tokens through a ViT, the mask tokens become pixels.

Yu et al. 2024, "An Image is Worth 32 Tokens", arXiv 2406.07550. A shorter prefix is a shorter sequence, as in
One-D-Piece (arXiv 2501.10064).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.refine import Refine
from tokenizers_vis.decoders.transformer import (
    Transformer,
    grid_of,
    init_linear,
    learned,
    prefix_mask,
    scattered,
    sincos_2d,
    unpatchify,
)


class ViTDecoder(Decoder):
    """dim: width of a code. size: height and width of the canvas. objective: what ``loss`` measures.

    refine: channels of the convolutions that follow the patches (``Refine``), 0 for none but one of 3 x 3.
    """

    one_pass = True
    tables = ("token_positions",)

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
        mlp: Literal["gelu", "swiglu"] = "swiglu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        objective: Literal["l1", "l2"] = "l2",
        refine: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.max_tokens, self.patch, self.grid = dim, max_tokens, patch, grid_of(size, patch)
        self.side = size
        self.objective = {"l1": F.l1_loss, "l2": F.mse_loss}[objective]
        self.read_codes = nn.Linear(dim, width)
        self.token_positions = scattered(max_tokens, self.grid, width)
        self.mask_token = learned(1, width)
        self.register_buffer("positions", sincos_2d(self.grid, self.grid, width), persistent=False)
        self.transformer = Transformer(width, depth, heads, mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm)
        self.norm = nn.LayerNorm(width)
        self.to_patches = nn.Linear(width, patch * patch * channels)
        # Sees over the patches' borders, which a linear layer per patch leaves visible.
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.refine = Refine(width=width, patch=patch, channels=refine, colors=channels) if refine else None
        self.read_codes.apply(init_linear)
        # Small, so that the first steps are not spent on unlearning noise.
        nn.init.trunc_normal_(self.to_patches.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.to_patches.bias)
        nn.init.dirac_(self.smooth.weight)
        nn.init.zeros_(self.smooth.bias)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        if sampling:
            raise ValueError(f"a one-pass decoder takes no sampling options, got {', '.join(sampling)}")
        self.check_codes(codes)
        b, n, _ = codes.shape
        tokens = self.read_codes(codes.to(self.mask_token.dtype)) + self.token_positions[:n]
        patches = (self.mask_token + self.positions).to(tokens.dtype).expand(b, -1, -1)
        mask = prefix_mask(lengths, n, before=patches.shape[1])
        x = self.transformer(torch.cat([patches, tokens], dim=1), mask)[:, : patches.shape[1]]
        x = self.norm(x)
        y = self.smooth(unpatchify(self.to_patches(x), self.patch, self.grid))
        return y if self.refine is None else self.refine(y, x)

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        estimate = self(codes, lengths).float()
        return DecoderLoss(self.objective(estimate, target.float()), estimate, target.new_ones(len(target)))
