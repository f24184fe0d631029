"""The rectified-flow decoder: a diffusion transformer that tokens tell what to draw.

Noisy patches and latent tokens share one sequence, time modulates every block, and a learned null token stands in for
the tokens in the unconditional branch. FlexTok, Bachmann et al. 2025, arXiv 2502.13967; DiT, arXiv 2212.09748.
Predicting the clean picture instead of the velocity suits big patches: Li and He 2025, arXiv 2511.13720.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizers_vis.decoders.base import DecoderLoss
from tokenizers_vis.decoders.paths import (
    interpolate,
    logit_normal,
    random_times,
    velocity_of,
    wanted_velocity,
)
from tokenizers_vis.decoders.sampling import Branches, Sampling, Stage, draw
from tokenizers_vis.decoders.scales import details, means, spread, surprise
from tokenizers_vis.decoders.transformer import grid_of
from tokenizers_vis.decoders.trunk import NoisyPatchDecoder


class FlowDecoder(NoisyPatchDecoder):
    """dim: width of a code. size: height and width of the canvas.

    scales: sizes to learn, such as (16, 32, 64), each the double of the one before and the last the canvas's own; one
        is drawn for each batch. Sampling may then walk from coarse to fine, ``steps`` with one number for each of them.
        () is the canvas's own size alone.
    predict: what the network gives. time_mean, time_std: of the logit-normal training times.
    estimates: what losses on the one-step estimate weigh over time, 1 - t ("late") or 1 ("even"). "even" makes every
        estimate a good picture by itself, which suits few steps.
    rollout: steps of a sampler from pure noise whose end is the estimate, in place of the one-step one; 0 is off. Its
        gradient passes through all steps; FlowMo's second stage, Sargent et al. 2025, arXiv 2503.11056, has 8.
    null_rate: share of training images whose tokens are replaced by the null token; 0 rules guidance out.
    refine: channels of the convolutions that follow the patches (``Refine``), 0 for none but one of 3 x 3.
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
        scales: tuple[int, ...] = (),
        predict: Literal["velocity", "picture"] = "velocity",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        estimates: Literal["late", "even"] = "late",
        rollout: int = 0,
        null_rate: float = 0.1,
        refine: int = 0,
        steps: int | tuple[int, ...] = 25,
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
            depth=depth,
            heads=heads,
            channels=channels,
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            qk_norm=qk_norm,
            null_rate=null_rate,
            refine=refine,
        )
        self.sizes = tuple(scales) or (size,)
        if any(2 * small != big for small, big in zip(self.sizes, (*self.sizes[1:], 2 * size), strict=True)):
            raise ValueError(f"scales double from one to the next and end at size {size}, got {scales}")
        grid_of(self.sizes[0], patch)
        if rollout < 0:
            raise ValueError(f"rollout is a number of steps, 0 for none, got {rollout}")
        self.predict, self.estimates, self.rollout = predict, estimates, rollout
        self.time_mean, self.time_std = time_mean, time_std
        self.defaults = dict(
            steps=steps, guidance=guidance, guidance_kind=guidance_kind, solver=solver, schedule=schedule
        )
        Sampling.of(self.defaults, {}).stages(self.sizes)  # defaults that cannot be are told before any training
        # Positions tell a grid by its spacing; a vector for each scale tells it to every layer. At first it is silent.
        self.scale = nn.Parameter(torch.zeros(len(scales), width)) if len(scales) > 1 else None
        # A running mean of what training pictures hold at each scale that no coarser one foretells.
        self.register_buffer("surprises", torch.zeros(len(scales)) if len(scales) > 1 else None)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        """Draws pictures y: b c h w for codes: b n d. The options are those of ``Sampling``."""
        return draw(self, codes, lengths, Sampling.of(self.defaults, sampling))

    def branches(self, codes: Tensor, lengths: Tensor | None, stage: Stage) -> Branches:
        """What ``draw`` draws with."""
        times = torch.tensor(stage.asked, device=codes.device)
        return self._branches(codes, lengths, stage, self._condition(times, stage.size), self.predict)

    def unknown(self, size: int) -> float:
        """How large the details of a picture of this size are that the next coarser one does not foretell."""
        return self.surprises[self.sizes.index(size)].item()

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        """Mean squared error of the velocity, at a random time per image, and at a random scale per batch.

        At a coarse scale the estimate is of full size all the same, with details that are the target's own: losses on
        pictures see what this scale has to answer for.
        """
        self.check_codes(codes)
        target = target.float()
        factor = self._some_factor()
        if self.training and self.surprises is not None:
            self._learn_surprises(target)
        wanted = means(target, factor)
        t = logit_normal(len(target), self.time_mean, self.time_std, target.device).clamp_min(1e-3)
        noise = torch.randn_like(wanted)
        x = interpolate(wanted, noise, t)
        everything, full = self._tokens(codes, lengths)
        tokens, mask, dropped = self._some_dropped(everything, full)
        velocity = self._velocity(x, t, tokens, mask)
        loss = F.mse_loss(velocity, wanted_velocity(wanted, x, t, self.predict))
        if self.rollout:
            estimate, weight = self._rolled_out(torch.randn_like(wanted), everything, full), torch.ones_like(t)
        else:
            estimate = x - t.view(-1, 1, 1, 1) * velocity
            weight = (1 - t if self.estimates == "late" else torch.ones_like(t)) * ~dropped
        if factor > 1:
            estimate = spread(estimate, factor) + details(target, factor)
        return DecoderLoss(loss, estimate, weight)

    def _rolled_out(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """From noise to pictures in ``rollout`` Euler steps of random lengths, others for each image, with gradient."""
        for t, s in pairwise(random_times(self.rollout, len(x), x.device)):
            # Of each step only where it started is kept: the way back walks it once more.
            v = checkpoint(self._velocity, x, t, tokens, mask, use_reentrant=False)
            x = x + (s - t).view(-1, 1, 1, 1) * v
        return x

    @torch.no_grad()
    def _learn_surprises(self, target: Tensor) -> None:
        for i, size in enumerate(self.sizes[1:], 1):
            now = surprise(means(target, self.sizes[-1] // size)).to(self.surprises.dtype)
            before = self.surprises[i]
            self.surprises[i] = torch.where(before == 0, now, torch.lerp(before, now, 0.01))

    def _some_factor(self) -> int:
        """How much smaller than the canvas a batch shall be."""
        if len(self.sizes) == 1:
            return 1
        return self.sizes[-1] // self.sizes[int(torch.randint(len(self.sizes), ()))]

    def _velocity(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x: b c h w, t: b, tokens: b n width -> velocity b c h w, float32."""
        condition = self._condition(t, x.shape[-1])
        return velocity_of(self._network(x, condition, tokens, mask), x, t, self.predict)

    def _condition(self, t: Tensor, size: int) -> Tensor:
        """t: b -> b width, what the network is told of the times and of the scale."""
        condition = self._time(t)
        return condition if self.scale is None else condition + self.scale[self.sizes.index(size)]
