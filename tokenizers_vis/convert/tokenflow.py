"""TokenFlow: https://github.com/ByteVisionLab/TokenFlow, tokenflow/tokenizer/vq_model.py.

The teacher whose encoder it starts from, CLIP's ViT-B/16 or SigLIP's so400m, is trained further and lies in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizers_vis.convert import Converted
from tokenizers_vis.convert.fqgan import TRANSFORMER, count, named, path_of, shape, side
from tokenizers_vis.convert.vqgan import conv_names, numbers, tensors_of
from tokenizers_vis.weights import CheckpointError

# What their ``ModelArgs`` take when nothing is said.
DEFAULTS = {
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "semantic_code_dim": 32,
    "codebook_l2_norm": True,
    "commit_loss_beta": 1.0,
    "entropy_loss_ratio": 0.0,
    "encoder_ch_mult": [1, 1, 2, 2, 4],
    "decoder_ch_mult": [1, 1, 2, 2, 4],
    "z_channels": 256,
    "teacher": None,
    "infer_interpolate": False,
    "feature_heads": 12,
}
TEACHERS = ("clipb_224", "siglip_384")
SCALES = {  # by the size of images that they are for
    224: [1, 2, 4, 6, 8, 10, 12, 14],
    256: [1, 2, 4, 6, 8, 10, 12, 14, 16],
    384: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27],
}

SIGLIP = (
    (r"^(vision_model\.)?embeddings\.patch_embedding\.", "read_patches."),
    (r"^(vision_model\.)?embeddings\.position_embedding\.weight$", "positions"),
    (r"^(vision_model\.)?encoder\.layers\.", "transformer.blocks."),
    (r"\.layer_norm1\.", ".attention_norm."),
    (r"\.self_attn\.out_proj\.", ".attention.out."),
    (r"\.self_attn\.", ".attention."),
    (r"\.layer_norm2\.", ".mlp_norm."),
    (r"\.mlp\.fc1\.", ".mlp.up."),
    (r"\.mlp\.fc2\.", ".mlp.down."),
)
CLIP = ((r"^conv1\.", "read_patches."), *TRANSFORMER)
# The semantic decoder, in the way of BEiT v2's code.
BEIT = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "read."),
    (r"^blocks\.", "transformer.blocks."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.norm2\.", ".mlp_norm."),
    (r"\.mlp\.fc1\.", ".mlp.up."),
    (r"\.mlp\.fc2\.", ".mlp.down."),
    (r"^fc_norm\.", "norm_out."),
)
PROJECTION = re.compile(r"(.*\.attention\.)([qkv])_proj\.(weight|bias)")
PARTS = {
    "encode_task_layer.": "encoder.to_meaning.",
    "quant_conv.": "encoder.pixels.to_codes.",
    "post_quant_conv.": "decoder.pixels.from_codes.",
    "decode_task_layer.": "decoder.heads.0.write.",
    "scaling_layer.shift": "encoder.semantic.mean",
    "scaling_layer.scale": "encoder.semantic.std",
}


def tokenflow(official: Mapping[str, Any], state: Any) -> Converted:
    """official: the fields of their ``ModelArgs``, and what is fixed in their code: image_size, scale_rq_layers,
    teacher_heads, feature_heads (of the semantic decoder).

    Without the first two they follow the teacher: 224 px for "clipb_224", or 256 with infer_interpolate, for which its
    positions are stretched; 384 for "siglip_384". The weights say all other widths and depths, so also whether the
    decoder is the enhanced one. state: a training checkpoint (its "ema", else its "model"), or the tensors themselves.

    Left out: ``quantize.codebook_used``, the last ids of its training; and of SigLIP the last layer, the last norm and
    the pooling head, on which no output depends (features are those of the layer before the last).

    The first ``semantic_code_dim`` numbers of a code are meaning, the others pixels (``quantizer.part.halves``). What
    the semantic decoder makes of it is ``decoder.features``. Raises ``CheckpointError`` for another teacher.
    """
    state = {key: value for key, value in tensors_of(state).items() if key != "quantize.codebook_used"}
    config = DEFAULTS | dict(official)
    if config["teacher"] not in TEACHERS:
        raise CheckpointError(
            f"teacher is {' or '.join(map(repr, TEACHERS))}, those of the released weights; got {config['teacher']!r}"
        )
    clip = config["teacher"] == "clipb_224"
    usual = 384 if not clip else 256 if config["infer_interpolate"] else 224
    size = config.get("image_size", usual)
    scales = numbers({"scale_rq_layers": SCALES[usual]} | config, "scale_rq_layers")
    tower = _clip(config, state) if clip else _siglip(config, state)
    down, up = numbers(config, "encoder_ch_mult"), numbers(config, "decoder_ch_mult")
    meaning, pixels, grid = config["semantic_code_dim"], config["codebook_embed_dim"], size // tower["patch"]

    def net(part: str, mult: list[int]) -> dict[str, Any]:
        return {
            "dim": pixels,
            "size": grid * 2 ** (len(mult) - 1),
            "channel_mult": mult,
            "z_channels": config["z_channels"],
            "attention": [len(mult) - 1],
            **path_of(state, part, mult),
        }

    table = {
        "canvas": {"kind": "pixels", "size": size},
        "encoder": {
            "kind": "dual",
            "semantic": {"size": size, **tower},
            "semantic_dim": meaning,
            "pixels": net("encoder", down),
        },
        "quantizer": {
            "kind": "multi_scale",
            "part": {
                "kind": "shared_index",
                "dims": [meaning, pixels],
                "codebook_size": config["codebook_size"],
                "distance": "cosine" if config["codebook_l2_norm"] else "euclidean",
                "commitment": config["commit_loss_beta"],
                "entropy": config["entropy_loss_ratio"],
            },
            "scales": scales,
            "ratio": 0.0,
            "loss": "scales",
            "scale_drop": 0.1 if len(scales) > 1 else 0.0,
        },
        "decoder": {
            "kind": "dual",
            "dim": meaning + pixels,
            "size": size,
            "pixels": net("decoder", up),
            "heads": [{"dim": meaning, "grid": grid, **_semantic_decoder(config, state)}],
        },
    }
    return Converted(table, _renamed(state, tower, len(up)))


CONVERTERS = {"tokenflow": tokenflow}


def _clip(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of ``VisionTower``, but for its size."""
    width, _, patch, _ = shape(state, "encoder_vqkd.conv1.weight", 4)
    return {
        "style": "clip",
        "patch": patch,
        "width": width,
        "depth": count(state, r"encoder_vqkd\.transformer\.resblocks\.(\d+)\."),
        "heads": config.get("teacher_heads", max(1, width // 64)),
        "hidden": shape(state, "encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "positions": side(shape(state, "encoder_vqkd.positional_embedding", 2)[0] - 1),
    }


def _siglip(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same, without SigLIP's last layer. Before version 5 transformers put ``vision_model`` before its names."""
    old = "encoder_vqkd.vision_model.embeddings.patch_embedding.weight" in state
    prefix = "encoder_vqkd.vision_model." if old else "encoder_vqkd."
    width, _, patch, _ = shape(state, f"{prefix}embeddings.patch_embedding.weight", 4)
    return {
        "style": "siglip",
        "patch": patch,
        "width": width,
        "depth": count(state, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.") - 1,
        "heads": config.get("teacher_heads", 16),
        "hidden": shape(state, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "positions": side(shape(state, f"{prefix}embeddings.position_embedding.weight", 2)[0]),
    }


def _semantic_decoder(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of ``FeatureHead``, but for what it sees."""
    return {
        "style": "tokenflow",
        "width": shape(state, "decoder_vqkd.patch_embed.proj.weight", 4)[0],
        "depth": count(state, r"decoder_vqkd\.blocks\.(\d+)\."),
        "heads": config["feature_heads"],
        "out": shape(state, "decode_task_layer.2.weight", 2)[0],
        "positions": side(shape(state, "decoder_vqkd.pos_embed", 3)[1] - 1),
    }


def _renamed(state: Mapping[str, Tensor], tower: Mapping[str, Any], levels: int) -> dict[str, Tensor]:
    """Their tensors by our names; what is known of no part stays as it is, to be complained of as left over."""
    clip = tower["style"] == "clip"
    unused = re.compile(rf"encoder_vqkd\.(vision_model\.)?(encoder\.layers\.{tower['depth']}|post_layernorm|head)\.")
    renamed, nets = {}, {}
    for key, value in state.items():
        part = next((part for part in PARTS if key.startswith(part)), None)
        if key.startswith("encoder_vqkd."):
            if clip or not unused.match(key):
                renamed["encoder.semantic." + named(key.removeprefix("encoder_vqkd."), CLIP if clip else SIGLIP)] = (
                    value
                )
        elif key.startswith("decoder_vqkd."):
            renamed["decoder.heads.0." + named(key.removeprefix("decoder_vqkd."), BEIT)] = value
        elif part is not None:
            renamed[PARTS[part] + key.removeprefix(part)] = value
        else:
            nets[key] = value
    renamed = _fused({name: _laid_out(name, value) for name, value in renamed.items()})
    nets = _with_codebook(nets)
    return renamed | conv_names(nets, {"encoder.": "encoder.pixels.net.", "decoder.": "decoder.pixels.net."}, levels)


def _laid_out(name: str, value: Tensor) -> Tensor:
    """Without axes of length 1: a class token is 1 w, positions are n w, a 1x1 conv of codes is a matrix."""
    if name.endswith((".class_token", ".positions")):
        return value.reshape(-1, value.shape[-1])
    if name == "decoder.heads.0.read.weight" and value.shape[2:] == (1, 1):
        return value[..., 0, 0]
    return value


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v of an attention as one, in this order. BEiT's weights are one already; of its biases k has none."""
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        match = PROJECTION.fullmatch(key)
        if match is None:
            fused[key] = value
            continue
        at, part, kind = match.groups()
        trio = [state.get(f"{at}{each}_proj.{kind}") for each in "qkv"]
        if kind == "bias" and f"{at}qkv.weight" in state and trio[1] is None:
            trio[1] = torch.zeros_like(value)
        if any(each is None for each in trio):
            fused[key] = value
        elif part == "q":
            fused[f"{at}qkv.{kind}"] = torch.cat(trio)
    return fused


def _with_codebook(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both codebooks beside each other, since one index reads one row of both."""
    theirs = ("quantize.embedding_vqkd.weight", "quantize.embedding_vqgan.weight")
    if len({shape(state, key, 2)[0] for key in theirs}) != 1:
        raise CheckpointError(f"both codebooks are of one length, got {[tuple(state[key].shape) for key in theirs]}")
    rest = {key: value for key, value in state.items() if key not in theirs}
    return rest | {"quantizer.part.codebook": torch.cat([state[key] for key in theirs], dim=1)}
