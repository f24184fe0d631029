"""FlexTok's released checkpoints: https://github.com/apple/ml-flextok, flextok/flextok_wrapper.py.

Their tensors lie under ``vae.vae.``, ``encoder.module_dict.NAME.`` and ``decoder.module_dict.NAME.``, where the names
are those of the config. What training alone knows (dropout of weights, corruption of tokens, initialisation) is left
out; the drawing of lengths and times, and the rate of the null token, are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from tokenizers_vis.convert import Converted
from tokenizers_vis.convert.flextok_config import Part, one, parts, read_sections, vae_shape
from tokenizers_vis.weights import CheckpointError

ENCODER = (
    "PatchEmbedder",
    "PositionalEmbeddingAdder 2",
    "Registers1D",
    "BlockWiseSequencePacker",
    "FlexTransformer",
    "LinearHead",
)
DECODER = (
    "LinearLayer",
    "PositionalEmbeddingAdder 1",
    "MaskedNestedDropout",
    "LearnedNullCond",
    "PatchEmbedder",
    "PositionalEmbeddingAdder 2",
    "BlockWiseSequencePacker",
    "TimestepEmbedder",
    "FlexTransformer",
    "ToPatchesLinearHead",
)
BLOCK = (
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc2\.", ".mlp.down."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
)
FUSED_LAYER = re.compile(r"(.*\.blocks\.\d+\.)(attn\.w[qkv]|mlp\.fc[13])\.weight")
# Linear layers of theirs that are one of ours, in this order along the output.
FUSED = (
    (("attn.wq", "attn.wk", "attn.wv"), "attention.qkv"),
    (("mlp.fc1", "mlp.fc3"), "mlp.up"),
)


def flextok(official: Mapping[str, Any], state: Any) -> Converted:
    """official: the config of the checkpoint, and "_folder", "_file", "_hub" that say where it lies. A preset has no
    config, which is then read from there, but "sizes" that it must have, and "vae", the shape of the VAE.
    """
    sections = read_sections(official)
    encoder, decoder = parts(sections, "encoder", ENCODER), parts(sections, "decoder", DECODER)
    embedder, places, registers, _, _, _ = encoder
    fsq = one(sections, "regularizer", "FSQ")
    vae = vae_shape(official, one(sections, "vae", "StableDiffusionVAE"))
    size, levels = places.square("max_sizes") * embedder.square("patch_sizes"), list(fsq.get("levels"))
    max_tokens = registers.get("n_max")
    if (registers.options.get("n_eval") or max_tokens) != max_tokens:
        raise CheckpointError(
            f"{registers.name}n_eval of a released FlexTok is n_max, {max_tokens}; got {registers.options['n_eval']}"
        )
    part = {
        "kind": "flextok",
        "dim": len(levels),
        "max_tokens": max_tokens,
        "size": size,
        "patch": embedder.square("patch_sizes"),
        "channels": embedder.get("channels_in"),
    }
    table = {
        "canvas": {"kind": "vae", "size": size * 2 ** (len(vae["block_out_channels"]) - 1), **vae},
        "encoder": {**part, "stored_positions": True, **_encoder(encoder), "lengths": _lengths(decoder)},
        "quantizer": {"kind": "fsq", "levels": levels, "bypass": fsq.options.get("drop_quant_p", 0.0)},
        "decoder": {
            **part,
            **_decoder(decoder),
            **_times(one(sections, "flow_matching_noise_module", "MinRFNoiseModule")),
        },
    }
    for side, sizes in official.get("sizes", {}).items():
        found = {key: table[side][key] for key in sizes}
        if found != sizes:
            raise CheckpointError(f"this is the checkpoint of another FlexTok: its {side} has {found}, not {sizes}")
    return Converted(table, _names(state, encoder, decoder))


CONVERTERS = {"flextok": flextok}


def _encoder(encoder: list[Part]) -> dict[str, Any]:
    _, _, registers, packer, trunk, _ = encoder
    _check_sequence(packer, "causal_last", registers.get("registers_write_key"))
    return _trunk(trunk)


def _decoder(decoder: list[Part]) -> dict[str, Any]:
    codes, places, dropout, null, _, _, packer, time, trunk, _ = decoder
    for first, second in pairwise((codes, places, dropout, null, packer)):
        if first.place > second.place:  # else the registers that are dropped would not be alike
            raise CheckpointError(f"in a released FlexTok {second.kind} comes after {first.kind}, in this one before")
    _check_sequence(packer, "full", dropout.get("read_write_key"))
    return {
        **_trunk(trunk),
        "time_width": time.options.get("frequency_embedding_size", 256),
        "max_timestep": float(time.options.get("max_timestep", 1000.0)),
        "null_rate": float(null.options.get("dropout_prob", 0.0)),
    }


def _trunk(trunk: Part) -> dict[str, Any]:
    width, head = trunk.options.get("dim", 768), trunk.options.get("head_dim", 64)
    if not 1 <= head <= width:
        raise CheckpointError(f"{trunk.name}head_dim is from 1 to dim, {width}; got {head}")
    return {
        "width": width,
        "depth": trunk.options.get("depth", 12),
        "heads": width // head,
        "mlp_ratio": float(trunk.options.get("mlp_ratio", 4.0)),
        "qk_norm": trunk.options.get("qk_norm", True),
        "attention_scale": 8 / (width // (width // head)),
    }


def _check_sequence(packer: Part, mask: str, registers: str) -> None:
    """Patches first, registers last, and who may look at whom."""
    keys, mode = packer.get("input_list_read_keys"), packer.options.get("mask_mode", "full")
    if len(keys) != 2 or keys[1] != registers or mode != mask:
        raise CheckpointError(
            f"{packer.name[:-1]}: the sequence of a released FlexTok is patches, registers with the mask {mask!r}; "
            f"this one's is {', '.join(keys)} with {mode!r}"
        )


def _lengths(decoder: list[Part]) -> dict[str, str]:
    """How training draws lengths. In the original the decoder does, and drops what the encoder made."""
    return {"kind": decoder[2].options.get("size_sampling_mode", "uniform")}


def _times(noise: Part) -> dict[str, Any]:
    if noise.options.get("ln", True):
        return {"times": "stratified" if noise.options.get("stratisfied", False) else "logit_normal"}
    return {"times": "mode", "mode_scale": float(noise.options.get("mode_scale", 0.0))}


def _names(state: Mapping[str, Tensor], encoder: list[Part], decoder: list[Part]) -> dict[str, Tensor]:
    """The tensors by our names; those that are not known keep theirs, and are refused when they are loaded."""
    e = dict(zip(ENCODER, (part.name for part in encoder), strict=True))
    d = dict(zip(DECODER, (part.name for part in decoder), strict=True))
    prefixes = {
        "vae.vae.": "canvas.vae.",
        f"{e['PatchEmbedder']}patch_proj.": "encoder.read_patches.",
        f"{e['FlexTransformer']}blocks.": "encoder.transformer.blocks.",
        f"{e['LinearHead']}proj.": "encoder.to_codes.",
        f"{d['LinearLayer']}proj.": "decoder.read_codes.",
        f"{d['PatchEmbedder']}patch_proj.": "decoder.read_patches.",
        f"{d['TimestepEmbedder']}mlp.": "decoder.time.",
        f"{d['FlexTransformer']}blocks.": "decoder.blocks.",
        f"{d['ToPatchesLinearHead']}adaLN_modulation.1.": "decoder.modulation.",
        f"{d['ToPatchesLinearHead']}proj.": "decoder.to_patches.",
    }
    # The tables: theirs -> ours, and how theirs is laid out.
    tables = {
        f"{e['PositionalEmbeddingAdder 2']}posembs": ("encoder.positions", "1 d h w -> (h w) d"),
        f"{e['Registers1D']}registers": ("encoder.registers", "n d -> n d"),
        f"{d['PositionalEmbeddingAdder 1']}posembs": ("decoder.token_positions", "1 1 d n -> n d"),
        f"{d['PositionalEmbeddingAdder 2']}posembs": ("decoder.positions", "1 d h w -> (h w) d"),
        f"{d['MaskedNestedDropout']}dropout_mask_token": ("decoder.mask_token", "d -> d"),
        f"{d['LearnedNullCond']}nullcond": ("decoder.null_token", "d -> d"),
    }
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "vae.logvar":
            continue  # of the loss that the VAE was trained with
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if key in tables:
            name, layout = tables[key]
            try:
                renamed[name] = rearrange(value, layout).contiguous()
            except EinopsError:
                renamed[name] = value  # whose shape is then refused when it is loaded
        elif prefix is not None:
            name = prefixes[prefix] + key.removeprefix(prefix)
            for theirs, ours in BLOCK if ".blocks." in name else ():
                name = re.sub(theirs, ours, name)
            renamed[name] = value
        else:
            renamed[key] = value
    return _fused(renamed)


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        match = FUSED_LAYER.fullmatch(key)
        layers, ours = next(group for group in FUSED if match[2] in group[0]) if match else ((), "")
        group = [f"{match[1]}{layer}.weight" for layer in layers] if match else []
        if not group or any(name not in state for name in group):
            fused[key] = value
        elif key == group[0]:
            fused[f"{match[1]}{ours}.weight"] = torch.cat([state[name] for name in group])
    return fused
