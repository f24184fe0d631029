"""How a codebook is kept in use: where codes start, and where unused ones go (CVQ, Zheng and Vedaldi 2023,
https://arxiv.org/abs/2307.15139; k-means and restart as in Jukebox, https://arxiv.org/abs/2005.00341).

Letters: n rows (vectors of a batch), d width, k codes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from tokenizers_vis.cuda.ops import code_statistics, nearest_code
from tokenizers_vis.quantizers.base import from_first_rank, is_distributed, over_ranks

LAPLACE = 1e-5  # added to each count of the moving average
JITTER = 1e-2  # of the data's root mean square, for codes that have no data vector of their own
PULL = 10.0, 1e-3  # of an anchor, CVQ eq. 5


def draw(rows: Tensor, count: int) -> Tensor:
    """``count`` rows at random; none comes twice before all came once. n d -> count d."""
    order = torch.randperm(len(rows), device=rows.device)
    return rows[order[torch.arange(count, device=rows.device) % len(rows)]]


@torch.no_grad()
def kmeans(rows: Tensor, k: int, iterations: int = 10) -> Tensor:
    """k centres of the rows, k d. With fewer rows than centres: each row, then rows again, a little moved."""
    centres = draw(rows, k)
    if len(rows) <= k:
        centres[len(rows) :] += JITTER * rows.square().mean().sqrt() * torch.randn_like(centres[len(rows) :])
        return centres
    for _ in range(iterations):
        counts, sums = code_statistics(rows, nearest_code(rows, centres), k)
        # An empty centre starts again at a row.
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], draw(rows, k))
    return centres


def smoothed_means(counts: Tensor, sums: Tensor) -> Tensor:
    """The means of what each code won, k d, from moving averages: counts k, sums k d.

    The counts are smoothed (Laplace) so that a code that wins nothing keeps a divisor: (N + e) / (total + k e) total.
    """
    total = counts.sum()
    smoothed = (counts + LAPLACE) / (total + len(counts) * LAPLACE) * total
    return sums / smoothed[:, None]


def pull(usage: Tensor, decay: float) -> Tensor:
    """How far each code goes towards its anchor: k, from 0 (a code in use stays) to 1 (an unused one moves there).

    usage: k, the moving average, with ``decay``, of the share of vectors that chose each code.
    exp(-10 k usage / (1 - decay) - 1e-3), CVQ eq. 5.
    """
    slope, floor = PULL
    return (-slope * len(usage) * usage / (1 - decay) - floor).exp()


@torch.no_grad()
def anchors(codes: Tensor, rows: Tensor, kind: Literal["nearest", "random"], metric: str) -> Tensor:
    """A vector for each code to go to, k d, the same on all ranks.

    codes: k d. rows: n d, those of this rank. "nearest" is the nearest of all ranks' rows, "random" one of rank 0's.
    """
    if kind == "random":
        return from_first_rank(draw(rows, len(codes)))
    found = rows[nearest_code(codes, rows, metric=metric)]
    if not is_distributed():
        return found
    a, b = (F.normalize(x, dim=-1) if metric == "cosine" else x for x in (codes, found))
    distances = codes.new_zeros(distributed.get_world_size(), len(codes))
    distances[distributed.get_rank()] = (a - b).square().sum(dim=-1)
    mine = over_ranks(distances).argmin(dim=0) == distributed.get_rank()
    return over_ranks(found.where(mine[:, None], 0.0))
