"""Ids as one integer, as bits, and as packed words: exact, in integers alone.

Letters: k codebooks, b bits of one token, w words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["msb", "lsb"]
WORD = 64


@dataclass(frozen=True)
class IdFormat:
    """How the k ids of a token are one number.

    sizes: of the k codebooks.
    order: "msb" makes the first codebook the most significant, "lsb" the last. It is part of what the number means,
        so it is kept with the codes.

    In bits, codebook j takes ceil(log2(sizes[j])) of them, and each id is written from its highest bit to its lowest;
    with "lsb" the whole row is reversed, so that the first bit is the lowest one of the first id.
    """

    sizes: tuple[int, ...]
    order: Order = "msb"

    def __post_init__(self) -> None:
        sizes = tuple(self.sizes)
        if not sizes or any(type(size) is not int or not 1 <= size <= 2**63 for size in sizes):
            raise ValueError(f"sizes are one or more whole numbers from 1 to 2^63, got {self.sizes!r}")
        if self.order not in ("msb", "lsb"):
            raise ValueError(f"order is 'msb' or 'lsb', got {self.order!r}")
        object.__setattr__(self, "sizes", sizes)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each id."""
        return tuple((size - 1).bit_length() for size in self.sizes)

    @property
    def bits(self) -> int:
        """Bits of one token."""
        return sum(self.widths)

    @property
    def words(self) -> int:
        """64-bit words of one packed token."""
        return -(-self.bits // WORD)

    @property
    def total(self) -> int:
        """How many different tokens there are. A Python integer, however large."""
        return math.prod(self.sizes)

    def join(self, ids: Tensor) -> Tensor:
        """ids: ... k -> ..., int64, the ids as digits of one number.

        Raises ``ValueError`` when there are 2^63 different tokens or more; ``pack`` has no such limit.
        """
        ids = self._check(ids)
        return (ids * torch.tensor(self._places(), device=ids.device)).sum(dim=-1)

    def split(self, joined: Tensor) -> Tensor:
        """The inverse of ``join``: ... -> ... k, int64. Raises ``ValueError`` for a number that no token has."""
        places = self._places()
        if joined.is_floating_point() or joined.dtype == torch.bool:
            raise ValueError(f"joined ids are integers, got {joined.dtype}")
        joined = joined.long()
        if joined.numel() and (joined.min() < 0 or joined.max() >= self.total):
            raise ValueError(
                f"joined ids run from 0 to {self.total - 1}, got {joined.min().item()} to {joined.max().item()}"
            )
        columns = [joined // place % size for place, size in zip(places, self.sizes, strict=True)]
        return torch.stack(columns, dim=-1)

    def to_bits(self, ids: Tensor) -> Tensor:
        """ids: ... k -> ... b, uint8, 0 or 1."""
        ids = self._check(ids)
        columns = [
            (ids[..., j, None] >> torch.arange(width - 1, -1, -1, device=ids.device)) & 1
            for j, width in self._columns()
        ]
        bits = torch.cat(columns, dim=-1).to(torch.uint8)
        return bits.flip(-1) if self.order == "lsb" else bits

    def from_bits(self, bits: Tensor) -> Tensor:
        """The inverse of ``to_bits``: ... b, of any dtype, where what is not 0 is 1 -> ... k, int64."""
        if bits.ndim == 0 or bits.shape[-1] != self.bits:
            raise ValueError(f"bits are ... {self.bits}, got {tuple(bits.shape)}")
        bits = (bits.flip(-1) if self.order == "lsb" else bits) != 0
        columns, start = {}, 0
        for j, width in self._columns():
            weights = torch.tensor([1 << i for i in range(width - 1, -1, -1)], dtype=torch.int64, device=bits.device)
            columns[j] = (bits[..., start : start + width] * weights).sum(dim=-1)
            start += width
        return self._check(torch.stack([columns[j] for j in range(len(self.sizes))], dim=-1))

    def pack(self, ids: Tensor) -> Tensor:
        """ids: ... k -> ... w, int64 words, the first word the most significant; spare bits of it are 0."""
        ids = self._check(ids)
        words = [ids.new_zeros(ids.shape[:-1]) for _ in range(self.words)]
        for j, width, low in self._fields():
            word, shift = divmod(low, WORD)
            words[word] |= ids[..., j] << shift
            if shift + width > WORD:
                words[word + 1] |= ids[..., j] >> (WORD - shift)
        return torch.stack(words[::-1], dim=-1) if words else ids.new_zeros((*ids.shape[:-1], 0))

    def unpack(self, words: Tensor) -> Tensor:
        """The inverse of ``pack``: ... w, int64 -> ... k, int64."""
        if words.dtype != torch.int64 or words.ndim == 0 or words.shape[-1] != self.words:
            raise ValueError(f"packed tokens are int64 ... {self.words}, got {words.dtype} {tuple(words.shape)}")
        low_first = words.flip(-1)
        columns = [words.new_zeros(words.shape[:-1]) for _ in self.sizes]
        for j, width, low in self._fields():
            word, shift = divmod(low, WORD)
            # The shift of a signed integer copies the sign; the mask takes the copies off again.
            value = (low_first[..., word] >> shift) & _ones(min(width, WORD - shift))
            if shift + width > WORD:
                value |= (low_first[..., word + 1] & _ones(shift + width - WORD)) << (WORD - shift)
            columns[j] = value
        return self._check(torch.stack(columns, dim=-1))

    def _columns(self) -> Sequence[tuple[int, int]]:
        """(codebook, width), the most significant first."""
        pairs = list(enumerate(self.widths))
        return pairs[::-1] if self.order == "lsb" else pairs

    def _fields(self) -> list[tuple[int, int, int]]:
        """(codebook, width, lowest bit) of each codebook that takes bits at all, the least significant first."""
        fields, low = [], 0
        for j, width in reversed(self._columns()):
            if width:
                fields.append((j, width, low))
            low += width
        return fields

    def _places(self) -> list[int]:
        if self.total >= 2**63:
            raise ValueError(
                f"tokens of {self.bits} bits ({len(self.sizes)} codebooks) are more than one int64 can name: there are "
                f"{self.total} of them, and 2^63 is the limit; use pack, which gives {self.words} words"
            )
        if self.order == "lsb":
            return [math.prod(self.sizes[:j]) for j in range(len(self.sizes))]
        return [math.prod(self.sizes[j + 1 :]) for j in range(len(self.sizes))]

    def _check(self, ids: Tensor) -> Tensor:
        k = len(self.sizes)
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim == 0 or ids.shape[-1] != k:
            raise ValueError(f"ids are integers ... {k}, got {ids.dtype} {tuple(ids.shape)}")
        ids = ids.long()
        for j, size in enumerate(self.sizes):
            column = ids[..., j]
            if column.numel() and (column.min() < 0 or column.max() > size - 1):
                raise ValueError(
                    f"ids of codebook {j} run from 0 to {size - 1}, got {column.min().item()} to {column.max().item()}"
                )
        return ids


def _ones(width: int) -> int:
    """width ones, as a signed 64-bit integer."""
    return -1 if width == WORD else (1 << width) - 1
