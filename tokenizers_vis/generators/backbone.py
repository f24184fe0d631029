"""The transformer of a generator: Llama's blocks (Touvron et al. 2023, arXiv 2302.13971) from transformers, with SDPA.

Letters: b batch, m positions of one pass, d width, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import check_option


class Backbone(nn.Module):
    """The blocks and last norm of a ``LlamaModel``, under its own parameter names; embeddings and heads are elsewhere.

    width: d. depth: blocks. heads: of attention; width / heads is even, for the rotary positions.
    mlp_ratio: hidden width of the gated MLP, as a multiple of width, rounded up to a multiple of 32.
    dropout: of what each attention and each MLP adds to the residual stream. Llama itself has none.
    """

    def __init__(self, *, width: int, depth: int, heads: int, mlp_ratio: float = 8 / 3, dropout: float = 0.0) -> None:
        super().__init__()
        check_option(depth >= 1, "depth is 1 or more", depth)
        check_option(heads >= 1 and width % (2 * heads) == 0, f"heads divides width ({width}) into even parts", heads)
        check_option(mlp_ratio > 0, "mlp_ratio is above 0", mlp_ratio)
        check_option(0 <= dropout < 1, "dropout is from 0 to below 1", dropout)
        try:
            from transformers import LlamaConfig, LlamaModel
        except ModuleNotFoundError as error:
            raise ValueError(f"generators need {error.name}: pip install 'tokenizers-vis[generate]'") from error
        self.width = width
        self.llama = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=-(-int(width * mlp_ratio) // 32) * 32,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="sdpa",
            )
        )
        del self.llama.embed_tokens
        for layer in self.llama.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                # Writers into the residual stream start smaller the more of them there are, as in GPT-2.
                nn.init.normal_(part.weight, std=0.02 * (2 * depth) ** -0.5)
                if dropout:
                    # The hook is given the module it is on, so that a deep copy drops by its own mode.
                    part.register_forward_hook(lambda module, _, out: F.dropout(out, dropout, module.training))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        cache: KeyValues | None = None,
        mask: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        """x: b m d -> b m d, after the last norm.

        positions: m or b m, for the rotary embedding.
        cache: what came before; the keys and values of x are added to it.
        mask: q k booleans or b q k, True where a query sees a key; k counts what is in the cache too. None is causal,
            or all see all where ``causal`` is false. After a cache and without a mask, x is a single position, or it
            sees itself whole.
        """
        positions = positions if positions.ndim == 2 else positions[None]
        rotary = self.llama.rotary_emb(x, position_ids=positions)
        if mask is not None:
            mask = mask[:, None] if mask.ndim == 3 else mask[None, None]
        for layer in self.llama.layers:
            x = layer(x, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, is_causal=causal)
        if cache is not None:
            cache.filled += x.shape[1]
        return self.llama.norm(x)


class KeyValues:
    """A static cache: room for ``length`` positions is taken once, and filled from the left.

    It has the one method that transformers' attention asks of a cache. Going back is free: ``filled`` is a number.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self._room: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """keys, values: b h m d of the new positions -> of all so far."""
        end = self.filled + keys.shape[2]
        if end > self.length:
            raise ValueError(f"the cache has room for {self.length} positions, {end} are asked for")
        if layer_idx not in self._room:
            b, h, _, d = keys.shape
            self._room[layer_idx] = (keys.new_empty(b, h, self.length, d), values.new_empty(b, h, self.length, d))
        for room, new in zip(self._room[layer_idx], (keys, values), strict=True):
            room[:, :, self.filled : end] = new
        all_keys, all_values = self._room[layer_idx]
        return all_keys[:, :, :end], all_values[:, :, :end]

    def keep(self, rows: int) -> None:
        """Forgets all but the first rows of the batch."""
        self._room = {layer: (keys[:rows], values[:rows]) for layer, (keys, values) in self._room.items()}


def causal_after(filled: int, m: int, device: torch.device) -> Tensor | None:
    """m (filled + m), True where one of m new positions sees an earlier one; None where a single one sees all."""
    if m == 1:
        return None
    return torch.ones(m, filled + m, dtype=torch.bool, device=device).tril(filled)
