"""Quantizers made of quantizers: Product splits a vector, Residual quantizes what is left of it, again and again.

Product: UniTok (https://arxiv.org/abs/2502.20321), ImageFolder (https://arxiv.org/abs/2410.01756), and FQGAN
(https://arxiv.org/abs/2411.16681) with ``disentangle``. Residual: RQ-VAE (https://arxiv.org/abs/2203.01941) and
SoundStream (https://arxiv.org/abs/2107.03312). DualToken (https://arxiv.org/abs/2503.14324) is a Product of Residuals.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_ids, check_option, straight_through
from tokenizers_vis.quantizers.integers import Order
from tokenizers_vis.quantizers.vq import VQ


class Product(Quantizer):
    """Splits z along d, and quantizes each piece by a quantizer of its own.

    parts: the quantizers, in the order in which they take the pieces.
    part, count: ``count`` copies of one quantizer, in place of ``parts``. They start equal.
    reduction: what is made of the parts' losses: their "mean", as UniTok and ImageFolder, or their "sum", as FQGAN.
    disentangle: weight of the mean, over vectors and pairs of parts, of cos^2 between the codes of the two, which makes
        the codebooks hold different things (FQGAN: .1, with two or three). Its gradient goes to z, past the codes. All
        parts have one dim then.

    codes: b n d, those of the parts beside each other, as are ids, b n k.
    parts of the result: each loss of part j as name_j, and disentangle.
    Raises ``ValueError`` for options out of range and for parts that do not go together.
    """

    def __init__(
        self,
        *,
        parts: tuple[Quantizer, ...] = (),
        part: Quantizer | None = None,
        count: int = 0,
        reduction: Literal["mean", "sum"] = "mean",
        disentangle: float = 0.0,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(chosen_parts(parts, part, count, "count"))
        check_option(reduction in ("mean", "sum"), "reduction is 'mean' or 'sum'", reduction)
        check_option(disentangle >= 0, "disentangle is a weight, 0 or more", disentangle)
        widths = [part.dim for part in self.parts]
        if disentangle and (len(widths) == 1 or len(set(widths)) > 1):
            raise ValueError(
                f"disentangle compares the codes of two parts or more, of one dim; got parts of dim {widths}; "
                f"give the parts one dim, or set disentangle to 0"
            )
        self.reduction = reduction
        self.disentangle = disentangle
        self.dim = sum(widths)
        self.codebook_sizes = joined_sizes(self.parts)
        self.order = common_order(self.parts)
        self.discrete = all(part.discrete for part in self.parts)
        self.fixed_n = common_n(self.parts)

    @property
    def in_dim(self) -> int:
        return sum(part.in_dim for part in self.parts)

    def id_count(self, n: int) -> int:
        return self.parts[0].id_count(n)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        pieces = z.split([part.in_dim for part in self.parts], dim=-1)
        outs = [part(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        with torch.autocast(z.device.type, enabled=False):
            loss, named = joined_loss(outs, self.reduction)
            if self.disentangle:
                alike = torch.stack([cosine_squared(a.codes, b.codes) for a, b in combinations(outs, 2)]).mean()
                loss = loss + self.disentangle * alike
                named["disentangle"] = alike.detach()
        codes, ids = torch.cat([out.codes for out in outs], dim=-1), torch.cat([out.ids for out in outs], dim=-1)
        return Quantized(codes, ids, loss, named)

    def lookup(self, ids: Tensor) -> Tensor:
        k = len(self.codebook_sizes)
        if ids.ndim != 3 or ids.shape[-1] != k:
            raise ValueError(f"ids are b n {k} (batch, tokens, codebooks), got {tuple(ids.shape)}")
        columns = ids.split([len(part.codebook_sizes) for part in self.parts], dim=-1)
        return torch.cat([part.lookup(column) for part, column in zip(self.parts, columns, strict=True)], dim=-1)


class Residual(Quantizer):
    """Quantizes z, then what the first level left of it, then what both left, and so on; the code is the sum of all.

    ``r_1 = z``, ``c_j = Q_j(r_j)``, ``r_{j+1} = r_j - sg c_j`` (RQ-VAE, eq. 3).

    parts: the quantizers of the levels, the coarsest first. They have one dim.
    part, depth: ``depth`` levels of one quantizer, in place of ``parts``; copies that start equal.
    shared: one codebook serves all ``depth`` levels. The moving averages of a vq learn from all levels together, once a
        step. (In RQ-VAE's code each level moves the codebook before the next one reads it.)
    reduction: what is made of the levels' losses: their "mean", as RQ-VAE, or their "sum". What a level's commitment
        sees, r_j - c_j, is also z less the sum of the codes so far: per-level and cumulative commitment are the same.
    gradient: "whole": straight through from the sum of the codes to z, as RQ-VAE. "levels": that of each level, added,
        as vector-quantize-pytorch and the first EnCodec. It is as many times as large as there are levels; it serves
        levels whose codes have a gradient of their own (the rotation trick, IBQ), which "whole" leaves out.
    scale: level j, from 0, quantizes at that scale to the power j: scale^j Q(r / scale^j). For levels whose codes
        cannot follow the rest as it shrinks: 1 / 2 for LFQ, 1 / (L - 1) for FSQ of L levels. Losses are those of Q.
    dropout: in training, the share of images that keep only their first levels: a number of them from ``keep`` to all,
        each as probable. 1 is SoundStream's quantizer dropout, .5 DAC's. The levels left out add nothing to the codes
        and have the id -1; they still learn, on every rank alike.
    keep: levels that every image keeps.

    codes: b n d, the sum. ids: b n k, coarse to fine.
    parts of the result: each loss of level j as name_j.
    ``lookup`` takes fewer columns too, those of the first levels: a coarser code. An id of -1 says that the level is
    not there; the first level is always there.
    Raises ``ValueError`` for options out of range and for parts that do not go together.
    """

    def __init__(
        self,
        *,
        parts: tuple[Quantizer, ...] = (),
        part: Quantizer | None = None,
        depth: int = 0,
        shared: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        gradient: Literal["whole", "levels"] = "whole",
        scale: float = 1.0,
        dropout: float = 0.0,
        keep: int = 1,
    ) -> None:
        super().__init__()
        if shared and part is None:
            raise ValueError("a shared codebook is that of one part: give part and depth in place of parts")
        # One module once, so that a shared codebook is saved once.
        self.parts = nn.ModuleList(chosen_parts(parts, part, min(depth, 1) if shared else depth, "depth"))
        self.depth = depth if shared else len(self.parts)
        self.shared = shared
        levels = self.levels
        dims = [width for level in levels for width in (level.in_dim, level.dim)]
        if len(set(dims)) > 1:
            raise ValueError(f"each level takes what the one before left, so that all widths are equal; got {dims}")
        if any(level.fixed_n is not None for level in levels):
            raise ValueError("a level takes any number of vectors; put a residual in a multi_scale, not the reverse")
        check_option(reduction in ("mean", "sum"), "reduction is 'mean' or 'sum'", reduction)
        check_option(gradient in ("whole", "levels"), "gradient is 'whole' or 'levels'", gradient)
        check_option(scale > 0, "scale is above 0", scale)
        check_option(0 <= dropout <= 1, "dropout is a share from 0 to 1", dropout)
        check_option(1 <= keep <= len(levels), f"keep is a number of levels from 1 to {len(levels)}", keep)
        self.reduction = reduction
        self.gradient = gradient
        self.scale = scale
        self.dropout = dropout
        self.keep = keep
        self.dim = levels[0].dim
        self.codebook_sizes = joined_sizes(levels)
        self.order = common_order(levels)
        self.discrete = all(level.discrete for level in levels)

    @property
    def levels(self) -> list[Quantizer]:
        """The quantizer of each level; the same one, if shared."""
        return [self.parts[0]] * self.depth if self.shared else list(self.parts)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        kept = levels_kept(z, self.depth, self.dropout, self.keep) if self.training and self.dropout else None
        rest, total, outs = z, torch.zeros_like(z), []
        with torch.autocast(z.device.type, enabled=False), learn_once(self.parts, self.training and self.shared):
            for j, level in enumerate(self.levels):
                scale = self.scale**j
                out = level(rest / scale)
                out = out._replace(codes=out.codes * scale)
                rest = rest - out.codes.detach()
                if kept is not None:
                    there = (j < kept)[:, None, None]
                    out = out._replace(codes=out.codes.where(there, 0.0), ids=out.ids.where(there, -1))
                total = total + out.codes
                outs.append(out)
            loss, named = joined_loss(outs, self.reduction)
            codes = straight_through(total, z) if self.gradient == "whole" else total
        return Quantized(codes, torch.cat([out.ids for out in outs], dim=-1), loss, named)

    def lookup(self, ids: Tensor) -> Tensor:
        counts = [len(level.codebook_sizes) for level in self.levels]
        ends = list(accumulate(counts))
        if ids.ndim != 3 or ids.shape[-1] not in ends:
            raise ValueError(
                f"ids are b n k (batch, tokens, codebooks), where k is {', '.join(map(str, ends))} for 1 to "
                f"{self.depth} levels; got {tuple(ids.shape)}"
            )
        check_ids(ids[..., : ends[0]], self.codebook_sizes[: ends[0]])
        check_ids(ids.where(ids != -1, 0), self.codebook_sizes[: ids.shape[-1]])
        depth = ends.index(ids.shape[-1]) + 1
        total = 0.0
        for j, column in enumerate(ids.split(counts[:depth], dim=-1)):
            there = (column >= 0).all(dim=-1, keepdim=True)
            codes = self.levels[j].lookup(column.where(there, 0)) * self.scale**j
            total = total + codes.where(there, 0.0)
        return total

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, depth={self.depth}, shared={self.shared}"


@contextmanager
def learn_once(part: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the codebooks of ``part`` stay as they are; then each learns once from all that it quantized inside.

    So a codebook that is read several times in one step moves once, and ranks meet once, as its moving averages say.
    """
    waiting = [vq for vq in part.modules() if isinstance(vq, VQ) and vq.waiting is None] if training else []
    for vq in waiting:
        vq.waiting = []
    try:
        yield
        for vq in waiting:
            if vq.waiting:
                vq.learn(*(torch.cat(tensors) for tensors in zip(*vq.waiting, strict=True)))
    finally:
        for vq in waiting:
            vq.waiting = None


def chosen_parts(parts: Sequence[Quantizer], part: Quantizer | None, count: int, name: str) -> list[Quantizer]:
    """``parts``, or ``count`` copies of ``part``. Raises ``ValueError`` unless one of the two is given."""
    if parts and part is None and count in (0, len(parts)):
        return list(parts)
    if part is None or parts or count < 1:
        raise ValueError(
            f"give parts, a list of quantizers, or part, one quantizer, and {name}, 1 or more; "
            f"got {len(parts)} parts, {'no' if part is None else 'a'} part, and {name} {count}"
        )
    return [part, *(copy.deepcopy(part) for _ in range(count - 1))]


def joined_sizes(parts: Sequence[Quantizer]) -> tuple[int, ...]:
    return tuple(size for part in parts for size in part.codebook_sizes)


def common_order(parts: Sequence[Quantizer]) -> Order:
    """The parts' order, or "msb" (the first part is the most significant) where they differ."""
    orders = {part.order for part in parts}
    return orders.pop() if len(orders) == 1 else "msb"


def common_n(parts: Sequence[Quantizer]) -> int | None:
    """How many vectors the parts take, if not any number. Raises ``ValueError`` where they do not go together."""
    fixed = {part.fixed_n for part in parts} - {None}
    if len(fixed) > 1:
        raise ValueError(f"the parts take different numbers of vectors: {sorted(fixed)}")
    n = fixed.pop() if fixed else None
    counts = {part.id_count(n or 1) for part in parts}
    if len(counts) > 1:
        raise ValueError(f"the parts give different numbers of ids for {n or 1} vectors: {sorted(counts)}")
    return n


def joined_loss(outs: Sequence[Quantized], reduction: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of all outs as one, and their parts, each with the number of its out behind its name."""
    losses = torch.stack([out.loss for out in outs])
    named = {f"{name}_{j}": value for j, out in enumerate(outs) for name, value in out.parts.items()}
    return losses.mean() if reduction == "mean" else losses.sum(), named


def cosine_squared(a: Tensor, b: Tensor) -> Tensor:
    """The mean over vectors of cos(a, b)^2. a, b: b n d -> scalar."""
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1).square().mean()


def levels_kept(z: Tensor, depth: int, dropout: float, keep: int) -> Tensor:
    """How many levels each image keeps: b, int64. A share ``dropout`` of them ``keep`` to ``depth``, the others all."""
    b = z.shape[0]
    kept = torch.randint(keep, depth + 1, (b,), device=z.device)
    return kept.where(torch.rand(b, device=z.device) < dropout, depth)
