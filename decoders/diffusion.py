"""The diffusion decoder: it learns to remove noise at every level, and draws with a scheduler of the library diffusers.

DDPM, Ho et al. 2020, arXiv 2006.11239; EDM, Karras et al. 2022, arXiv 2206.00364. Needs the extra ``latents``:
pip install 'tokenizers-vis[latents]'.

With u the picture over its standard deviation, the network sees x = alpha u + sigma noise, alpha² + sigma² = 1. EDM's
preconditioning is the prediction of v = alpha noise - sigma u (Salimans and Ho 2022, arXiv 2202.00512) there, so that
what is predicted and which levels are met are two choices, and any scheduler serves any of them.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.decoders.base import DecoderLoss
from tokenizers_vis.decoders.guidance import AutoGuidance
from tokenizers_vis.decoders.sampling import Guide, Sampling
from tokenizers_vis.decoders.trunk import NoisyPatchDecoder

LEVELS, BETAS = 1000, (1e-4, 0.02)  # of a DDPM: how many, and the noise that the first and the last add
# Those of diffusers that walk the levels of each kind and end in the picture, whatever is predicted.
SCHEDULERS = {
    "ddpm": (
        "DDIM",
        "DDPM",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LCM",
        "SASolver",
        "TCD",
        "UniPCMultistep",
    ),
    "edm": ("EDMEuler", "EDMDPMSolverMultistep"),
}


@cache
def log_sigmas() -> Tensor:
    """ln(sigma / alpha) at each level of a DDPM: float32, on the CPU."""
    kept = (1 - torch.linspace(*BETAS, LEVELS, dtype=torch.float64)).cumprod(0)
    return (((1 - kept) / kept).log() / 2).float()


class DiffusionDecoder(NoisyPatchDecoder):
    """dim: width of a code. size: height and width of the canvas.

    noise: the levels that it learns: the 1000 of a "ddpm", or the log-normal ones of "edm".
    predict: what the network gives: the noise, v, or the picture. "edm" with "v" is EDM's preconditioning.
    data_std: standard deviation of what the canvas holds: about 0.5 for pixels in [-1, 1], 1 for latents.
    sigma_mean, sigma_std: of the logarithm of "edm"'s noise, on top of pictures as they are.
    estimates: what losses on the one-step estimate weigh, alpha² ("late") or 1 ("even").
    null_rate: share of training images whose tokens are replaced by the null token; 0 rules guidance out.
    scheduler: one of ``SCHEDULERS``, diffusers' names; "" is the first for that noise, DDIM or EDMEuler.
    steps, guidance, guidance_kind: with it the defaults of ``forward``. Guidance works on the clean estimate.
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
        noise: Literal["ddpm", "edm"] = "ddpm",
        predict: Literal["epsilon", "v", "picture"] = "v",
        data_std: float = 0.5,
        sigma_mean: float = -1.2,
        sigma_std: float = 1.2,
        estimates: Literal["late", "even"] = "late",
        null_rate: float = 0.1,
        scheduler: str = "",
        steps: int = 25,
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
        if not data_std > 0:
            raise ValueError(f"data_std is above 0, got {data_std}")
        self.noise, self.predict, self.data_std, self.estimates = noise, predict, data_std, estimates
        self.sigma_mean, self.sigma_std = sigma_mean, sigma_std
        self.scheduler = scheduler or SCHEDULERS[noise][0]
        self.defaults = dict(steps=steps, guidance=guidance, guidance_kind=guidance_kind)
        # Defaults that cannot be are told before any training.
        Sampling.of(self.defaults, {})
        scheduler_of(self.scheduler, noise, data_std)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, *, scheduler: str = "", **sampling: Any) -> Tensor:
        """Draws pictures y: b c h w for codes: b n d.

        scheduler: as in the constructor. The other options are those of ``Sampling``, without ``solver``,
        ``schedule`` and ``batched``; where they speak of a time t it is sigma / (alpha + sigma). Schedulers that add
        noise on the way draw it for each image from a seed made of the noise it starts from.
        """
        for option in ("solver", "schedule", "batched"):
            if option in sampling:
                raise ValueError(f"a diffusion decoder takes no {option}; scheduler names one of diffusers'")
        options = Sampling.of(self.defaults, sampling)
        if not isinstance(options.steps, int):
            raise ValueError(f"steps of a diffusion decoder is one whole number, got {options.steps!r}")
        self.check_codes(codes)
        self._check_guidance(options.guided)
        rule = options.rule
        if isinstance(rule, AutoGuidance):
            raise ValueError("a diffusion decoder is guided by its null token: cfg or apg, not AutoGuidance")
        tokens, mask = self._tokens(codes, lengths)
        nothing = self.null_token.to(tokens.dtype).expand(len(codes), 1, -1)
        walk = scheduler_of(scheduler or self.scheduler, self.noise, self.data_std)
        walk.set_timesteps(options.steps, device=codes.device)
        start = options.start(len(codes), self.shape).float()
        extra = {}
        if "generator" in inspect.signature(walk.step).parameters:
            extra["generator"] = [torch.Generator().manual_seed(seed_of(noise)) for noise in start]
        guide = Guide(rule)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self._picture(x, t, tokens, mask), self._picture(x, t, nothing, None)

        y = start.to(codes.device) * walk.init_noise_sigma
        for step, time in enumerate(walk.timesteps, 1):
            x = walk.scale_model_input(y, time)
            t = time.to(x).view(1)
            alpha, sigma = self._level(t)
            clock = (sigma / (alpha + sigma)).item()
            picture = guide(clock, partial(self._picture, x, t, tokens, mask), partial(both, x, t))
            if options.callback is not None:
                options.callback(step, len(walk.timesteps), picture)
            v = (alpha * x - picture / self.data_std) / sigma
            y = walk.step(v, time, y, **extra).prev_sample
        return y if self.noise == "edm" else y * self.data_std

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        """Mean squared error of what the network gives, at a random level per image."""
        self.check_codes(codes)
        target = target.float()
        b, device = len(target), target.device
        if self.noise == "edm":
            t = (self.sigma_mean + self.sigma_std * torch.randn(b, device=device)) / 4
        else:
            t = torch.randint(LEVELS, (b,), device=device).float()
        alpha, sigma = self._level(t)
        u, noise = target / self.data_std, torch.randn_like(target)
        x = alpha * u + sigma * noise
        tokens, mask, dropped = self._some_dropped(*self._tokens(codes, lengths))
        out = self._out(x, t, tokens, mask)
        wanted = {"epsilon": noise, "v": alpha * noise - sigma * u, "picture": target}[self.predict]
        weight = alpha.flatten() ** 2 if self.estimates == "late" else torch.ones(b, device=device)
        return DecoderLoss(F.mse_loss(out, wanted), self._estimate(out, x, alpha, sigma), weight * ~dropped)

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, b 1 1 1, at times t: b of a scheduler: 0 to 999, or ln(sigma) / 4 for "edm"."""
        if self.noise == "edm":
            log_sigma = 4 * t - math.log(self.data_std)
        else:
            # Some schedulers stop between two levels.
            below = t.floor().clamp(0, LEVELS - 2)
            table = log_sigmas().to(t.device)
            log_sigma = torch.lerp(table[below.long()], table[below.long() + 1], t - below)
        log_sigma = log_sigma.view(-1, 1, 1, 1)
        return torch.sigmoid(-2 * log_sigma).sqrt(), torch.sigmoid(2 * log_sigma).sqrt()

    def _out(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """What the network gives: x b c h w, t: b as in ``_level``, tokens: b n width."""
        return self._network(x, self._time(t if self.noise == "edm" else t / LEVELS), tokens, mask)

    def _estimate(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean picture that an output of the network means: b c h w."""
        if self.predict == "picture":
            return out
        u = alpha * x - sigma * out if self.predict == "v" else (x - sigma * out) / alpha
        return u * self.data_std

    def _picture(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The clean picture as the tokens tell it, b c h w. x: b c h w, t: b or 1."""
        return self._estimate(self._out(x, t, tokens, mask), x, *self._level(t))


def scheduler_of(name: str, noise: str, data_std: float) -> Any:
    """A fresh scheduler of diffusers for predictions of v. noise: "ddpm" or "edm". Raises ``ValueError``."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            "a diffusion decoder draws with diffusers' schedulers: pip install 'tokenizers-vis[latents]'"
        ) from error
    name = name.removesuffix("Scheduler")
    if name not in SCHEDULERS[noise]:
        raise ValueError(
            f"scheduler is one that walks the levels of noise {noise!r}: {', '.join(SCHEDULERS[noise])}; got {name!r}"
        )
    kind = getattr(diffusers, f"{name}Scheduler")
    if noise == "edm":
        return kind(sigma_data=data_std, prediction_type="v_prediction")
    options = {
        "num_train_timesteps": LEVELS,
        "beta_schedule": "linear",
        "beta_start": BETAS[0],
        "beta_end": BETAS[1],
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",  # from pure noise on: Lin et al. 2023, arXiv 2305.08891
        "clip_sample": False,  # latents go beyond 1
        "lower_order_final": True,
    }
    return kind(**{key: value for key, value in options.items() if key in inspect.signature(kind).parameters})


def seed_of(noise: Tensor) -> int:
    """A seed made of the noise that an image starts from, which makes what is added on the way its own."""
    digest = hashlib.blake2b(noise.cpu().contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
