"""Latent perturbation that fades as a run goes on, as in RobustTok (Qiu et al. 2025, https://arxiv.org/abs/2503.08354),
whose released run lowers rate and neighbours to a half from epoch 40 to 120 of 200."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tokenizers_vis.config import ConfigError
from tokenizers_vis.quantizers.perturb import Perturb
from tokenizers_vis.train.terms import Schedule


@dataclass(frozen=True)
class AnnealConfig:
    """Options of each ``perturb`` in the quantizer over the steps of a run; what is not named stays as it was built.

    rate, share: shares from 0 to 1. neighbours: rounded to a whole number, 1 to the codebook size.
    """

    rate: Schedule | None = None
    share: Schedule | None = None
    neighbours: Schedule | None = None

    def __post_init__(self) -> None:
        for name, schedule in (("rate", self.rate), ("share", self.share)):
            if schedule and not (0 <= schedule.start <= 1 and 0 <= schedule.end <= 1):
                raise ValueError(f"{name} is a share from 0 to 1, got {schedule}")
        if self.neighbours and min(self.neighbours.start, self.neighbours.end) < 1:
            raise ValueError(f"neighbours is from 1 to the codebook size, got {self.neighbours}")

    @property
    def named(self) -> dict[str, Schedule]:
        options = {"rate": self.rate, "share": self.share, "neighbours": self.neighbours}
        return {name: schedule for name, schedule in options.items() if schedule}


def perturbs(model: nn.Module) -> list[Perturb]:
    """The perturbations in a tokenizer, those of a product's parts included."""
    return [module for module in model.modules() if isinstance(module, Perturb)]


def check_anneal(model: nn.Module, config: AnnealConfig) -> None:
    """Raises ``ConfigError`` where there is nothing to anneal, or fewer codes than neighbours."""
    if config.named and not perturbs(model):
        raise ConfigError(
            f"loss.anneal has {', '.join(config.named)}, but no quantizer is perturbed: wrap it, as in "
            'quantizer = { kind = "perturb", quantizer = { kind = "vq", ... } }, or leave loss.anneal out'
        )
    wanted = max(config.neighbours.start, config.neighbours.end) if config.neighbours else 1
    for module in perturbs(model):
        if wanted > module.codebook_sizes[0]:
            raise ConfigError(
                f"loss.anneal.neighbours goes to {wanted}, but the codebook has {module.codebook_sizes[0]}"
            )


def anneal(model: nn.Module, config: AnnealConfig, step: int) -> None:
    """Sets the options for optimiser step ``step``, from 0. Call it before each pass: they are not in a checkpoint."""
    values = {name: schedule.at(step) for name, schedule in config.named.items()}
    if not values:
        return
    if "neighbours" in values:
        values["neighbours"] = round(values["neighbours"])
    for module in perturbs(model):
        for name, value in values.items():
            setattr(module, name, value)
