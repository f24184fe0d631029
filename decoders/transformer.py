"""The one transformer of the house: attention, MLP, block; plain, or modulated by a condition (adaLN-zero).

Pre-norm residual blocks on scaled_dot_product_attention. Encoders and decoders build on it.
QK-norm: Dehghani et al. 2023, arXiv 2302.05442. adaLN-zero: Peebles and Xie 2022, arXiv 2212.09748.

Letters: b batch, n tokens, d width, h heads, e width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

ALL = slice(None)  # places of a sequence
_SHORT = 256  # keys, up to which attention is written out where that is quicker


class Attention(nn.Module):
    """Self-attention, one fused projection for queries, keys and values. scale: of the logits, None is e ** -0.5."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, bias: bool, scale: float | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qk_norm = qk_norm
        self.scale = scale
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: slice = ALL) -> Tensor:
        """x: b n d. mask: bool, True where a query (row) may look at a key (column), or floats that are added to the
        logits; n n, or b 1 n n.

        keep: the places whose result is wanted; with fewer than all, a mask has one row for them all, b 1 1 n.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        if self.qk_norm:
            q, k = (F.layer_norm(t.float(), t.shape[-1:]).to(v.dtype) for t in (q, k))
        attended = attend(q[:, :, keep], k, v, mask, self.scale)
        return self.out(rearrange(attended, "b h n e -> b n (h e)"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """``scaled_dot_product_attention``, b h n e. On a CPU that learns in bfloat16 it is written out for short
    sequences: the way back through the fused kernel takes two to three times as long (``benchmarks/attention.py``).
    """
    written_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= _SHORT
    if not (written_out and torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    with torch.autocast("cpu", enabled=False):  # its softmax is in float32, which costs what was saved
        logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(dim=-1).to(v.dtype) @ v


class MLP(nn.Module):
    """Two layers with a GELU between, or SwiGLU (Shazeer 2020, arXiv 2002.05202) with 2/3 of the hidden width."""

    def __init__(self, width: int, *, kind: Literal["gelu", "swiglu"], ratio: float, bias: bool) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = int(2 * int(ratio * width) / 3) if self.gated else int(ratio * width)
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(x)))
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with a condition, both are shifted, scaled and gated by it."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp: Literal["gelu", "swiglu"] = "swiglu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        affine: bool = False,
        bias: bool = False,
        modulated: bool = False,
        attention_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.attention = Attention(width, heads, qk_norm=qk_norm, bias=bias, scale=attention_scale)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.mlp = MLP(width, kind=mlp, ratio=mlp_ratio, bias=bias)
        self.modulation = nn.Linear(width, 6 * width) if modulated else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        keep: slice = ALL,
        row: Tensor | None = None,
    ) -> Tensor:
        """x: b n d. condition: b d, for a modulated block. keep: the places that come out, as in ``Attention``.

        row: b 6d or 1 6d, ``modulation(silu(condition))`` where it is at hand.
        """
        if self.modulation is None:
            x = x[:, keep] + self.attention(self.attention_norm(x), mask, keep)
            return x + self.mlp(self.mlp_norm(x))
        row = self.modulation(F.silu(condition)) if row is None else row
        parts = row.unsqueeze(1).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x[:, keep] + gate_a * self.attention(modulate(self.attention_norm(x), shift_a, scale_a), mask, keep)
        return x + gate_m * self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m))


class Transformer(nn.Module):
    """A stack of blocks of one kind."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        mlp: Literal["gelu", "swiglu"] = "swiglu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        affine: bool = False,
        bias: bool = False,
        modulated: bool = False,
        attention_scale: float | None = None,
    ) -> None:
        super().__init__()
        options = dict(
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            qk_norm=qk_norm,
            affine=affine,
            bias=bias,
            modulated=modulated,
            attention_scale=attention_scale,
        )
        self.blocks = nn.ModuleList(Block(width, heads, **options) for _ in range(depth))
        self.apply(init_linear)
        for block in self.blocks:
            if block.modulation is not None:
                # At first the condition changes nothing: a block is a plain one, gates open.
                nn.init.zeros_(block.modulation.weight)
                block.modulation.bias.data.view(6, width)[[2, 5]] = 1.0
            init_branches(block.attention, block.mlp, depth)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        keep: slice = ALL,
        rows: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """keep: the places that come out. The last block computes these alone, which changes none of them.

        rows: what ``modulations`` gave for the condition, in its place.
        """
        for i, block in enumerate(self.blocks):
            row = None if rows is None else rows[i]
            x = block(x, mask, condition, keep if i + 1 == len(self.blocks) else ALL, row)
        return x

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """Of every block, b 6d for conditions b d: once for many steps of a sampler, whose times are known ahead."""
        return [block.modulation(F.silu(condition)) for block in self.blocks]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def init_linear(module: nn.Module) -> None:
    """Weights of variance 1 / fan-in, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_branches(attention: Attention, mlp: MLP, depth: int) -> None:
    """Of one block in a stack of ``depth``, after ``init_linear``."""
    # Queries and keys start equal, so that things at like positions attend to each other from the first step and the
    # mean colour is soon left. Trockman and Kolter 2023, arXiv 2305.09828.
    q, k, _ = attention.qkv.weight.data.chunk(3)
    k.copy_(q)
    # Keeps the residual stream's variance from growing with depth (GPT-2).
    for layer in (attention.out, mlp.down):
        layer.weight.data.mul_((2 * depth) ** -0.5)


def learned(*shape: int, std: float = 0.5) -> nn.Parameter:
    """A learned table of vectors (positions, registers, mask tokens).

    About as large as the content that positions are added to: with the usual 0.02 a small model cannot tell its tokens
    apart and stays on the mean colour for long.
    """
    return nn.Parameter(torch.randn(*shape) * std)


def sincos(places: Tensor, dim: int) -> Tensor:
    """Position vectors n d of places n 2 (row, column): half of the channels tells the row, half the column."""
    if dim % 4:
        raise ValueError(f"2D sine-cosine positions need a width that is a multiple of 4, got {dim}")
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [position[:, None] * rate for position in places.double().unbind(dim=1)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    """Fixed position vectors (h w) d of a grid."""
    return sincos(torch.cartesian_prod(torch.arange(height), torch.arange(width)), dim)


def scattered(n: int, grid: int, dim: int) -> nn.Parameter:
    """A learned table n d that starts as positions scattered over a square grid, each prefix evenly.

    Latent tokens that begin at places of their own find what to hold. The places are Roberts' R2 sequence (2018),
    a two-dimensional golden ratio.
    """
    ratio = torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)
    places = (torch.arange(n)[:, None] + 0.5) * ratio % 1 * grid - 0.5
    return nn.Parameter(sincos(places, dim) + 0.1 * torch.randn(n, dim))


def placed(grid: int, dim: int) -> nn.Parameter:
    """A learned table (1 + grid grid) d, of a class token and the positions of a grid, which start as ``sincos_2d``."""
    first = torch.zeros(1, dim)
    return nn.Parameter(torch.cat([first, sincos_2d(grid, grid, dim)]) + 0.1 * torch.randn(1 + grid**2, dim))


def time_features(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """t: b, in [0, 1] -> b dim, cosines then sines of 1000 t (the diffusion transformers' convention)."""
    rate = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * t.float()[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_of(size: int, patch: int) -> int:
    """Patches along one side of a canvas; raises ``ValueError`` when they do not fill it."""
    if size % patch:
        raise ValueError(f"size {size} is not a multiple of patch {patch}")
    return size // patch


def patchify(x: Tensor, size: int) -> Tensor:
    """b c (h size) (w size) -> b (h w) (size size c)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def unpatchify(x: Tensor, size: int, height: int) -> Tensor:
    """b (h w) (size size c) -> b c (h size) (w size), for ``height`` rows of patches."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", p=size, q=size, h=height)


def prefix_mask(lengths: Tensor | None, n: int, before: int) -> Tensor | None:
    """Who may be looked at when each image keeps its first ``lengths`` of n tokens: b 1 1 (before + n), bool.

    ``before`` positions that stand in front of the tokens are always seen. None when every token is kept.
    """
    if lengths is None:
        return None
    kept = torch.arange(n, device=lengths.device) < lengths[:, None]
    seen = torch.ones(len(lengths), before, dtype=torch.bool, device=lengths.device)
    return torch.cat([seen, kept], dim=1)[:, None, None, :]
