"""How far an encoder's vector is from having other ids: the room that rounding has before tokens change.

Letters: b batch, n tokens, d width of a vector, k codes, m ids along an image, r rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.bsq import BSQ
from tokenizers_vis.quantizers.compose import Product
from tokenizers_vis.quantizers.frozen_table import FrozenTable
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.lfq import GFQ, LFQ
from tokenizers_vis.quantizers.vq import VQ

MAX_SCORES = 2**22  # float64 numbers in memory at a time
HALVINGS = 40  # of an interval that holds the boundary: past float32
NUDGES = 2.0 ** torch.arange(-26, 2, dtype=torch.float32)  # from below float32 rounding to twice the vector
SAME = 1e-15  # codes whose squared distance is this share of their squared lengths are one code twice


class Margins(NamedTuple):
    """values: b m, float64. exact: whether they are the shortest way, or what nudging found."""

    values: Tensor
    exact: bool


@torch.no_grad()
def margins(quantizer: Quantizer, z: Tensor) -> Margins:
    """How far each vector must move, as a share of its length, until one of its ids is another.

    z: b n d, float32, what the encoder gives; the quantizer is in eval mode.

    Exact, over all directions, for codes chosen from a table (vq, sim_vq, vqgan_lc), for rounding (fsq), for signs
    (lfq, gfq, bsq), and for products of these. For other quantizers each vector is nudged in one random direction, the
    same in every call, by lengths that double: the value is the first at which an id of that place changes, inf where
    none does. What rounding does is such a nudge; the shortest way is shorter.
    """
    z = z.float()
    way = _shortest(quantizer, z)
    if way is None:
        return Margins(_nudged(quantizer, z), False)
    return Margins(way / z.double().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny), True)


def _shortest(quantizer: Quantizer, z: Tensor) -> Tensor | None:
    """z: b n d -> b n, float64, the distance to the nearest boundary; None where no formula is known here."""
    if isinstance(quantizer, Product):
        pieces = z.split([part.in_dim for part in quantizer.parts], dim=-1)
        ways = [_shortest(part, piece) for part, piece in zip(quantizer.parts, pieces, strict=True)]
        return None if any(way is None for way in ways) else torch.stack(ways).amin(dim=0)
    if isinstance(quantizer, (LFQ, GFQ, BSQ)):
        return z.double().abs().amin(dim=-1)
    if isinstance(quantizer, FSQ):
        return _to_another_level(quantizer, z)
    if isinstance(quantizer, (VQ, FrozenTable)):
        table = quantizer.table().double()
        # Codes of length 1 in float64: the last bits of a length would else count as distance.
        table = F.normalize(table, dim=-1) if quantizer.distance == "cosine" else table
        rows, ids = rearrange(z, "b n d -> (b n) d").double(), quantizer(z).ids.flatten()
        step = max(1, MAX_SCORES // len(table))
        ways = [_to_another_code(*part, table) for part in zip(rows.split(step), ids.split(step), strict=True)]
        return rearrange(torch.cat(ways), "(b n) -> b n", b=len(z))
    return None


def _to_another_code(rows: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """The distance to the nearest plane midway between the chosen code a and another one c: r.

    (|z - c|^2 - |z - a|^2) / (2 |c - a|). With codes of one length it is the boundary of the cosine, too.
    rows: r d. ids: r. table: k d. All float64.
    """
    chosen, squares = table[ids], table.square().sum(dim=-1)
    rise = squares - squares[ids, None] - 2 * (rows @ table.T - reduce(rows * chosen, "r d -> r 1", "sum"))
    both = squares + squares[ids, None]
    apart = both - 2 * chosen @ table.T
    way = rise.clamp_min(0) / (2 * apart.clamp_min(0).sqrt())
    return way.masked_fill(apart <= SAME * both, torch.inf).amin(dim=-1)


def _to_another_level(quantizer: FSQ, z: Tensor) -> Tensor:
    """The distance of the nearest number to its next level: b n. By halving, for a level only rises with its number."""
    here = quantizer.digits(quantizer(z).ids)
    far = z.abs().amax() + 20  # where every number has its outermost level
    nearest = torch.full(z.shape, torch.inf, dtype=torch.float64, device=z.device)
    for sign in (-1, 1):
        low, high = torch.zeros_like(nearest), far.double().expand_as(nearest)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            other = quantizer.digits(quantizer((z + sign * middle).float()).ids) != here
            low, high = torch.where(other, low, middle), torch.where(other, middle, high)
        nearest = torch.where(high < far, torch.minimum(nearest, high), nearest)
    return nearest.amin(dim=-1)


def _nudged(quantizer: Quantizer, z: Tensor) -> Tensor:
    """b m, float64: the first of ``NUDGES`` at which an id of a place changes."""
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.device)
    direction = F.normalize(direction, dim=-1) * z.norm(dim=-1, keepdim=True)
    here = quantizer(z).ids
    found = torch.full(here.shape[:2], torch.inf, dtype=torch.float64, device=z.device)
    for nudge in NUDGES.flip(0).tolist():
        found[(quantizer(z + nudge * direction).ids != here).any(dim=-1)] = nudge
    return found
