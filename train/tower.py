"""The vision transformer of a dual encoder takes the weights of CLIP or SigLIP, as TokenFlow begins.

Qu et al. 2024, "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation", arXiv 2412.03069.
"""

from __future__ import annotations

import re

from torch import Tensor

from tokenizers_vis.config import ConfigError
from tokenizers_vis.encoders.base import Encoder
from tokenizers_vis.encoders.dual import DualEncoder
from tokenizers_vis.eval.features import timm_net
from tokenizers_vis.weights import CheckpointError, load_strictly

# timm's names -> ours.
NAMES = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "read_patches."),
    (r"^norm_pre\.", "norm_in."),
    (r"^norm\.", "norm_out."),
    (r"^blocks\.", "transformer.blocks."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.norm2\.", ".mlp_norm."),
    (r"\.mlp\.fc1\.", ".mlp.up."),
    (r"\.mlp\.fc2\.", ".mlp.down."),
)


def adopt_tower(encoder: Encoder, model: str, weights: str = "") -> None:
    """Fills ``encoder.semantic`` with a timm model's weights, of CLIP for style "clip", of SigLIP for "siglip".

    model, weights: as ``timm_net`` takes them, such as "vit_base_patch16_clip_quickgelu_224.openai" (CLIP's own weights
        want the quick GELU) or "vit_so400m_patch14_siglip_384.webli", and a local file or "".

    A SigLIP lends all its blocks but the last one or more, as many as the encoder has; its last norm and its pooling
    stay behind. Raises ``ConfigError`` for another encoder or model, ``ValueError`` for weights that cannot be had.
    """
    if not isinstance(encoder, DualEncoder):
        raise ConfigError(f"init.tower fills the transformer of encoder 'dual'; this one is {type(encoder).__name__}")
    tower = encoder.semantic
    net, _ = timm_net(model, weights, {})
    state: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        for theirs, ours in NAMES:
            key = re.sub(theirs, ours, key)
        state[key] = value.flatten(0, -2) if key in ("class_token", "positions") else value
    if tower.style == "siglip":
        last = len(tower.transformer.blocks)
        behind = re.compile(r"norm_out\.|attn_pool\.|transformer\.blocks\.(\d+)\.")
        state = {
            key: value
            for key, value in state.items()
            if not (match := behind.match(key)) or (match[1] and int(match[1]) < last)
        }
        # Not weights: the range of pixels, which timm keeps elsewhere.
        state |= {"mean": tower.mean, "std": tower.std}
    try:
        load_strictly(tower, state, model)
    except CheckpointError as error:
        raise ConfigError(f"init.tower: tokenizer.encoder.semantic is no {model}: {error}") from error
