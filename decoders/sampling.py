"""How a flow decoder draws: the options that every one takes, where a picture starts, and the guided walk to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizers_vis.decoders.guidance import adaptive_projected, classifier_free
from tokenizers_vis.decoders.paths import Time, euler, heun

# x, t -> the conditional velocity and the unconditional one, None where no guidance is wanted.
Velocities = Callable[[Tensor, Time], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Sampling:
    """The options of one call. Raises ``ValueError`` for values that cannot be.

    steps: solver steps. guidance: scale, 1 is none. guidance_kind: "cfg" or "apg". solver: "euler" or "heun".
    generator: draws the noise, image by image, so that a batch may be split. noise: b c h w to start from.
    With neither, every image starts from one fixed noise: the same codes always give the same picture.
    """

    steps: int
    guidance: float
    guidance_kind: str
    solver: str
    generator: torch.Generator | None = None
    noise: Tensor | None = None

    @classmethod
    def of(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
        """What a caller gave, over a decoder's defaults."""
        unknown = [key for key in given if key not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(f"a flow decoder has no option {', '.join(unknown)}; it takes steps, guidance, "
                             f"guidance_kind, solver, generator and noise")  # fmt: skip
        return cls(**{**defaults, **given})

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps is a whole number from 1, got {self.steps!r}")
        if not isinstance(self.guidance, (int, float)) or not math.isfinite(self.guidance):
            raise ValueError(f"guidance is a number (1 is none), got {self.guidance!r}")
        if self.guidance_kind not in ("cfg", "apg") or self.solver not in ("euler", "heun"):
            raise ValueError(
                f"guidance_kind is 'cfg' or 'apg', solver is 'euler' or 'heun'; "
                f"got {self.guidance_kind!r}, {self.solver!r}"
            )

    @property
    def guided(self) -> bool:
        return self.guidance != 1

    def start(self, b: int, shape: tuple[int, ...]) -> Tensor:
        """b c h w of pure noise, for pictures of a shape c h w."""
        if self.noise is not None:
            if tuple(self.noise.shape) != (b, *shape):
                raise ValueError(f"noise is {(b, *shape)} (b c h w of the canvas), got {tuple(self.noise.shape)}")
            return self.noise
        if self.generator is None:
            # Always drawn on the CPU: the same picture on every device.
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).expand(b, *(-1 for _ in shape))
        draws = [torch.randn(shape, generator=self.generator, device=self.generator.device) for _ in range(b)]
        return torch.stack(draws)

    def walk(self, velocities: Velocities, x: Tensor, times: Tensor | Sequence[float]) -> Tensor:
        """From noise x to pictures, both b c h w, along the guided velocity. times: steps + 1 of them, from 1 to 0."""
        previous: Tensor | None = None

        def velocity(x: Tensor, t: Time) -> Tensor:
            nonlocal previous
            conditional, unconditional = velocities(x, t)
            if unconditional is None:
                return conditional
            if self.guidance_kind == "cfg":
                return classifier_free(conditional, unconditional, self.guidance)
            guided, previous = adaptive_projected(conditional, unconditional, self.guidance, previous)
            return guided

        return {"euler": euler, "heun": heun}[self.solver](velocity, x, times)
