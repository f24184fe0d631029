"""Nets that losses look through and that are never trained: they move along, but nobody averages, trains or saves them.

Letters: b batch, h w a picture's height and width, d width of a feature, i j the places of a grid of features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.eval.features import timm_net


class Bearer(nn.Module):
    """A module that bears frozen nets: ``.to()`` and its like move them too, but they are neither in ``parameters()``
    nor in ``state_dict()``, and ``.train()`` leaves them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.borne: dict[Any, nn.Module] = {}  # a plain dict, which nn.Module does not look into

    def bear(self, key: Any, net: nn.Module) -> nn.Module:
        """Freezes a net and keeps it under ``key``."""
        self.borne[key] = net.requires_grad_(False).eval()
        return net

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bearer:
        for net in self.borne.values():
            net._apply(fn)
        return super()._apply(fn, recurse)


def steady(device: torch.device) -> AbstractContextManager[None]:
    """The precision of frozen nets and critics under autocast: bfloat16 stays on an accelerator; float32 else.

    A CPU is quicker in float32, and float16 overflows in the features of some nets.
    """
    low = device.type != "cpu" and torch.get_autocast_dtype(device.type) == torch.bfloat16
    return torch.autocast(device.type, enabled=low and torch.is_autocast_enabled(device.type))


class Features(NamedTuple):
    """What a net sees in pictures. patches: b d i j. pooled: b e, the class token or the mean, as the net pools."""

    patches: Tensor
    pooled: Tensor


class Teacher(nn.Module):
    """A timm net whose features are learned from. ``teacher(images)`` takes b 3 h w in [0, 1], without gradients.

    model, weights: as ``timm_net`` takes them. size: side of the square that pictures are scaled to (bicubic,
        antialiased); 0 is what the net was trained on (518 for DINOv2: 224 costs a sixth). Another one needs a vision
        transformer or a convolutional net.

    Raises ``ValueError`` for a model that timm does not have, and weights that cannot be had or are of another.
    """

    def __init__(self, *, model: str, weights: str = "", size: int = 0) -> None:
        super().__init__()
        self.net, (mean, std, self.size) = timm_at(model, weights, size)
        self.register_buffer("mean", rearrange(torch.tensor(mean), "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(torch.tensor(std), "c -> c 1 1"), persistent=False)
        self.dim, self.pooled_dim = self.net.num_features, self.net.head_hidden_size
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        with steady(images.device):
            x = fit_square(images, self.size, "bicubic")
            y = self.net.forward_features((x - self.mean) / self.std)
            pooled = self.net.forward_head(y, pre_logits=True)
        if y.ndim == 3:
            first = getattr(self.net, "num_prefix_tokens", 0)
            side = round((y.shape[1] - first) ** 0.5)
            y = rearrange(y[:, first:], "b (i j) d -> b d i j", i=side)
        elif y.shape[1] != self.dim:  # channels last, as Swin's
            y = rearrange(y, "b i j d -> b d i j")
        return Features(y.float(), pooled.float())

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return super().train(False)


def timm_at(
    model: str, weights: str, size: int, *, classifier: bool = False
) -> tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...], int]]:
    """A timm net for pictures of side ``size`` (0 is its own), and the mean, std and size of these.

    Raises ``ValueError`` as ``Teacher`` does.
    """
    import timm

    from tokenizers_vis.config import did_you_mean

    if not timm.is_model(model.partition(".")[0]):
        raise ValueError(f"timm has no model {model!r}.{did_you_mean(model, timm.list_models())}")
    config = timm.get_pretrained_cfg(model)
    options: dict[str, Any] = {}
    if size and config.fixed_input_size and size != config.input_size[-1]:
        options = {"dynamic_img_size": True}
        try:
            with torch.device("meta"):
                timm.create_model(model, **options)
        except TypeError as error:
            raise ValueError(f"{model} sees pictures of {config.input_size[-1]} px alone: leave size 0") from error
    net, from_tensorflow = timm_net(model, weights, options, classifier=classifier)
    seen = timm.data.resolve_model_data_config(net)
    half = (0.5, 0.5, 0.5)
    mean, std = (half, half) if from_tensorflow else (seen["mean"], seen["std"])
    return net, (mean, std, size or seen["input_size"][-1])


def fit_square(images: Tensor, size: int, mode: str) -> Tensor:
    """b 3 h w -> b 3 size size, float32, antialiased; the aspect goes."""
    images = images.float()
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode=mode, antialias=True, align_corners=False)
