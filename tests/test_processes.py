"""Several processes train what one would: on a CPU with gloo, as on many GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_vis as tv
from tokenizers_vis.config import override, to_toml

ROOT = Path(__file__).resolve().parents[1]
# Nothing is drawn at random but the pictures' order and crops, so that one process and two can be compared.
RECIPE = """
name = "tiny"
precision = "fp32"
device = "cpu"
[tokenizer]
canvas = { kind = "pixels", size = 16 }
quantizer = { kind = "vq", dim = 3, codebook_size = 16, update = "ema" }
[tokenizer.encoder]
kind = "flextok"
dim = 3
max_tokens = 4
size = 16
patch = 8
width = 32
depth = 2
heads = 2
lengths = { kind = "full" }
[tokenizer.decoder]
kind = "vit"
dim = 3
max_tokens = 4
size = 16
patch = 8
width = 32
depth = 2
heads = 2
[optim]
steps = 6
batch_size = 8
lr = 3e-3
warmup = 2
ema = 0.9
[data]
workers = 0
[log]
every = 1
val_every = 6
save_every = 3
"""
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tokenizers_vis.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def recipe(folder: Path, *overrides: str) -> str:
    """The path of a recipe file, over eight pictures of noise."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        random = np.random.default_rng(0)
        for i in range(8):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data / f"{i}.png")
    file = folder / f"recipe-{len(list(folder.iterdir()))}.toml"
    file.write_text(to_toml(override(tomllib.loads(RECIPE), [f"data.train={data}", f"data.val={data}", *overrides])))
    return str(file)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same global batches: losses and weights agree, codebooks too. Then one process goes on alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, "train", recipe(tmp_path), "-o", str(one))
    launch(2, "train", recipe(tmp_path), "-o", str(two))
    for line, other in zip(lines(one), lines(two), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-3)
    mine, theirs = (tv.load(folder, device="cpu").state_dict() for folder in (one, two))
    worst = max((mine[key].float() - theirs[key].float()).abs().max().item() for key in mine)
    assert worst < 2e-3

    text = (two / "recipe.toml").read_text()
    (two / "recipe.toml").write_text(text.replace("steps = 6", "steps = 8"))
    done = launch(1, "train", "--resume", str(two))
    assert "the run had 2 processes, now it has 1" in done.stderr
    assert [line["step"] for line in lines(two)] == list(range(1, 9))


@pytest.mark.slow
def test_sharded_processes_train_as_one(tmp_path: Path) -> None:
    """FSDP2: each process holds a part of the weights, the optimiser and the average; checkpoints hold the whole."""
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, "train", recipe(tmp_path), "-o", str(one))
    launch(2, "train", recipe(tmp_path, "sharding=fsdp", "optim.steps=3"), "-o", str(two))
    text = (two / "recipe.toml").read_text()
    (two / "recipe.toml").write_text(text.replace("steps = 3", "steps = 6"))
    launch(2, "train", "--resume", str(two))
    for line, other in zip(lines(one), lines(two), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=2e-3)
    mine, theirs = (tv.load(folder, device="cpu").state_dict() for folder in (one, two))
    assert max((mine[key].float() - theirs[key].float()).abs().max().item() for key in mine) < 1e-2
