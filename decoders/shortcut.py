"""The shortcut decoder: a flow whose network is told how far it shall jump, so that one or two steps are enough.

Frans et al. 2024, "One Step Diffusion via Shortcut Models", arXiv 2410.12557. Most training images learn the velocity,
which is the jump of vanishing length; the others learn that one jump lands where two of half its length do.
Chosen over consistency training (Song et al. 2023, arXiv 2303.01469) because one run from scratch serves every budget
of 1, 2, 4 ... steps, so that more steps still buy more quality, and nothing has to be annealed on the way.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.decoders.base import DecoderLoss
from tokenizers_vis.decoders.paths import interpolate, logit_normal, velocity_of, wanted_velocity
from tokenizers_vis.decoders.sampling import Branches, Sampling, Stage, draw
from tokenizers_vis.decoders.trunk import NoisyPatchDecoder


class ShortcutDecoder(NoisyPatchDecoder):
    """dim: width of a code. size: height and width of the canvas.

    time_mean, time_std: of the logit-normal training times; "picture" wants a mean above 0.
    finest: most steps that it can take, a power of 2. steps: the default of ``forward``, a power of 2 up to finest.
    bootstrap: share of training images that learn jumps from jumps of half the length.
    predict: what the network gives. "picture" makes a jump to t = 0 the network's own output.
    estimates: what losses on the one-step estimate weigh over time, 1 - t ("late") or 1 ("even").
    null_rate: share of training images whose tokens are replaced by the null token; 0 rules guidance out.
    guidance, guidance_kind: defaults of ``forward``.
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
        predict: Literal["velocity", "picture"] = "velocity",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        finest: int = 128,
        bootstrap: float = 0.25,
        estimates: Literal["late", "even"] = "late",
        null_rate: float = 0.1,
        steps: int = 1,
        guidance: float = 1.0,
        guidance_kind: Literal["cfg", "apg"] = "cfg",
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
        )
        if finest < 2 or finest & (finest - 1):
            raise ValueError(f"finest is a power of 2 from 2, got {finest}")
        if not 0 < bootstrap < 1:
            raise ValueError(f"bootstrap is a share between 0 and 1, both excluded, got {bootstrap}")
        self.predict, self.estimates = predict, estimates
        self.time_mean, self.time_std = time_mean, time_std
        self.finest, self.bootstrap = finest, bootstrap
        self.defaults = dict(steps=steps, guidance=guidance, guidance_kind=guidance_kind)
        Sampling.of(self.defaults, {})  # defaults that cannot be are told before any training
        self._level(steps)
        # One vector for each length of a jump: 1, 1/2, 1/4 ... 1/finest. At first they say nothing.
        self.jump = nn.Embedding(finest.bit_length(), width)
        nn.init.zeros_(self.jump.weight)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        """Draws pictures y: b c h w for codes: b n d. The options are those of ``Sampling``, without ``solver``
        and ``schedule``.
        """
        for option in ("solver", "schedule"):
            if option in sampling:
                raise ValueError(f"a shortcut decoder takes no {option}: it has learned jumps of equal length")
        return draw(self, codes, lengths, Sampling.of(self.defaults, sampling))

    def branches(self, codes: Tensor, lengths: Tensor | None, stage: Stage) -> Branches:
        """What ``draw`` draws with."""
        times = torch.tensor(stage.asked, device=codes.device)
        level = torch.full_like(times, self._level(len(stage.times) - 1), dtype=torch.int64)
        return self._branches(codes, lengths, stage, self._condition(times, level), self.predict)

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        """Mean squared error of the velocity, and of jumps from where two jumps of half the length land."""
        self.check_codes(codes)
        target = target.float()
        b, device = len(target), target.device
        # The first images of the batch jump; a fraction of an image is one by that chance.
        jumping = int(b * self.bootstrap + torch.rand(()).item())
        level = torch.full((b,), self._level(self.finest), device=device)
        level[:jumping] = torch.randint(len(self.jump.weight) - 1, (jumping,), device=device)
        length = 0.5**level
        # Rounded up to where a walk of such steps may stand.
        t = (logit_normal(b, self.time_mean, self.time_std, device) / length).ceil().clamp_min(1) * length
        x = interpolate(target, torch.randn_like(target), t)
        tokens, mask, dropped = self._some_dropped(*self._tokens(codes, lengths))
        wanted = wanted_velocity(target, x, t, self.predict)
        # Before the jumps: under autocast, weights that are first cast without gradient would stay without.
        velocity = self._velocity(x, t, level, tokens, mask)
        if jumping:
            first = [None if v is None else v[:jumping].detach() for v in (x, t, level, tokens, mask)]
            wanted[:jumping] = self._two_jumps(*first)
        estimate = x - t.view(-1, 1, 1, 1) * velocity
        weight = 1 - t if self.estimates == "late" else torch.ones_like(t)
        # Of the long jumps, only those that end in the picture make a picture to judge.
        weight[:jumping] = (t == length)[:jumping].float()
        return DecoderLoss(F.mse_loss(velocity, wanted), estimate, weight * ~dropped)

    @torch.no_grad()
    def _two_jumps(self, x: Tensor, t: Tensor, level: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The mean velocity over two jumps of half the length: equations 4 and 5 of the paper."""
        half = 0.5 ** (level + 1)
        first = self._velocity(x, t, level + 1, tokens, mask)
        landed = x - half.view(-1, 1, 1, 1) * first
        return (first + self._velocity(landed, t - half, level + 1, tokens, mask)) / 2

    def _velocity(self, x: Tensor, t: Tensor, level: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x: b c h w, t and level: b, tokens: b n width -> mean velocity of a jump of 2 ** -level, b c h w, float32."""
        return velocity_of(self._network(x, self._condition(t, level), tokens, mask), x, t, self.predict)

    def _condition(self, t: Tensor, level: Tensor) -> Tensor:
        """t, level: b -> b width, what the network is told of the time and of the length of the jump."""
        return self._time(t) + self.jump(level).to(self.null_token.dtype)

    def _level(self, steps: int) -> int:
        """The base-2 logarithm of a number of steps, or ``ValueError``."""
        if steps & (steps - 1) or not 1 <= steps <= self.finest:
            raise ValueError(f"a shortcut decoder takes steps of 1, 2, 4 ... {self.finest}, got {steps}")
        return steps.bit_length() - 1
