"""Keeps a module's numbers in float32 when the model around it is cast."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, which ``nn.Module._apply`` gives to each tensor, without its change of dtype.

    In bfloat16 the moving average of a constant 256 stalls at 64, and rounded codes change the nearest one. So a
    quantizer moves to another device with ``model.to(...)``, but stays in float32.
    """

    def kept(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return kept
