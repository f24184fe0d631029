"""``load``: a tokenizer by name, from a file or from a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tokenizers_vis.catalogue import FOLDER, list_presets, preset
from tokenizers_vis.config import ConfigError
from tokenizers_vis.convert import Converted, convert, from_folder, weights_in
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.weights import CheckpointError, check_sha256, fetch, read_state

DEFAULT = "mini"
TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_told: set[str] = set()


def load(
    name: str | Path = DEFAULT,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    weights: str | Path | None = None,
) -> Tokenizer:
    """A tokenizer, ready to use.

    name: a preset; a checkpoint file (.safetensors); a folder that holds one (``tokenizer.safetensors``, as a training
        run leaves it), or that holds an official download as it is (its config and its weights). Without a name: the
        bundled tokenizer, no network needed.
    device: None is the best at hand (cuda, mps, cpu).
    dtype: of encoder, decoder and canvas, None is float32; quantizing is always float32.
    weights: for a preset, the authors' file, or a folder that holds it, in place of the Hugging Face Hub.

    It comes in eval mode. The source and licence of released weights are told once on standard error. Raises
    ``ValueError`` (``CheckpointError`` for weights that cannot be had or do not fit, ``ConfigError`` for a device that
    is not here).
    """
    target = usable_device(device)
    path = Path(name)
    if weights is not None:
        tokenizer = _released(str(name), preset(str(name)), Path(weights))
    elif path.is_dir() and not (path / "tokenizer.safetensors").is_file():
        tokenizer = _from_folder(path)
    elif path.is_dir():
        tokenizer = Tokenizer.from_file(path / "tokenizer.safetensors")
    elif path.suffix in TORCH_SUFFIXES and path.is_file():
        raise CheckpointError(
            f"{path} does not say what tokenizer its weights are of: name the preset too, "
            f"load(preset, weights={str(path)!r}), or give the folder that also holds its config"
        )
    elif path.suffix == ".safetensors" or path.is_file():
        tokenizer = Tokenizer.from_file(path)
    else:
        table = preset(str(name))
        if "family" in table:
            tokenizer = _released(str(name), table, None)
        else:
            tokenizer = Tokenizer.from_file(FOLDER / f"{name}.safetensors")
    tokenizer = tokenizer.eval().requires_grad_(False)
    if dtype is not None:
        for part in (tokenizer.canvas, tokenizer.encoder, tokenizer.decoder):
            part.to(dtype)
    return tokenizer.to(target)


def _released(name: str, table: dict[str, Any], weights: Path | None) -> Tokenizer:
    """A preset of released weights, from the Hub or from a local file or folder."""
    if "family" not in table:
        raise CheckpointError(f"{name} comes with the library; it takes no other weights")
    if weights is None:
        file = fetch(table["hub"], table["file"], table["sha256"])
    else:
        file = _at_hand(weights, table["file"])
        if table["sha256"]:
            check_sha256(file, table["sha256"])
    state = read_state(file)
    official = {**table["official"], "_folder": str(file.parent), "_file": str(file), "_hub": table["hub"]}
    try:
        converted = convert(table["family"], official, state)
        tokenizer = _build(name, converted, "it")
    except (KeyError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{file} is no checkpoint of {name}, which is {table['file']} of {table['hub']}: {reason}"
        ) from error
    if name not in _told:
        _told.add(name)
        commercial = "" if table["commercial"] else ", which forbids commercial use"
        told = f"{name}: weights of {table['hub']}, licence {table['licence']}{commercial}, {table['paper']}"
        print(told, file=sys.stderr)
    return tokenizer


def _at_hand(weights: Path, file: str) -> Path:
    """A preset's file at ``weights``: that itself, or in that folder under its name on the Hub, or what lies there."""
    if weights.is_file():
        return weights
    if not weights.is_dir():
        raise CheckpointError(f"there is no file or folder {weights}; weights is where {file} was downloaded to")
    named = [weights / file, weights / Path(file).name]
    return next((path for path in named if path.is_file()), None) or weights_in(weights)


def _from_folder(folder: Path) -> Tokenizer:
    """An official download, named after the preset that it is of, else after its folder."""
    try:
        return _build(_preset_of(folder) or folder.resolve().name, from_folder(folder), str(folder))
    except KeyError as error:
        raise CheckpointError(f"{folder} does not hold what its config asks for: there is no {error}") from error


def _preset_of(folder: Path) -> str | None:
    """The preset whose file a download is, told by where it lies: a folder named like its repository on the Hub, or the
    Hub's own cache. Its shape does not tell: other weights of that shape make other tokens, and tokens carry the name.
    """
    folder = folder.resolve()
    for name in list_presets():
        table = preset(name)
        if "family" not in table or not (folder / Path(table["file"]).name).is_file():
            continue
        if folder.name == table["hub"].split("/")[1] or f"models--{table['hub'].replace('/', '--')}" in folder.parts:
            return name
    return None


def _build(name: str, converted: Converted, source: str) -> Tokenizer:
    return Tokenizer.from_state({"name": name, **converted.config}, converted.state, source)


def usable_device(device: str | torch.device | None) -> torch.device:
    """``device``, or the best at hand for None. Raises ``ConfigError`` when there is no such device here."""
    if device is None:
        return best_device()
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the device {str(device)!r} cannot be used here: {reason}") from error


def best_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
