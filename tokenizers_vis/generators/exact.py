"""A generator evaluated so that every machine gets the same bits, which decoding with its probabilities needs.

Floating point sums depend on their order, and that on the batch, the threads and the hardware. So there are none here
that round: what is summed is rounded to a grid first, coarse enough that float64 holds every partial sum exactly
(integers below 2^53, as of integer networks: Ballé et al. 2019, https://openreview.net/forum?id=S1zz2i0cY7). What is
left are single operations (+, -, *, /, sqrt), which IEEE 754 rounds one way everywhere; exp, cos and sin are made of
these, since libraries differ in their last bit.

Letters: b batch, m positions of one pass, n all positions so far, d width, h heads, e width of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, localcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenizers_vis.generators.backbone import Backbone

WEIGHT_BITS, ROW_BITS, SHARE_BITS, VALUE_BITS = 18, 20, 20, 14  # after the binary point
VALUE_BOUND = 256.0  # larger values are cut off: they are summed over positions, so that no row has its own scale
_MODEL = TypeVar("_MODEL", bound=nn.Module)


def exact_copy(model: _MODEL) -> _MODEL:
    """The model on the CPU in float64, its weights on the grid, ready to be run inside ``Exact``.

    Raises ``ValueError`` for weights so large that a sum could need more than 53 bits.
    """
    model = copy.deepcopy(model).to("cpu", torch.float64).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(on_grid(weight, WEIGHT_BITS))
        # Rows of matrices are summed; a bias or the weight of a norm is used number by number.
        largest = (weight.abs().sum(dim=-1) if weight.ndim > 1 else weight.abs()).max().item()
        if not largest * 2 ** (WEIGHT_BITS + ROW_BITS) < 2**53:
            raise ValueError(f"{name} has weights too large for exact sums: a row of them adds up to {largest:g}")
    for part in model.modules():
        if isinstance(part, Backbone):
            part.llama.rotary_emb = ExactRotary(part.llama.config)
    return model


class Exact(TorchFunctionMode):
    """``with Exact():`` sums are exact, and what is not known to be the same everywhere is a ``ValueError``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _EXACT:
            return _EXACT[name](*args, **kwargs)
        found = func(*args, **kwargs)
        parts = found if isinstance(found, (tuple, list)) else (found,)
        if name not in _SAFE and any(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
            raise ValueError(f"this model computes {name!r}, which is not known to be the same on every machine")
        return found


class ExactRotary(nn.Module):
    """Cosines and sines of the rotary embedding, as ``LlamaRotaryEmbedding`` with its plain frequencies."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        e = config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        theta = Decimal(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000)
        with localcontext(prec=40):
            frequencies = [float(theta ** (Decimal(-2 * i) / e)) for i in range(e // 2)]
        self.register_buffer("frequencies", torch.tensor(frequencies, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        return tuple(torch.cat([part, part], dim=-1) for part in cos_sin(angles))


# The operations


def on_grid(x: Tensor, bits: int) -> Tensor:
    """The nearest multiples of 2^-bits."""
    return (x * 2.0**bits).round() * 2.0**-bits


def row_on_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: ... d -> ... d from -1 to 1 on the grid, and ... 1, the power of two that each row was divided by."""
    _, exponent = torch.frexp(x.abs().amax(dim=-1, keepdim=True))
    scale = power_of_two(exponent.long())
    return on_grid(x / scale, ROW_BITS), scale


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight: on the grid, as ``exact_copy`` left it."""
    x, scale = row_on_grid(x)
    product = F.linear(x, weight) * scale
    return product if bias is None else product + bias


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """q: b h m e, k, v: b h n e, attn_mask: booleans -> b h m e."""
    e, n = k.shape[-1], k.shape[-2]
    if e >= 8192 or n >= 2048:
        raise ValueError(f"attention is exact for heads below 8192 and sequences below 2048, got {e} and {n}")
    (q, q_scale), (k, k_scale) = row_on_grid(q), row_on_grid(k)
    logits = q @ k.transpose(-1, -2) * q_scale * k_scale.transpose(-1, -2)
    logits = logits * (1 / math.sqrt(e) if scale is None else scale)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    # On this grid what is far from the largest is 0, and what is masked too.
    shares = on_grid(exp(logits - logits.amax(dim=-1, keepdim=True)), SHARE_BITS)
    values = on_grid(v.clamp(-VALUE_BOUND, VALUE_BOUND), VALUE_BITS)
    return shares @ values / shares.sum(dim=-1, keepdim=True)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    y = x / (_mean_square(x, shape) + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
    return y if weight is None else y * weight


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    rounded, scale = row_on_grid(x)
    x = x - rounded.sum(dim=-1, keepdim=True) / shape[0] * scale
    y = x / (_mean_square(x, shape) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _mean_square(x: Tensor, shape: Sequence[int]) -> Tensor:
    if len(shape) != 1 or shape[0] >= 8192:
        raise ValueError(f"norms are exact over one dimension below 8192, got {tuple(shape)}")
    rounded, scale = row_on_grid(x)
    return (rounded * rounded).sum(dim=-1, keepdim=True) / shape[0] * scale * scale


def total(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return (on_grid(x.double(), WEIGHT_BITS) if x.is_floating_point() else x).sum(*args, **kwargs)


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x / (1 + exp(-x))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """The tanh form, also where the exact one is asked for: they differ by less than 5e-4."""
    return x / (1 + exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def exp(x: Tensor) -> Tensor:
    """e^x within a few units of the last place; at -60 and below, -inf included, as at -60."""
    x = x.clamp(-60, 60)
    twos = (x * 1.4426950408889634).round()
    r = x - twos * 0.6931471805599453
    y = torch.full_like(r, 1 / math.factorial(13))
    for i in range(12, -1, -1):
        y = y * r + 1 / math.factorial(i)
    return y * power_of_two(twos.long())


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, int64 from -1022 to 1023, from its bits."""
    return ((exponent + 1023) << 52).view(torch.float64)


def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of angles up to some thousands."""
    quarters = (x * (2 / math.pi)).round()
    r = x - quarters * (math.pi / 2)
    square = r * r
    cos, sin = (_series(square, range(first, 22, 2)) for first in (0, 1))
    sin = sin * r
    turn = quarters.long() % 4
    odd = turn % 2 == 1
    cos, sin = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return torch.where((turn == 1) | (turn == 2), -cos, cos), torch.where(turn >= 2, -sin, sin)


def _series(square: Tensor, orders: range) -> Tensor:
    """The sum of (-square)^i / orders[i]!."""
    y = torch.zeros_like(square)
    for order in reversed(orders):
        y = y * -square + 1 / math.factorial(order)
    return y


_EXACT: Mapping[str, Callable[..., Any]] = {
    "linear": linear,
    "scaled_dot_product_attention": attention,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "silu": silu,
    "gelu": gelu,
    "sum": total,
}
# Single operations that IEEE 754 defines, and those that move numbers about.
_SAFE = frozenset(
    """__getitem__ add cat chunk clone contiguous div double embedding expand flatten float masked_fill mul neg
    new_empty permute reshape repeat roll round split sqrt squeeze stack sub to transpose unbind unflatten unsqueeze
    view where zeros_like""".split()
)
