"""Triton twin of ``entropy.softmax_entropy``, without the matrix of rows and codes.

Rows pass over the codes for their log-sum-exp and entropy, codes over the rows for their mean
probability; backward, rows pass for sum_j p_ij v_j and for dz, codes for dc. No atomics: the same bits each time.
Products are in float32 up to d = 32, beyond as three of TF32, which is nearly that.

It runs where ``kernels`` does. Letters: n rows, d width, k codes; a program has M rows and walks over tiles of N codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizers_vis.cuda.entropy import SoftmaxEntropy, centred, check_entropy, scale_of, slope
from tokenizers_vis.cuda.kernels import INTERPRETED, OPTIONS, available

MAX_WIDTH = 64  # beyond, registers spill, and the torch walk is as good: its matmuls take most of its time
TILE = (256, 256) if INTERPRETED else (64, 32)


def takes_entropy(z: Tensor, codebook: Tensor) -> bool:
    """Whether ``softmax_entropy`` can run on these; not in float64, nor on wide codes."""
    fits = z.shape[-1] <= MAX_WIDTH and not z.dtype == codebook.dtype == torch.float64
    return fits and available(z)


def softmax_entropy(
    z: Tensor,
    codebook: Tensor,
    temperature: float = 0.01,
    metric: Literal["euclidean", "dot"] = "euclidean",
    eps: float = 0.0,
) -> SoftmaxEntropy:
    """As ``entropy.softmax_entropy``, always in float32. d is at most 64."""
    check_entropy(z, codebook, temperature, metric, eps)
    if z.shape[-1] > MAX_WIDTH:
        raise ValueError(f"d is at most {MAX_WIDTH}, got {z.shape[-1]}; entropy.softmax_entropy takes any")
    if z.ndim == 3:
        groups = [softmax_entropy(*group, temperature, metric, eps) for group in zip(z, codebook, strict=True)]
        return SoftmaxEntropy(*(torch.stack(values) for values in zip(*groups, strict=True)))
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        return SoftmaxEntropy(*_Tiled.apply(z.float(), codebook.float(), temperature, metric == "euclidean", eps))


class _Tiled(torch.autograd.Function):
    """z: n d, codebook: k d, float32 -> sample, batch."""

    @staticmethod
    def forward(ctx, z: Tensor, codebook: Tensor, temperature: float, euclidean: bool, eps: float):
        rows, codes, bias = (part.contiguous() for part in centred(z, codebook, temperature, euclidean))
        (n, d), k = rows.shape, len(codes)
        top, log_sum, entropy = rows.new_empty(3, n)
        mean = rows.new_empty(k)
        m, t = TILE
        shape = entropy_shape(d)
        _row_entropy[triton.cdiv(n, m),](rows, codes, bias, top, log_sum, entropy, n, k, **shape)
        _mean_p[triton.cdiv(k, t),](rows, codes, bias, top, log_sum, mean, n, k, **shape)
        ctx.save_for_backward(z, codebook, top, log_sum, entropy, mean)
        ctx.options = temperature, euclidean, eps
        return entropy.mean(), -torch.special.xlogy(mean, mean + eps).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, of_sample: Tensor, of_batch: Tensor):
        with torch.autocast(of_sample.device.type, enabled=False), torch.cuda.device_of(of_sample):
            return *_gradients(of_sample, of_batch, *ctx.saved_tensors, *ctx.options), None, None, None


def _gradients(
    of_sample: Tensor, of_batch: Tensor, z: Tensor, codebook: Tensor, top: Tensor, log_sum: Tensor, entropy: Tensor,
    mean: Tensor, temperature: float, euclidean: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of z and of the codebook."""
    rows, codes, bias = (part.contiguous() for part in centred(z, codebook, temperature, euclidean))
    (n, d), k = rows.shape, len(codes)
    v = of_batch * slope(mean, eps)
    of_sample = of_sample.reshape(1).float()
    of_z, of_codes, used = torch.empty_like(rows), torch.empty_like(codes), torch.empty_like(mean)
    m, t = TILE
    inputs = (rows, codes, bias, top, log_sum, entropy, v, of_sample)
    mean_v = torch.empty_like(top)
    shape = entropy_shape(d)
    _row_slopes[triton.cdiv(n, m),](rows, codes, bias, top, log_sum, v, mean_v, n, k, **shape)
    _row_gradients[triton.cdiv(n, m),](*inputs, mean_v, of_z, n, k, **shape)
    _code_gradients[triton.cdiv(k, t),](*inputs, mean_v, of_codes, used, n, k, **shape)
    scale = scale_of(temperature, euclidean)
    of_codes = scale * of_codes - codes * used[:, None] if euclidean else scale * of_codes
    return of_z, of_codes


def entropy_shape(d: int) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(d))
    precision = "ieee" if width <= 32 else "tf32x3"
    m, t = TILE
    return {"d": d, "M": m, "N": t, "D": width, "PRECISION": precision, "num_warps": 4, **OPTIONS}


@triton.jit
def _matrix(pointer, first, count, d: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """SIZE rows from ``first``, SIZE D; 0 past the ends."""
    number, columns = first + tl.arange(0, SIZE), tl.arange(0, D)
    there = (number < count)[:, None] & (columns < d)[None, :]
    return tl.load(pointer + number.to(tl.int64)[:, None] * d + columns[None, :], mask=there, other=0.0)


@triton.jit
def _vector(pointer, first, count, other, SIZE: tl.constexpr):
    number = first + tl.arange(0, SIZE)
    return tl.load(pointer + number, mask=number < count, other=other)


@triton.jit
def _log_p(x, c, bias, top, log_sum, PRECISION: tl.constexpr):
    """M N. The greatest logit comes off first, so that the log of a probability near 1 keeps its digits."""
    return tl.dot(x, c.T, input_precision=PRECISION) + bias[None, :] - top[:, None] - log_sum[:, None]


@triton.jit(do_not_specialize=["n", "k"])
def _row_entropy(
    rows, codes, bias, top, log_sum, entropy, n, k,
    d: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """In one pass, with s = sum e^(l - top) and t = sum e^(l - top) (l - top): H = log s - t / s."""
    first = tl.program_id(0) * M
    x = _matrix(rows, first, n, d, M, D)
    most = tl.full((M,), -1e30, dtype=tl.float32)
    s, t = tl.zeros((M,), dtype=tl.float32), tl.zeros((M,), dtype=tl.float32)
    for code in range(0, k, N):
        c = _matrix(codes, code, k, d, N, D)
        logits = tl.dot(x, c.T, input_precision=PRECISION) + _vector(bias, code, k, -1e30, N)[None, :]
        higher = tl.maximum(most, tl.max(logits, axis=1))
        shrink = tl.exp(most - higher)
        below = logits - higher[:, None]
        p = tl.exp(below)
        t = shrink * (t + (most - higher) * s) + tl.sum(p * below, axis=1)
        s = shrink * s + tl.sum(p, axis=1)
        most = higher
    at = first + tl.arange(0, M)
    tl.store(top + at, most, mask=at < n)
    tl.store(log_sum + at, tl.log(s), mask=at < n)
    tl.store(entropy + at, tl.log(s) - t / s, mask=at < n)


@triton.jit(do_not_specialize=["n", "k"])
def _mean_p(
    rows, codes, bias, top, log_sum, mean, n, k,
    d: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * N
    c, offset = _matrix(codes, first, k, d, N, D), _vector(bias, first, k, -1e30, N)
    total = tl.zeros((N,), dtype=tl.float32)
    for row in range(0, n, M):
        x = _matrix(rows, row, n, d, M, D)
        # A row past the end has a top of 1e30, and probability 0.
        most, log_s = _vector(top, row, n, 1e30, M), _vector(log_sum, row, n, 0.0, M)
        total += tl.sum(tl.exp(_log_p(x, c, offset, most, log_s, PRECISION)), axis=0)
    at = first + tl.arange(0, N)
    tl.store(mean + at, total / n, mask=at < k)


@triton.jit(do_not_specialize=["n", "k"])
def _row_slopes(
    rows, codes, bias, top, log_sum, v, mean_v, n, k,
    d: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j p_ij v_j, n."""
    first = tl.program_id(0) * M
    x = _matrix(rows, first, n, d, M, D)
    most, log_s = _vector(top, first, n, 0.0, M), _vector(log_sum, first, n, 0.0, M)
    total = tl.zeros((M,), dtype=tl.float32)
    for code in range(0, k, N):
        c, offset = _matrix(codes, code, k, d, N, D), _vector(bias, code, k, -1e30, N)
        p = tl.exp(_log_p(x, c, offset, most, log_s, PRECISION))
        total += tl.sum(p * _vector(v, code, k, 0.0, N)[None, :], axis=1)
    at = first + tl.arange(0, M)
    tl.store(mean_v + at, total, mask=at < n)


@triton.jit
def _change(x, c, offset, most, log_s, h, v, v_row, of_sample, n, PRECISION: tl.constexpr):
    """The gradient of the logits, M N: p / n (v - sum p v - g (log p + H)), where v already holds the batch's share."""
    log_p = _log_p(x, c, offset, most, log_s, PRECISION)
    return tl.exp(log_p) * (v[None, :] - v_row[:, None] - of_sample * (log_p + h[:, None])) / n


@triton.jit(do_not_specialize=["n", "k"])
def _row_gradients(
    rows, codes, bias, top, log_sum, entropy, v, of_sample, mean_v, of_rows, n, k,
    d: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * M
    x = _matrix(rows, first, n, d, M, D)
    most, log_s = _vector(top, first, n, 0.0, M), _vector(log_sum, first, n, 0.0, M)
    h, v_row = _vector(entropy, first, n, 0.0, M), _vector(mean_v, first, n, 0.0, M)
    g = tl.load(of_sample)
    total = tl.zeros((M, D), dtype=tl.float32)
    for code in range(0, k, N):
        c, offset = _matrix(codes, code, k, d, N, D), _vector(bias, code, k, -1e30, N)
        change = _change(x, c, offset, most, log_s, h, _vector(v, code, k, 0.0, N), v_row, g, n, PRECISION)
        total = tl.dot(change, c, total, input_precision=PRECISION)
    at, columns = (first + tl.arange(0, M))[:, None], tl.arange(0, D)[None, :]
    tl.store(of_rows + at.to(tl.int64) * d + columns, total, mask=(at < n) & (columns < d))


@triton.jit(do_not_specialize=["n", "k"])
def _code_gradients(
    rows, codes, bias, top, log_sum, entropy, v, of_sample, mean_v, of_codes, used, n, k,
    d: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_i change_ik x_i, k d, and sum_i change_ik, k."""
    first = tl.program_id(0) * N
    c, offset = _matrix(codes, first, k, d, N, D), _vector(bias, first, k, -1e30, N)
    v_code = _vector(v, first, k, 0.0, N)
    g = tl.load(of_sample)
    total, count = tl.zeros((N, D), dtype=tl.float32), tl.zeros((N,), dtype=tl.float32)
    for row in range(0, n, M):
        x = _matrix(rows, row, n, d, M, D)
        most, log_s = _vector(top, row, n, 1e30, M), _vector(log_sum, row, n, 0.0, M)
        h, v_row = _vector(entropy, row, n, 0.0, M), _vector(mean_v, row, n, 0.0, M)
        change = _change(x, c, offset, most, log_s, h, v_code, v_row, g, n, PRECISION)
        total = tl.dot(change.T, x, total, input_precision=PRECISION)
        count += tl.sum(change, axis=0)
    at, columns = (first + tl.arange(0, N))[:, None], tl.arange(0, D)[None, :]
    tl.store(of_codes + at.to(tl.int64) * d + columns, total, mask=(at < k) & (columns < d))
    tl.store(used + first + tl.arange(0, N), count, mask=first + tl.arange(0, N) < k)
