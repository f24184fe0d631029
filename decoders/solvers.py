"""Solvers: from noise to the picture along a velocity. Pure functions; ``SOLVERS`` names them.

All take a velocity v(x, t), where x stands, and the times to step through, downwards; v is asked at these times alone,
as the sequence holds them. They give x at the last of the times. ``watch(step, estimate)``, with step from 1, is shown
after each step the clean picture x - t v that its velocity points at.

Orders are global: halving the steps' length divides the error by 2 to the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Time = Tensor | float
Velocity = Callable[[Tensor, Any], Tensor]
Watch = Callable[[int, Tensor], None]


def euler(velocity: Velocity, x: Tensor, times: Sequence[Time], watch: Watch | None = None) -> Tensor:
    """First order. One evaluation a step."""
    for step, (t, s) in enumerate(pairwise(times), 1):
        v = velocity(x, t)
        if watch is not None:
            watch(step, x - t * v)
        x = x + (s - t) * v
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[Time], watch: Watch | None = None) -> Tensor:
    """Second order. Two evaluations a step; a step that ends in the picture itself, at t = 0, is Euler's."""
    for step, (t, s) in enumerate(pairwise(times), 1):
        v = velocity(x, t)
        if watch is not None:
            watch(step, x - t * v)
        ahead = x + (s - t) * v
        x = ahead if s == 0 else x + (s - t) * (v + velocity(ahead, s)) / 2
    return x


def dpm_solver(velocity: Velocity, x: Tensor, times: Sequence[Time], watch: Watch | None = None) -> Tensor:
    """DPM-Solver++ (2M), second order. One evaluation a step. Lu et al. 2022, arXiv 2211.01095."""
    return _diffusers("DPMSolverMultistepScheduler", velocity, x, times, watch)


def unipc(velocity: Velocity, x: Tensor, times: Sequence[Time], watch: Watch | None = None) -> Tensor:
    """UniPC with a predictor of second order. One evaluation a step. Zhao et al. 2023, arXiv 2302.04867."""
    return _diffusers("UniPCMultistepScheduler", velocity, x, times, watch)


SOLVERS = {"euler": euler, "heun": heun, "dpm++": dpm_solver, "unipc": unipc}


def evaluations(steps: int, solver: str, *, to_the_end: bool = True) -> int:
    """How often a solver asks for the velocity. to_the_end: whether the last of the times is 0."""
    return 2 * steps - to_the_end if solver == "heun" else steps


def _diffusers(name: str, velocity: Velocity, x: Tensor, times: Sequence[Time], watch: Watch | None) -> Tensor:
    """A multistep scheduler of the library diffusers, walked through our times."""
    try:
        import diffusers

        # Before 0.32 it does not know flows.
        scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2)
    except (ImportError, TypeError) as error:
        raise ValueError(
            "the solvers 'dpm++' and 'unipc' are those of diffusers 0.32 or newer: pip install "
            "'tokenizers-vis[latents]', or take 'euler' or 'heun'"
        ) from error
    # Its own flow times are of other ends, so ours are put where ``set_timesteps`` puts them. In pure noise the
    # logarithm of the signal is infinite, hence the cap, which is diffusers' too.
    scheduler.sigmas = torch.tensor([min(float(t), 1 - 1e-6) for t in times])
    scheduler.num_inference_steps = len(times) - 1
    scheduler.timesteps = torch.arange(len(times) - 1)
    scheduler.set_begin_index(0)
    for step, t in enumerate(times[:-1], 1):
        v = velocity(x, t)
        if watch is not None:
            watch(step, x - t * v)
        x = scheduler.step(v, scheduler.timesteps[step - 1], x, return_dict=False)[0]
    return x
