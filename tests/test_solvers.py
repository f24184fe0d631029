"""Schedules keep their ends, solvers the orders that they promise."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.paths import interpolate, logit_normal
from tokenizers_vis.decoders.schedules import scheduled
from tokenizers_vis.decoders.solvers import SOLVERS, evaluations

SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}


def flow(**changes) -> FlowDecoder:
    return build(Decoder, {"kind": "flow", **SHAPE, **changes}).eval().requires_grad_(False)


# -- where steps stand


def test_schedules():
    assert scheduled(4) == [1, 0.75, 0.5, 0.25, 0]
    assert scheduled(2, "shifted:3") == [1, 0.75, 0]
    assert scheduled(2, "power:0.25") == [1, pytest.approx(0.840896), 0]
    for name in ("uniform", "shifted:3", "shifted:0.1", "power:0.25", "power:4"):
        times = scheduled(7, name)
        assert times[0] == 1 and times[-1] == 0 and all(t > s for t, s in pairwise(times))
    # The shift multiplies the odds of noise to picture.
    for t, s in zip(scheduled(5)[1:-1], scheduled(5, "shifted:2.5")[1:-1], strict=True):
        assert s / (1 - s) == pytest.approx(2.5 * t / (1 - t))


@pytest.mark.parametrize("name", ["cosine", "shifted", "shifted:", "shifted:0", "power:-1", "power:x", "uniform:2", 3])
def test_an_unknown_schedule(name):
    with pytest.raises(ValueError, match="schedule is one of uniform, shifted:S, power:P"):
        flow()(torch.randn(4, 6, 5), schedule=name)
    with pytest.raises(ConfigError, match="schedule"):
        flow(schedule=name)


# -- solvers


def gaussian(x: Tensor, t: float) -> Tensor:
    """The velocity for pictures whose numbers are normal, of mean 0.7 and standard deviation 0.5."""
    away = (x - (1 - t) * 0.7) / ((1 - t) ** 2 * 0.25 + t**2)
    return t * away - (0.7 + (1 - t) * 0.25 * away)


def gaussian_at(t: float, noise: Tensor) -> Tensor:
    """Where that velocity has carried the noise at a time t."""
    return (1 - t) * 0.7 + math.sqrt((1 - t) ** 2 * 0.25 + t**2) * noise


def order(solver: str, high: float, low: float, steps: tuple[int, int]) -> float:
    """By how many halvings of the error a doubling of the steps is paid, between two times."""
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
    errors = []
    for n in steps:
        times = [high - (high - low) * i / n for i in range(n)] + [low]
        end = SOLVERS[solver](gaussian, gaussian_at(high, noise), times)
        errors.append((end - gaussian_at(low, noise)).square().mean().sqrt().item())
    return math.log2(errors[0] / errors[1]) / math.log2(steps[1] / steps[0])


@pytest.mark.parametrize(("solver", "promised"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)])
def test_the_order_of_a_solver(solver, promised):
    assert order(solver, 0.9, 0.1, (32, 64)) > promised - 0.12
    # All the way: near the picture the logarithm of noise to picture has no even steps, which costs DPM-Solver++ a
    # logarithm of the steps.
    whole = order(solver, 1.0, 0.0, (64, 256))
    assert whole > promised - (0.3 if solver == "dpm++" else 0.12)
    if solver == "euler":
        assert whole < 1.1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["uniform", "shifted:3", "power:0.5"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_straight_path_is_walked_exactly(solver, schedule, steps):
    picture, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    end = SOLVERS[solver](lambda x, t: noise - picture, noise, scheduled(steps, schedule))
    torch.testing.assert_close(end, picture, rtol=0, atol=1e-9 if solver in ("euler", "heun") else 2e-5)


def test_euler_and_heun_by_hand():
    # dx/dt = x backwards over two steps of a half: each of Euler's takes half away.
    assert SOLVERS["euler"](lambda x, t: x, torch.tensor([8.0]), scheduled(2)).tolist() == [2.0]
    # First step: (8 + 4) / 2 * 0.5 = 3 taken away; the last one is Euler's.
    assert SOLVERS["heun"](lambda x, t: x, torch.tensor([8.0]), scheduled(2)).tolist() == [2.5]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_asks_and_tells_at_the_right_times(solver):
    asked: list[float] = []
    told: list[tuple[int, float]] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.full_like(x, 2.0)

    for times in (scheduled(4), [0.9, 0.5, 0.2]):
        asked.clear(), told.clear()
        x = torch.ones(1, 1, 1, 1)
        SOLVERS[solver](velocity, x, times, lambda step, estimate: told.append((step, estimate.item())))
        inner = times[1:] if times[-1] else times[1:-1]
        expected = sorted([*times[:-1], *inner] if solver == "heun" else times[:-1], reverse=True)
        assert asked == expected
        assert evaluations(len(times) - 1, solver, to_the_end=times[-1] == 0) == len(asked)
        # On a straight line the estimate is its end, at every step.
        assert [step for step, _ in told] == list(range(1, len(times)))
        assert [estimate for _, estimate in told] == pytest.approx([1 - 2 * times[0]] * len(told), abs=1e-4)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for solver in ("dpm++", "unipc"):
        with pytest.raises(ValueError, match=r"pip install 'tokenizers-vis\[latents\]', or take 'euler' or 'heun'"):
            flow()(torch.randn(4, 6, 5), solver=solver)


def test_interpolate_and_training_times():
    picture, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    x = interpolate(picture, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x[0], picture[0]) and torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], 0.75 * picture[1] + 0.25 * noise[1])
    t = logit_normal(5000, 0.5, 0.8, torch.device("cpu"))
    assert 0 < t.min() and t.max() < 1
    assert abs(t.logit().mean() - 0.5) < 0.05 and abs(t.logit().std() - 0.8) < 0.05
