"""AdamW with warm-up and cosine, and a moving average of the weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    """steps: optimiser steps of the whole run. warmup: steps to the full learning rate.

    final: share of the learning rate that is left at the end.
    clip: largest gradient norm, 0 is none. ema: decay of the averaged weights, which are the ones that are saved.
    """

    steps: int
    batch_size: int
    lr: float = 1e-3
    warmup: int = 500
    final: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.warmup < 0:
            raise ValueError(
                f"steps and batch_size are at least 1 and warmup at least 0, got {self.steps}, {self.batch_size} "
                f"and {self.warmup}"
            )
        if min(self.lr, self.final, self.weight_decay, self.clip) < 0 or not 0 <= self.ema < 1:
            raise ValueError(
                f"lr, final, weight_decay and clip are at least 0 and ema from 0 to below 1, got {self.lr}, "
                f"{self.final}, {self.weight_decay}, {self.clip} and {self.ema}"
            )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of optimiser step ``step`` (from 0): linear warm-up, then a cosine down to ``lr * final``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2)


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on the matrices of linear and convolution layers; none on biases, norms, tables and codebooks."""
    matrices = {
        layer.weight
        for layer in model.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.requires_grad
    }
    others = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    ordered = [p for p in model.parameters() if p in matrices]
    groups = [
        {"params": ordered, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in matrices)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


class Average:
    """An exponential moving average of a model's parameters and running statistics; whole numbers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.shards: list[Tensor] = []

    def follow(self, model: nn.Module) -> None:
        """Call once, when the model's weights have been sharded: the average is from then on sharded alike."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        values = list(model.state_dict().values())
        if not any(isinstance(value, DTensor) for value in values):
            return
        for mine, other in zip(self.model.state_dict().values(), values, strict=True):
            sharded = isinstance(other, DTensor)
            self.shards.append(distribute_tensor(mine, other.device_mesh, other.placements) if sharded else mine)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Call after optimiser step ``step`` (from 0). The decay warms up, so that the start is soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged = self.shards or self.model.state_dict().values()
        for mine, other in zip(averaged, model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(other, 1 - decay)
            else:
                mine.copy_(other)

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """The averaged model. Where it is sharded, every process calls this at the same time."""
        for mine, shard in zip(self.model.state_dict().values(), self.shards, strict=False):
            if hasattr(shard, "full_tensor"):
                mine.copy_(shard.full_tensor())
        return self.model
