"""Multi-scale residual quantization: a grid of vectors as ever finer grids of ids (VAR, Tian et al. 2024, https://arxiv.org/abs/2404.02905).

Letters: h w the grid of one image, p the side of a coarser grid, m the ids of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_ids, check_option, straight_through, weighted
from tokenizers_vis.quantizers.compose import learn_once, levels_kept
from tokenizers_vis.quantizers.float32 import keep_dtype


class MultiScale(Quantizer):
    """Quantizes a coarse grid of z, takes it off z, quantizes a finer grid of the rest, and so on (algorithms 1 and 2).

    ``e_s = Q(area(r_s, p_s))``, ``f_s = f_{s-1} + phi_s(bicubic(e_s))``, ``r_{s+1} = z - f_s``.

    part: the quantizer Q of all scales, of any kind that is discrete.
    scales: the sides p of the grids, from coarse to fine, equal ones allowed; the last is the side of z's own grid.
    share: phis, 3x3 convolutions that mend what upsampling blurs: 1 for all scales, 0 for one per scale, or a number of
        them spread over the scales (VAR: 4).
    ratio: how much of phi is the convolution, from 0 to 1: phi(x) = (1 - ratio) x + ratio conv(x). At 0 there are none.
    loss: "cumulative": mse between z and the picture so far, f_s, the mean over scales (VAR, ImageFolder); its gradient
        reaches the codes of that and all coarser scales, straight-through runs from the last f to z, and the part's
        own loss is not used. "scales": the part's own loss, the mean over scales, and its own gradient (TokenFlow).
    commitment: weight of mse(z, sg f_s). With "cumulative" only.
    codebook_weight: weight of mse(f_s, sg z). With "cumulative" only.
    scale_drop: probability, in training, that a step leaves out one scale, any but the first (TokenFlow: .1).
    dropout: in training, the share of images that keep only their first scales, a number of them from ``keep`` to all,
        each as probable (ImageFolder: .1, from 3 on).
    keep: scales that every image keeps under ``dropout``.

    codes: b n d, with n = h w, row by row; ``fixed_n`` is that number.
    ids: b m k, where m is the sum of p p, the first scale first, each row by row; -1 where training dropped a scale.
    parts: commitment and codebook with "cumulative", the part's with "scales"; each the mean over scales.

    ``lookup`` takes the ids of the first scales alone too, and gives the picture so far. It takes ids of -1 for scales
    that are not there, all of an image's or none; the first scale is always there.
    Moving averages of the part learn from all scales together, once a step; a k-means start sees the first scale alone.
    The phis stay in float32 when the model is cast. Raises ``ValueError`` for options out of range.

    ImageFolder's authors choose by the cosine, but take the code as long as it is; a part of distance "cosine" has
    codes of length 1.
    """

    def __init__(
        self,
        *,
        part: Quantizer,
        scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        share: int = 4,
        ratio: float = 0.5,
        loss: Literal["cumulative", "scales"] = "cumulative",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        scale_drop: float = 0.0,
        dropout: float = 0.0,
        keep: int = 1,
    ) -> None:
        super().__init__()
        scales = tuple(scales)
        if not scales or scales[0] < 1 or list(scales) != sorted(scales):
            raise ValueError(f"scales are one or more sides, 1 or more, none smaller than the one before; got {scales}")
        if not part.discrete or part.in_dim != part.dim or part.fixed_n is not None:
            raise ValueError(
                f"the part of a multi_scale gives codes as wide as what it takes, of any number of vectors, and all of "
                f"a code is in its ids; {type(part).__name__} does not; take a vq, or the like"
            )
        check_option(0 <= ratio <= 1, "ratio is from 0 to 1", ratio)
        fits = 0 <= share and (share <= len(scales) or not ratio)
        check_option(fits, f"share is a number of phis from 0 (one per scale) to {len(scales)}", share)
        check_option(loss in ("cumulative", "scales"), "loss is 'cumulative' or 'scales'", loss)
        check_option(commitment >= 0, "commitment is 0 or more", commitment)
        check_option(codebook_weight >= 0, "codebook_weight is 0 or more", codebook_weight)
        check_option(0 <= scale_drop <= 1, "scale_drop is a probability from 0 to 1", scale_drop)
        check_option(not scale_drop or len(scales) > 1, "scale_drop takes two scales or more", scale_drop)
        check_option(0 <= dropout <= 1, "dropout is a share from 0 to 1", dropout)
        check_option(1 <= keep <= len(scales), f"keep is a number of scales from 1 to {len(scales)}", keep)
        self.part = part
        self.scales = scales
        self.size = scales[-1]
        self.loss = loss
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.scale_drop = scale_drop
        self.dropout = dropout
        self.keep = keep
        self.dim = part.dim
        self.codebook_sizes = part.codebook_sizes
        self.order = part.order
        self.fixed_n = self.size**2
        phis = share or len(scales)
        self.phi_of = [nearest_tick(s / max(len(scales) - 1, 1), phis) for s in range(len(scales))]
        self.phis = nn.ModuleList(Phi(part.dim, ratio) for _ in range(phis if ratio else 0))

    def id_count(self, n: int) -> int:
        return sum(p * p for p in self.scales)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        if z.shape[1] != self.fixed_n:
            raise ValueError(f"z is a grid of {self.size} x {self.size} vectors, n = {self.fixed_n}; got {z.shape[1]}")
        kept, dropped = self._draw(z)
        with torch.autocast(z.device.type, enabled=False), learn_once(self.part, self.training):
            f = rearrange(z, "b (h w) d -> b d h w", h=self.size)
            cumulative = self.loss == "cumulative"
            rest = f.detach() if cumulative else f
            total, ids, losses = torch.zeros_like(f), [], []
            for s, p in enumerate(self.scales):
                if s == dropped:
                    ids.append(torch.full_like(ids[0][:, :1], -1).expand(-1, p * p, -1))
                    continue
                out = self.part(rearrange(self._shrink(rest, p), "b d h w -> b (h w) d"))
                codes = out.codes
                if cumulative and torch.is_grad_enabled():
                    codes = self.part.lookup(out.ids)  # with the gradient of the codebook
                grown = self._grow(codes, s)
                rest = rest - grown.detach()
                there = s < kept
                total = total + grown.where(there[:, None, None, None], 0.0)
                ids.append(out.ids.where(there[:, None, None], -1))
                losses.append(self._cumulative(f, total, there) if cumulative else (out.loss, out.parts))
            codes = rearrange(total, "b d h w -> b (h w) d")
            if cumulative:
                codes = straight_through(codes, z)
            loss = torch.stack([loss for loss, _ in losses]).mean()
            named = {name: torch.stack([parts[name] for _, parts in losses]).mean() for name in losses[0][1]}
        return Quantized(codes, torch.cat(ids, dim=1), loss, named)

    def lookup(self, ids: Tensor) -> Tensor:
        counts = [p * p for p in self.scales]
        ends = list(accumulate(counts))
        if ids.ndim != 3 or ids.shape[1] not in ends:
            raise ValueError(
                f"ids are b m k (batch, ids of whole scales, codebooks), where m is {', '.join(map(str, ends))} for 1 "
                f"to {len(ends)} scales; got {tuple(ids.shape)}"
            )
        check_ids(ids[:, : ends[0]], self.codebook_sizes)
        check_ids(ids.where(ids != -1, 0), self.codebook_sizes)
        counts = counts[: ends.index(ids.shape[1]) + 1]
        total = 0.0
        with torch.autocast(ids.device.type, enabled=False):
            for s, scale in enumerate(ids.split(counts, dim=1)):
                there = (scale >= 0).all(dim=2, keepdim=True).all(dim=1, keepdim=True)
                grown = self._grow(self.part.lookup(scale.where(there, 0)), s)
                total = total + grown.where(there[..., None], 0.0)
        return rearrange(total, "b d h w -> b (h w) d")

    def _draw(self, z: Tensor) -> tuple[Tensor, int]:
        """How many scales each image keeps, b, and the scale that this step leaves out, or -1."""
        if self.training and self.dropout:
            kept = levels_kept(z, len(self.scales), self.dropout, self.keep)
        else:
            kept = torch.full((z.shape[0],), len(self.scales), device=z.device)
        if self.training and self.scale_drop and torch.rand(()).item() < self.scale_drop:
            return kept, int(torch.randint(1, len(self.scales), ()).item())
        return kept, -1

    def _shrink(self, f: Tensor, p: int) -> Tensor:
        """f: b d h w -> b d p p, the mean over areas."""
        return f if p == self.size else F.interpolate(f, size=(p, p), mode="area")

    def _grow(self, codes: Tensor, s: int) -> Tensor:
        """Codes of scale s, b (p p) d -> what they add to the picture, b d h w."""
        f = rearrange(codes, "b (h w) d -> b d h w", h=self.scales[s])
        if self.scales[s] != self.size:
            f = F.interpolate(f, size=(self.size, self.size), mode="bicubic")
        return self.phis[self.phi_of[s]](f) if len(self.phis) else f

    def _cumulative(self, f: Tensor, total: Tensor, there: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the picture so far, over the images that have this scale. f, total: b d h w; there: b."""
        mean = there / there.sum().clamp_min(1)
        losses: dict[str, tuple[float, Tensor]] = {}
        if self.commitment:
            losses["commitment"] = self.commitment, per_image(f - total.detach()) @ mean
        if self.codebook_weight:
            losses["codebook"] = self.codebook_weight, per_image(total - f.detach()) @ mean
        return weighted(losses, f)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiScale:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scales={self.scales}, loss={self.loss}"


class Phi(nn.Conv2d):
    """x, b d h w -> (1 - ratio) x + ratio conv(x)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.ratio) * x + self.ratio * super().forward(x)


def nearest_tick(at: float, phis: int) -> int:
    """The phi of a scale that lies ``at`` from 0 to 1: the nearest of as many points, spread evenly.

    With VAR's 10 scales and 4 phis the third scale lies in the middle between two, at 2/9, and rounding chooses. So
    this is the arithmetic of the published weights, step by step.
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    return int(np.argmin(np.abs(np.linspace(margin, 1 - margin, phis) - at)))


def per_image(difference: Tensor) -> Tensor:
    """The mean square of each image: b d h w -> b."""
    return difference.square().flatten(1).mean(dim=1)
