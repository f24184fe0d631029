"""Rectified flow as functions. Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747.

Time runs from 0 (the picture) to 1 (noise): x_t = (1 - t) x_0 + t noise, with velocity noise - x_0.
A sampler walks ``times`` downwards with a velocity function v(x, t), t as ``times`` holds it: a number, or a scalar
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Time = Tensor | float
Velocity = Callable[[Tensor, Time], Tensor]


def interpolate(picture: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t. picture, noise: b c h w; t: b."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * picture + t * noise


def logit_normal(b: int, mean: float, std: float, device: torch.device) -> Tensor:
    """Training times: sigmoid of a normal. Esser et al. 2024, arXiv 2403.03206, eq. 19."""
    return torch.sigmoid(mean + std * torch.randn(b, device=device))


def stratified_logit_normal(b: int, device: torch.device) -> Tensor:
    """Training times: a standard ``logit_normal`` with one draw in each of b parts of equal probability."""
    u = (torch.arange(b, device=device) + torch.rand(b, device=device)) / b
    return torch.sigmoid(torch.special.ndtri(u))


def mode_sampled(b: int, scale: float, device: torch.device) -> Tensor:
    """Training times, more of them in the middle for a scale above 0. Esser et al. 2024, arXiv 2403.03206, eq. 20."""
    u = torch.rand(b, device=device)
    return 1 - u - scale * ((math.pi * u / 2).cos().square() - 1 + u)


def uniform_times(steps: int, device: torch.device | None = None) -> Tensor:
    """steps + 1 times from 1 down to 0."""
    return torch.linspace(1, 0, steps + 1, device=device)


def euler(velocity: Velocity, x: Tensor, times: Tensor | Sequence[float]) -> Tensor:
    """One evaluation a step."""
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor | Sequence[float]) -> Tensor:
    """Two evaluations a step, second order; the last step, which ends in the picture itself, is Euler's."""
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)
        ahead = x + (s - t) * v
        x = ahead if s == 0 else x + (s - t) * (v + velocity(ahead, s)) / 2
    return x
