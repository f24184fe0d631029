"""The two entropies of a soft assignment to codes (MaskGIT's quantizer, https://github.com/google-research/maskgit;
MAGVIT-2, https://arxiv.org/abs/2310.05737, eq. 4), forward and backward without the matrix of rows and codes.

Letters: g groups, n rows, d width, k codes, r rows of a chunk.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of a chunk. Four float32 matrices of this size are alive at once, 64 MB in all.
MAX_SCORES = 2**22


class SoftmaxEntropy(NamedTuple):
    """In nats, between 0 and log k (with ``eps``: a little less for the batch).

    sample: mean over rows of a row's entropy: 0 when every row is sure of its code.
    batch: entropy of the rows' mean probabilities: log k when all codes are used alike.
    """

    sample: Tensor
    batch: Tensor


def softmax_entropy(
    z: Tensor,
    codebook: Tensor,
    temperature: float = 0.01,
    metric: Literal["euclidean", "dot"] = "euclidean",
    eps: float = 0.0,
) -> SoftmaxEntropy:
    """Entropies of p = softmax(logits), where the logits are -|z - c|^2 / temperature, or z.c / temperature with "dot".

    z: n d, codebook: k d -> scalars. z: g n d, codebook: g k d -> g each, one per group. Differentiable, once, in z and
    codebook. Computed in float32, also under autocast; in float64 where both are float64. Quantizers' usual entropy
    loss is ``sample - batch``.

    With a = mean_i p_i: sample = mean_i H_i, H_i = -sum_k p_ik log p_ik, and batch = -sum_k a_k log(a_k + eps).
    LlamaGen, FQGAN and IBQ have eps = 1e-5; codes of small a lose part of their gradient by it.

    For the gradient, let g and h be those of sample and batch and v_k = -log(a_k + eps) - a_k / (a_k + eps). Then

        dlogit_ik = p_ik / n (h (v_k - sum_j p_ij v_j) - g (log p_ik + H_i))

    and sum_k dlogit_ik = 0, so that with Euclid, s = 2 / temperature, and with "dot", s = 1 / temperature,

        dz_i = s sum_k dlogit_ik c_k,    dc_k = s sum_i dlogit_ik (z_i - c_k)    ("dot": without - c_k)

    Both passes walk over rows, 64 MB of scores at a time or one row if that is more, and only a is kept between them.
    On a GPU with Triton, up to d = 64, ``entropy_kernels.softmax_entropy`` does the same in tiles.
    Raises ``ValueError`` when the shapes do not fit, or for a temperature or eps out of range.
    """
    check_entropy(z, codebook, temperature, metric, eps)
    if z.is_cuda and (kernels := _kernels()) is not None and kernels.takes_entropy(z, codebook):
        return kernels.softmax_entropy(z, codebook, temperature, metric, eps)
    if z.ndim == 3:
        pairs = [softmax_entropy(*group, temperature, metric, eps) for group in zip(z, codebook, strict=True)]
        return SoftmaxEntropy(*(torch.stack(values) for values in zip(*pairs, strict=True)))
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.float64 if z.dtype == codebook.dtype == torch.float64 else torch.float32
        return SoftmaxEntropy(*_Walk.apply(z.to(dtype), codebook.to(dtype), temperature, metric == "euclidean", eps))


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, where Triton is installed."""
    try:
        return importlib.import_module("tokenizers_vis.cuda.entropy_kernels")
    except ImportError:
        return None


class _Walk(torch.autograd.Function):
    """z: n d, codebook: k d, of one dtype -> sample, batch."""

    @staticmethod
    def forward(ctx, z: Tensor, codebook: Tensor, temperature: float, euclidean: bool, eps: float):
        rows, codes, bias = centred(z, codebook, temperature, euclidean)
        sample, mean = z.new_zeros(()), z.new_zeros(len(codes))
        for part in _chunks(rows, codes):
            log_p = _log_p(part, codes, bias)
            p = log_p.exp()
            sample -= log_p.mul_(p).sum()
            mean += p.sum(dim=0)
        mean /= len(rows)
        ctx.save_for_backward(z, codebook, mean)
        ctx.options = temperature, euclidean, eps
        return sample / len(rows), -torch.special.xlogy(mean, mean + eps).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, of_sample: Tensor, of_batch: Tensor):
        z, codebook, mean = ctx.saved_tensors
        temperature, euclidean, eps = ctx.options
        with torch.autocast(z.device.type, enabled=False):
            rows, codes, bias = centred(z, codebook, temperature, euclidean)
            v = slope(mean, eps)
            of_z, of_codes, used = torch.empty_like(rows), torch.zeros_like(codes), torch.zeros_like(mean)
            for part, to in zip(_chunks(rows, codes), _chunks(of_z, codes), strict=True):
                log_p = _log_p(part, codes, bias)
                p = log_p.exp()
                entropy = -(p * log_p).sum(dim=1, keepdim=True)
                change = log_p.add_(entropy).mul_(-of_sample).add_(of_batch * v).sub_(of_batch * (p @ v)[:, None])
                change.mul_(p).div_(len(rows))
                torch.mm(change, codes, out=to)
                of_codes.addmm_(change.T, part)
                used += change.sum(dim=0)
            scale = scale_of(temperature, euclidean)
            of_codes = scale * of_codes - codes * used[:, None] if euclidean else scale * of_codes
        return of_z, of_codes, None, None, None


def slope(mean: Tensor, eps: float) -> Tensor:
    """The derivative of -a log(a + eps), 0 where a is 0: no row is there to feel it."""
    used = mean > 0
    shifted = torch.where(used, mean + eps, 1.0)
    return torch.where(used, -shifted.log() - mean / shifted, 0.0)


def scale_of(temperature: float, euclidean: bool) -> float:
    return (2 if euclidean else 1) / temperature


def centred(z: Tensor, codebook: Tensor, temperature: float, euclidean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows n d, codes k d and bias k, such that rows @ codes.T + bias are the logits but for a constant of each row.

    Without the codes' mean m the numbers are small and few digits cancel: z.m is the same for all codes.
    """
    mean, scale = codebook.mean(dim=0), scale_of(temperature, euclidean)
    codes = codebook - mean
    bias = -codes.square().sum(dim=1) / temperature
    return (z - mean, codes * scale, bias) if euclidean else (z, codes * scale, torch.zeros_like(bias))


def _chunks(rows: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, MAX_SCORES // len(codes)))


def _log_p(rows: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """r k."""
    return F.log_softmax(torch.addmm(bias, rows, codes.T), dim=1)


def check_entropy(z: Tensor, codebook: Tensor, temperature: float, metric: str, eps: float) -> None:
    shapes = f"{tuple(z.shape)} and {tuple(codebook.shape)}"
    if not (z.ndim == codebook.ndim == 2 or z.ndim == codebook.ndim == 3 and len(z) == len(codebook)):
        raise ValueError(f"z is n d and codebook k d, or z is g n d and codebook g k d, got {shapes}")
    if z.shape[-1] != codebook.shape[-1] or 0 in (*z.shape, *codebook.shape):
        raise ValueError(f"z is n d and codebook k d with the same d, all 1 or more, got {shapes}")
    if not (z.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(f"z and codebook are of a float dtype, got {z.dtype} and {codebook.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature is above 0, got {temperature}")
    if not eps >= 0:
        raise ValueError(f"eps is 0 or more, got {eps}")
    if metric not in ("euclidean", "dot"):
        raise ValueError(f"metric is 'euclidean' or 'dot', got {metric!r}")
