"""The patch flow: one transformer pass over the tokens, then a small MLP draws every patch by itself, in a few steps.

UniFlow, Yue et al. 2025, arXiv 2510.10575; the MLP is that of MAR's diffusion loss, Li et al. 2024, arXiv 2406.11838.
The cheapest decoder that starts from noise: a step costs the MLP, no attention. A patch hears of its neighbours only
through the transformer's features, so what is random in a picture is random patch by patch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.decoders.base import DecoderLoss
from tokenizers_vis.decoders.paths import interpolate, logit_normal, velocity_of, wanted_velocity
from tokenizers_vis.decoders.sampling import Branches, Sampling, Stage, draw
from tokenizers_vis.decoders.transformer import Transformer, init_linear, modulate, patchify, time_features, unpatchify
from tokenizers_vis.decoders.trunk import NullTokenDecoder


class PatchBlock(nn.Module):
    """x + mlp(norm(x)), shifted, scaled and gated by the condition of its own patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition: b p width."""
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class PatchMLP(nn.Module):
    """dim: numbers in a patch. features: width of what it is told of a patch."""

    def __init__(self, *, dim: int, features: int, width: int, depth: int) -> None:
        super().__init__()
        self.read_patches = nn.Linear(dim, width)
        self.read_features = nn.Linear(features, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(PatchBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_patches = nn.Linear(width, dim)
        self.apply(init_linear)
        for block in self.blocks:
            # At first the condition changes nothing: a block is a plain one, its gate open.
            nn.init.zeros_(block.modulation.weight)
            block.modulation.bias.data.view(3, width)[2] = 1.0
            block.mlp[2].weight.data.mul_((2 * depth) ** -0.5)
        for layer in (self.modulation, self.to_patches):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """x: b p dim, t: b in [0, 1], features: b p f -> b p dim."""
        time = self.time(time_features(t, 256).to(features.dtype))
        condition = time.unsqueeze(1) + self.read_features(features)
        x = self.read_patches(x)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.to_patches(modulate(self.norm(x), shift, scale))


class PatchFlowDecoder(NullTokenDecoder):
    """dim: width of a code. size: height and width of the canvas.

    width, depth, heads, mlp, mlp_ratio, qk_norm: of the transformer. flow_width (0 is width), flow_depth: of the MLP.
    predict: what the network gives. time_mean, time_std: of the logit-normal training times.
    estimates: what losses on the one-step estimate weigh over time, 1 - t ("late") or 1 ("even").
    null_rate: share of training images whose tokens are replaced by the null token; 0 rules guidance out.
    steps, guidance, guidance_kind, solver, schedule: the defaults of ``forward``.
    """

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
        flow_width: int = 0,
        flow_depth: int = 4,
        predict: Literal["velocity", "picture"] = "velocity",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        estimates: Literal["late", "even"] = "late",
        null_rate: float = 0.1,
        steps: int = 4,
        guidance: float = 1.0,
        guidance_kind: Literal["cfg", "apg"] = "cfg",
        solver: Literal["euler", "heun", "dpm++", "unipc"] = "euler",
        schedule: str = "uniform",
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
        if flow_depth < 1 or flow_width < 0:
            raise ValueError(f"flow_depth is at least 1 and flow_width at least 0, got {flow_depth} and {flow_width}")
        self.predict, self.estimates = predict, estimates
        self.time_mean, self.time_std = time_mean, time_std
        self.defaults = dict(
            steps=steps, guidance=guidance, guidance_kind=guidance_kind, solver=solver, schedule=schedule
        )
        Sampling.of(self.defaults, {})  # defaults that cannot be are told before any training
        self.transformer = Transformer(width, depth, heads, mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm)
        self.norm = nn.LayerNorm(width)
        numbers = patch * patch * channels
        # What the feature says alone; the MLP adds what noise and time change. A one-pass decoder's weights fit here.
        self.to_patches = nn.Linear(width, numbers)
        self.flow = PatchMLP(dim=numbers, features=width, width=flow_width or width, depth=flow_depth)
        # Sees over the patches' borders, which an MLP per patch leaves visible.
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.read_codes.apply(init_linear)
        nn.init.trunc_normal_(self.to_patches.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.to_patches.bias)
        nn.init.dirac_(self.smooth.weight)
        nn.init.zeros_(self.smooth.bias)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        """Draws pictures y: b c h w for codes: b n d. The options are those of ``Sampling``."""
        return draw(self, codes, lengths, Sampling.of(self.defaults, sampling))

    def branches(self, codes: Tensor, lengths: Tensor | None, stage: Stage) -> Branches:
        """What ``draw`` draws with. The transformer runs here, once for all steps."""
        self._check_guidance(stage.guided)
        features = self._features(*self._tokens(codes, lengths))
        # The same for every image; and what is not asked for is not computed.
        nothing = self._features(self.null_token[None], None) if stage.guided else features[:1]
        nothing = nothing.expand_as(features)

        def velocity(x: Tensor, t: float, features: Tensor) -> Tensor:
            return self._velocity(x, x.new_full((len(x),), t), features)

        def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            told, untold = velocity(torch.cat([x, x]), t, torch.cat([features, nothing])).chunk(2)
            return told, untold

        return Branches(lambda x, t: velocity(x, t, features), lambda x, t: velocity(x, t, nothing), both)

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        """Mean squared error of the velocity, at a random time per image."""
        self.check_codes(codes)
        target = target.float()
        t = logit_normal(len(target), self.time_mean, self.time_std, target.device).clamp_min(1e-3)
        x = interpolate(target, torch.randn_like(target), t)
        tokens, mask, dropped = self._some_dropped(*self._tokens(codes, lengths))
        velocity = self._velocity(x, t, self._features(tokens, mask))
        estimate = x - t.view(-1, 1, 1, 1) * velocity
        weight = 1 - t if self.estimates == "late" else torch.ones_like(t)
        wanted = wanted_velocity(target, x, t, self.predict)
        return DecoderLoss(F.mse_loss(velocity, wanted), estimate, weight * ~dropped)

    def _features(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """tokens: b n width -> what the transformer knows of every patch, b p width."""
        patches = (self.mask_token + self.positions).to(tokens.dtype).expand(len(tokens), -1, -1)
        out = self.transformer(torch.cat([patches, tokens], dim=1), mask, keep=slice(patches.shape[1]))
        return self.norm(out)

    def _velocity(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """x: b c h w, t: b, features: b p width -> velocity b c h w, float32."""
        patches = patchify(x, self.patch).to(self.null_token.dtype)
        out = self.to_patches(features) + self.flow(patches, t, features)
        out = self.smooth(unpatchify(out, self.patch, self.grid)).float()
        return velocity_of(out, x, t, self.predict)
