"""The VQGAN lineage: MaskGIT's VQGAN as ported to PyTorch, and LlamaGen's VQ-16 and VQ-8.

"maskgit-vqgan": https://github.com/bytedance/1d-tokenizer, modeling/modules/maskgit_vqgan.py, file
``maskgit-vqgan-imagenet-f16-256.bin``; open-muse's folders have the same names. "llamagen":
https://github.com/FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py. FQGAN and TiTok's second stage hold
the same nets and borrow the names from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizers_vis.convert import Converted
from tokenizers_vis.weights import CheckpointError

# Theirs -> ours, inside an encoder or a decoder, tried in this order.
NAMES = (
    (r"^conv_in\.", "path.first."),
    (r"^(conv_blocks|down|up)\.", "path.levels."),
    (r"^mid\.", "path.middle."),
    (r"^norm_out\.", "head.norm."),
    (r"^conv_out\.", "head.conv."),
    (r"\.(res|block)\.", ".blocks."),
    (r"\.attn\.", ".attention."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.(downsample|upsample)\.", ".resample."),
    (r"\.upsample_conv\.", ".resample.conv."),
    (r"\.proj_out\.", ".out."),
)
ATTENTION = re.compile(r"(.*\.)([qkv])\.(weight|bias)")

# What the originals take when their config does not say.
MASKGIT = {
    "channel_mult": [1, 1, 2, 2, 4],
    "hidden_channels": 128,
    "num_channels": 3,
    "num_res_blocks": 2,
    "resolution": 256,
    "z_channels": 256,
    "num_embeddings": 1024,
    "commitment_cost": 0.25,
}
LLAMAGEN = {
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
    "commit_loss_beta": 0.25,
    "encoder_ch_mult": [1, 1, 2, 2, 4],
    "decoder_ch_mult": [1, 1, 2, 2, 4],
    "z_channels": 256,
    "image_size": 256,
}


def maskgit_vqgan(official: Mapping[str, Any], state: Any) -> Converted:
    """official: as the constructor's config in either repository. state: encoder, decoder, quantize.embedding."""
    state = tensors_of(state)
    config, net = MASKGIT | dict(official), maskgit_net(official)
    size, z_channels = config["resolution"], config["z_channels"]
    part = {"dim": z_channels, "size": size, "style": "maskgit", **net}
    table = {
        "canvas": {"kind": "pixels", "size": size, "span": "unit"},
        "encoder": {"kind": "grid", **part},
        "quantizer": {
            "kind": "vq",
            "dim": z_channels,
            "codebook_size": config["num_embeddings"],
            "commitment": 1.0,
            "codebook_weight": config["commitment_cost"],  # on the codebook's term, whatever its name says
        },
        "decoder": {"kind": "conv", **part},
    }
    renamed = conv_names(state, {"encoder.": "encoder.net.", "decoder.": "decoder.net."}, len(net["channel_mult"]))
    return Converted(table, move(renamed, {"quantize.embedding.weight": "quantizer.codebook"}))


def maskgit_net(official: Mapping[str, Any]) -> dict[str, Any]:
    """Their options of the encoder or decoder -> ours: of ``GridEncoder``, ``GridDecoder``, ``VQGANCodes``.

    Raises ``CheckpointError`` for options that no released net has.
    """
    config = MASKGIT | dict(official)
    mult = numbers(config, "channel_mult")
    levels = config.get("num_resolutions", len(mult))
    if levels != len(mult):
        raise CheckpointError(f"num_resolutions is the length of channel_mult, got {levels} for {mult}")
    width = config.get("embedding_dim", config.get("quantized_embed_dim", config["z_channels"]))
    if width != config["z_channels"]:
        raise CheckpointError(
            f"MaskGIT's VQGAN quantizes z itself, so its codes are z_channels = {config['z_channels']} wide, "
            f"got an embedding of {width}"
        )
    return {
        "ch": config["hidden_channels"],
        "channel_mult": mult,
        "num_res_blocks": config["num_res_blocks"],
        "z_channels": config["z_channels"],
        "channels": config["num_channels"],
    }


def vqgan_codes(
    pixel_decoder: Mapping[str, Any], pixel_quantizer: Mapping[str, Any], *, size: int, encoder: bool = False
) -> dict[str, Any]:
    """The table of the canvas ``VQGANCodes``, from TiTok's names; an option left out is MaskGIT's own."""
    net = maskgit_net({**pixel_decoder, **pixel_quantizer})
    codes = pixel_quantizer.get("num_embeddings", MASKGIT["num_embeddings"])
    return {"kind": "vqgan_codes", "size": size, "codebook_size": codes, "encoder": encoder, **net}


def vqgan_codes_names(state: Mapping[str, Tensor], levels: int, prefix: str = "pixel_") -> dict[str, Tensor]:
    """The tensors with the parts of ``VQGANCodes`` by our names, the others as they are.

    prefix: "pixel_" in a TiTok checkpoint of the second stage; "" in MaskGIT-VQGAN's own file, with an encoder too.
    """
    parts = {f"{prefix}{part}.": f"canvas.{part}." for part in ("encoder", "decoder")}
    return move(conv_names(state, parts, levels), {f"{prefix}quantize.embedding.weight": "canvas.codebook"})


def llamagen(official: Mapping[str, Any], state: Any) -> Converted:
    """official: the fields of their ``ModelArgs``, and image_size, ch, num_res_blocks.

    The last two are fixed in their code: where official does not say them, the weights do. state: a training checkpoint
    (its "ema", else its "model", as their scripts choose), or the tensors themselves. Its ``quantize.codebook_used``,
    the last ids of its training, is no part of the tokenizer and left out.
    """
    state = {key: value for key, value in tensors_of(state).items() if key != "quantize.codebook_used"}
    config = LLAMAGEN | _told_by_weights(state) | dict(official)
    dim, size = config["codebook_embed_dim"], config["image_size"]

    def part(kind: str, theirs: str) -> dict[str, Any]:
        mult = numbers(config, theirs)
        return {
            "kind": kind,
            "dim": dim,
            "size": size,
            "ch": config["ch"],
            "channel_mult": mult,
            "num_res_blocks": config["num_res_blocks"],
            "z_channels": config["z_channels"],
            "attention": [len(mult) - 1],
            "style": "taming",
        }

    table = {
        "canvas": {"kind": "pixels", "size": size},
        "encoder": part("grid", "encoder_ch_mult"),
        "quantizer": {
            "kind": "vq",
            "dim": dim,
            "codebook_size": config["codebook_size"],
            "distance": "cosine" if config["codebook_l2_norm"] else "euclidean",
            "commitment": config["commit_loss_beta"],
        },
        "decoder": part("conv", "decoder_ch_mult"),
    }
    levels = len(table["decoder"]["channel_mult"])
    renamed = conv_names(state, {"encoder.": "encoder.net.", "decoder.": "decoder.net."}, levels)
    return Converted(table, move(renamed, CODES))


CODES = {
    "quantize.embedding.weight": "quantizer.codebook",
    "quant_conv.weight": "encoder.to_codes.weight",
    "quant_conv.bias": "encoder.to_codes.bias",
    "post_quant_conv.weight": "decoder.from_codes.weight",
    "post_quant_conv.bias": "decoder.from_codes.bias",
}
CONVERTERS = {"maskgit-vqgan": maskgit_vqgan, "llamagen": llamagen}


def conv_names(state: Mapping[str, Tensor], parts: Mapping[str, str], levels: int) -> dict[str, Tensor]:
    """The tensors with those under each prefix in ``parts`` renamed to ``ConvEncoder``'s or ``ConvDecoder``'s names.

    parts: their prefix -> ours. levels: of the decoder; MaskGIT stores its levels from the finest, we as they run.
    The 1x1 convs q, k and v of an attention become one, in this order along the output. Others stay as they are.
    """
    kept, renamed = {}, {}
    for key, value in state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            kept[key] = value
            continue
        name = re.sub(r"^up\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key.removeprefix(prefix))
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        renamed[parts[prefix] + name] = value
    return kept | _fused(renamed)


def move(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with some of them renamed."""
    return {names.get(key, key): value for key, value in state.items()}


def tensors_of(state: Any) -> Mapping[str, Tensor]:
    """The tensors of a file that may nest them, as training scripts do. Raises ``CheckpointError``."""
    if isinstance(state, Mapping):
        state = next((state[key] for key in ("ema", "model", "state_dict") if key in state), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        got = f"one with {', '.join(map(str, list(state)[:6]))}" if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"a checkpoint is a table of tensors, or has one under ema, model or state_dict; got {got}"
        )
    return state


def numbers(config: Mapping[str, Any], key: str) -> list[int]:
    """A list of whole numbers in a config, or ``CheckpointError``."""
    value = config[key]
    if not isinstance(value, (list, tuple)) or not value or any(type(number) is not int for number in value):
        raise CheckpointError(f"{key} is a list of whole numbers, got {value!r}")
    return list(value)


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        match = ATTENTION.fullmatch(key)
        trio = [f"{match[1]}{part}.{match[3]}" for part in "qkv"] if match else []
        if not trio or any(name not in state for name in trio):
            fused[key] = value
        elif match[2] == "q":
            fused[f"{match[1]}qkv.{match[3]}"] = torch.cat([state[name] for name in trio])
    return fused


def _told_by_weights(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What LlamaGen's config does not hold: the first level's width and the blocks of a level."""
    first = state.get("encoder.conv_in.weight")
    blocks = {key.split(".")[4] for key in state if key.startswith("encoder.conv_blocks.0.res.")}
    return {"ch": 128 if first is None else len(first), "num_res_blocks": len(blocks) or 2}
