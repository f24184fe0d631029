"""FQGAN, dual and triple: https://github.com/showlab/FQGAN, tokenizer/vq_model_dual.py and vq_model_triple.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tokenizers_vis.convert import Converted
from tokenizers_vis.convert.vqgan import conv_names, numbers, tensors_of
from tokenizers_vis.weights import CheckpointError


class Factor(NamedTuple):
    """Their names of one codebook: its suffix, the branch that leads to it, the head that tells features from it."""

    suffix: str
    branch: str
    head: str | None = None


# By the number of codebooks, in the order in which the decoder takes the codes: pixels first, then meaning.
FACTORS = {
    2: (Factor("vis", "visual_head"), Factor("sem", "semantic_head", "feat_pred_head")),
    3: (
        Factor("vis", "visual_head"),
        Factor("sem_mid", "semantic_head_mid", "mid_sem_feat_pred"),
        Factor("sem_high", "semantic_head_high", "high_sem_feat_pred"),
    ),
}

# Theirs -> ours, of a transformer in the way of CLIP's own code, and what stands around it.
TRANSFORMER = (
    (r"(^|\.)transformer\.(resblocks\.)?(\d+)\.", r"\1transformer.blocks.\3."),
    (r"\.ln_1\.", ".attention_norm."),
    (r"\.attn\.in_proj_", ".attention.qkv."),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.ln_2\.", ".mlp_norm."),
    (r"\.mlp\.c_fc\.", ".mlp.up."),
    (r"\.mlp\.c_proj\.", ".mlp.down."),
    (r"(^|\.)positional_embedding$", r"\1positions"),
    (r"(^|\.)class_embedding$", r"\1class_token"),
    (r"(^|\.)ln_pre\.", r"\1norm_in."),
    (r"(^|\.)ln_post\.", r"\1norm_out."),
    (r"(^|\.)upscale\.", r"\1read."),
)

# What their ``ModelArgs`` take when nothing is said, and their transformers' heads.
DEFAULTS = {
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
    "commit_loss_beta": 0.25,
    "entropy_loss_ratio": 0.0,
    "encoder_ch_mult": [1, 1, 2, 2, 4],
    "decoder_ch_mult": [1, 1, 2, 2, 4],
    "z_channels": 256,
    "with_disentanglement": False,
    "disentanglement_ratio": 0.0,
    "num_heads": 8,
}


def fqgan(official: Mapping[str, Any], state: Any) -> Converted:
    """official: the fields of their ``ModelArgs``, and codebooks (2 or 3), image_size, num_heads (of each transformer).

    Where official does not say the first two, the weights do, as they say all other widths and depths that are fixed in
    their code. state: a training checkpoint (its "ema", else its "model"), or the tensors themselves. Left out:
    ``quantize_*.codebook_used``, the last ids of its training.

    ids: b n k, pixels first, then meaning (of the triple: mid level, then high). The heads that foretell a teacher's
    features, where there are any, are ``decoder.heads``.
    """
    state = {key: value for key, value in tensors_of(state).items() if not key.endswith(".codebook_used")}
    config = DEFAULTS | dict(official)
    factors = _factors(config, state)
    dim, k, heads = config["codebook_embed_dim"], len(factors), config["num_heads"]
    down, up = numbers(config, "encoder_ch_mult"), numbers(config, "decoder_ch_mult")
    adapter = f"encoder.{factors[0].branch}.0"
    grid = side(shape(state, f"{adapter}.positional_embedding", 2)[0])
    size = config.get("image_size", grid * 2 ** (len(down) - 1))
    foretold = [(j, factor.head) for j, factor in enumerate(factors) if f"{factor.head}.upscale.0.weight" in state]
    table = {
        "canvas": {"kind": "pixels", "size": size},
        "encoder": {
            "kind": "fqgan",
            "dim": k * dim,
            "size": size,
            "branches": k,
            "channel_mult": down,
            "z_channels": config["z_channels"],
            "depth": count(state, rf"{adapter}\.transformer\.(\d+)\."),
            "heads": heads,
            **path_of(state, "encoder", down),
        },
        "quantizer": {
            "kind": "product",
            "part": {
                "kind": "vq",
                "dim": dim,
                "codebook_size": config["codebook_size"],
                "distance": "cosine" if config["codebook_l2_norm"] else "euclidean",
                "commitment": config["commit_loss_beta"],
                "entropy": config["entropy_loss_ratio"],
            },
            "count": k,
            "reduction": "sum",
            "disentangle": config["disentanglement_ratio"] if config["with_disentanglement"] else 0.0,
        },
        "decoder": {
            "kind": "dual",
            "dim": k * dim,
            "size": size,
            "pixels": {
                "dim": k * dim,
                "size": size,
                "channel_mult": up,
                "z_channels": config["z_channels"],
                "attention": [len(up) - 1],
                **path_of(state, "decoder", up),
            },
            "heads": [
                {"start": j * dim, "dim": dim, "grid": grid, "heads": heads, **_head(state, name)}
                for j, name in foretold
            ],
        },
    }
    return Converted(table, _renamed(state, factors, [name for _, name in foretold], len(up)))


CONVERTERS = {"fqgan": fqgan}


def shape(state: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that tells how a model was built. ``CheckpointError`` if it is not there, or another."""
    if key not in state:
        raise CheckpointError(
            f"the checkpoint holds no {key}, so it is of another model; it has {', '.join(list(state)[:4])} ..."
        )
    if state[key].ndim != axes:
        raise CheckpointError(f"{key} has {axes} axes, got {tuple(state[key].shape)}")
    return tuple(state[key].shape)


def side(places: int) -> int:
    """The side of a square grid. Raises ``CheckpointError`` for a number of places that is no square."""
    root = round(places**0.5)
    if root * root != places:
        raise CheckpointError(f"positions are those of a square grid, got {places}")
    return root


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers stand at the group of a pattern, in the names of the tensors that begin with it."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def path_of(state: Mapping[str, Tensor], part: str, mult: list[int]) -> dict[str, int]:
    """ch and num_res_blocks of a taming encoder or decoder, which their configs do not hold: what the weights say."""
    conv, axis = ("conv_in", 0) if part == "encoder" else ("conv_out", 1)
    ch = shape(state, f"{part}.{conv}.weight", 4)[axis] // (1 if part == "encoder" else mult[0])
    blocks = count(state, rf"{part}\.conv_blocks\.0\.res\.(\d+)\.")
    return {"ch": ch, "num_res_blocks": blocks - (part == "decoder")}


def named(key: str, names: tuple[tuple[str, str], ...]) -> str:
    """A key with patterns replaced, in their order."""
    for theirs, ours in names:
        key = re.sub(theirs, ours, key)
    return key


def _factors(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[Factor, ...]:
    """Raises ``CheckpointError`` for another number of codebooks than the released ones have."""
    k = config.get("codebooks", count(state, r"(quantize_\w+)\.embedding\."))
    if k not in FACTORS:
        raise CheckpointError(f"FQGAN has 2 or 3 codebooks, quantize_vis and one or two more; got {k}")
    return FACTORS[k]


def _head(state: Mapping[str, Tensor], head: str) -> dict[str, int]:
    width = shape(state, f"{head}.upscale.0.weight", 2)[0]
    return {"width": width, "out": width, "depth": count(state, rf"{head}\.transformer\.(\d+)\.")}


def _renamed(
    state: Mapping[str, Tensor], factors: tuple[Factor, ...], heads: list[str], levels: int
) -> dict[str, Tensor]:
    """Their tensors by our names; what is known of no part stays as it is, to be complained of as left over."""
    prefixes = {f"{head}.": f"decoder.heads.{j}." for j, head in enumerate(heads)}
    for j, (suffix, branch, _) in enumerate(factors):
        ours = f"encoder.branches.{j}."
        prefixes |= {
            f"encoder.{branch}.0.": f"{ours}adapter.",
            f"encoder.norm_out_{suffix}.": f"{ours}head.norm.",
            f"encoder.conv_out_{suffix}.": f"{ours}head.conv.",
            f"quant_conv_{suffix}.": f"{ours}to_codes.",
            f"quantize_{suffix}.embedding.weight": f"quantizer.parts.{j}.codebook",
        }
    prefixes["post_quant_conv."] = "decoder.pixels.from_codes."
    renamed, nets = {}, {}
    for key, value in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            nets[key] = value
        else:
            renamed[prefixes[prefix] + named(key.removeprefix(prefix), TRANSFORMER)] = value
    return renamed | conv_names(nets, {"encoder.": "encoder.", "decoder.": "decoder.pixels.net."}, levels)
