"""Vector quantization: the nearest of K learned codes (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937).

With ``distance="cosine"`` both sides are l2-normalised, as in ViT-VQGAN (https://arxiv.org/abs/2110.04627), LlamaGen
and TiTok. With ``update="ema"`` the codes are moving averages, not parameters (https://arxiv.org/abs/1906.00446).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from tokenizers_vis.cuda.reference import nearest_code
from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.quantizers.float32 import keep_dtype

LAPLACE = 1e-5  # added to each count of the moving average
JITTER = 1e-2  # of the data's root mean square, for codes that have no data vector of their own


class VQ(Quantizer):
    """Replaces each vector by the nearest of ``codebook_size`` codes.

    dim: width of a code.
    codebook_size: number of codes, 2 or more.
    distance: "euclidean", or "cosine": z and the codes are l2-normalised, also in what comes out.
    update: "gradient" learns the codes by the codebook loss, "ema" by moving averages of the vectors they win.
    commitment: weight of mse(z, sg c), which draws the encoder to the codes.
    codebook_weight: weight of mse(c, sg z), which draws the codes to the encoder. With "gradient" only.
    decay: of the moving averages, between 0 and 1. With "ema" only.
    kmeans_start: the first training batch places the codes by k-means.
    revive_after: a code that no vector chose for so many training steps moves to a random vector of the batch;
        0 is never. k-means and revival draw from torch's global random state.

    ids: b n 1. Under torch.distributed the statistics are summed over ranks, and new codes come from rank 0.
    The codebook stays in float32 when the model is cast. Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        update: Literal["gradient", "ema"] = "gradient",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        decay: float = 0.99,
        kmeans_start: bool = False,
        revive_after: int = 0,
    ) -> None:
        super().__init__()
        _check(dim >= 1, "dim is 1 or more", dim)
        _check(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        _check(distance in ("euclidean", "cosine"), "distance is 'euclidean' or 'cosine'", distance)
        _check(update in ("gradient", "ema"), "update is 'gradient' or 'ema'", update)
        _check(commitment >= 0, "commitment is 0 or more", commitment)
        _check(codebook_weight >= 0, "codebook_weight is 0 or more", codebook_weight)
        _check(0 < decay < 1, "decay is between 0 and 1", decay)
        _check(revive_after >= 0, "revive_after is a number of steps, or 0 for never", revive_after)
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.distance = distance
        self.update = update
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.decay = decay
        self.kmeans_start = kmeans_start
        self.revive_after = revive_after

        codebook = torch.empty(codebook_size, dim, dtype=torch.float32).uniform_(-1 / codebook_size, 1 / codebook_size)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(codebook_size, dtype=torch.float32))
            self.register_buffer("sums", codebook.clone())
        if kmeans_start:
            self.register_buffer("started", torch.tensor(False))
        if revive_after:
            self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            if self.distance == "cosine":
                z = F.normalize(z, dim=-1)
            rows = rearrange(z.detach(), "b n d -> (b n) d")
            learning = self.training and len(rows) > 0
            if learning and self.kmeans_start and not self.started:
                self._start(rows)
            ids = self._nearest(rows)
            if learning and self.revive_after:
                self._revive(rows, ids)
            codes = F.embedding(rearrange(ids, "(b n) -> b n", b=len(z)), self._codes())
            loss, parts = self._loss(z, codes)
            if learning and self.update == "ema":
                self._average(rows, ids)
            # Adding an exact zero keeps the value the code itself, bit for bit, while the gradient goes to z.
            codes = codes.detach() + (z - z.detach())
        return Quantized(codes, rearrange(ids, "(b n) -> b n 1", b=len(z)), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(self.check_ids(ids)[..., 0].long(), self._codes())

    def _codes(self) -> Tensor:
        """The codes as they come out, k d."""
        return F.normalize(self.codebook, dim=-1) if self.distance == "cosine" else self.codebook

    def _nearest(self, rows: Tensor) -> Tensor:
        codes = self._codes().detach()
        return nearest_code(rows, codes) if self.distance == "cosine" else nearest_centred(rows, codes)

    def _loss(self, z: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {"commitment": F.mse_loss(z, codes.detach())}
        loss = self.commitment * parts["commitment"]
        if self.update == "gradient":
            parts["codebook"] = F.mse_loss(codes, z.detach())
            loss = loss + self.codebook_weight * parts["codebook"]
        return loss, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        """Places all codes by k-means on this batch, once."""
        (k,) = self.codebook_sizes
        share = rows.new_tensor(len(rows) / k)
        over_ranks(share)
        self._replace(torch.arange(k, device=rows.device), kmeans(rows, k), share)
        self.started.fill_(True)

    @torch.no_grad()
    def _average(self, rows: Tensor, ids: Tensor) -> None:
        """Moves counts, sums and codes towards what this batch chose."""
        counts, sums = count_and_sum(rows, ids, self.codebook_sizes[0])
        over_ranks(counts)
        over_ranks(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + LAPLACE) / (total + len(counts) * LAPLACE) * total
        self.codebook.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def _revive(self, rows: Tensor, ids: Tensor) -> None:
        """Counts the idle steps of each code and moves the long idle ones to vectors of this batch.

        Those are codes that this batch did not choose, so ``ids`` still name the codes they were found with.
        """
        counts, _ = count_and_sum(rows[:, :0], ids, self.codebook_sizes[0])
        over_ranks(counts)
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        dead = (self.idle >= self.revive_after).nonzero()[:, 0]
        if len(dead):
            self._replace(dead, draw(rows, len(dead)), rows.new_tensor(1.0))
            self.idle[dead] = 0

    @torch.no_grad()
    def _replace(self, index: Tensor, vectors: Tensor, count: Tensor) -> None:
        """Puts codes at vectors; in the moving average each stands for ``count`` of them."""
        if _distributed():
            distributed.broadcast(vectors, src=0)
        # .data: a graph of an earlier forward may still hold the codebook; it has no gradient for codes it did not use.
        self.codebook.data[index] = vectors
        if self.update == "ema":
            self.counts[index] = count
            self.sums[index] = vectors * count

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQ:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, distance={self.distance}, update={self.update}"


def nearest_centred(rows: Tensor, codes: Tensor) -> Tensor:
    """``nearest_code`` with the codes' mean taken off both sides, which keeps float32 exact for data far from zero."""
    centre = codes.mean(dim=0)
    return nearest_code(rows - centre, codes - centre)


def count_and_sum(rows: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many rows chose each of k codes, and their sum. rows: n d, ids: n -> k, k d, float32."""
    counts = rows.new_zeros(k).index_add_(0, ids, rows.new_ones(len(ids)))
    return counts, rows.new_zeros(k, rows.shape[1]).index_add_(0, ids, rows)


def draw(rows: Tensor, count: int) -> Tensor:
    """``count`` rows at random; none comes twice before all came once."""
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
        counts, sums = count_and_sum(rows, nearest_centred(rows, centres), k)
        # An empty centre starts again at a row.
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], draw(rows, k))
    return centres


def over_ranks(tensor: Tensor) -> None:
    """Sums the tensor over all ranks, in place; alone, nothing happens."""
    if _distributed():
        distributed.all_reduce(tensor)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _check(fits: bool, rule: str, value: object) -> None:
    if not fits:
        raise ValueError(f"{rule}, got {value!r}")
