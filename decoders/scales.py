"""Sampling from coarse to fine: most of the way is walked at resolutions where a step costs a fraction.

A picture of half the size is the mean of each 2 x 2 pixels. In that mean noise weighs half of what it weighed, so that
a picture at time t is, at half the size, one at the time whose odds of noise to picture are half of t's:
``coarse_time``. That is the other way round the time shift of Stable Diffusion 3 (arXiv 2403.03206), and it is what
makes one schedule serve all sizes. Going up, ``refine`` keeps the means, noise and all, as they are, and gives the
details, which no coarse step has seen, the noise that is theirs: block noise is whitened as in pyramidal flow matching
(Jin et al. 2024, arXiv 2410.05954), here without a draw of its own, for the noise of all sizes is one noise of the
finest, cut into means and details.

Sizes double from one to the next. Pictures are b c h w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.decoders.schedules import shifted
from tokenizers_vis.decoders.solvers import evaluations


def means(x: Tensor, factor: int) -> Tensor:
    """b c (h factor) (w factor) -> b c h w."""
    return F.avg_pool2d(x, factor) if factor > 1 else x


def details(x: Tensor, factor: int) -> Tensor:
    """What ``means`` leaves out: x minus the mean of each factor x factor pixels."""
    return x - spread(means(x, factor), factor)


def spread(x: Tensor, factor: int) -> Tensor:
    """b c h w -> b c (h factor) (w factor), every pixel as a block; ``means`` undoes it."""
    return F.interpolate(x, scale_factor=factor, mode="nearest") if factor > 1 else x


def coarse_time(t: float, factor: int) -> float:
    """At which time a picture is when one at t is seen at 1 / factor of its size."""
    return shifted(t, 1 / factor)


def white_noises(noise: Tensor, count: int) -> list[Tensor]:
    """One noise, b c h w, as noise of unit variance at ``count`` sizes, the coarsest first; each holds the means of the
    next."""
    return [2**level * means(noise, 2**level) for level in range(count - 1, -1, -1)]


def foretold(picture: Tensor) -> Tensor:
    """Details b c 2h 2w of a picture b c h w, from bicubic interpolation.

    On photographs of 64, 32 and 16 px these are .37 to .28 of the variance of the true ones; copies of pixels, as
    blocks, foretell nothing.
    """
    return details(F.interpolate(picture, scale_factor=2, mode="bicubic"), 2)


def surprise(picture: Tensor) -> Tensor:
    """How large, as the standard deviation of white noise, the details b c h w are that nobody foretold; a scalar."""
    # A quarter of the variance of noise is that of its means.
    return ((details(picture, 2) - foretold(means(picture, 2))).square().mean() / 0.75).sqrt()


def refine(x: Tensor, estimate: Tensor, t: float, noise: Tensor, unknown: float = 0.0) -> Tensor:
    """x: b c h w at the time ``coarse_time(t, 2)`` -> b c 2h 2w at time t.

    estimate: b c h w, the clean picture that x stands for. noise: b c 2h 2w of unit variance, of which details count.
    unknown: the ``surprise`` of pictures of the finer size.

    The means are those of x, which after the scaling are (1 - t) picture + t noise. The details are those foretold and
    t noise, the noise enlarged by what is missing of the picture's: so x has the variance of its time in both.
    """
    wide = math.hypot(t, (1 - t) * unknown)
    return (1 - t / 2) * spread(x, 2) + (1 - t) * foretold(estimate) + wide * details(noise, 2)


def cost(steps: int | Sequence[int], solver: str = "euler", *, guided: bool = False) -> float:
    """Evaluations of the network for one picture, each weighted by its share of the picture's pixels.

    steps: a number, or one for each scale, the coarsest first. guided: whether each step evaluates twice.
    """
    numbers = [steps] if isinstance(steps, int) else list(steps)
    last = len(numbers) - 1
    made = (evaluations(n, solver, to_the_end=i == last) / 4 ** (last - i) for i, n in enumerate(numbers))
    return (1 + guided) * sum(made)
