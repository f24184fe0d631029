"""Codes assigned by optimal transport, so that all of them are used (Zhang et al. 2024, https://arxiv.org/abs/2412.15195)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from tokenizers_vis.cuda.ops import nearest_code
from tokenizers_vis.quantizers.base import (
    Quantized,
    Quantizer,
    check_option,
    is_distributed,
    over_ranks,
    straight_through,
    weighted,
)
from tokenizers_vis.quantizers.float32 import keep_dtype

TINY = 1e-8  # added to each sum before a division by it
BLOCK = 2**22  # costs held at a time: 16 MB


class OptVQ(Quantizer):
    """Replaces each vector by a code, and spreads the vectors of a batch evenly over the codes while it learns.

    In training the ids are those of a transport plan found by Sinkhorn's iterations (``sinkhorn``) over all vectors of
    the batch and, under torch.distributed, of all ranks.

    dim: width of z, a multiple of ``heads``.
    codebook_size: number of codes, 2 or more. They start as standard normal vectors.
    heads: parts into which each vector is cut; all share one codebook, of codes of width dim / heads. The released
        models have 4 and 8.
    projection: the codes are a learned linear map of the table, with a bias. It moves them all together.
    epsilon: sharpness of the plan, above 0: the iterations scale exp(-epsilon * cost). It multiplies, as in the
        published code, where other texts divide: a large one stays close to the nearest codes.
    iterations: of Sinkhorn, 1 or more.
    commitment: weight of mse(z, sg c), which draws the encoder to the codes.
    codebook_weight: weight of mse(c, sg z), which draws the codes to the encoder.
    eval_assignment: "nearest" gives each vector its nearest code in eval, so that the ids of an image are its own.
        "sinkhorn" does in eval as in training, over the batch at hand: the published code does so, and so an image's
        ids change with what else is in its batch. It is not for export with a free batch.

    ids: b n heads. Of equal choices the lowest id.
    The defaults are the published ones but for ``eval_assignment``: there beta weighs the codebook's side.
    Table and projection stay in float32 when the model is cast. Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        heads: int = 1,
        projection: bool = True,
        epsilon: float = 10.0,
        iterations: int = 5,
        commitment: float = 1.0,
        codebook_weight: float = 0.25,
        eval_assignment: Literal["nearest", "sinkhorn"] = "nearest",
    ) -> None:
        super().__init__()
        check_option(heads >= 1, "heads is 1 or more", heads)
        check_option(dim >= 1 and dim % heads == 0, f"dim is a multiple of heads ({heads})", dim)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        check_option(epsilon > 0, "epsilon is above 0", epsilon)
        check_option(iterations >= 1, "iterations is 1 or more", iterations)
        check_option(commitment >= 0, "commitment is a weight, 0 or more", commitment)
        check_option(codebook_weight >= 0, "codebook_weight is 0 or more", codebook_weight)
        check_option(
            eval_assignment in ("nearest", "sinkhorn"), "eval_assignment is 'nearest' or 'sinkhorn'", eval_assignment
        )
        self.dim = dim
        self.codebook_sizes = (codebook_size,) * heads
        self.heads = heads
        self.epsilon = epsilon
        self.iterations = iterations
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.eval_assignment = eval_assignment
        width = dim // heads
        self.codebook = nn.Parameter(torch.randn(codebook_size, width, dtype=torch.float32))
        self.projection = nn.Linear(width, width, dtype=torch.float32) if projection else None
        if projection:
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            table = self._table()
            ids = self._assign(rearrange(z.detach(), "b n (k d) -> (b n k) d", k=self.heads), table.detach())
            ids = rearrange(ids, "(b n k) -> b n k", b=z.shape[0], k=self.heads)
            codes = rearrange(F.embedding(ids, table), "b n k d -> b n (k d)")
            loss, parts = self._loss(z, codes)
            codes = straight_through(codes, z)
        return Quantized(codes, ids, loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        ids = self.check_ids(ids)
        with torch.autocast(ids.device.type, enabled=False):
            return rearrange(F.embedding(ids, self._table()), "b n k d -> b n (k d)")

    def _table(self) -> Tensor:
        """The codes as they come out. All are mapped, also for one lookup, so that their bits are always the same."""
        return self.codebook if self.projection is None else self.projection(self.codebook)

    def _assign(self, rows: Tensor, table: Tensor) -> Tensor:
        if not self.training and self.eval_assignment == "nearest":
            return nearest_code(rows, table)
        return sinkhorn(rows, table, epsilon=self.epsilon, iterations=self.iterations, all_ranks=self.training)

    def _loss(self, z: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses: dict[str, tuple[float, Tensor]] = {}
        if self.commitment:
            losses["commitment"] = self.commitment, F.mse_loss(z, codes.detach())
        if self.codebook_weight:
            losses["codebook"] = self.codebook_weight, F.mse_loss(codes, z.detach())
        return weighted(losses, z)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptVQ:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eval_assignment={self.eval_assignment}"


@torch.no_grad()
def sinkhorn(z: Tensor, codes: Tensor, *, epsilon: float, iterations: int, all_ranks: bool = False) -> Tensor:
    """The code that each vector sends most of its mass to, in a plan that uses all codes alike.

    z: n d. codes: k d. all_ranks: n is counted over all ranks; every rank calls this, with any n of its own.
    Returns n, int64, the lowest id where several are equal.

    The cost is the Euclidean distance, standardised over all pairs: a = (|z - c| - mean) / std. The plan
    is P = diag(v) exp(-epsilon a) diag(u). Each iteration first scales u, so that every code gets 1 / k of the mass,
    and then v, so that every vector gives 1 / n of it. u and v are kept as logarithms, and a vector's choice is the
    largest log P of its row, so no row is ever lost to underflow.

    A plan in memory would take 4 n k bytes, and its costs as many again: 2 GB each for 8192 vectors in 4 heads (n =
    32768) at k = 16384. So the costs are found anew in each pass, ``BLOCK`` of them at a time: iterations + 3 matmuls
    of n k d in all, and a few times 16 MB.
    """
    n, k = len(z), len(codes)
    step = max(1, BLOCK // k)
    blocks = [slice(start, start + step) for start in range(0, n, step)]
    centre = codes.mean(dim=0)  # off both sides: distances stay the same, and exact for data far from zero
    z, codes = z - centre, codes - centre
    total = over_ranks if all_ranks else lambda tensor: tensor

    def cost(block: slice) -> Tensor:
        return torch.cdist(z[block], codes)

    def log_kernel(block: slice) -> Tensor:
        return cost(block).sub_(lowest).mul_(-epsilon / spread)

    everyone = total(z.new_tensor(float(n)))
    sums = torch.stack([cost(block).sum() for block in blocks]).sum()
    mean = total(sums) / (everyone * k)
    squares = torch.zeros_like(mean)
    lowest = torch.full_like(mean, torch.inf)
    for block in blocks:
        costs = cost(block)
        squares += (costs - mean).square().sum()
        lowest = torch.minimum(lowest, costs.min())
    spread = (total(squares) / (everyone * k - 1)).sqrt() + 1e-6
    if all_ranks and is_distributed():
        distributed.all_reduce(lowest, op=distributed.ReduceOp.MIN)

    mass = torch.zeros_like(codes[:, 0])
    for block in blocks:
        mass += log_kernel(block).exp_().sum(dim=0)
    mass = total(mass)
    whole = mass.sum() + TINY
    mass, log_u, log_v = mass / whole, -whole.log(), z.new_zeros(n)
    for _ in range(iterations - 1):
        log_u = log_u - ((mass + TINY) * k).log()
        mass = torch.zeros_like(mass)
        for block in blocks:
            plan = log_kernel(block).add_(log_u).add_(log_v[block, None]).exp_()
            scale = (plan.sum(dim=1) + TINY) * everyone
            log_v[block] -= scale.log()
            mass += plan.div_(scale[:, None]).sum(dim=0)
        mass = total(mass)
    log_u = log_u - ((mass + TINY) * k).log()  # the last v scales whole rows, so it changes no choice
    return torch.cat([(log_kernel(block) + log_u).argmax(dim=1) for block in blocks])
