"""The ops in plain torch: slow or fast, these are the numbers that every other implementation must give.

Letters: g groups, n rows, d width, k codes, m best codes; r rows and t codes of a tile.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["euclidean", "cosine", "dot"]
METRICS = ("euclidean", "cosine", "dot")

# Scores of a tile: 2^20 float32 are 4 MB and stay in the cache between the matmul and the search.
MAX_SCORES = 2**20
# Numbers of a tile's codes. They are copied a few times, also in float64: 1 or 2 MB each time.
MAX_CODES = 2**18
# Codes whose best score is taken first: amax is many times faster than argmax, which then sees one block only.
BLOCK = 32
MIN_ROWS = 128  # of a tile
KEY_IDS = 2**32 - 1  # the half of a key that holds the id
HASH_FACTORS = (0x4F1BBCDCBFA53E0B, 0x2545F4914F6CDD1D)
CENTRE_OF = 255  # codes
DIRECT_WIDTH = 3
EPS = 1e-12  # the smallest |c| that F.normalize divides by
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def nearest_code(z: Tensor, codebook: Tensor, metric: Metric = "euclidean") -> Tensor:
    """The code nearest to each row.

    z: n d, codebook: k d -> n, int64. z: g n d, codebook: g k d -> g n, one lookup per group. Any float dtype, computed
    in float32; no gradient. "euclidean" is argmin |z - c|, "cosine" argmax z.c / |c|, "dot" argmax z.c.

    Of codes that score equally the lowest id wins; codes that are equal always do. A code that holds a number that is
    not finite, or longer than 1e19, is nobody's; a row that holds one has id 0. Raises ``ValueError`` for other shapes,
    dtypes and metrics.

    Euclid is scored as z.c - |c|^2 / 2 after a vector m amid the codes is taken off both: |z|^2 - 2 z.c + |c|^2 loses
    the small differences between codes to the size of |z|^2. Up to d = 3, where many codes lie close together, it is
    scored as -|z - c|^2. For the other metrics m comes off the codes alone, as z.m is the same for all of them.

    The n x k matrix is never there: tiles of 4 MB, and with all else under 64 MB at any n, k, and d up to 1024, the ids
    and a few numbers per row and code excepted. Scores are as exact as torch's matmul: float32 unless TF32 is on.
    """
    return nearest_codes(z, codebook, 1, metric)[..., 0]


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor, m: int, metric: Metric = "euclidean") -> Tensor:
    """The m nearest codes of each row, best first: as ``nearest_code``, n m or g n m. m is at most k."""
    check_lookup(z, codebook, m, metric)
    ids = torch.empty(*z.shape[:-1], m, dtype=torch.int64, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        if z.ndim == 2:
            _search(z, codebook, metric, ids)
        else:
            for group in zip(z, codebook, ids, strict=True):
                _search(*group[:2], metric, group[2])
    return ids


def check_lookup(z: Tensor, codebook: Tensor, m: int = 1, metric: str = "euclidean") -> None:
    """Raises ``ValueError`` unless rows, codes, m and metric fit together."""
    shapes = f"{tuple(z.shape)} and {tuple(codebook.shape)}"
    if not (z.ndim == codebook.ndim == 2 or z.ndim == codebook.ndim == 3 and z.shape[0] == codebook.shape[0]):
        raise ValueError(f"z is n d and codebook k d, or z is g n d and codebook g k d, got {shapes}")
    if z.shape[-1] != codebook.shape[-1] or z.shape[-1] == 0 or codebook.shape[-2] == 0:
        raise ValueError(f"z is n d and codebook k d with the same d > 0 and k > 0, got {shapes}")
    if z.dtype not in FLOATS or codebook.dtype not in FLOATS:
        raise ValueError(f"z and codebook are float32, float16, bfloat16 or float64, got {z.dtype}, {codebook.dtype}")
    if z.device != codebook.device:
        raise ValueError(f"z and codebook are on one device, got {z.device} and {codebook.device}")
    if not 1 <= m <= codebook.shape[-2]:
        raise ValueError(f"m is from 1 to the number of codes, {codebook.shape[-2]}, got {m}")
    if metric not in METRICS:
        raise ValueError(f"metric is 'euclidean', 'cosine' or 'dot', got {metric!r}")


def _search(z: Tensor, codebook: Tensor, metric: Metric, ids: Tensor) -> None:
    """Fills ids, n m. z: n d. codebook: k d.

    A score and its id are one int64, the key: the greatest key is the best score and, of equal ones, the lowest id.
    """
    (n, m), (k, d) = ids.shape, codebook.shape
    direct = metric == "euclidean" and d <= DIRECT_WIDTH
    centre = torch.zeros(d, device=z.device) if direct else _centre(codebook, metric)
    keys = torch.full((n, m), torch.iinfo(torch.int64).min, device=z.device)
    blocks_at_once = min(_blocks(k), MAX_SCORES // (MIN_ROWS * BLOCK), MAX_CODES // (d * BLOCK))
    codes_at_once = max(1, blocks_at_once) * BLOCK
    rows_at_once = max(1, MAX_SCORES // codes_at_once)
    memory = torch.empty(codes_at_once * rows_at_once, device=z.device)  # a fresh one each time costs page faults
    finite = _finite(z)
    clean = bool(finite.all())
    for first in range(0, k, codes_at_once):
        codes = _scorer(codebook[first : first + codes_at_once], centre, metric)
        for start in range(0, n, rows_at_once):
            part = slice(start, start + rows_at_once)
            rows = z[part].float()
            rows = rows if clean else rows.masked_fill(~finite[part], 0)
            rows = F.pad(rows - centre if metric == "euclidean" else rows, (0, 1), value=1.0)
            scores = memory[: len(codes) * len(rows)].view(len(codes), len(rows))
            if direct:
                _direct_scores(codes, rows, scores)
            else:
                torch.mm(codes, rows.T, out=scores)
            keys[part] = _best(keys[part], scores, first)
    ids.copy_(KEY_IDS - (keys & KEY_IDS))
    _lowest_of_equal(codebook, ids)
    if not clean:
        ids.copy_(torch.where(finite, ids, torch.arange(m, device=z.device)))


def _finite(z: Tensor) -> Tensor:
    """n d -> n 1, whether all of a row's numbers are."""
    finite = torch.ones(len(z), 1, dtype=torch.bool, device=z.device)
    step = max(1, MAX_CODES // z.shape[1])
    for start in range(0, len(z), step):
        rows = z[start : start + step]
        if not bool(torch.stack(rows.aminmax()).isfinite().all()):  # nan is both the least and the greatest
            finite[start : start + step] = rows.isfinite().all(dim=1, keepdim=True)
    return finite


def _blocks(codes: int) -> int:
    return -(-codes // BLOCK)


def _centre(codebook: Tensor, metric: Metric) -> Tensor:
    """d. The median, number by number, of some codes: unlike a mean, a few far codes do not move it."""
    some = _directed(codebook[:: -(-len(codebook) // CENTRE_OF)], metric).float()
    return some.nan_to_num(0.0, 0.0, 0.0).median(dim=0).values


def _directed(codes: Tensor, metric: Metric) -> Tensor:
    """In float64: the directions of codes far from 0 differ little."""
    codes = codes.float().double()
    return F.normalize(codes, dim=1, eps=EPS) if metric == "cosine" else codes


def _scorer(codes: Tensor, centre: Tensor, metric: Metric) -> Tensor:
    """t d -> t' (d + 1): the matrix whose product with the rows, which end in a 1, are the scores.

    The last column is -|c|^2 / 2 of the centred codes, so that the scores take one matmul and no second pass. t' is t
    filled up to whole blocks with codes that score -infinity; so do codes that are not finite.
    """
    codes = (_directed(codes, metric) - centre).float()
    half = codes.double().square().sum(dim=1, keepdim=True).float() / -2
    codes = torch.cat([codes, half if metric == "euclidean" else torch.zeros_like(half)], dim=1)
    codes = F.pad(codes.masked_fill(~half.isfinite(), 0), (0, 0, 0, _blocks(len(codes)) * BLOCK - len(codes)))
    codes[len(half) :, -1] = -torch.inf
    codes[: len(half), -1:].masked_fill_(~half.isfinite(), -torch.inf)
    return codes


def _direct_scores(codes: Tensor, rows: Tensor, scores: Tensor) -> None:
    """Fills the scores, t r, with -|z - c|^2, but -infinity where a scorer's last column is."""
    scores.copy_(codes[:, -1:].masked_fill(codes[:, -1:].isfinite(), 0).expand_as(scores))
    for j in range(rows.shape[1] - 1):
        difference = codes[:, j, None] - rows[:, j]
        scores.addcmul_(difference, difference, value=-1)


def _best(keys: Tensor, scores: Tensor, first: int) -> Tensor:
    """The best keys of a tile and those before it. keys: r m. scores: t r. first: the id of the tile's first code."""
    m = keys.shape[1]
    blocks = scores.unflatten(0, (-1, BLOCK))
    tops = blocks.amax(dim=1)
    row = torch.arange(len(keys), device=keys.device)
    if m == 1:
        top, block = tops.max(dim=0)
        inside = blocks[block, :, row].argmax(dim=1)
        return torch.maximum(keys, _key(top, first + block * BLOCK + inside)[:, None])
    # The m best codes lie in the m best blocks.
    numbers = torch.arange(len(tops), device=keys.device)
    block = KEY_IDS - (_key(tops.T, numbers).topk(min(m, len(tops)), dim=1).values & KEY_IDS)
    inside = torch.arange(BLOCK, device=keys.device)
    found = _key(blocks[block, :, row[:, None]], first + block[..., None] * BLOCK + inside)
    return torch.cat([keys, found.flatten(1)], dim=1).topk(m, dim=1).values


def _key(scores: Tensor, ids: Tensor) -> Tensor:
    """float32 and ids below 2^32 -> int64 that sorts by score, then from the highest id to the lowest."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0.0 is 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative floats the greater bits are the smaller number
    return (bits << 32) + (KEY_IDS - ids)


def _lowest_of_equal(codebook: Tensor, ids: Tensor) -> None:
    """Where codes are equal, puts the lowest of their ids first, in place. codebook: k d. ids: n m, best first.

    The scores alone do not: a matmul may round the same product differently at another place of the matrix. So equal
    codes are found by a hash of their bits.
    """
    codes_at_once = max(1, MAX_CODES // codebook.shape[1])
    hashes = torch.empty(len(codebook), dtype=torch.int64, device=codebook.device)
    for start in range(0, len(codebook), codes_at_once):
        hashes[start : start + codes_at_once] = _hash(codebook[start : start + codes_at_once])
    hashes, order = hashes.sort(stable=True)
    same = hashes[1:] == hashes[:-1]
    pairs = same.nonzero()[:, 0]
    if len(pairs) == 0:
        return
    for some in pairs.split(codes_at_once):
        same[some] = (codebook[order[some]] == codebook[order[some + 1]]).all(dim=1)
    # start[i]: where in `order` the ids of the codes that equal code i begin, the lowest first.
    place = torch.arange(len(order), device=order.device)
    start = torch.empty_like(order)
    start[order] = torch.where(F.pad(same, (1, 0)), 0, place).cummax(dim=0).values
    group = start[ids]
    for j in range(ids.shape[1]):
        earlier = (group[:, :j] == group[:, j : j + 1]).sum(dim=1)
        ids[:, j] = order[group[:, j] + earlier]


def _hash(codes: Tensor) -> Tensor:
    """t d -> t, int64: equal for equal codes. Integers alone, so the same wherever a code lies."""
    codes = F.pad(codes.float() + 0.0, (0, codes.shape[1] % 2)).contiguous().view(torch.int64)
    column = torch.arange(1, codes.shape[1] + 1, device=codes.device)
    mixed = codes * (2 * column * HASH_FACTORS[0] + 1)
    mixed = (mixed ^ (mixed >> 32)) * (2 * column * HASH_FACTORS[1] + 1)
    return (mixed ^ (mixed >> 29)).sum(dim=1)


@torch.no_grad()
def code_statistics(z: Tensor, ids: Tensor, k: int, deterministic: bool = False) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, and the sum of them: what a moving average of a codebook needs.

    z: n d, any float dtype. ids: n, int64, from 0 to k - 1 -> counts: k, sums: k d, float32.

    ``deterministic`` sorts the rows by id and adds them up one after another: bitwise the same sums on every run and
    with every number of threads, also on a GPU, where the order of plain additions is left to chance.
    Raises ``ValueError`` for other shapes and dtypes.
    """
    if z.ndim != 2 or z.dtype not in FLOATS or ids.shape != z.shape[:1] or ids.dtype != torch.int64 or k < 1:
        raise ValueError(
            f"z is n d of floats, ids n of int64 and k 1 or more, got {tuple(z.shape)} {z.dtype}, {tuple(ids.shape)} "
            f"{ids.dtype} and k = {k}"
        )
    z = z.float()
    counts = torch.zeros(k, dtype=torch.int64, device=z.device).index_add_(0, ids, torch.ones_like(ids))
    if deterministic:
        order = ids.argsort(stable=True)
        sums = torch.segment_reduce(z[order], "sum", lengths=counts, axis=0, initial=0.0)
    else:
        sums = z.new_zeros(k, z.shape[1]).index_add_(0, ids, z)
    return counts.float(), sums
