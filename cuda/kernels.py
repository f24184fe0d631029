"""Triton twin of ``reference.nearest_code``, without the matrix of rows and codes.

Runs on NVIDIA GPUs from compute capability 8.0 and, with TRITON_INTERPRET=1 set before Triton is imported, slowly on
CPU tensors. Nothing is compiled again for another n or k.

Letters: g groups, n rows, d width, k codes; a program has M rows and walks over tiles of N codes.

As in FlashAttention (https://arxiv.org/abs/2205.14135) no tile of scores leaves the registers. Only
the best of each group of 16 or 64 codes is taken from it, at half an instruction a score; an arg-max costs six:

1. Rows and codes are rounded to TF32 and packed with two or three columns more, whose products are -|c|^2 / 2 and a
   constant of the row that makes all scores negative. So one tensor core product is the score, and as the bits of
   negative floats order backwards as integers do, its best is an integer minimum, three at a time on Hopper.
2. Of each tile four numbers per row are kept: the best scores of its four groups of codes. That is n k / 64 numbers,
   for as many rows at once as fit into 64 MB.
3. By the Cauchy-Schwarz inequality an approximate score is off by at most e = |x - x'| |c| + |x'| |c - c'|, where x'
   and c' are the rounded ones, and a little for sums in float32. A group whose best is more than 2 e below the row's
   best cannot hold the nearest code. The other groups, one or two of thousands as a rule, are scored again in float32,
   until none is left that could be better. So the result is as exact as the reference's for any data, without a second
   way: where the rounded scores say nothing (all codes equal, say), all groups are scored.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tokenizers_vis.cuda.reference import Metric, check_lookup

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
MAX_KEPT = 2**24  # group maxima at once: 64 MB
WIDE = 64  # up to this width the rows of a program stay in shared memory
CHUNK = 32  # beyond, columns at a time
COLUMNS = 8  # of codes scored exactly, at a time
PROGRAMS = 1 if INTERPRETED else 512  # at least, where there is work for them: a few for each multiprocessor
LARGE_SHARED = 220 * 1024  # bytes of shared memory that the large tiles need; Hopper and newer data-centre GPUs
PACKED, EXACT = (256, 256) if INTERPRETED else (16, 2)  # rows of a program
SEEN = 256  # groups whose bests are looked at together
OPTIONS = {"enable_fp_fusion": True}  # said, as Triton's own default changes


def available(z: Tensor) -> bool:
    """Whether the kernels can run on this tensor."""
    if INTERPRETED:
        return z.device.type == "cpu"
    return z.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(z.device) >= (8, 0)


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor, metric: Metric = "euclidean") -> Tensor:
    """As ``reference.nearest_code``: z n d, codebook k d -> n, or z g n d, codebook g k d -> g n; int64."""
    check_lookup(z, codebook, 1, metric)
    if z.ndim == 2:
        return nearest_code(z[None], codebook[None], metric)[0]
    with torch.cuda.device_of(z):  # where Triton launches
        return _lookup(z, codebook, metric)


def _lookup(z: Tensor, codebook: Tensor, metric: Metric) -> Tensor:
    """z: g n d, codebook: g k d -> g n."""
    (g, n, d), k = z.shape, codebook.shape[1]
    ids = torch.empty(g, n, dtype=torch.int64, device=z.device)
    if ids.numel() == 0:
        return ids
    z, euclidean = z.contiguous(), metric == "euclidean"
    if metric == "cosine":
        codes, mean = _centred_directions(codebook), z.new_zeros(g, d, dtype=torch.float32)
    else:
        codes = codebook.float().contiguous()
        mean = codes.mean(dim=1)  # any point amid the codes will do

    width, main, tail = packed_width(d)
    tile = tile_for(width, _shared_memory(z.device))
    m, t = tile["M"], tile["N"]
    tiles = triton.cdiv(k, t)
    packed_codes = z.new_empty(g, tiles * t, width, dtype=torch.float32)
    half, sizes = z.new_empty(g, k, dtype=torch.float32), z.new_empty(2, g, tiles * t, dtype=torch.float32)
    shape = {"d": d, "D": triton.next_power_of_2(d), "W": triton.next_power_of_2(width), "R": PACKED, **OPTIONS}
    _pack_codes[triton.cdiv(tiles * t, PACKED), g](
        codes, mean, packed_codes, half, sizes, g, k, tiles * t, width, N=t, EUCLIDEAN=euclidean, **shape
    )
    sizes = sizes.amax(dim=2)

    at_once = max(1, MAX_KEPT // (g * tiles * 4 * m)) * m
    for start in range(0, n, at_once):
        rows = min(at_once, n - start)
        packed = z.new_empty(g, rows, width, dtype=torch.float32)
        bounds, kept = packed.new_empty(2, g, rows), packed.new_empty(g, tiles, rows, 4)
        _pack_rows[triton.cdiv(rows, PACKED), g](
            z, mean, sizes, packed, bounds, g, n, start, rows, width, EUCLIDEAN=euclidean, **shape
        )
        row_programs = triton.cdiv(rows, m)
        span = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, row_programs * g)))
        _group_maxima[row_programs, triton.cdiv(tiles, span), g](
            packed, packed_codes, kept, rows, tiles, span, width, D=main, TAIL=tail, C=CHUNK, **tile, **OPTIONS
        )
        _exact[triton.cdiv(rows, EXACT), g](
            z, codes, mean, half, bounds, kept, ids, g, n, k, start, rows, tiles, d=d, EUCLIDEAN=euclidean,
            G=t // 4, Q=SEEN, R=EXACT, C=COLUMNS, num_warps=1, **OPTIONS,
        )  # fmt: skip
    return ids


def _centred_directions(codebook: Tensor) -> Tensor:
    """g k d -> g k d, float32: c / |c| less their mean, by way of float64: codes far from 0 all point one way."""
    parts = codebook.split(max(1, 2**21 // codebook.shape[2]), dim=1)
    mean = sum(F.normalize(part.double(), dim=2).sum(dim=1, keepdim=True) for part in parts) / codebook.shape[1]
    return torch.cat([(F.normalize(part.double(), dim=2) - mean).float() for part in parts], dim=1)


def packed_width(d: int) -> tuple[int, int, bool]:
    """Of a packed row, its main part as a power of two (0: taken in chunks), and whether 16 columns follow it."""
    main = max(16, triton.next_power_of_2(d))
    if main > WIDE:
        return triton.cdiv(d + 3, CHUNK) * CHUNK, 0, False
    tail = d + 3 > main
    return main + 16 * tail, main, tail


def tile_for(width: int, shared: int) -> dict[str, int]:
    """M rows and N codes, and how Triton is to run them, with so many bytes of shared memory."""
    if shared >= LARGE_SHARED:
        return {"M": 128, "N": 256, "num_warps": 8, "num_stages": 2 if WIDE <= width <= WIDE + 16 else 3}
    return {"M": 128, "N": 64, "num_warps": 4, "num_stages": 2}


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have. Unknown to torch before 2.7; the small tiles fit everywhere."""
    if INTERPRETED:
        return LARGE_SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


@triton.jit
def _tf32(x):
    """Rounded to the ten bits of mantissa that tensor cores take, so that they cannot round otherwise."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["g", "k", "padded"])
def _pack_codes(
    codes, mean, packed, half, sizes, g, k, padded, width,
    d: tl.constexpr, N: tl.constexpr, EUCLIDEAN: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A packed code: c', two parts of -|c|^2 / 2, -1. Codes past the end score -1e38.

    Within a tile, code (j, a, b) of (4, N / 8, 2) comes to (a, j, b): a thread of a tensor core's result has the
    columns of one j, so that a group's best takes no talk between threads.
    """
    group = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, D)
    there = (ids < k)[:, None] & (columns < d)[None, :]
    c = tl.load(codes + (group * k + ids)[:, None] * d + columns[None, :], mask=there, other=0.0)
    c = tl.where(there, c - tl.load(mean + group * d + columns, mask=columns < d, other=0.0)[None, :], 0.0)
    rounded = _tf32(c)
    lost = c - rounded
    square = tl.sum(c * c, axis=1)
    score = square * 0.5 if EUCLIDEAN else square * 0.0
    tl.store(half + group * k + ids, score, mask=ids < k)
    tl.store(sizes + group * padded + ids, tl.sqrt(square), mask=ids < padded)
    tl.store(sizes + (g + group) * padded + ids, tl.sqrt(tl.sum(lost * lost, axis=1)), mask=ids < padded)

    local = ids % N
    j, a, b = local // (N // 4), (local % (N // 4)) // 2, local % 2
    to = packed + (group * padded + ids - local + a * 8 + j * 2 + b)[:, None] * width
    tl.store(to + columns[None, :], rounded, mask=(ids < padded)[:, None] & (columns < d)[None, :])
    first = tl.where(ids < k, _tf32(score), 1e38)
    second = tl.where(ids < k, _tf32(score - first), 0.0)
    more = tl.arange(0, W)[None, :]
    value = tl.where(more == d, -first[:, None], tl.where(more == d + 1, -second[:, None], 0.0))
    value = tl.where(more == d + 2, -1.0, value)
    tl.store(to + more, value, mask=(ids < padded)[:, None] & (more >= d) & (more < width))


@triton.jit(do_not_specialize=["g", "n", "start", "count"])
def _pack_rows(
    z, mean, sizes, packed, bounds, g, n, start, count, width,
    d: tl.constexpr, EUCLIDEAN: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A packed row: x', 1, 1, more than any x.c. bounds, 2 g n: how far a row's scores may be off, and that constant.

    A row that is not finite may be off by -1.
    """
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, D)
    inside = (rows < count)[:, None]
    there = inside & (columns < d)[None, :]
    x = tl.load(z + (group * n + start + rows)[:, None] * d + columns[None, :], mask=there, other=0.0).to(tl.float32)
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=1) > 0
    if EUCLIDEAN:
        x -= tl.load(mean + group * d + columns, mask=columns < d, other=0.0)[None, :]
    x = tl.where(there & finite[:, None], x, 0.0)
    rounded = _tf32(x)
    lost = x - rounded
    size = tl.sqrt(tl.sum(x * x, axis=1))
    # A thousandth more, for the rounding of these numbers themselves.
    most, most_lost = tl.load(sizes + group) * 1.001, tl.load(sizes + g + group) * 1.001
    error = tl.sqrt(tl.sum(lost * lost, axis=1)) * most + size * most_lost
    # Sums of width numbers, the row's constant among them, each off by 2^-22 of the largest: tensor cores cut off.
    error = 1.001 * error + (width + 64) * 2.4e-7 * (size * most + 0.5 * most * most) + 1e-36
    error = tl.where(error >= 0, error, float("inf"))  # nan is infinity times 0
    above = _tf32(size * most * 1.004 + 1e-30)
    tl.store(bounds + group * count + rows, tl.where(finite, error, -1.0), mask=rows < count)
    tl.store(bounds + (g + group) * count + rows, above, mask=rows < count)

    to = packed + (group * count + rows)[:, None] * width
    tl.store(to + columns[None, :], rounded, mask=there)
    more = tl.arange(0, W)[None, :]
    value = tl.where((more == d) | (more == d + 1), 1.0, tl.where(more == d + 2, above[:, None], 0.0))
    tl.store(to + more, value, mask=inside & (more >= d) & (more < width))


@triton.jit(do_not_specialize=["n", "tiles", "span"])
def _group_maxima(
    rows, codes, kept, n, tiles, span, width,
    D: tl.constexpr, TAIL: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """rows: g n width, codes: g (tiles N) width -> kept: g tiles n 4, the best approximate score of each group."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    inside = (row < n)[:, None]
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, tiles)
    rows += (group * n + row)[:, None] * width
    codes += tl.arange(0, N)[:, None] * width
    kept += row[:, None] * 4 + tl.arange(0, 4)[None, :]
    if D > 0:
        x = tl.load(rows + tl.arange(0, D)[None, :], mask=inside, other=0.0)
    if TAIL:
        x_tail = tl.load(rows + D + tl.arange(0, 16)[None, :], mask=inside, other=0.0)
    for t in range(first, last):
        tile = codes + (group * tiles + t) * N * width
        if D > 0:
            scores = tl.dot(x, tl.load(tile + tl.arange(0, D)[None, :]).T, input_precision="tf32")
            if TAIL:
                c_tail = tl.load(tile + D + tl.arange(0, 16)[None, :])
                scores = tl.dot(x_tail, c_tail.T, scores, input_precision="tf32")
        else:
            scores = tl.zeros((M, N), dtype=tl.float32)
            for column in range(0, width, C):
                columns = (column + tl.arange(0, C))[None, :]
                x = tl.load(rows + columns, mask=inside, other=0.0)
                scores = tl.dot(x, tl.load(tile + columns).T, scores, input_precision="tf32")
        bits = tl.reshape(scores.to(tl.int32, bitcast=True), (M, N // 8, 4, 2))
        best = tl.min(tl.min(bits, axis=1), axis=2).to(tl.float32, bitcast=True)
        tl.store(kept + (group * tiles + t) * n * 4, best, mask=inside)


@triton.jit(do_not_specialize=["g", "n", "k", "start", "count", "tiles"])
def _exact(
    z, codes, mean, half, bounds, kept, ids, g, n, k, start, count, tiles, d: tl.constexpr,
    EUCLIDEAN: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Scores, in float32, the groups of G codes that may hold a row's nearest one. Q groups' bests are read at once."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < count
    kept += (group * tiles * count + row)[:, None] * 4
    z += (group * n + start + row)[:, None] * d
    codes += group * k * d
    mean += group * d
    half += group * k
    error = tl.load(bounds + group * count + row, mask=inside, other=-1.0)
    above = tl.load(bounds + (g + group) * count + row, mask=inside, other=0.0)

    top = tl.full((R,), -3e38, dtype=tl.float32)
    for q in range(0, tiles * 4, Q):
        number = (q + tl.arange(0, Q))[None, :]
        at = kept + (number // 4).to(tl.int64) * count * 4 + number % 4
        values = tl.load(at, mask=inside[:, None] & (number < tiles * 4), other=-float("inf"))
        top = tl.maximum(top, tl.max(values, axis=1))
    # A group below this cannot hold the nearest. A score that overflowed counts as -3e38, so that it is never below.
    least = tl.where(error >= 0, tl.maximum(top - 2 * error, -3e38), float("inf"))

    best = tl.full((R,), -float("inf"), dtype=tl.float32)
    chosen = tl.zeros((R,), dtype=tl.int32)
    for q in range(0, tiles * 4, Q):
        number = (q + tl.arange(0, Q))[None, :]
        there = inside[:, None] & (number < tiles * 4)
        at = kept + (number // 4).to(tl.int64) * count * 4 + number % 4
        values = tl.where(there, tl.maximum(tl.load(at, mask=there, other=0.0), -3e38), -float("inf"))
        value, pick = tl.max(values, axis=1, return_indices=True)
        while tl.max((value >= least).to(tl.int32), axis=0) > 0:
            code = ((q + pick) * G)[:, None] + tl.arange(0, G)[None, :]
            use = (value >= least)[:, None] & (code < k)
            scores = tl.zeros((R, G), dtype=tl.float32)
            for column in range(0, d, C):
                columns = column + tl.arange(0, C)
                m = tl.load(mean + columns, mask=columns < d, other=0.0)
                x = tl.load(z + columns[None, :], mask=inside[:, None] & (columns < d)[None, :], other=0.0)
                x = x.to(tl.float32)
                if EUCLIDEAN:
                    x -= m[None, :]
                c = tl.load(
                    codes + code.to(tl.int64)[:, :, None] * d + columns[None, None, :],
                    mask=use[:, :, None] & (columns < d)[None, None, :],
                    other=0.0,
                )
                scores += tl.sum(x[:, None, :] * (c - m[None, None, :]), axis=2)
            scores = tl.where(use, scores - tl.load(half + code, mask=use, other=0.0), -float("inf"))
            score, within = tl.max(scores, axis=1, return_indices=True)  # of equal ones the first
            found = (q + pick) * G + within
            better = (score > best) | ((score == best) & (found < chosen))
            best, chosen = tl.where(better, score, best), tl.where(better, found, chosen)
            least = tl.maximum(least, best - above - error)
            values = tl.where(tl.arange(0, Q)[None, :] == pick[:, None], -float("inf"), values)
            value, pick = tl.max(values, axis=1, return_indices=True)
    tl.store(ids + group * n + start + row, chosen.to(tl.int64), mask=inside)
