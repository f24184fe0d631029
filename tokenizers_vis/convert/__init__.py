"""Official checkpoints become ours: one file, one pure function per family.

A family's function takes the authors' config and the authors' tensors and gives a config table of ``Tokenizer`` and its
tensors by our names. It renames, and where our layout is another one it rearranges by a stated rule; nothing is dropped
in silence, and ``load_strictly`` then asks for exactly the tensors there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tokenizers_vis.weights import CheckpointError, read_safetensors, read_state

# Family -> the module of this package whose ``convert`` reads it.
FAMILIES = {
    "titok": "titok",
    "maskgit-vqgan": "vqgan",
    "llamagen": "vqgan",
    "flextok": "flextok",
    "fqgan": "fqgan",
    "tokenflow": "tokenflow",
}


class Converted(NamedTuple):
    """config: the table that builds the tokenizer, but for its name. state: tensors by our names."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def convert(family: str, official: Mapping[str, Any], state: Any) -> Converted:
    """official: the authors' config as plain values. state: what their file holds. Raises ``CheckpointError``."""
    module = import_module(f"{__name__}.{FAMILIES[family]}")
    function: Callable[[Mapping[str, Any], Any], Converted] = module.CONVERTERS[family]
    return function(official, state)


def from_folder(folder: Path) -> Converted:
    """A download as it lies on disk: a config (config.json, or YAML) and model.safetensors or pytorch_model.bin."""
    weights = weights_in(folder)
    official = _read_config(folder, weights)
    family = _family(official, folder)
    state = read_state(weights)
    return convert(family, {**official, "_folder": str(folder)}, state)


def weights_in(folder: Path) -> Path:
    """The one file of weights in a folder. Raises ``CheckpointError`` when there is none, or more than one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"the folder {folder} should hold tokenizer.safetensors, model.safetensors, pytorch_model.bin or one other "
            f"file of weights; it holds {names}"
        )
    return found[0]


def _read_config(folder: Path, weights: Path) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        try:
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    yamls = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if len(yamls) == 1:
        import yaml

        try:
            return yaml.safe_load(yamls[0].read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise CheckpointError(f"{yamls[0]} is not YAML of plain values: {error}") from error
    if weights.suffix == ".safetensors":
        header = read_safetensors(weights)[1]
        if header:
            return dict(header)
    raise CheckpointError(
        f"the folder {folder} has no config.json, so the shape of {weights.name} is not known; if it is one of the "
        f"presets, name it: load('llamagen-vq-16', weights='{weights}')"
    )


def _family(official: Mapping[str, Any], folder: Path) -> str:
    model = official.get("model")
    if isinstance(model, Mapping) and "vq_model" in model:
        return "titok"
    if "semantic_code_dim" in official:
        return "tokenflow"
    if "with_disentanglement" in official:
        return "fqgan"
    if "encoder_ch_mult" in official:
        return "llamagen"
    if "channel_mult" in official:
        return "maskgit-vqgan"
    sections = official.get("config", official)
    if isinstance(sections, Mapping) and {"encoder", "decoder", "regularizer"} & set(sections):
        return "flextok"
    raise CheckpointError(
        f"{folder} has a config of no family that is known here ({', '.join(FAMILIES)}); its keys are "
        f"{', '.join(list(official)[:8])}"
    )
