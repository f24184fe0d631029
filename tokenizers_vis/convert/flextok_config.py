"""What a FlexTok checkpoint says of itself: trees of ``_target_`` classes and their arguments, read as data.

Nothing in a tree is imported or called. A class that is not known here, or an option that makes another network of a
known one, is a ``CheckpointError``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers_vis.weights import CheckpointError, fetch, read_safetensors

SECTIONS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")

SILU = {"_target_": "torch.nn.SiLU", "_partial_": True}
NORM = {"_target_": "flextok.model.layers.norm.Fp32LayerNorm", "_partial_": True} | dict.fromkeys(
    ("bias", "elementwise_affine"), False
)
HEAD = {"use_mup_readout": (False,), "norm_layer": (NORM,), "adaLN_bias": (True,), "proj_bias": (True,)}

# The known classes, with the values that an option may have where another one would mean another network. An option
# that is not given has the only value, or the first.
KNOWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "flextok.flextok_wrapper.FlexTok": {},
    "flextok.flextok_wrapper.FlexTokFromHub": {},
    "flextok.vae_wrapper.StableDiffusionVAE": {},
    "flextok.flow_matching.noise_modules.MinRFNoiseModule": {},
    "flextok.flow_matching.pipelines.MinRFPipeline": {},
    "flextok.regularizers.quantize_fsq.FSQ": {},
    "flextok.model.layers.norm.Fp32LayerNorm": {},
    "flextok.model.postprocessors.heads.LinearHead": HEAD,
    "flextok.model.postprocessors.heads.ToPatchesLinearHead": HEAD,
    "flextok.model.postprocessors.seq_unpacking.SequenceUnpacker": {},
    "flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker": {},
    "flextok.model.preprocessors.linear.LinearLayer": {"proj_bias": (True,)},
    "flextok.model.preprocessors.nullcond.LearnedNullCond": {"replace_with_single_token": (False,)},
    "flextok.model.preprocessors.patching.PatchEmbedder": {},
    "flextok.model.preprocessors.registers.Registers1D": {
        "ordering_mode": ("nested",),
        "extra_registers_write_key": (None,),
    },
    "flextok.model.preprocessors.time_embedding.TimestepEmbedder": {"temb_as_tokens": (False,)},
    "flextok.model.preprocessors.token_dropout.MaskedNestedDropout": {},
    "flextok.model.trunks.transformers.FlexTransformer": {
        "qkv_bias": (False,),
        "proj_bias": (False,),
        "mlp_bias": (False,),
        "gated_mlp": (True,),
        "act_layer": (SILU,),
        "norm_layer": (NORM,),
        "score_mod_read_key": (None,),
        "rope_forward_read_key": (None,),
    },
    "flextok.model.utils.dict_ops.PerSampleOp": {},
    "flextok.model.utils.dict_ops.channels_first_to_last": {},
    "flextok.model.utils.dict_ops.channels_last_to_first": {},
    "flextok.model.utils.posembs.PositionalEmbeddingAdder": {"posemb_scaling": ("absolute", "interpolate")},
    "flextok.model.utils.wrappers.SequentialModuleDictWrapper": {},
    "torch.nn.SiLU": {},
}

# What AutoencoderKL of diffusers takes when its config does not say.
DIFFUSERS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
SCALING = 0.18215
# What FlexTok's wrapper makes without a folder.
SDXL = {
    **DIFFUSERS,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


class Part(NamedTuple):
    """An object of a tree. name: of its tensors, with a dot at the end. kind: its class without the package.

    place: among the modules of a sequence, from 0.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    place: int = 0

    def get(self, key: str) -> Any:
        """An option that has to be given. Raises ``CheckpointError``."""
        if key not in self.options:
            raise CheckpointError(f"{self.name}{key} is missing in the checkpoint's config")
        return self.options[key]

    def square(self, key: str) -> int:
        """The side of an option that is two equal numbers. Raises ``CheckpointError``."""
        sides = list(self.get(key))
        if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int:
            raise CheckpointError(f"{self.name}{key} is two equal whole numbers, got {sides}")
        return sides[0]


def read_sections(official: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The six trees, checked.

    They are in ``official`` itself, under "config" or not; else in the header of its "_file"; else in the config.json
    of its "_folder" or of its repository "_hub". Raises ``CheckpointError``.
    """
    found = official.get("config", official)
    if "encoder" not in found and Path(official.get("_file", "")).suffix == ".safetensors":
        found = read_safetensors(official["_file"])[1]
    if "encoder" not in found:
        found = _config_json(official)
    missing = [name for name in SECTIONS if name not in found]
    if missing:
        raise CheckpointError(
            f"a FlexTok checkpoint says its shape in its header or in a config.json beside it; here is no section "
            f"{', '.join(missing)}. Put the config.json of its Hub repository into its folder"
        )
    sections = {name: _literal(found[name], name) for name in SECTIONS}
    _check({"_target_": found.get("_target_", "flextok.flextok_wrapper.FlexTok"), **sections}, "")
    return sections


def one(sections: Mapping[str, Mapping[str, Any]], section: str, kind: str) -> Part:
    """A section that is one object of a class."""
    tree = sections[section]
    if _kind(tree) != kind:
        raise CheckpointError(f"{section} of a released FlexTok is a {kind}, this one is {tree.get('_target_')!r}")
    return Part(f"{section}.", kind, tree)


def parts(sections: Mapping[str, Mapping[str, Any]], section: str, kinds: tuple[str, ...]) -> list[Part]:
    """One module of each kind, of the section that is a sequence of modules.

    "Kind n" is one whose ``max_sizes`` has n numbers. Modules without parameters may be there beside them.
    """
    modules = one(sections, section, "SequentialModuleDictWrapper").get("module_dict")
    found: dict[str, list[Part]] = {}
    for place, (name, options) in enumerate(modules.items()):
        kind = _kind(options)
        kind += f" {len(options['max_sizes'])}" if "max_sizes" in options else ""
        found.setdefault(kind, []).append(Part(f"{section}.module_dict.{name}.", kind, options, place))
    for kind in sorted(found.keys() | set(kinds)):
        free = kind in ("PerSampleOp", "SequenceUnpacker")
        if not free and (kind not in kinds or len(found.get(kind, [])) != 1):
            wanted = "one" if kind in kinds else "no"
            raise CheckpointError(
                f"the {section} of a released FlexTok has {wanted} {kind}, this one has {len(found.get(kind, []))}"
            )
    return [found[kind][0] for kind in kinds]


def vae_shape(official: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """The options of ``VAELatents`` that a VAE's section and its diffusers folder say.

    The folder is in "_folder", or is a repository on the Hub; a preset says "vae", the shape of its repository's.
    """
    path, scaling = part.options.get("hf_hub_path"), part.options.get("scaling_factor")
    folder = Path(official.get("_folder", "."))
    if path is None:
        config = {**SDXL, "latent_channels": part.options.get("latent_channels", 16), "scaling_factor": None}
    elif (found := _in_folder(folder, path)) is not None:
        config = found
    elif "vae" in official and scaling:
        config = official["vae"]
    else:
        config = _on_hub(folder, path)
    scaling = scaling or config.get("scaling_factor", SCALING)
    if not scaling:
        raise CheckpointError("the VAE has no scaling_factor, neither in the checkpoint's config nor in a folder")
    shape = {key: config.get(key, default) for key, default in DIFFUSERS.items()}
    # Our default is the mean: a config that asks for a draw from the posterior gets it.
    sample = part.options.get("sample_posterior", False)
    return {**shape, "scaling_factor": float(scaling), "sample_posterior": sample}


def _config_json(official: Mapping[str, Any]) -> Mapping[str, Any]:
    path = Path(official["_folder"]) / "config.json" if "_folder" in official else None
    if "_hub" in official and not (path and path.is_file()):
        path = fetch(official["_hub"], "config.json")
    if path is None or not path.is_file():
        return {}
    found = _read_json(path)
    return found.get("config", found)


def _in_folder(folder: Path, path: str) -> Mapping[str, Any] | None:
    places = (folder / path / "config.json", folder / Path(path).name / "config.json")
    return next((_read_json(place) for place in places if place.is_file()), None)


def _on_hub(folder: Path, path: str) -> Mapping[str, Any]:
    try:
        return _read_json(fetch(path, "config.json"))
    except CheckpointError as error:
        raise CheckpointError(
            f"the shape of the VAE is in the config.json of {path}, and there is no {folder / path / 'config.json'}. "
            f"Put that file there. ({error})"
        ) from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} should hold a table, got {type(found).__name__}")
    return found


def _literal(value: Any, section: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise CheckpointError(f"{section} in the checkpoint's header is no Python literal: {error}") from error
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{section} in the checkpoint's config is a table, got {type(value).__name__}")
    return value


def _check(tree: Any, where: str) -> None:
    """Refuses classes that are not known, and options that make another network."""
    if isinstance(tree, (list, tuple)):
        for value in tree:
            _check(value, where)
    if not isinstance(tree, Mapping):
        return
    target = tree.get("_target_")
    if target is not None and (not isinstance(target, str) or target not in KNOWN):
        raise CheckpointError(
            f"{where or 'the config'} asks for {target!r}, which is no class of a released FlexTok, and is refused; "
            f"there are {', '.join(KNOWN)}"
        )
    for key, value in tree.items():
        _check(value, f"{where}.{key}".lstrip("."))
    for key, values in KNOWN.get(target, {}).items():
        if key in tree and tree[key] not in values:
            raise CheckpointError(
                f"{where}.{key} of a released FlexTok is {' or '.join(map(repr, values))}, this one's is "
                f"{tree[key]!r}: another network, which is not known here"
            )


def _kind(tree: Any) -> str:
    return str(tree.get("_target_")).rpartition(".")[2] if isinstance(tree, Mapping) else "value"
