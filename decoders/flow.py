"""The rectified-flow decoder: a diffusion transformer that tokens tell what to draw.

Noisy patches and latent tokens share one sequence, time modulates every block, and a learned null token stands in for
the tokens in the unconditional branch. FlexTok, Bachmann et al. 2025, arXiv 2502.13967; DiT, arXiv 2212.09748.
Predicting the clean picture instead of the velocity suits big patches: Li and He 2025, arXiv 2511.13720.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.paths import interpolate, logit_normal, uniform_times
from tokenizers_vis.decoders.sampling import Sampling
from tokenizers_vis.decoders.transformer import (
    Transformer,
    grid_of,
    init_linear,
    learned,
    modulate,
    patchify,
    prefix_mask,
    scattered,
    sincos_2d,
    time_features,
    unpatchify,
)

# Dividing by a vanishing t would blow up the last bit of the way to the picture.
SMALLEST_T = 0.05


class FlowDecoder(Decoder):
    """dim: width of a code. size: height and width of the canvas.

    predict: what the network gives. time_mean, time_std: of the logit-normal training times.
    estimates: what losses on the one-step estimate weigh over time, 1 - t ("late") or 1 ("even"). "even" makes every
        estimate a good picture by itself, which suits few steps.
    null_rate: share of training images whose tokens are replaced by the null token; 0 rules guidance out.
    steps, guidance, guidance_kind, solver: the defaults of ``forward``.
    """

    one_pass = False

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
        predict: Literal["velocity", "picture"] = "velocity",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        estimates: Literal["late", "even"] = "late",
        null_rate: float = 0.1,
        steps: int = 25,
        guidance: float = 1.0,
        guidance_kind: Literal["cfg", "apg"] = "cfg",
        solver: Literal["euler", "heun"] = "euler",
    ) -> None:
        super().__init__()
        self.dim, self.max_tokens, self.patch, self.grid = dim, max_tokens, patch, grid_of(size, patch)
        self.shape = (channels, size, size)
        self.predict, self.estimates, self.null_rate = predict, estimates, null_rate
        self.time_mean, self.time_std = time_mean, time_std
        self.defaults = dict(steps=steps, guidance=guidance, guidance_kind=guidance_kind, solver=solver)
        self.read_codes = nn.Linear(dim, width)
        self.token_positions = scattered(max_tokens, self.grid, width)
        self.null_token = learned(1, width)
        self.mask_token = learned(1, width)
        self.read_patches = nn.Linear(patch * patch * channels, width, bias=False)
        self.register_buffer("positions", sincos_2d(self.grid, self.grid, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer = Transformer(
            width, depth, heads, mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm, modulated=True
        )
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_patches = nn.Linear(width, patch * patch * channels)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        for part in (self.read_codes, self.time):
            part.apply(init_linear)
        # It starts by listening to the tokens alone, as the one-pass decoder does, whose weights it can adopt.
        for layer in (self.modulation, self.to_patches, self.read_patches):
            nn.init.zeros_(layer.weight)
        for layer in (self.modulation, self.to_patches, self.smooth):
            nn.init.zeros_(layer.bias)
        nn.init.dirac_(self.smooth.weight)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        """Draws pictures y: b c h w for codes: b n d. The options are those of ``Sampling``."""
        options = Sampling.of(self.defaults, sampling)
        if options.guided and self.null_rate == 0:
            raise ValueError("this decoder was trained without a null token (null_rate 0): guidance must be 1")
        self.check_codes(codes)
        x = options.start(len(codes), self.shape).to(codes.device, torch.float32)
        tokens, mask = self._tokens(codes, lengths)
        nothing = self.null_token.to(tokens.dtype).expand(len(codes), 1, -1)

        def velocities(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            t = t.expand(len(x))
            conditional = self._velocity(x, t, tokens, mask)
            return conditional, self._velocity(x, t, nothing, None) if options.guided else None

        return options.walk(velocities, x, uniform_times(options.steps, codes.device))

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        """Mean squared error of the velocity, at a random time per image."""
        self.check_codes(codes)
        target = target.float()
        t = logit_normal(len(target), self.time_mean, self.time_std, target.device).clamp_min(1e-3)
        noise = torch.randn_like(target)
        x = interpolate(target, noise, t)
        tokens, mask = self._tokens(codes, lengths)
        dropped = torch.rand(len(target), device=target.device) < self.null_rate
        tokens, mask = self._drop(tokens, mask, dropped)
        velocity = self._velocity(x, t, tokens, mask)
        divisor = t.view(-1, 1, 1, 1)
        # A picture prediction near t = 0 is divided by t; the cap keeps those images from drowning the others.
        wanted = (x - target) / (divisor.clamp_min(SMALLEST_T) if self.predict == "picture" else divisor)
        estimate = x - divisor * velocity
        weight = 1 - t if self.estimates == "late" else torch.ones_like(t)
        return DecoderLoss(F.mse_loss(velocity, wanted), estimate, weight * ~dropped)

    def _velocity(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x: b c h w, t: b, tokens: b n width -> velocity b c h w, float32."""
        dtype = self.null_token.dtype
        condition = self.time(time_features(t, 256).to(dtype))
        patches = self.read_patches(patchify(x, self.patch).to(dtype))
        patches = patches + (self.mask_token + self.positions).to(patches.dtype)
        sequence = torch.cat([patches, tokens.to(patches.dtype)], dim=1)
        out = self.transformer(sequence, mask, condition)[:, : patches.shape[1]]
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        out = self.to_patches(modulate(self.norm(out), shift, scale))
        out = self.smooth(unpatchify(out, self.patch, self.grid)).float()
        if self.predict == "velocity":
            return out
        return (x - out) / t.view(-1, 1, 1, 1).clamp_min(SMALLEST_T)

    def _tokens(self, codes: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
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
