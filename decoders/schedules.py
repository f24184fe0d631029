"""Time schedules: where on the way from noise (1) to the picture (0) the steps of a sampler stand.

A schedule is named by a text: "uniform"; "shifted:S", the shift of Stable Diffusion 3, which spends more steps in the
noise for S above 1 (Esser et al. 2024, arXiv 2403.03206, eq. 23); "power:P", t ** P, of which FlowMo uses 0.25 (Sargent
et al. 2025, arXiv 2503.11056): the same, and more so.
"""

from __future__ import annotations

import math

SCHEDULES = ("uniform", "shifted:S", "power:P")


def uniform(steps: int) -> list[float]:
    """steps + 1 times from 1 down to 0."""
    return [step / steps for step in range(steps, -1, -1)]


def shifted(t: float, shift: float) -> float:
    """The time whose odds t / (1 - t), noise to picture, are ``shift`` times those of t."""
    return t if t in (0, 1) else shift * t / (1 + (shift - 1) * t)


def power(t: float, exponent: float) -> float:
    return t**exponent


def scheduled(steps: int, schedule: str = "uniform") -> list[float]:
    """steps + 1 times from 1 down to 0, floats of double precision. Raises ``ValueError`` for an unknown schedule."""
    name, colon, text = schedule.partition(":") if isinstance(schedule, str) else (schedule, "", "")
    if name == "uniform" and not colon:
        return uniform(steps)
    bend = {"shifted": shifted, "power": power}.get(name)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if bend is None or not 0 < number < math.inf:
        raise ValueError(
            f"schedule is one of {', '.join(SCHEDULES)} with numbers S and P above 0, such as 'shifted:3' or "
            f"'power:0.25'; got {schedule!r}"
        )
    return [bend(t, number) for t in uniform(steps)]
