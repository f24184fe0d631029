"""Guidance: how a prediction that knows the codes and one that knows less become one.

The formulas are pure functions on b c h w. The objects hold their numbers and say at which times they count; a scale
may be a function of the time t, which runs from 1 (noise) to 0 (the picture). Scale 1 is no guidance, and costs none:
the second prediction is not made at times where the scale is 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers_vis.decoders.base import Decoder

Scale = float | Callable[[float], float]


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
    eta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Guidance without over-saturation. Sadat et al. 2024, arXiv 2410.02416, algorithm 1.

    The difference gets momentum, is limited to a norm of ``threshold`` per image, and of its part along the conditional
    prediction a share of ``eta`` is kept. Returns the guided prediction and the difference to hand in as ``previous``
    next time.
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
    kept = (limited.to(exact) - (1 - eta) * along).to(conditional.dtype)
    return conditional + (scale - 1) * kept, difference


@dataclass(frozen=True)
class Guidance(ABC):
    """Abstract. scale: a number, or a function of t. interval: the lowest and the highest t with guidance.

    An interval keeps guidance from where it harms (noise) or is idle (the last steps): Kynkäänniemi et al. 2024,
    arXiv 2404.07724. Theirs are noise levels s of another convention: t = s / (1 + s).
    """

    scale: Scale
    _: KW_ONLY
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not callable(self.scale):
            _finite(self.scale, "the scale of a guidance is a number (1 is none) or a function of t")
        if (
            not isinstance(self.interval, (tuple, list))
            or len(self.interval) != 2
            or not (0 <= self.interval[0] <= self.interval[1] <= 1)
        ):
            raise ValueError(f"interval is the lowest and the highest t, 0 <= low <= high <= 1; got {self.interval!r}")

    def at(self, t: float) -> float:
        """The scale at a time; 1 outside of the interval."""
        if not self.interval[0] <= t <= self.interval[1]:
            return 1.0
        if callable(self.scale):
            return _finite(self.scale(t), f"a scale as a function of t gives a number; at t = {t:g} it does not")
        return self.scale

    @abstractmethod
    def combine(
        self, conditional: Tensor, other: Tensor, scale: float, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction, and what to hand in as ``previous`` next time; None at first."""


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """``classifier_free``, away from the prediction without codes."""

    def combine(
        self, conditional: Tensor, other: Tensor, scale: float, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return classifier_free(conditional, other, scale), None


@dataclass(frozen=True)
class AdaptiveProjected(Guidance):
    """``adaptive_projected``, away from the prediction without codes; it remembers the last step's difference."""

    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("momentum", "threshold", "eta"):
            _finite(getattr(self, name), f"{name} is a number")
        if self.threshold <= 0:
            raise ValueError(f"threshold is a norm above 0, got {self.threshold!r}")

    def combine(
        self, conditional: Tensor, other: Tensor, scale: float, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        options = dict(momentum=self.momentum, threshold=self.threshold, eta=self.eta)
        return adaptive_projected(conditional, other, scale, previous, **options)


@dataclass(frozen=True)
class AutoGuidance(Guidance):
    """Away from the prediction of a smaller or less trained decoder of the same codes and canvas.

    Needs no null token. Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507.
    """

    model: Decoder

    def combine(
        self, conditional: Tensor, other: Tensor, scale: float, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return classifier_free(conditional, other, scale), None


def _finite(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what}, got {value!r}")
    return value
