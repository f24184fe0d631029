"""What a run learns, apart from how it runs.

The loop (``loop.Run``) knows steps, processes, averages, checkpoints and progress; a task knows the model, its data and
its losses. A recipe names its task: ``task = "tokenizer"``, which is the default, or another of ``TASKS``.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, build, did_you_mean
from tokenizers_vis.train.losses import Losses
from tokenizers_vis.train.optim import OptimConfig

TASKS = {
    "tokenizer": "tokenizers_vis.train.tokenizer_task:TokenizerTask",
    "distill": "tokenizers_vis.train.distill:DistillTask",
    "generator": "tokenizers_vis.train.generator_task:GeneratorTask",
}


@dataclass(frozen=True)
class LogConfig:
    """In optimiser steps: how often to log, to validate, and to write a checkpoint.

    keep: the newest checkpoints that stay, the latest as ``checkpoint.pt``, older ones with their step in the name.
    """

    every: int = 20
    val_every: int = 500
    save_every: int = 250
    keep: int = 2

    def __post_init__(self) -> None:
        if min(self.every, self.val_every, self.save_every, self.keep) < 1:
            raise ValueError("every, val_every, save_every and keep are at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has, whatever it learns.

    precision: of the forward pass, by autocast; weights and the optimiser are float32. fp16 scales its loss.
    accumulate: parts that a process cuts its share of a batch into, one after the other; the result is the same but for
        random draws and statistics over a batch.
    checkpointing: activations of transformer blocks are computed again in the backward pass instead of kept.
    compile: transformer blocks (or the whole encoder and decoder where there are none) through torch.compile.
    sharding: several processes hold the whole model each ("ddp") or a part of it ("fsdp", PyTorch's FSDP2).
    device: "" is the best at hand.
    """

    name: str
    task: str = "tokenizer"
    optim: OptimConfig
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    sharding: Literal["ddp", "fsdp"] = "ddp"
    device: str = ""

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.optim.batch_size % self.accumulate:
            raise ValueError(f"accumulate divides optim.batch_size ({self.optim.batch_size}), got {self.accumulate}")


class RunError(ValueError):
    """A run folder that cannot be started or gone on with."""


class Batch(Protocol):
    """data: what the task's ``forward`` takes, tensors with a row per example. skipped: names of unreadable ones."""

    @property
    def data(self) -> Any: ...

    @property
    def skipped(self) -> list[str]: ...


class Validation(NamedTuple):
    """scalars by name; sheet: a PIL picture to look at, or None."""

    scalars: dict[str, float]
    sheet: Any


class Task(nn.Module, ABC):
    """Abstract. Its registered modules are trained and checkpointed; ``model`` among them is averaged and saved.

    model: what the run makes. Frozen nets (a teacher, a perceptual distance) are kept out of the registered modules.
    step: the optimiser step at hand, from 0; the loop sets it.
    fingerprint: of the data; a resumed run needs the same.
    critic: plays against the model where there is an adversarial loss, else None: ``critic(fake, real) -> Losses``.
        It is not a registered module.
    rows: what an example is called in the progress line.
    """

    config_type: ClassVar[type[RunConfig]]
    rows: ClassVar[str] = "images"
    model: nn.Module
    fingerprint: str
    critic: nn.Module | None = None
    step: int = 0

    def __init__(self, config: Any, device: torch.device, built: Mapping[str, Any] | None = None) -> None:
        """The registered modules may be made anywhere, the loop places them; frozen nets go onto the device at once.

        built: what ``built`` said when the run began, on resuming; weights follow from the checkpoint.
        """
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def built(self) -> dict[str, Any]:
        """Plain values that rebuild the model without whatever it was started from."""

    @abstractmethod
    def batches(self, start: int, rank: int, world: int) -> AbstractContextManager[Iterator[Batch]]:
        """An endless stream from batch ``start`` on, a function of seed and number alone. A process sees its rows."""

    @abstractmethod
    def forward(self, data: Any) -> Losses:
        """The losses of one batch, under autocast."""

    def real(self, data: Any) -> Tensor:
        """b 3 h w in [0, 1]: what the critic shall take for real."""
        raise NotImplementedError

    def set_modes(self) -> None:
        """Called before each run of steps: training mode, but for parts that are frozen."""
        self.train()

    def scalars(self) -> dict[str, float]:
        """What the log holds beside losses, over the steps since the last call."""
        return {}

    @abstractmethod
    def validate(self, model: nn.Module) -> Validation | None:
        """Judges the averaged weights; None where the recipe names no validation data."""

    def score(self, scalars: Mapping[str, float]) -> float | None:
        """Of a validation: larger is better, None keeps no best."""
        return None

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, name: str | None = None) -> None:
        """Writes the averaged weights as what users load, under the usual name of its kind, or as ``name``."""


def task_type(name: str) -> type[Task]:
    """The class of a task. Raises ``ConfigError``."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}.{did_you_mean(name, TASKS)} There are: {', '.join(TASKS)}")
    module, _, cls = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def read_config(table: Mapping[str, Any]) -> RunConfig:
    """The config of a recipe's table, of the type that its task wants. Raises ``ConfigError``."""
    return build(task_type(table.get("task", "tokenizer")).config_type, table)
