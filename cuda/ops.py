"""The ops that the quantizers use: the fastest implementation at hand, which gives what ``reference.py`` gives.

On the CPU that is the C++ of ``nearest.cpp`` for work that is worth it, on a GPU the Triton of ``kernels.py``, and
plain torch wherever these are absent. Compilers and ``torch.export`` see a lookup as one operator.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from tokenizers_vis.cuda import native, reference
from tokenizers_vis.cuda.entropy import SoftmaxEntropy, softmax_entropy
from tokenizers_vis.cuda.reference import Metric, check_lookup, code_statistics

__all__ = ["Metric", "SoftmaxEntropy", "code_statistics", "nearest_code", "nearest_codes", "softmax_entropy"]

# Multiplications from which the C++ kernel is taken; before that it would be loaded, or even built, for nothing.
NATIVE_WORK = 2**20


def nearest_code(z: Tensor, codebook: Tensor, metric: Metric = "euclidean") -> Tensor:
    """The code nearest to each row, int64: n for z n d and codebook k d, g n for g n d and g k d. No gradient.

    metric: "euclidean" is argmin |z - c|, "cosine" argmax z.c / |c|, "dot" argmax z.c. In float32, also under autocast,
    and without the n x k matrix. Of codes equally near the lowest id wins; a row that holds a number that is not finite
    has id 0. Raises ``ValueError`` for other shapes, dtypes and metrics. See ``reference.nearest_code``.
    """
    check_lookup(z, codebook, 1, metric)
    return _nearest_codes(z.detach(), codebook.detach(), 1, metric).squeeze(-1)


def nearest_codes(z: Tensor, codebook: Tensor, m: int, metric: Metric = "euclidean") -> Tensor:
    """The m nearest codes of each row, best first: n m or g n m. As ``nearest_code``; m is from 1 to k."""
    check_lookup(z, codebook, m, metric)
    return _nearest_codes(z.detach(), codebook.detach(), m, metric)


@torch.library.custom_op("tokenizers_vis::nearest_codes", mutates_args=())
def _nearest_codes(z: Tensor, codebook: Tensor, m: int, metric: str) -> Tensor:
    ids = _by_twin(z, codebook, metric) if m == 1 else None
    return reference.nearest_codes(z, codebook, m, metric) if ids is None else ids.unsqueeze(-1)


@_nearest_codes.register_fake
def _(z: Tensor, codebook: Tensor, m: int, metric: str) -> Tensor:
    return z.new_empty((*z.shape[:-1], m), dtype=torch.int64)


def _by_twin(z: Tensor, codebook: Tensor, metric: str) -> Tensor | None:
    """The ids, or None where no twin of the reference can give them."""
    if z.device.type == "cuda" and (kernels := _kernels()) is not None and kernels.available(z):
        return kernels.nearest_code(z, codebook, metric)
    if z.device.type == "cpu" and z.numel() * codebook.shape[-2] >= NATIVE_WORK:
        return native.nearest_code(z, codebook, metric)
    return None


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, where Triton is installed."""
    try:
        return importlib.import_module("tokenizers_vis.cuda.kernels")
    except ImportError:
        return None
