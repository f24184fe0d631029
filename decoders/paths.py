"""Rectified flow as functions. Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747.

Time runs from 0 (the picture) to 1 (noise): x_t = (1 - t) x_0 + t noise, with velocity noise - x_0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Dividing by a vanishing t would blow up the last bit of the way to the picture.
SMALLEST_T = 0.05


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


def random_times(steps: int, b: int, device: torch.device) -> Tensor:
    """(steps + 1) b: for each image times from 1 down to 0 with gaps of random lengths, in proportion to uniform draws.

    As FlowMo draws the steps that it trains through, Sargent et al. 2025, arXiv 2503.11056.
    """
    left = torch.rand(steps, b, device=device).clamp_min(1e-6).flip(0).cumsum(0).flip(0)
    return torch.cat([left / left[0], left.new_zeros(1, b)])


def velocity_of(out: Tensor, x: Tensor, t: Tensor, predict: str) -> Tensor:
    """The velocity at x, t that a network's output means: b c h w, t: b or 1. predict: "velocity" or "picture"."""
    return out if predict == "velocity" else (x - out) / t.view(-1, 1, 1, 1).clamp_min(SMALLEST_T)


def wanted_velocity(target: Tensor, x: Tensor, t: Tensor, predict: str) -> Tensor:
    """What ``velocity_of`` shall give on the straight line from noise to target: b c h w, t: b."""
    # A picture prediction near t = 0 is divided by t; the cap keeps those images from drowning the others.
    return (x - target) / t.view(-1, 1, 1, 1).clamp_min(SMALLEST_T if predict == "picture" else 0)
