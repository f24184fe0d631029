"""Losses on pictures, beside the one that the decoder minimises itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenizers_vis.eval.perceptual import perceptual
from tokenizers_vis.tokenizer import TrainingPass


@dataclass(frozen=True)
class LossConfig:
    """Weights of the sum that is minimised: reconstruction is the decoder's own loss.

    perceptual: of a distance in the features of ``net``, a timm model or "lpips-vgg", "lpips-alex".
    net_weights: a local file; "" is the usual cache or download.
    """

    reconstruction: float = 1.0
    quantizer: float = 1.0
    perceptual: float = 0.0
    net: str = "lpips-vgg"
    net_weights: str = ""


class Losses(NamedTuple):
    """total: scalar with gradient. parts: each term by name, un-weighted and detached."""

    total: Tensor
    parts: dict[str, Tensor]


class LossSum:
    """Computes the weighted sum for one training pass. The feature net is read once, when it is needed."""

    def __init__(self, config: LossConfig, device: torch.device) -> None:
        self.config = config
        self.distance = None
        if config.perceptual:
            self.distance = perceptual(config.net, config.net_weights).to(device)

    def __call__(self, done: TrainingPass, images: Tensor, paint: Callable[[Tensor], Tensor]) -> Losses:
        """images: b 3 h w, floats in [0, 1]. paint: the canvas', from the decoder's space to images."""
        config, decoded, quantized = self.config, done.decoded, done.quantized
        total = config.reconstruction * decoded.loss + config.quantizer * quantized.loss
        parts = {"reconstruction": decoded.loss.detach(), **{k: v.detach() for k, v in quantized.parts.items()}}
        if self.distance is not None:
            # Outside autocast: the feature net is quicker and exact in float32 on a CPU.
            with torch.autocast(images.device.type, enabled=False):
                per_image = self.distance(paint(decoded.estimate.float()), images)
            distance = (per_image * decoded.weight).mean()
            total = total + config.perceptual * distance
            parts["perceptual"] = distance.detach()
        return Losses(total, parts)
