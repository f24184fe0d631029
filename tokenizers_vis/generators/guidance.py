"""How strong classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) is at each step of a sequence.

Everywhere the logits are u + scale (c - u), so that a scale of 1 is none. LlamaGen, VAR and RAR count so; MaskGIT and
the MaskGIT of 1d-tokenizer write c + s (c - u), whose s is one less.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass


class Guidance(ABC):
    """Abstract. The scale at each step."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[Guidance]]:
        """The schedules that a config may name by ``kind``."""
        return {"constant": Constant, "power_cosine": PowerCosine, "linear": Linear, "interval": Interval}

    @abstractmethod
    def at(self, step: int, steps: int) -> float:
        """The scale at step 0 to steps - 1. A step is a token, a level or a round of unmasking."""


@dataclass(frozen=True)
class Constant(Guidance):
    """One scale throughout."""

    scale: float

    def __post_init__(self) -> None:
        _check(self.scale)

    def at(self, step: int, steps: int) -> float:
        return self.scale


@dataclass(frozen=True)
class PowerCosine(Guidance):
    """From 1 up to the scale: 1 + (scale - 1) (1 - cos(pi (step / steps)^power)) / 2.

    The schedule of MDT (Gao et al. 2023, arXiv 2303.14389), which RAR samples with (its power is 2.75, scale 16 for the
    base model). A larger power stays near 1 for longer.
    """

    scale: float
    power: float = 2.75

    def __post_init__(self) -> None:
        _check(self.scale)
        if not self.power >= 0:
            raise ValueError(f"power is 0 or more, got {self.power!r}")

    def at(self, step: int, steps: int) -> float:
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * (step / steps) ** self.power)) / 2


@dataclass(frozen=True)
class Linear(Guidance):
    """From 1 straight up: 1 + (scale - 1) step / steps. Muse (Chang et al. 2023, arXiv 2301.00704)."""

    scale: float

    def __post_init__(self) -> None:
        _check(self.scale)

    def at(self, step: int, steps: int) -> float:
        return 1 + (self.scale - 1) * step / steps


@dataclass(frozen=True)
class Interval(Guidance):
    """The scale from step ``start`` to before ``stop``, none elsewhere (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    LlamaGen's ``cfg_interval`` i is ``stop`` i + 2: it counts from the second token, and includes its end.
    """

    scale: float
    start: int = 0
    stop: int = 2**31

    def __post_init__(self) -> None:
        _check(self.scale)
        if not 0 <= self.start < self.stop:
            raise ValueError(f"start is 0 or more and below stop, got {self.start} and {self.stop}")

    def at(self, step: int, steps: int) -> float:
        return self.scale if self.start <= step < self.stop else 1.0


def _check(scale: float) -> None:
    if not math.isfinite(scale) or scale < 0:
        raise ValueError(f"a guidance scale is a number from 0 (1 is none), got {scale!r}")
