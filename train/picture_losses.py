"""Distances between a picture and its reconstruction, one number for each image.

Letters: b batch, c channels, h w height and width. Pictures are b 3 h w, the original in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.config import did_you_mean
from tokenizers_vis.eval.perceptual import read_weights, unit
from tokenizers_vis.train.frozen import fit_square, timm_at
from tokenizers_vis.train.terms import Weight, check_weights

EPSILON = 0.1  # what logit-Laplace leaves at both ends of [0, 1]
# Where the logit goes on as a straight line: a picture 0.1 outside [0, 1], whose gradient is the largest.
_EDGE = 0.02
_TORCHVISION = "torchvision:"
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean(dim=(1, 2, 3))


def l2(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(dim=(1, 2, 3))


def logit_laplace(mean: Tensor, log_scale: Tensor, y: Tensor) -> Tensor:
    """Minus the log likelihood of y, but for log 2: DALL-E, Ramesh et al. 2021, arXiv 2102.12092, appendix A.3.

    |logit(y) - mean| / scale + log scale + log(y (1 - y)), averaged over an image. mean, log_scale: of the logit, of
    shapes that fit y, b c h w, in (0, 1), as ``squeezed`` gives it.
    """
    error = (torch.logit(y) - mean).abs() * torch.exp(-log_scale)
    return (error + log_scale + torch.log(y * (1 - y))).mean(dim=(1, 2, 3))


def squeezed(pictures: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9], where logits are finite: the paper's phi."""
    return (1 - 2 * EPSILON) * pictures + EPSILON


def logits_of(pictures: Tensor) -> Tensor:
    """The logit of a squeezed picture, a straight line where it is 0.1 outside [0, 1] or farther."""
    y = squeezed(pictures)
    inside = y.clamp(_EDGE, 1 - _EDGE)
    return torch.logit(inside) + (y - inside) / (_EDGE * (1 - _EDGE))


def gram(fx: Sequence[Tensor], fy: Sequence[Tensor]) -> Tensor:
    """How unlike the textures are, wherever they stand: b. fx, fy: feature maps of both pictures, each b c h w.

    The Gram matrix of a map is the mean over its places of f f^T, f of length 1 so that all layers count alike; the
    loss is the squared Frobenius norm of the difference of two, averaged over maps. Gatys et al. 2016, "Image Style
    Transfer Using Convolutional Neural Networks"; in tokenizers AToken (Lu et al. 2025, arXiv 2509.14476) trains with
    it in place of a critic.
    """
    gaps = [(gram_matrix(unit(x)) - gram_matrix(unit(y))).square().sum(dim=(1, 2)) for x, y in zip(fx, fy, strict=True)]
    return torch.stack(gaps).mean(dim=0)


def gram_matrix(f: Tensor) -> Tensor:
    """b c h w -> b c c."""
    f = rearrange(f, "b c h w -> b c (h w)")
    return f @ f.mT / f.shape[-1]


@dataclass(frozen=True)
class ClassifierConfig:
    """The distance between what a classifier says of two pictures. See ``ClassifierDistance``."""

    weight: Weight = 0.0
    net: str = "torchvision:convnext_small"
    weights: str = ""
    size: int = 224

    def __post_init__(self) -> None:
        check_weights(weight=self.weight)
        if self.size < 1:
            raise ValueError(f"size is a number of pixels, got {self.size}")


class ClassifierDistance(nn.Module):
    """Mean squared difference of two pictures' class scores (logits), each b 3 h w in [0, 1] -> b, float32.

    TiTok's "convnext_s" (Yu et al. 2024, arXiv 2406.07550) is torchvision's ConvNeXt-S; FlowMo's and MaskBit's (Weber
    et al. 2024, arXiv 2409.16211) is ResNet-50.

    net: a classifier that gives b k for pictures normalised by mean and std, as ``classifier_net`` finds it.
    size: side of the square that pictures are scaled to first (bilinear, antialiased).
    """

    def __init__(self, *, net: nn.Module, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        super().__init__()
        self.net, self.size = net, size
        self.register_buffer("mean", rearrange(torch.tensor(mean), "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(torch.tensor(std), "c -> c 1 1"), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, config: ClassifierConfig) -> ClassifierDistance:
        net, mean, std = classifier_net(config.net, config.weights, config.size)
        return cls(net=net, mean=mean, std=std, size=config.size)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = [self.net((fit_square(z, self.size, "bilinear") - self.mean) / self.std).float() for z in (x, y)]
        return F.mse_loss(*scores, reduction="none").mean(dim=1)

    def train(self, mode: bool = True) -> ClassifierDistance:
        """Stays in eval mode."""
        return super().train(False)


def classifier_net(
    name: str, weights: str = "", size: int = 224
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A classifier of ImageNet with the mean and std of its pictures: any timm model, or "torchvision:convnext_small".

    weights: a local file; "" is timm's or torchvision's own (IMAGENET1K_V1), from the cache or the network.
    Raises ``ValueError`` for a model that is not there, and weights that cannot be had or are of another.
    """
    if not name.startswith(_TORCHVISION):
        net, (mean, std, _) = timm_at(name, weights, size, classifier=True)
        if not net.num_classes:
            raise ValueError(f"{weights or name} has no classifier, whose scores are compared; give another model")
        return net, mean, std
    from torchvision import models

    name = name.removeprefix(_TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}.{did_you_mean(name, known)}")
    entry = models.get_model_weights(name)["IMAGENET1K_V1"]
    if weights:
        state = read_weights(weights)[0]
    else:
        try:
            state = entry.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"torchvision's {name} is not in the cache and cannot be had from {entry.url} "
                f"({type(error).__name__}); go online once, or give a local .pth or .safetensors file as weights"
            ) from error
    with torch.device("meta"):
        net = models.get_model(name, weights=None)
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights or entry.url} is not torchvision's {name}: {error}") from error
    return net, *_IMAGENET
