"""How unlike features are those of a teacher: the formulas of alignment, without a parameter.

Letters: b batch, m places, d width of a feature, i j a grid of places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def difference(kind: str, mine: Tensor, wanted: Tensor, margin: float = 0.0) -> Tensor:
    """b m. mine, wanted: b m d. kind: "cosine", 1 - cos; "margin", relu(1 - margin - cos) (VA-VAE, eq. 5); "mse"."""
    if kind == "mse":
        return (mine - wanted).square().mean(dim=-1)
    cosine = F.cosine_similarity(mine, wanted, dim=-1)
    return 1 - cosine if kind == "cosine" else F.relu(1 - margin - cosine)


def relations(mine: Tensor, wanted: Tensor, margin: float) -> Tensor:
    """b. The cosines between all places of an image, against the teacher's: relu(|difference| - margin), averaged.

    VA-VAE (Yao et al. 2025, https://arxiv.org/abs/2501.01423), eq. 6. mine, wanted: b m d and b m e.
    """
    a, b = (F.normalize(x, dim=-1) for x in (mine, wanted))
    return F.relu((a @ a.mT - b @ b.mT).abs() - margin).mean(dim=(1, 2))


def contrastive(mine: Tensor, wanted: Tensor) -> Tensor:
    """b. InfoNCE over the batch: minus the log of the softmax of cosines at an image's own. mine, wanted: b d.

    FQGAN (Bai et al. 2024, https://arxiv.org/abs/2411.16681), whose code has temperature 1.
    """
    cosines = F.normalize(mine, dim=-1) @ F.normalize(wanted, dim=-1).mT
    return F.cross_entropy(cosines, torch.arange(len(mine), device=mine.device), reduction="none")


def tapered(place: Tensor, n: int, tail: float) -> Tensor:
    """1 at place 0, ``tail`` at place n - 1, a straight line between."""
    return 1 + (tail - 1) * place / max(1, n - 1)


def masked_mean(x: Tensor, kept: Tensor) -> Tensor:
    """b m d -> b 1 d, of the first ``kept`` (b) of each image."""
    real = (torch.arange(x.shape[1], device=x.device) < kept[:, None]).to(x.dtype)
    return (x * real[..., None]).sum(dim=1, keepdim=True) / real.sum(dim=1)[:, None, None]


def places(features: Tensor) -> Tensor:
    """b m d as it is, b d i j as b (i j) d."""
    return rearrange(features, "b d i j -> b (i j) d") if features.ndim == 4 else features


def resized_grid(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """b d i j -> b m d on another grid, bilinear, antialiased where it is coarser."""
    if patches.shape[-2:] != grid:
        patches = F.interpolate(patches, size=grid, mode="bilinear", antialias=True, align_corners=False)
    return places(patches)
