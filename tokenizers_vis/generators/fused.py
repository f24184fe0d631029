"""The backbone for sampling: the same numbers from fewer operations, which is what token by token takes its time for.

Queries, keys and values come from one product, the two halves of the gated MLP from another, each norm is one
operation, and queries and keys are turned together. ``Backbone`` is the truth; this is tested against it.

Letters: b batch, m positions of one pass, d width, h heads, e width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizers_vis.generators.backbone import Backbone, KeyValues


class _Block(NamedTuple):
    """The weights of one block."""

    before_attention: Tensor
    queries_keys_values: Tensor
    out: Tensor
    before_mlp: Tensor
    gate_up: Tensor
    down: Tensor


class FusedBackbone:
    """Reads the weights of a backbone once, as they are now; for inference."""

    def __init__(self, backbone: Backbone) -> None:
        llama = backbone.llama
        self.llama, self.heads, self.eps = llama, llama.config.num_attention_heads, llama.config.rms_norm_eps
        self.blocks = []
        for layer in llama.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.blocks.append(
                _Block(
                    layer.input_layernorm.weight,
                    torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                )
            )

    def __call__(self, x: Tensor, positions: Tensor, *, cache: KeyValues, mask: Tensor | None) -> Tensor:
        """x: b m d -> b m d. As ``Backbone.forward`` with a cache; positions: m. mask: q k booleans; None sees all."""
        cos, sin = self.llama.rotary_emb(x, position_ids=positions[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[:, None], torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, None]
        for i, block in enumerate(self.blocks):
            y = F.linear(self._norm(x, block.before_attention), block.queries_keys_values)
            y = rearrange(y, "b m (c h e) -> b (c h) m e", c=3, h=self.heads)
            turned = y[:, : 2 * self.heads]
            # The halves of each head change places, the first with its sign turned: that is in ``sin``.
            turned = turned * cos + turned.roll(half, dims=-1) * sin
            queries, new_keys = turned.split(self.heads, dim=1)
            keys, values = cache.update(new_keys, y[:, 2 * self.heads :], i)
            y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            x = x + F.linear(rearrange(y, "b h m e -> b m (h e)"), block.out)
            gate, up = F.linear(self._norm(x, block.before_mlp), block.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, block.down)
        cache.filled += x.shape[1]
        return self._norm(x, self.llama.norm.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)
