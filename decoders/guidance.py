"""Guidance: how a conditional and an unconditional prediction become one. Pure functions on b c h w."""

from __future__ import annotations

import torch
from torch import Tensor


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + scale (c - u); scale 1 is no guidance. Ho and Salimans 2022, arXiv 2207.12598."""
    return unconditional + scale * (conditional - unconditional)


def adaptive_projected(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    previous: Tensor | None,
    *,
    momentum: float = -0.5,
    threshold: float = 2.5,
) -> tuple[Tensor, Tensor]:
    """Guidance without over-saturation. Sadat et al. 2024, arXiv 2410.02416, algorithm 1.

    The difference gets momentum, is limited to a norm of ``threshold`` per image, and loses its part along the
    conditional prediction. Returns the guided prediction and the difference to hand in as ``previous`` next time.
    """
    difference = conditional - unconditional
    if previous is not None:
        difference = difference + momentum * previous
    dims = (1, 2, 3)
    norm = difference.norm(p=2, dim=dims, keepdim=True).clamp_min(1e-12)
    limited = difference * (threshold / norm).clamp_max(1)
    exact = torch.float32 if conditional.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    direction = conditional.to(exact) / conditional.to(exact).norm(p=2, dim=dims, keepdim=True).clamp_min(1e-12)
    along = (limited.to(exact) * direction).sum(dim=dims, keepdim=True) * direction
    orthogonal = (limited.to(exact) - along).to(conditional.dtype)
    return conditional + (scale - 1) * orthogonal, difference
