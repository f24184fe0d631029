"""What decoders that start from noise share: tokens with a null token beside them, and the transformer over both.

The null token stands in for all tokens where a decoder draws without them, so that guidance has something to compare
with: classifier-free guidance, Ho and Salimans 2022, arXiv 2207.12598. Noisy patches and latent tokens share one
sequence and time modulates every block: DiT, arXiv 2212.09748; FlexTok, arXiv 2502.13967.
"""

from __future__ import annotations

from abc import ABC
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.paths import velocity_of
from tokenizers_vis.decoders.refine import Refine
from tokenizers_vis.decoders.sampling import Branches, Stage
from tokenizers_vis.decoders.transformer import (
    Transformer,
    grid_of,
    init_linear,
    learned,
    modulate,
    patchify,
    prefix_mask,
    scattered,
    sincos,
    sincos_2d,
    time_features,
    unpatchify,
)


class NullTokenDecoder(Decoder, ABC):
    """Abstract: reads tokens, or the null token in their place, for a canvas of a grid of patches.

    null_rate: share of training images whose tokens are replaced by the null token; 0 rules guidance out.
    """

    one_pass = False
    tables = ("token_positions",)

    def __init__(
        self, *, dim: int, max_tokens: int, size: int, patch: int, width: int, channels: int, null_rate: float
    ) -> None:
        super().__init__()
        if not 0 <= null_rate <= 1:
            raise ValueError(f"null_rate is a share from 0 to 1, got {null_rate}")
        self.dim, self.max_tokens, self.patch, self.grid = dim, max_tokens, patch, grid_of(size, patch)
        self.shape, self.side = (channels, size, size), size
        self.sizes: tuple[int, ...] = (size,)
        self.null_rate = null_rate
        self.read_codes = nn.Linear(dim, width)
        self.token_positions = scattered(max_tokens, self.grid, width)
        self.null_token = learned(1, width)
        self.mask_token = learned(1, width)
        self.register_buffer("positions", sincos_2d(self.grid, self.grid, width), persistent=False)

    def _tokens(self, codes: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """codes: b n d -> tokens b n width, and the mask of a sequence of all patches, then the tokens."""
        n = codes.shape[1]
        tokens = self.read_codes(codes.to(self.null_token.dtype)) + self.token_positions[:n]
        return tokens, prefix_mask(lengths, n, before=self.grid**2)

    def _drop(self, tokens: Tensor, mask: Tensor | None, dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Leaves only the null token to the images that are dropped."""
        b, n, _ = tokens.shape
        if not dropped.any():
            return tokens, mask
        if mask is None:
            mask = prefix_mask(torch.full((b,), n, device=tokens.device), n, before=self.grid**2)
        alone = prefix_mask(torch.ones(b, dtype=torch.int64, device=tokens.device), n, before=self.grid**2)
        return (
            torch.where(dropped.view(-1, 1, 1), self.null_token.to(tokens.dtype), tokens),
            torch.where(dropped.view(-1, 1, 1, 1), alone, mask),
        )

    def _some_dropped(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """``_drop`` of a random ``null_rate`` of the images; also says which, b."""
        dropped = torch.rand(len(tokens), device=tokens.device) < self.null_rate
        return *self._drop(tokens, mask, dropped), dropped

    def _check_guidance(self, guided: bool) -> None:
        if guided and self.null_rate == 0:
            raise ValueError("this decoder was trained without a null token (null_rate 0): guidance must be 1")


class Modulations(NamedTuple):
    """What times do to the network. blocks: b (6 width) for each block. head: b (2 width)."""

    blocks: list[Tensor]
    head: Tensor


class NoisyPatchDecoder(NullTokenDecoder, ABC):
    """Abstract: the transformer over noisy patches and tokens. Its children say what its output means."""

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
        channels: int,
        mlp: Literal["gelu", "swiglu"],
        mlp_ratio: float,
        qk_norm: bool,
        null_rate: float,
        refine: int = 0,
    ) -> None:
        super().__init__(
            dim=dim,
            max_tokens=max_tokens,
            size=size,
            patch=patch,
            width=width,
            channels=channels,
            null_rate=null_rate,
        )
        self.read_patches = nn.Linear(patch * patch * channels, width, bias=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer = Transformer(
            width, depth, heads, mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm, modulated=True
        )
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_patches = nn.Linear(width, patch * patch * channels)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.refine = Refine(width=width, patch=patch, channels=refine, colors=channels) if refine else None
        for part in (self.read_codes, self.time):
            part.apply(init_linear)
        # It starts by listening to the tokens alone, as the one-pass decoder does, whose weights it can adopt.
        for layer in (self.modulation, self.to_patches, self.read_patches):
            nn.init.zeros_(layer.weight)
        for layer in (self.modulation, self.to_patches, self.smooth):
            nn.init.zeros_(layer.bias)
        nn.init.dirac_(self.smooth.weight)

    def _time(self, t: Tensor) -> Tensor:
        """t: b, in [0, 1] -> the condition b width that modulates the blocks."""
        return self.time(time_features(t, 256).to(self.null_token.dtype))

    def _modulations(self, condition: Tensor) -> Modulations:
        """condition: b width."""
        return Modulations(self.transformer.modulations(condition), self.modulation(F.silu(condition)))

    def _network(self, x: Tensor, condition: Tensor | Modulations, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x: b c h w, condition: b width or its modulations, tokens: b n width -> b c h w, float32.

        x may be smaller than the canvas: then its patches, fewer and farther apart, cover the same picture.
        """
        rows = condition if isinstance(condition, Modulations) else self._modulations(condition)
        grid = grid_of(x.shape[-1], self.patch)
        patches = self.read_patches(patchify(x, self.patch).to(self.null_token.dtype))
        patches = patches + (self.mask_token + self._positions(grid)).to(patches.dtype)
        sequence = torch.cat([patches, tokens.to(patches.dtype)], dim=1)
        # Patches are always seen, so that for a coarser grid the mask is the end of the whole grid's.
        mask = None if mask is None else mask[..., -sequence.shape[1] :]
        out = self.transformer(sequence, mask, keep=slice(grid**2), rows=rows.blocks)
        shift, scale = rows.head.unsqueeze(1).chunk(2, dim=-1)
        out = modulate(self.norm(out), shift, scale)
        y = self.smooth(unpatchify(self.to_patches(out), self.patch, grid))
        return (y if self.refine is None else self.refine(y, out)).float()

    def _positions(self, grid: int) -> Tensor:
        """Of the centres of a coarser grid, in the places of the finest."""
        if grid == self.grid:
            return self.positions
        places = (torch.arange(grid, device=self.positions.device) + 0.5) * (self.grid / grid) - 0.5
        return sincos(torch.cartesian_prod(places, places), self.positions.shape[-1])

    def _branches(
        self, codes: Tensor, lengths: Tensor | None, stage: Stage, conditions: Tensor, predict: str
    ) -> Branches:
        """conditions: n width, of the times that the stage asks at. predict: as in ``velocity_of``.

        What depends on the time alone, or on the codes alone, is computed once for all steps and images.
        """
        self._check_guidance(stage.guided)
        tokens, mask = self._tokens(codes, lengths)
        nothing = self.null_token.to(tokens.dtype).expand(len(tokens), 1, -1)
        times = torch.tensor(stage.asked, device=codes.device)
        blocks, head = self._modulations(conditions)
        row_of = {t: slice(i, i + 1) for i, t in enumerate(stage.asked)}

        def velocity(x: Tensor, t: float, tokens: Tensor, mask: Tensor | None) -> Tensor:
            row = row_of[t]
            now = Modulations([block[row] for block in blocks], head[row])
            return velocity_of(self._network(x, now, tokens, mask), x, times[row], predict)

        @cache
        def pair() -> tuple[Tensor, Tensor | None]:
            untold = torch.arange(2 * len(tokens), device=tokens.device) >= len(tokens)
            return self._drop(tokens.repeat(2, 1, 1), None if mask is None else mask.repeat(2, 1, 1, 1), untold)

        def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            return velocity(x.repeat(2, 1, 1, 1), t, *pair()).chunk(2)

        return Branches(
            told=lambda x, t: velocity(x, t, tokens, mask), untold=lambda x, t: velocity(x, t, nothing, None), both=both
        )
