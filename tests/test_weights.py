"""Weights from files: checked, without running code, and without a second copy."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokenizers_vis.weights import (
    CheckpointError,
    check_sha256,
    empty_weights,
    fetch,
    load_strictly,
    read_pickle,
    read_safetensors,
    read_state,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Conv2d(2, 3, 1)
        self.c = nn.Parameter(torch.randn(5))
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        nn.init.dirac_(self.b.weight)


def test_an_empty_module_takes_the_tensors_as_they_are():
    with empty_weights():
        module = Small()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.table.tolist() == [0, 1, 2] and not module.kept.is_meta
    state = {key: value.detach() for key, value in Small().state_dict().items()}
    load_strictly(module, state, "x")
    assert module.a.weight.data_ptr() == state["a.weight"].data_ptr() and module.c.requires_grad
    assert not any(parameter.is_meta for parameter in Small().parameters())  # the patch is gone


def test_a_full_module_keeps_its_parameters():
    module, other = Small(), Small()
    before = module.a.weight
    load_strictly(module, other.state_dict(), "x")
    assert module.a.weight is before and torch.equal(before, other.a.weight)
    assert before.data_ptr() != other.a.weight.data_ptr()


def test_half_precision_becomes_what_the_module_has():
    with empty_weights():
        module = Small()
    load_strictly(module, {key: value.half() for key, value in Small().state_dict().items()}, "x")
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


def test_what_does_not_fit_is_listed():
    state = Small().state_dict()
    del state["a.bias"]
    state["d"], state["c"] = torch.zeros(1), torch.zeros(1, 5)
    with pytest.raises(CheckpointError, match=r"missing: a.bias; left over: d; of another shape: c \(1, 5\) instead"):
        load_strictly(Small(), state, "x")


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        read_pickle(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="refused|cannot be read"):
        read_pickle(tmp_path / "plain.pt")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_reading_and_truncation(tmp_path: Path, suffix: str, zipped: bool):
    path, state = tmp_path / f"w{suffix}", {"a": torch.randn(100)}
    if suffix == ".safetensors":
        save_file(state, path, metadata={"x": "y"})
        assert read_safetensors(path)[1] == {"x": "y"}
    else:
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_state(path)["a"], state["a"])
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.with_name(f"cut{suffix}").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cannot be read|refused"):
            read_state(path.with_name(f"cut{suffix}"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / f"none{suffix}")


def test_sha256(tmp_path: Path):
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    check_sha256(path, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(CheckpointError, match="damaged, or another version"):
        check_sha256(path, "0" * 64)


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be had .* weights='path/to/folder'"):
        fetch("someone/nothing", "model.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_loading_takes_the_memory_of_the_weights_once(tmp_path: Path):
    """In a process of its own: peak memory beyond that of an import stays under 1.2 times the weights."""
    script = """
import sys, torch
from pathlib import Path
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.presets import load
path = Path(sys.argv[1])
part = {"dim": 4, "max_tokens": 16, "size": 64, "patch": 8, "width": 768, "depth": 12, "heads": 12}
table = {"name": "large", "canvas": {"kind": "pixels", "size": 64}, "encoder": {"kind": "titok", **part},
         "quantizer": {"kind": "vq", "dim": 4, "codebook_size": 64}, "decoder": {"kind": "vit", **part}}
if not path.exists():
    Tokenizer.from_config(table).save(path)
    sys.exit()
part |= {"width": 64, "depth": 1, "heads": 1}
small = Tokenizer.from_config(table | {"encoder": {"kind": "titok", **part}, "decoder": {"kind": "vit", **part}})
small.save(path.with_name("small.safetensors"))
load(path.with_name("small.safetensors"), device="cpu")
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
tok = load(path, device="cpu")
total = sum(float(p.double().sum()) for p in tok.parameters())  # every page is touched
print((peak() - before) / sum(p.numel() * p.element_size() for p in tok.parameters()))
"""
    path = tmp_path / "large.safetensors"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2
