"""What every quantizer is: continuous vectors in, codes and ids out.

Letters: b batch, n tokens, d width of a code, k codebooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """The result of quantizing.

    codes: b n d, float32. The straight-through gradient lives inside: the value is the code, the gradient reaches z.
    ids: b n k, int64. One integer per codebook.
    loss: scalar, the weighted sum of ``parts``.
    parts: each loss by name, un-weighted, for the log.
    """

    codes: Tensor
    ids: Tensor
    loss: Tensor
    parts: Mapping[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Abstract. A quantizer says its ``dim`` and ``codebook_sizes``, quantizes, and looks ids up again.

    Everything inside is computed in float32, also under autocast. ``lookup(quantized.ids)`` equals
    ``quantized.codes`` in eval mode.
    """

    dim: int
    codebook_sizes: tuple[int, ...]

    @classmethod
    def kinds(cls) -> Mapping[str, type[Quantizer]]:
        """The quantizers that a config may name by ``kind``."""
        from tokenizers_vis.quantizers import QUANTIZERS

        return QUANTIZERS

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """z: b n d, any float dtype."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """ids: b n k, int64 -> codes: b n d, float32."""

    def check_z(self, z: Tensor) -> Tensor:
        """Returns z in float32; raises ``ValueError`` when it is not b n dim."""
        if z.ndim != 3 or z.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__} takes b n {self.dim} (batch, tokens, width), got {tuple(z.shape)}; "
                f"make the encoder's dim {self.dim}, or rearrange to b n d"
            )
        return z.float()

    def check_ids(self, ids: Tensor) -> Tensor:
        """Returns ids; raises ``ValueError`` when shape, dtype or range is wrong."""
        check_ids(ids, self.codebook_sizes)
        return ids

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_sizes={self.codebook_sizes}"


def check_ids(ids: Tensor, codebook_sizes: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ids are b n k integers, each within its codebook."""
    k = len(codebook_sizes)
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"ids are integers (int64), got {ids.dtype}; call .long() if they hold whole numbers")
    if ids.ndim != 3 or ids.shape[-1] != k:
        raise ValueError(f"ids are b n {k} (batch, tokens, codebooks), got {tuple(ids.shape)}")
    if ids.numel() == 0:
        return
    low, high = ids.amin(dim=(0, 1)).tolist(), ids.amax(dim=(0, 1)).tolist()
    for j, size in enumerate(codebook_sizes):
        if low[j] < 0 or high[j] >= size:
            raise ValueError(f"ids of codebook {j} run from 0 to {size - 1}, got values from {low[j]} to {high[j]}")
