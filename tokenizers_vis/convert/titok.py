"""TiTok, TA-TiTok and One-D-Piece: one architecture in three sets of options.

https://github.com/bytedance/1d-tokenizer, modeling/titok.py and modeling/tatitok.py;
https://github.com/turingmotors/One-D-Piece, modeling/one_d_piece.py.

A hub's config.json is the authors' whole OmegaConf tree with its references ``${a.b}`` as they were written; these are
followed here as data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from tokenizers_vis.convert import Converted
from tokenizers_vis.convert.vqgan import MASKGIT, move, tensors_of, vqgan_codes, vqgan_codes_names
from tokenizers_vis.weights import CheckpointError, read_state

SIZES = {
    "small": {"width": 512, "num_layers": 8, "num_heads": 8},
    "base": {"width": 768, "num_layers": 12, "num_heads": 12},
    "large": {"width": 1024, "num_layers": 24, "num_heads": 16},
}
PROXY_FILE = "maskgit-vqgan-imagenet-f16-256.bin"
# What the originals take when their config does not say.
DEFAULTS = {
    "quantize_mode": "vq",
    "finetune_decoder": True,
    "is_legacy": True,
    "strict_length_assertion": True,
    "commitment_cost": 0.25,
    "text_context_length": 77,
    "text_embed_dim": 768,
    "pretrained_tokenizer_weight": PROXY_FILE,
}

# Theirs -> ours, whole names.
NAMES = {
    "latent_tokens": "encoder.queries",
    "encoder.class_embedding": "encoder.class_token",
    "encoder.positional_embedding": "encoder.positions",
    "encoder.latent_token_positional_embedding": "encoder.query_positions",
    "decoder.class_embedding": "decoder.class_token",
    "decoder.positional_embedding": "decoder.positions",
    "decoder.latent_token_positional_embedding": "decoder.token_positions",
    "decoder.text_guidance_positional_embedding": "decoder.text_positions",
    "quantize.embedding.weight": "quantizer.codebook",
    "quantize.embed_prob": "quantizer.usage",
}
# Theirs -> ours, layers.
LAYERS = (
    (r"^encoder\.patch_embed\.", "encoder.read_patches."),
    (r"^encoder\.conv_out\.", "encoder.to_codes."),
    (r"^decoder\.decoder_embed\.", "decoder.read_codes."),
    (r"^decoder\.text_guidance_proj\.", "decoder.read_text."),
    (r"^decoder\.conv_out\.", "decoder.head.smooth."),
    (r"\.ln_pre\.", ".norm_in."),
    (r"\.ln_post\.", ".norm_out."),
    (r"\.transformer\.(\d+)\.", r".transformer.blocks.\1."),
    (r"\.ln_1\.", ".attention_norm."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attention.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.ln_2\.", ".mlp_norm."),
    (r"\.mlp\.c_fc\.", ".mlp.up."),
    (r"\.mlp\.c_proj\.", ".mlp.down."),
)


def titok(official: Mapping[str, Any], state: Any) -> Converted:
    """official: the config tree. state: their tensors. Raises ``CheckpointError``.

    A checkpoint of the first stage (logits, without a pixel decoder) finds the VQGAN whose codes it scores in the file
    ``pretrained_tokenizer_weight`` of its own folder, official["_folder"]; without that file it encodes only.
    """
    state, config = tensors_of(state), Config(official)
    mode, legacy = config.one_of("quantize_mode", ("vq", "vae")), config("is_legacy")
    finetuned = config("finetune_decoder")
    if finetuned and (mode == "vae" or not legacy):
        raise CheckpointError(
            f"finetune_decoder goes with quantize_mode 'vq' and is_legacy: its pixel decoder reads scores of codes; "
            f"got {mode!r} and is_legacy {legacy}"
        )
    size, dim = config.number("dataset.preprocessing.crop_size"), config("token_size")
    # One-D-Piece's tail drop: one length a batch, and the sequence itself is shorter.
    nested = config.get("model.type") == "one_d_piece" or not config("strict_length_assertion")
    shared = {"max_tokens": config("num_latent_tokens"), "size": size}
    encoder = {
        "kind": "titok",
        "dim": dim if mode == "vq" else 2 * dim,
        **shared,
        "patch": config("vit_enc_patch_size"),
        **config.size("vit_enc_model_size"),
        "scrambled": legacy,
        "lengths": {"kind": "uniform", "per": "batch"} if nested else {"kind": "full"},
    }
    decoder = {
        "kind": "titok",
        "dim": dim,
        **shared,
        "patch": config("vit_dec_patch_size"),
        **config.size("vit_dec_model_size"),
        "head": "logits" if legacy else "pixels",
    }
    if "decoder.text_guidance_proj.weight" in state:
        decoder |= {"text_dim": config("text_embed_dim"), "text_tokens": config("text_context_length")}
    canvas, state = {"kind": "pixels", "size": size, "span": "unit"}, _renamed(state, legacy)
    if legacy:
        pixel_decoder, pixel_quantizer = config.table("model.pixel_decoder"), config.table("model.pixel_quantizer")
        decoder["codebook_size"] = pixel_quantizer.get("num_embeddings", MASKGIT["num_embeddings"])
        canvas = vqgan_codes(pixel_decoder, pixel_quantizer, size=size, encoder=not finetuned)
        levels = len(canvas["channel_mult"])
        name = Path(str(config("pretrained_tokenizer_weight"))).name or PROXY_FILE
        file = Path(official.get("_folder", "")) / name
        if finetuned:
            state = vqgan_codes_names(state, levels)
        elif "_folder" in official and file.is_file():
            state |= vqgan_codes_names(tensors_of(read_state(file)), levels, prefix="")
        else:
            canvas = {"kind": "code_scores", "size": size, "needs": name}
    table = {"canvas": canvas, "encoder": encoder, "quantizer": _quantizer(config, state, mode), "decoder": decoder}
    return Converted(table, state)


CONVERTERS = {"titok": titok}


class Config:
    """Values of an OmegaConf tree, references followed and the originals' defaults filled in."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree

    def __call__(self, key: str) -> Any:
        """An option of ``model.vq_model``, or its default. A whole number or a bool where the originals want one."""
        value = self.get(f"model.vq_model.{key}", DEFAULTS.get(key))
        if isinstance(DEFAULTS.get(key), bool) and not isinstance(value, bool):
            raise CheckpointError(f"model.vq_model.{key} is true or false, got {value!r}")
        return value if key in DEFAULTS else self.number(f"model.vq_model.{key}")

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self(key)
        if value not in allowed:
            raise CheckpointError(f"model.vq_model.{key} is one of {', '.join(allowed)}; got {value!r}")
        return value

    def number(self, path: str) -> int:
        value = self.get(path)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"the config should say {path}, a whole number from 1; got {value!r}")
        return value

    def size(self, key: str) -> dict[str, int]:
        """A size by name, or a table {width, num_layers, num_heads}."""
        path = f"model.vq_model.{key}"
        value = self.get(path)
        if isinstance(value, Mapping) and set(value) == set(SIZES["small"]):
            found = {name: self.number(f"{path}.{name}") for name in value}
        elif isinstance(value, str) and value in SIZES:
            found = SIZES[value]
        else:
            raise CheckpointError(
                f"{path} is one of {', '.join(SIZES)}, or a table of width, num_layers, num_heads; got {value!r}"
            )
        return {"width": found["width"], "depth": found["num_layers"], "heads": found["num_heads"]}

    def table(self, path: str) -> dict[str, Any]:
        """A table that may be missing."""
        value = self.get(path, {})
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{path} is a table, got {value!r}")
        return {key: self.get(f"{path}.{key}") for key in value}

    def get(self, path: str, default: Any = None, seen: tuple[str, ...] = ()) -> Any:
        """The value at a dotted path. Raises ``CheckpointError`` for a reference that leads nowhere or in a circle."""
        if path in seen:
            raise CheckpointError(f"the config's references run in a circle: {' -> '.join((*seen, path))}")
        node: Any = self.tree
        for key in path.split("."):
            if not isinstance(node, Mapping) or key not in node:
                if seen:
                    raise CheckpointError(f"the config refers to {path}, which is not in it")
                return default
            node = node[key]
            if isinstance(node, str) and "${" in node:
                node = self._followed(node, (*seen, path))
        return node

    def _followed(self, text: str, seen: tuple[str, ...]) -> Any:
        reference = re.compile(r"\$\{([\w.-]+)\}")
        whole = reference.fullmatch(text)
        if whole:
            return self.get(whole[1], seen=seen)
        filled = reference.sub(lambda match: str(self.get(match[1], seen=seen)), text)
        if "${" in filled:
            raise CheckpointError(f"{seen[-1]} in the config is {text!r}; only references to other keys are read here")
        return filled


def _quantizer(config: Config, state: Mapping[str, Tensor], mode: str) -> dict[str, Any]:
    if mode == "vae":
        return {"kind": "gaussian", "dim": config("token_size")}
    cosine = config.get("model.vq_model.use_l2_norm")
    if not isinstance(cosine, bool):
        raise CheckpointError(f"the config should say model.vq_model.use_l2_norm, true or false; got {cosine!r}")
    return {
        "kind": "vq",
        "dim": config("token_size"),
        "codebook_size": config("codebook_size"),
        "distance": "cosine" if cosine else "euclidean",
        "commitment": config("commitment_cost"),
        # TA-TiTok's ``clustering_vq``, which only checkpoints of its training hold.
        "revival": "nearest" if "quantizer.usage" in state else "restart",
    }


def _renamed(state: Mapping[str, Tensor], legacy: bool) -> dict[str, Tensor]:
    """By our names. Convolutions of one place become linear layers, and the one over patches reads them row by row."""
    head = {"ffn.0": "hidden", "ffn.2": "to_logits"} if legacy else {"ffn.0": "to_patches"}
    renamed = {}
    for key, value in move(state, NAMES).items():
        for theirs, ours in LAYERS:
            key = re.sub(theirs, ours, key)
        for theirs, ours in head.items():
            key = key.replace(f"decoder.{theirs}.", f"decoder.head.{ours}.")
        if key == "encoder.read_patches.weight" and value.ndim == 4:
            value = rearrange(value, "w c p q -> w (p q c)")
        elif key == "encoder.to_codes.weight" and value.shape[2:] == (1, 1):
            value = rearrange(value, "c w 1 1 -> c w")
        elif key == "decoder.mask_token" and value.ndim == 3 and len(value) == 1:
            value = rearrange(value, "1 n w -> n w")
        renamed[key] = value
    return renamed
