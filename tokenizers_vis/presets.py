"""``load``: a tokenizer by name, from a file or from a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenizers_vis.catalogue import FOLDER, preset
from tokenizers_vis.config import ConfigError
from tokenizers_vis.tokenizer import CheckpointError, Tokenizer

DEFAULT = "mini"


def load(
    name: str | Path = DEFAULT, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Tokenizer:
    """A tokenizer, ready to use.

    name: a preset, a checkpoint file (.safetensors), or a folder that holds one (``tokenizer.safetensors``, as a
        training run leaves it). Without a name: the bundled tokenizer, no network needed.
    device: None is the best at hand (cuda, mps, cpu).
    dtype: of encoder and decoder, None is float32; quantizing is always float32.

    It comes in eval mode. Raises ``ValueError`` (``CheckpointError`` for weights that do not fit, ``ConfigError`` for a
    device that is not here).
    """
    path = Path(name)
    if path.is_dir():
        file = path / "tokenizer.safetensors"
        if not file.is_file():
            raise CheckpointError(f"the folder {path} holds no tokenizer.safetensors")
    elif path.suffix == ".safetensors" or path.is_file():
        file = path
    else:
        preset(str(name))
        file = FOLDER / f"{name}.safetensors"
    tokenizer = Tokenizer.from_file(file).eval().requires_grad_(False)
    if dtype is not None:
        tokenizer.encoder.to(dtype)
        tokenizer.decoder.to(dtype)
    return tokenizer.to(usable_device(device))


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
