"""What every quantizer is: continuous vectors in, codes and ids out.

Letters: b batch, n tokens, d width of a code, k codebooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from tokenizers_vis.quantizers.integers import IdFormat, Order

HUGE = 1e15  # stands for infinity in eval: its square is still finite in float32


class NotFiniteError(ValueError):
    """In training a quantizer was given numbers that are not finite."""


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

    Everything inside is computed in float32, also under autocast. Nothing changes its input in place.
    ``lookup(quantized.ids)`` equals ``quantized.codes`` in eval mode, bit for bit, where ``discrete`` is true. Where it
    is false the codes hold more than the ids: a decoder wants the codes, and lookup gives the nearest to them.

    ``order`` says which of several codebooks, or of the digits inside an id, is the most significant: "msb" the first,
    "lsb" the last. ``id_format`` turns ids into one integer, bits and packed words by it.
    """

    dim: int
    codebook_sizes: tuple[int, ...]
    order: Order = "msb"
    discrete: bool = True
    fixed_n: int | None = None  # vectors of one image, where only that number can be quantized

    @property
    def in_dim(self) -> int:
        """Width of z: ``dim``, but where a code is narrower or wider than what it is made from."""
        return self.dim

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

    @property
    def id_format(self) -> IdFormat:
        """Exact conversions between ids, one integer, bits and words."""
        return IdFormat(self.codebook_sizes, self.order)

    def id_count(self, n: int) -> int:
        """Ids that n vectors give. Unequal to n only where one vector is quantized at several scales."""
        return n

    def check_z(self, z: Tensor) -> Tensor:
        """Returns z in float32, finite.

        Raises ``ValueError`` when it is not b n in_dim or empty, and, in training, ``NotFiniteError`` when it holds a
        number that is not finite. In eval nan counts as 0 and an infinity as 1e15 of its sign, so that every z has a
        defined id.
        """
        if z.ndim != 3 or z.shape[-1] != self.in_dim:
            raise ValueError(
                f"{type(self).__name__} takes b n {self.in_dim} (batch, tokens, width), got {tuple(z.shape)}; "
                f"make the encoder's dim {self.in_dim}, or rearrange to b n d"
            )
        if z.shape[0] == 0 or z.shape[1] == 0:
            raise ValueError(f"there is nothing to quantize: z is {tuple(z.shape)}, b and n are 1 or more")
        z = z.float()
        if not self.training:
            return z.nan_to_num(nan=0.0, posinf=HUGE, neginf=-HUGE)
        if not torch.compiler.is_compiling() and not bool(z.isfinite().all()):
            wrong = (~z.isfinite()).nonzero()
            b, n, d = wrong[0].tolist()
            raise NotFiniteError(
                f"z holds {len(wrong)} of {z.numel()} numbers that are not finite, the first {z[b, n, d].item()} at "
                f"[{b}, {n}, {d}] (image, token, width); lower the learning rate, clip gradients, or look at that image"
            )
        return z

    def check_ids(self, ids: Tensor) -> Tensor:
        """Returns ids as int64; raises ``ValueError`` when shape, dtype or range is wrong.

        A compiled graph cannot raise for values, so there the range is the caller's business.
        """
        check_ids(ids, self.codebook_sizes)
        return ids.long()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_sizes={self.codebook_sizes}"


def check_ids(ids: Tensor, codebook_sizes: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ids are b n k integers, each within its codebook."""
    k = len(codebook_sizes)
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"ids are integers (int64), got {ids.dtype}; call .long() if they hold whole numbers")
    if ids.ndim != 3 or ids.shape[-1] != k:
        raise ValueError(f"ids are b n {k} (batch, tokens, codebooks), got {tuple(ids.shape)}")
    if ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = ids.amin(dim=(0, 1)).tolist(), ids.amax(dim=(0, 1)).tolist()
    for j, size in enumerate(codebook_sizes):
        if low[j] < 0 or high[j] >= size:
            raise ValueError(f"ids of codebook {j} run from 0 to {size - 1}, got values from {low[j]} to {high[j]}")


def check_option(fits: bool, rule: str, value: object) -> None:
    """Raises ``ValueError("{rule}, got {value}")`` unless it fits."""
    if not fits:
        raise ValueError(f"{rule}, got {value!r}")


def weighted(losses: Mapping[str, tuple[float, Tensor]], like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(weight, loss) by name -> their weighted sum, and each un-weighted, for ``Quantized``. like: dtype and device."""
    loss = sum((weight * value for weight, value in losses.values()), start=like.new_zeros(()))
    return loss, {name: value.detach() for name, (_, value) in losses.items()}


def straight_through(codes: Tensor, z: Tensor) -> Tensor:
    """The codes, bit for bit, with the gradient going to z as if codes were z (Bengio et al. 2013).

    Adding an exact zero, and not z + (codes - z).detach(), which rounds.
    """
    return codes.detach() + (z - z.detach())


def rotation_trick(codes: Tensor, z: Tensor) -> Tensor:
    """The codes, with the gradient turned and scaled as z must be to become them (Fifty et al. 2024, eq. 4).

    codes, z: ... d. The gradient is that of ``|c| / |z| R z`` with R, the rotation from z's direction to c's, held
    fixed: R x = x - 2 (x.w) w + 2 (x.u) v, where u and v are the directions of z and c and w that of u + v.
    See https://arxiv.org/abs/2410.06424. The value is the code but for rounding.
    """
    with torch.no_grad():
        u, v = F.normalize(z, dim=-1, eps=1e-6), F.normalize(codes, dim=-1, eps=1e-6)
        w = F.normalize(u + v, dim=-1, eps=1e-6)
        scale = codes.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    turned = z - 2 * (z * w).sum(dim=-1, keepdim=True) * w + 2 * (z * u).sum(dim=-1, keepdim=True) * v
    turned = turned * scale
    return codes.detach() + (turned - turned.detach())


def over_ranks(tensor: Tensor) -> Tensor:
    """Sums the tensor over all ranks of ``torch.distributed``, in place, and returns it; alone, nothing happens."""
    if is_distributed():
        distributed.all_reduce(tensor)
    return tensor


def from_first_rank(tensor: Tensor) -> Tensor:
    """Rank 0's tensor on all ranks, in place; alone, nothing happens."""
    if is_distributed():
        distributed.broadcast(tensor, src=0)
    return tensor


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
