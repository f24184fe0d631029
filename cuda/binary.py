"""Entropy of binary codes, exact and without a table of them (the loss of MAGVIT-2, https://arxiv.org/abs/2310.05737).

The softmax of -|z - c|^2 / T over all sign vectors c of {-s, s}^d is a product of d independent bits, bit i being
positive with probability sigmoid(4 s z_i / T). So the entropy of one row is a sum of d binary entropies, and the
average over rows, a distribution over 2^d codes, is one matrix product of two tables of half codes, 2^(d/2) columns
each. The same holds for BSQ (https://arxiv.org/abs/2406.07548).

Letters: g groups, n rows, d bits, K = 2^d codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BITS = 28  # the average over 2^28 codes is 1 GiB in float32
BLOCK = 2**20  # numbers of one working table: 4 MiB in float32


def sample_entropy(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over rows of the entropy of one row's code, in nats.

    logits: n d -> scalar, or g n d -> g. The log-odds of each bit, here 4 s z / T. float64 is computed in float64,
        everything else in float32.
    weights: n, of each row, 0 or more with a positive sum; None counts all rows alike. No gradient.

    Nothing is clamped: the gradient, -l sigmoid(l) sigmoid(-l), lives as long as sigmoid(-|l|) is above 0.
    """
    logits, weights = _checked(logits, weights)
    with torch.autocast(logits.device.type, enabled=False):
        entropy = -(logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits))
        return (entropy.sum(dim=-1) * weights).sum(dim=-1)


def batch_entropy(logits: Tensor, weights: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """The entropy of the average over rows of the distribution over the 2^d codes, in nats.

    logits, weights: as in ``sample_entropy``; n d -> scalar, or g n d -> g, each group with an average of its own.
    eps: 0 is the entropy. Above 0 it is -sum a log(a + eps), as Open-MAGVIT2 writes it with 1e-5: near uniform that
        halves the gradient at 2^18 codes.

    Memory is 2^d numbers per group and a few tables of 4 MiB, never n x 2^d; the gradient is found in the forward pass,
    from the same numbers, and kept as n d. On a GPU TF32 is off by torch's default, and should be.
    Raises ``ValueError`` for more than 28 bits.
    """
    logits, weights = _checked(logits, weights)
    d = logits.shape[-1]
    if d > MAX_BITS:
        raise ValueError(f"the average over 2^d codes is held for d up to {MAX_BITS}, got d = {d}; split the bits")
    if logits.ndim == 2:
        return _BatchEntropy.apply(logits[None], weights, eps)[0]
    return _BatchEntropy.apply(logits, weights, eps)


class _BatchEntropy(torch.autograd.Function):
    """logits: g n d, weights: n, of sum 1 -> g."""

    @staticmethod
    def forward(ctx, logits: Tensor, weights: Tensor, eps: float) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            d = logits.shape[-1]
            ratio = _mean_ratio(logits, weights)
            deficit = _to_slope(ratio, eps)
            if ctx.needs_input_grad[0]:
                ctx.save_for_backward(_gradient(logits, weights, ratio))
            return d * math.log(2) - deficit

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (slope,) = ctx.saved_tensors
        return gradient[:, None, None] * slope, None, None


def _mean_ratio(logits: Tensor, weights: Tensor) -> Tensor:
    """The average probability of each code, times K: g 2^(d/2) 2^(d - d/2), all 1 where the codes are used alike."""
    g, _, d = logits.shape
    ratio = logits.new_zeros(g, 1 << (d // 2), 1 << (d - d // 2))
    for rows, weight in _blocks(logits, weights):
        high, low = _halves(rows)
        ratio.baddbmm_((_ratios(high) * weight[:, None]).mT, _ratios(low))
    return ratio


def _to_slope(ratio: Tensor, eps: float) -> Tensor:
    """Turns the ratios r in place into dH/dr, and returns log K - H, which is mean(r log(r + eps K)): g.

    Measured from the uniform distribution both keep their precision near it. The slope leaves out what is alike for
    all codes: the probabilities always sum to 1, so it moves nothing.
    """
    g, _, columns = ratio.shape
    size = ratio[0].numel()
    shift = eps * size
    deficit = ratio.new_zeros(g)
    for block in ratio.split(max(1, BLOCK // (g * columns)), dim=1):
        deficit += torch.special.xlogy(block, block + shift).sum(dim=(1, 2))
        shifted = (block + shift).clamp_min(torch.finfo(ratio.dtype).tiny)
        block.copy_((shift / shifted - shifted.log()) / size)
    return deficit / size


def _gradient(logits: Tensor, weights: Tensor, slope: Tensor) -> Tensor:
    """dH/dlogits, g n d, from dH/dr."""
    gradient = torch.empty_like(logits)
    start = 0
    for rows, weight in _blocks(logits, weights):
        high, low = _halves(rows)
        highs, lows = _ratios(high), _ratios(low)
        by_high = (lows @ slope.mT) * highs
        by_low = (highs @ slope) * lows
        parts = torch.cat([_to_bits(by_high, high), _to_bits(by_low, low)], dim=-1)
        gradient[:, start : start + len(weight)] = parts * weight[:, None]
        start += len(weight)
    return gradient


def _blocks(logits: Tensor, weights: Tensor) -> zip:
    """The rows in blocks whose tables hold ``BLOCK`` numbers."""
    g, _, d = logits.shape
    rows = max(1, BLOCK // (g << (d - d // 2)))
    return zip(logits.split(rows, dim=1), weights.split(rows), strict=True)


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """g n d -> g n d/2, g n (d - d/2)."""
    d = rows.shape[-1]
    return rows[..., : d // 2], rows[..., d // 2 :]


def _ratios(logits: Tensor) -> Tensor:
    """g n h -> g n 2^h: the probability of each code of h bits, times 2^h. The first bit is the highest."""
    table = logits.new_ones((*logits.shape[:-1], 1))
    for logit in logits.unbind(dim=-1):
        pair = 2 * torch.stack([-logit, logit], dim=-1).sigmoid()
        table = (table[..., None] * pair[..., None, :]).flatten(-2)
    return table


def _to_bits(by_code: Tensor, logits: Tensor) -> Tensor:
    """g n 2^h, each code's probability times its slope -> g n h, the derivative by each bit's logit l.

    A code's probability goes as sigmoid(l) where its bit is 1 and as sigmoid(-l) where it is 0. The two sums are kept
    apart, for the derivatives of those logs, sigmoid(-l) and -sigmoid(l), are tiny one at a time.
    """
    h = logits.shape[-1]
    codes = torch.arange(1 << h, device=logits.device)
    bits = (codes[:, None] >> torch.arange(h - 1, -1, -1, device=logits.device) & 1).to(logits.dtype)
    return (by_code @ bits) * (-logits).sigmoid() - (by_code @ (1 - bits)) * logits.sigmoid()


def _checked(logits: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64; the weights of sum 1, without gradient."""
    if logits.ndim not in (2, 3) or 0 in logits.shape:
        raise ValueError(f"logits are n d or g n d, none of them 0, got {tuple(logits.shape)}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    n = logits.shape[-2]
    if weights is None:
        return logits, logits.new_full((n,), 1 / n)
    if weights.shape != (n,):
        raise ValueError(f"weights are one for each of the {n} rows, got {tuple(weights.shape)}")
    weights = weights.detach().to(logits.dtype)
    return logits, weights / weights.sum()
