"""FlexTok's encoder: ordered registers, each of which sees the image and the registers before it.

Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", arXiv 2502.13967.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.decoders.transformer import Transformer, grid_of, init_linear, patchify, scattered, sincos_2d
from tokenizers_vis.encoders.base import Encoder, LengthPolicy


class FlexTokEncoder(Encoder):
    """dim: width of a code. size: height and width of the canvas.

    Patches see all patches and no register; register i sees all patches and the registers up to i. So the first tokens
    do not depend on how many follow, and a short encoding runs a short sequence.

    attention_scale: of the attention logits, None is (width / heads) ** -0.5.
    stored_positions: whether the table of patch positions is stored with the weights, as in the authors' releases.
    standardize: gives every channel of every token mean 0 and variance 1 over the images (batch statistics in training,
    running ones after), so that images differ by more than a quantizer's step from the start and all codes get used.
    """

    nested = True
    causal = True
    kept = 0  # tokens that stay in training

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
        attention_scale: float | None = None,
        stored_positions: bool = False,
        standardize: bool = False,
        lengths: LengthPolicy = LengthPolicy("uniform"),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        lengths.check(max_tokens)
        self.dim, self.max_tokens, self.patch, self.lengths = dim, max_tokens, patch, lengths
        grid, self.side = grid_of(size, patch), size
        self.read_patches = nn.Linear(patch * patch * channels, width)
        self.register_buffer("positions", sincos_2d(grid, grid, width), persistent=stored_positions)
        self.registers = scattered(max_tokens, grid, width)
        self.register_buffer("mask", causal_last(grid**2, max_tokens), persistent=False)
        self.transformer = Transformer(
            width, depth, heads, mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm, attention_scale=attention_scale
        )
        self.to_codes = nn.Linear(width, dim)
        self.read_patches.apply(init_linear)
        self.to_codes.apply(init_linear)
        self.standard = Standard(max_tokens, dim) if standardize else nn.Identity()
        self.tables = ("registers", *(f"standard.{name}" for name, _ in self.standard.named_buffers()))

    def forward(self, x: Tensor, n_tokens: int) -> Tensor:
        patches = self.read_patches(patchify(x, self.patch))
        patches = patches + self.positions.to(patches.dtype)
        registers, kept = self.registers[:n_tokens], self.kept
        if kept:
            fixed = registers[:kept].detach()
            registers = torch.cat([fixed, registers[kept:]]) if kept < n_tokens else fixed
        registers = registers.to(patches.dtype).expand(len(x), -1, -1)
        n = patches.shape[1] + n_tokens
        z = self.transformer(torch.cat([patches, registers], dim=1), self.mask[:n, :n])[:, -n_tokens:]
        return self.standard(self.to_codes(F.layer_norm(z, z.shape[-1:])))

    def keep(self, n_tokens: int) -> None:
        self.requires_grad_(False)
        self.registers.requires_grad_(True)
        self.kept = n_tokens
        if isinstance(self.standard, Standard):
            self.standard.kept = n_tokens


class Standard(nn.Module):
    """Batch normalisation without scale or bias, of each channel at each token position, in float32.

    kept: of so many first tokens the statistics stay as they are, also in training.
    """

    kept = 0

    def __init__(self, max_tokens: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(max_tokens, dim))
        self.register_buffer("variance", torch.ones(max_tokens, dim))

    def forward(self, z: Tensor) -> Tensor:
        """z: b n d, of the first n tokens."""
        n = z.shape[1]
        fixed = min(self.kept, n) if self.training else n
        parts = [self._standard(z, slice(0, fixed), False), self._standard(z, slice(fixed, n), True)]
        return torch.cat([part for part in parts if part.numel()], dim=1)

    def _standard(self, z: Tensor, own: slice, learn: bool) -> Tensor:
        z = z[:, own].float()
        if not z.numel():
            return z
        mean, variance = (table[own].float().flatten().clone() for table in (self.mean, self.variance))
        out = F.batch_norm(z.flatten(1), mean, variance, training=learn, momentum=0.02)
        if learn:
            self.mean[own], self.variance[own] = (table.view(z.shape[1:]) for table in (mean, variance))
        return out.view(z.shape)


def causal_last(patches: int, registers: int) -> Tensor:
    """The mask n n, True where a row may look at a column: patches among themselves, registers at all that precede."""
    n = patches + registers
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[:patches, :patches] = True
    return mask
