"""What every test has: a fixed seed, one torch thread per worker, and no network."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from safetensors.torch import save_file

import tokenizers_vis

ROOT = Path(__file__).resolve().parents[1]
SEED = 0

# No deadline: the first example of a property pays for imports and allocations. The same examples on every run.
settings.register_profile("tokenizers_vis", deadline=None, derandomize=True)
settings.load_profile("tokenizers_vis")

# What the library builds or notes on a machine stays out of its user's home.
os.environ["TOKENIZERS_VIS_CACHE"] = str(ROOT / ".pytest_cache" / "tokenizers_vis")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism; more threads make them wait for each other


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that talks to anything but this machine, unless it is marked ``network``.

    ``pytest.fail`` raises past ``except Exception``, so a library that swallows connection errors cannot hide it.
    """
    if request.node.get_closest_marker("network"):
        return

    def guarded(call: Callable[..., Any], host_of: Callable[..., Any]) -> Callable[..., Any]:
        def check(*args: Any, **kwargs: Any) -> Any:
            host = host_of(*args)
            if not _is_this_machine(host):
                pytest.fail(f"the test reached for {host}; use local files, or mark it with pytest.mark.network")
            return call(*args, **kwargs)

        return check

    def peer(sock: socket.socket, address: Any) -> Any:
        return address[0] if isinstance(address, tuple) else None  # a string or bytes is a Unix socket's path

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect, peer))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex, peer))
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *rest: host))


def _is_this_machine(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights for development, or a skip that says how to have one."""
    path = Path(os.environ.get("TOKENIZERS_VIS_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"needs the shared development data; {path} has none, set TOKENIZERS_VIS_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """``recorded("llamagen_vq")``: what an original gave on small random weights, and where that original is found.

    The tensors are inputs, weights, outputs and gradients by name. The metadata hold repository, commit, file and the
    options it was built with, as JSON. See tests/fixtures/README.md.
    """

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with safe_open(ROOT / "tests" / "fixtures" / f"{name}.safetensors", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)

    return read


Official = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture(scope="session")
def official(recorded: Callable[[str], tuple[dict[str, torch.Tensor], dict[str, str]]]) -> Callable[[str], Official]:
    """``official("fqgan_dual")``: weights by the authors' names in float32, the other tensors, and the options."""

    def split(name: str) -> Official:
        tensors, metadata = recorded(name)
        weights = {key[8:]: value.float() for key, value in tensors.items() if key.startswith("weights.")}
        rest = {key: value for key, value in tensors.items() if not key.startswith("weights.")}
        return weights, rest, json.loads(metadata["options"])

    return split


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """``folder(weights, options)``: a download as it lies on disk."""

    def write(weights: dict[str, torch.Tensor], options: dict[str, Any]) -> Path:
        save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(options))
        return tmp_path

    return write


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """The photographs that come with the package: 256x256 JPEG files, sorted by name."""
    return sorted((Path(tokenizers_vis.__file__).parent / "photos").glob("*.jpg"))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """``tiny(encoder, quantizer, decoder)``: the table of a tokenizer of 16 px, 6 tokens and a few thousand weights.

    quantizer: "fsq", "vq" (one codebook) or "library" (two: a residual quantizer).
    """
    quantizers: dict[str, tuple[int, dict[str, Any]]] = {
        "fsq": (3, {"levels": [8, 5, 5]}),
        "vq": (4, {"dim": 4, "codebook_size": 32, "update": "ema", "revive_after": 2}),
        "library": (4, {"dim": 4, "name": "ResidualVQ", "options": {"codebook_size": [16, 8]}}),
    }

    def table(encoder: str = "flextok", quantizer: str = "fsq", decoder: str = "vit") -> dict[str, Any]:
        dim, options = quantizers[quantizer]
        part = {"dim": dim, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
        return {
            "name": f"tiny-{encoder}-{quantizer}-{decoder}",
            "canvas": {"kind": "pixels", "size": 16},
            "encoder": {"kind": encoder, **part} | ({"standardize": True} if encoder == "flextok" else {}),
            "quantizer": {"kind": quantizer, **options},
            "decoder": {"kind": decoder, **part} | ({"steps": 2} if decoder == "flow" else {}),
        }

    return table
