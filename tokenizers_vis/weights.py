"""Weights from files and from the Hugging Face Hub: checked, no code run, no second copy in memory."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tokenizers_vis.cuda.native import cache_folder


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold what its config asks for."""


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. On the CPU tensors are views of the file, not copies.

    Raises ``CheckpointError`` for a file that is missing, cut short or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def read_pickle(path: str | Path) -> Any:
    """What a ``.pt``, ``.pth`` or ``.bin`` file of torch holds: tensors and plain values.

    Raises ``CheckpointError`` for a file that is cut short, or that wants to run code.
    """
    try:
        with warnings.catch_warnings():
            # Old files warn of their pickle protocol; the unpickler reads them or refuses them all the same.
            warnings.simplefilter("ignore", UserWarning)
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, and is refused: reading it would run code. Ask its "
            f"authors for safetensors, or convert it where you trust it. ({first_line(error)})"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a torch file: {first_line(error)}") from error


def read_state(path: str | Path) -> Any:
    """``read_safetensors(path)[0]`` or ``read_pickle(path)``, by the file's name."""
    return read_safetensors(path)[0] if Path(path).suffix == ".safetensors" else read_pickle(path)


def fetch(hub: str, file: str, sha256: str = "") -> Path:
    """A file of a model on the Hugging Face Hub, downloaded once into its usual cache and checked.

    sha256: what the file must hash to; "" checks it against what the Hub itself says, where it says so.

    Raises ``CheckpointError`` when the Hub cannot be reached, there is no such file, or the file is another one.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(hub, file))
    except Exception as error:  # offline, no such repository, gated, a broken connection, a full disk
        raise CheckpointError(
            f"{file} of {hub} cannot be had from the Hugging Face Hub: {first_line(error).rstrip('.')}. Without a "
            f"connection: download it where there is one, and give its folder, load(name, weights='path/to/folder') "
            f"or --weights path/to/folder"
        ) from error
    # In the Hub's cache a large file is a link to a blob that bears its sha256 as name.
    blob = path.resolve().name
    expected = sha256 or (blob if len(blob) == 64 else "")
    if expected and not (mark := _mark(path, expected)).exists():
        check_sha256(path, expected)
        with suppress(OSError):  # a cache that cannot be written to costs time only
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    return path


def _mark(path: Path, sha256: str) -> Path:
    """An empty file that says: this file, of this size and time, was found to have this sha256."""
    facts = path.resolve().stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns} {sha256}".encode()).hexdigest()
    return cache_folder() / "verified" / key


def check_sha256(path: Path, expected: str) -> None:
    """Raises ``CheckpointError`` when the file's sha256 is another one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{path} has sha256 {found}, expected {expected}: it is damaged, or another version; get it again"
        )


@contextmanager
def empty_weights() -> Iterator[None]:
    """Parameters of modules built inside take neither memory nor time; buffers are as always.

    For modules that are filled by ``load_strictly``, which puts the file's tensors in their place.
    """
    register = nn.Module.register_parameter
    layers = (nn.Linear, _ConvNd, nn.Embedding)
    resets = [layer.reset_parameters for layer in layers]

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty
    for layer in layers:
        # Memory that is never written to is never really taken.
        layer.reset_parameters = lambda self: None
    try:
        yield
    finally:
        nn.Module.register_parameter = register
        for layer, reset in zip(layers, resets, strict=True):
            layer.reset_parameters = reset


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Puts the tensors of ``state`` into the module, each in the dtype that the module has there.

    Parameters without memory (``empty_weights``) take tensors of the right dtype as they are; others are filled.
    Raises ``CheckpointError`` that lists what is missing, left over or of another shape.
    """
    wanted = module.state_dict()
    complaints = {
        "missing": [key for key in wanted if key not in state],
        "left over": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted
            if key in state and state[key].shape != wanted[key].shape
        ],
    }
    found = [f"{what}: {', '.join(keys[:6])}{' ...' * (len(keys) > 6)}" for what, keys in complaints.items() if keys]
    if found:
        raise CheckpointError(f"{source} does not fit its config; {'; '.join(found)}")
    empty = any(parameter.is_meta for parameter in module.parameters())
    module.load_state_dict({key: state[key].to(wanted[key].dtype) for key in wanted}, assign=empty)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
