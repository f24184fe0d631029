"""The bits of a code as ids of a few bits each, and back: integers alone, and no table of codes."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor, nn

from tokenizers_vis.quantizers.integers import Order


class BitIds(nn.Module):
    """Cuts d bits into k ids of ``widths`` bits each, the first bits into the first id.

    order: "msb" makes the first bit of each id its highest, "lsb" its lowest. ``IdFormat`` of the same order gives the
        bits in the order of the dimensions, for both.

    Raises ``ValueError`` unless there is a width at all and each is from 1 to 62, so that an id fits int64.
    """

    def __init__(self, widths: tuple[int, ...], order: Order) -> None:
        super().__init__()
        if not widths or any(not 1 <= width <= 62 for width in widths):
            raise ValueError(f"an id holds 1 to 62 bits, got ids of {widths} bits; cut the code into more ids")
        if order not in ("msb", "lsb"):
            raise ValueError(f"bit_order is 'msb' or 'lsb', got {order!r}")
        self.widths = widths
        self.sizes = tuple(1 << width for width in widths)
        owners = [j for j, width in enumerate(widths) for _ in range(width)]
        shifts = [i if order == "lsb" else width - 1 - i for width in widths for i in range(width)]
        self.register_buffer("_owners", torch.tensor(owners), persistent=False)
        self.register_buffer("_shifts", torch.tensor(shifts), persistent=False)

    def pack(self, bits: Tensor) -> Tensor:
        """bits: ... d, bool -> ... k, int64."""
        placed = bits.long() << self._shifts
        if len(set(self.widths)) == 1:
            return reduce(placed, "... (k b) -> ... k", "sum", b=self.widths[0])
        return torch.stack([part.sum(dim=-1) for part in placed.split(self.widths, dim=-1)], dim=-1)

    def unpack(self, ids: Tensor) -> Tensor:
        """The inverse of ``pack``: ... k, int64 -> ... d, bool."""
        return (ids.index_select(-1, self._owners) >> self._shifts & 1).bool()
