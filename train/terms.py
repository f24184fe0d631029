"""What a loss is made of: named terms, and weights that may change as a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """total: scalar with gradient. parts: each term by name, un-weighted and detached.

    fake: b 3 h w, the pictures that a critic shall see beside the real ones, detached; None where none shall.
    """

    total: Tensor
    parts: dict[str, Tensor]
    fake: Tensor | None = None


@dataclass(frozen=True)
class Schedule:
    """A number that moves in a straight line from ``start`` to ``end`` between two optimiser steps, counted from 0.

    Before ``from_step`` it is ``start``, from ``to_step`` on ``end``; where both are one step, it jumps there.
    """

    start: float
    end: float
    from_step: int
    to_step: int

    def __post_init__(self) -> None:
        if not 0 <= self.from_step <= self.to_step:
            raise ValueError(f"from_step is from 0 to to_step, got from_step {self.from_step}, to_step {self.to_step}")

    def at(self, step: int) -> float:
        if step >= self.to_step:
            return self.end
        if step <= self.from_step:
            return self.start
        return self.start + (self.end - self.start) * (step - self.from_step) / (self.to_step - self.from_step)


Weight = float | Schedule


def at_step(weight: Weight, step: int) -> float:
    return weight.at(step) if isinstance(weight, Schedule) else weight


def ever(weight: Weight) -> bool:
    """Whether it is above 0 at some step."""
    return max(weight.start, weight.end) > 0 if isinstance(weight, Schedule) else weight > 0


def check_weights(**weights: Weight) -> None:
    """Raises ``ValueError`` for a weight that is, or becomes, less than 0."""
    for name, weight in weights.items():
        if (min(weight.start, weight.end) if isinstance(weight, Schedule) else weight) < 0:
            raise ValueError(f"{name} is a weight, 0 or more; got {weight}")
