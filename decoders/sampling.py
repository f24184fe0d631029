"""How a flow decoder draws: the options that every one takes, where a picture starts, and the guided walk to it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenizers_vis.decoders.guidance import AdaptiveProjected, AutoGuidance, ClassifierFree, Guidance
from tokenizers_vis.decoders.scales import coarse_time, refine, white_noises
from tokenizers_vis.decoders.schedules import scheduled
from tokenizers_vis.decoders.solvers import SOLVERS, Velocity

FEW = 4  # images that leave a GPU idle
KINDS = {"cfg": ClassifierFree, "apg": AdaptiveProjected}


class Stage(NamedTuple):
    """A part of the walk at one scale.

    size: height and width. times: where the steps stand, downwards, in the time of this scale. guided: whether the
    velocity without codes will be asked for.
    """

    size: int
    times: list[float]
    guided: bool

    @property
    def asked(self) -> list[float]:
        """The times at which a solver may ask for the velocity: all but the picture's own."""
        return [t for t in self.times if t > 0]


class Branches(NamedTuple):
    """What a decoder says of the velocity at x: b c h w and at one of the times of a stage, once it has read the codes.

    told: with the codes. untold: without. both: the two from one batch of twice the length.
    """

    told: Velocity
    untold: Velocity
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]]


class FlowLike(Protocol):
    """A decoder that ``draw`` can draw with. shape: c h w. sizes: the scales that it was trained at, coarsest first."""

    shape: tuple[int, int, int]
    sizes: tuple[int, ...]

    def check_codes(self, codes: Tensor) -> None: ...

    def branches(self, codes: Tensor, lengths: Tensor | None, stage: Stage) -> Branches:
        """Raises ``ValueError`` when a guided stage is beyond it."""

    def unknown(self, size: int) -> float:
        """As in ``refine``. Asked only of a decoder with more sizes than one."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """The options of one call. Raises ``ValueError`` for values that cannot be.

    steps: solver steps. Of a decoder that was trained at several scales also one number for each scale, the coarsest
        first: (6, 2, 1) ends at full size and starts at a quarter of it. The schedule is of all steps together.
    guidance: a scale, 1 is none; or a ``Guidance``, which is all there is to say. guidance_kind: "cfg" or "apg", what
        a number means.
    solver: "euler", "heun", "dpm++" or "unipc". schedule: "uniform", "shifted:S" or "power:P".
    seed: a whole number, or one for each image: the noise of an image is that of its seed, whatever its place in a
        batch and whatever stands beside it. generator: draws the noise, image by image, so that a batch may be split.
        noise: b c h w to start from. With none of them, every image starts from one fixed noise, which is seed 0's: the
        same codes always give the same picture.
    callback: called after each step with its number from 1, the number of all steps, and the picture that the velocity
        points at there, b c h w on the canvas of the decoder, of the size of its scale.
    batched: whether guidance takes the predictions with and without codes from one batch. None: on a GPU that a few
        images would leave idle. Elsewhere the two by themselves are less work, as one has fewer tokens.
    """

    steps: int | tuple[int, ...]
    guidance: float | Guidance = 1.0
    guidance_kind: str = "cfg"
    solver: str = "euler"
    schedule: str = "uniform"
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    noise: Tensor | None = None
    callback: Callable[[int, int, Tensor], None] | None = None
    batched: bool | None = None

    @classmethod
    def of(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
        """What a caller gave, over a decoder's defaults."""
        options = list(cls.__dataclass_fields__)
        for key in given:
            if key not in options:
                raise ValueError(
                    f"a flow decoder has no option {key}; it takes {', '.join(options)}.{_near(key, options)}"
                )
        if isinstance(given.get("guidance"), Guidance) and given.get("guidance_kind") is not None:
            raise ValueError("guidance is an object, which is of a kind: leave guidance_kind out")
        return cls(**{**defaults, **given})

    def __post_init__(self) -> None:
        many = isinstance(self.steps, (tuple, list))
        for n in self.steps if many else [self.steps]:
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"steps is a whole number from 1, or one for each scale, got {self.steps!r}")
        if many and not self.steps:
            raise ValueError("steps has one whole number for each scale, got none")
        number = isinstance(self.guidance, (int, float)) and not isinstance(self.guidance, bool)
        if not isinstance(self.guidance, Guidance) and not (number and math.isfinite(self.guidance)):
            raise ValueError(f"guidance is a number (1 is none) or a Guidance, got {self.guidance!r}")
        _one_of("guidance_kind", self.guidance_kind, KINDS)
        _one_of("solver", self.solver, SOLVERS)
        scheduled(1, self.schedule)
        starts = [name for name in ("seed", "generator", "noise") if getattr(self, name) is not None]
        if len(starts) > 1:
            raise ValueError(f"a picture has one start: give {' or '.join(starts)}, not both")
        for seed in [] if self.seed is None else self._seeds(1):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise ValueError(f"seed is a whole number from 0 to 2**63 - 1, or one for each image; got {seed!r}")

    @property
    def rule(self) -> Guidance | None:
        """How predictions become one; None where one is enough."""
        rule = self.guidance if isinstance(self.guidance, Guidance) else KINDS[self.guidance_kind](self.guidance)
        return None if rule.scale == 1 else rule

    @property
    def guided(self) -> bool:
        """Whether predictions without codes will be asked for."""
        return self.rule is not None and not isinstance(self.rule, AutoGuidance)

    def start(self, b: int, shape: tuple[int, ...]) -> Tensor:
        """b c h w of pure noise, for pictures of a shape c h w."""
        if self.noise is not None:
            if tuple(self.noise.shape) != (b, *shape):
                raise ValueError(f"noise is {(b, *shape)} (b c h w of the canvas), got {tuple(self.noise.shape)}")
            return self.noise
        if self.generator is not None:
            draws = [torch.randn(shape, generator=self.generator, device=self.generator.device) for _ in range(b)]
            return torch.stack(draws)
        seeds = self._seeds(b)
        if len(seeds) != b:
            raise ValueError(f"seed is one number, or one for each of {b} images; got {len(seeds)}")
        # Always drawn on the CPU: the same picture on every device.
        drawn = {seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in set(seeds)}
        return torch.stack([drawn[seed] for seed in seeds])

    def stages(self, sizes: Sequence[int]) -> tuple[list[Stage], list[list[float]]]:
        """The walk, scale by scale; and for each of its times the time that it is at full size.

        sizes: the scales of the decoder, the coarsest first; each is half of the next.
        """
        steps = [self.steps] if isinstance(self.steps, int) else list(self.steps)
        if len(steps) > len(sizes):
            raise ValueError(
                f"steps has a number for each of {len(steps)} scales, {self.steps!r}; this decoder was trained at "
                f"{', '.join(map(str, sizes))} px alone. Train it with more scales, or give one number"
            )
        times, at, stages, clocks = scheduled(sum(steps), self.schedule), 0, [], []
        for n, size in zip(steps, sizes[-len(steps) :], strict=True):
            clock = times[at : at + n + 1]
            stages.append(Stage(size, [coarse_time(t, sizes[-1] // size) for t in clock], self.guided))
            clocks.append(clock)
            at += n
        return stages, clocks

    def _seeds(self, b: int) -> list[int]:
        """One for each of b images, where ``seed`` is one for all."""
        if self.seed is None:
            return [0] * b
        if isinstance(self.seed, Tensor) or hasattr(self.seed, "tolist"):
            found = self.seed.tolist()  # of a tensor, an array, or a number of theirs
            return found if isinstance(found, list) else [found] * b
        many = isinstance(self.seed, Iterable) and not isinstance(self.seed, str)
        return list(self.seed) if many else [self.seed] * b


class Guide:
    """A rule at work in one walk, with its memory of the steps before."""

    def __init__(self, rule: Guidance | None) -> None:
        self.rule = rule
        self.previous: Tensor | None = None

    def __call__(self, t: float, alone: Callable[[], Tensor], both: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """alone: gives the prediction that knows the codes. both: that, and the one that knows less."""
        scale = 1.0 if self.rule is None else self.rule.at(t)
        if scale == 1:
            return alone()
        guided, self.previous = self.rule.combine(*both(), scale, self.previous)
        return guided


def draw(decoder: FlowLike, codes: Tensor, lengths: Tensor | None, options: Sampling) -> Tensor:
    """Pictures y: b c h w of codes: b n d. Raises ``ValueError`` for options that the decoder cannot follow."""
    decoder.check_codes(codes)
    rule = options.rule
    stages, clocks = options.stages(decoder.sizes)
    weak = _weak(decoder, codes, rule.model, stages) if isinstance(rule, AutoGuidance) else None
    noises = white_noises(options.start(len(codes), decoder.shape).to(codes.device, torch.float32), len(stages))
    # A batch of two needs two of the same decoder.
    few = codes.device.type != "cpu" and len(codes) <= FEW
    batched = weak is None and (few if options.batched is None else options.batched)
    everything, done = sum(len(stage.times) - 1 for stage in stages), 0
    x, estimate = noises[0], noises[0]

    def watch(step: int, seen: Tensor) -> None:
        nonlocal estimate
        estimate = seen
        if options.callback is not None:
            options.callback(done + step, everything, seen)

    for stage, clock, noise in zip(stages, clocks, noises, strict=True):
        if done:
            x = refine(x, estimate, stage.times[0], noise, decoder.unknown(stage.size))
        branches = decoder.branches(codes, lengths, stage)
        other = branches.untold if weak is None else weak.branches(codes, lengths, stage).told
        velocity = _guided(branches, other, Guide(rule), dict(zip(stage.times, clock, strict=True)), batched)
        watched = options.callback is not None or stage is not stages[-1]
        x = SOLVERS[options.solver](velocity, x, stage.times, watch if watched else None)
        done += len(stage.times) - 1
    return x


def _weak(decoder: FlowLike, codes: Tensor, model: Any, stages: Sequence[Stage]) -> FlowLike:
    """The model of an ``AutoGuidance``, if it can help this decoder through these stages."""
    if not hasattr(model, "branches") or model.shape != decoder.shape:
        of = f" of {model.shape}" if hasattr(model, "shape") else ""
        raise ValueError(
            f"AutoGuidance takes a flow decoder of the same canvas, {decoder.shape} (c h w); got "
            f"{type(model).__name__}{of}"
        )
    model.check_codes(codes)
    for size in (stage.size for stage in stages):
        if size not in model.sizes:
            raise ValueError(f"AutoGuidance's model was trained at {model.sizes} px; {size} px is asked of it")
    return model


def _guided(branches: Branches, other: Velocity, guide: Guide, clock: Mapping[float, float], batched: bool) -> Velocity:
    """clock: the time at full size, which guidance goes by, for each time of the stage."""

    def velocity(x: Tensor, t: float) -> Tensor:
        def both() -> tuple[Tensor, Tensor]:
            return branches.both(x, t) if batched else (branches.told(x, t), other(x, t))

        return guide(clock[t], lambda: branches.told(x, t), both)

    return velocity


def _one_of(name: str, value: object, allowed: Mapping[str, Any]) -> None:
    if value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} is one of {words}; got {value!r}.{_near(value, allowed)}")


def _near(word: object, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""
