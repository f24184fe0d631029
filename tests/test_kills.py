"""A run that is killed at any moment, again and again, ends as one that nothing disturbed: to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_vis as tv
from tokenizers_vis.config import override
from tokenizers_vis.train.loop import fit, resume

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """
name = "tiny"
precision = "fp32"
device = "cpu"
[tokenizer]
canvas = { kind = "pixels", size = 16 }
quantizer = { kind = "vq", dim = 3, codebook_size = 16, update = "ema", kmeans_start = true, revive_after = 2 }
[tokenizer.encoder]
kind = "flextok"
dim = 3
max_tokens = 4
size = 16
patch = 8
width = 32
depth = 1
heads = 2
lengths = { kind = "uniform", per = "image" }
[tokenizer.decoder]
kind = "flow"
dim = 3
max_tokens = 4
size = 16
patch = 8
width = 32
depth = 1
heads = 2
steps = 2
[optim]
steps = 120
batch_size = 4
lr = 3e-3
warmup = 2
ema = 0.9
[data]
workers = 0
[log]
every = 1
val_every = 40
save_every = 4
"""
KILLS = 20
# One process imports once and forks what is killed: each attempt costs only what it does.
PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tokenizers_vis.train.loop import fit, resume
import tokenizers_vis.pictures, torch.utils.tensorboard
table, folder, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(0)

def attempt(patience):
    child = os.fork()
    if not child:
        try:
            resume(folder) if (folder / "checkpoint.pt").exists() else fit(table, folder)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

# The patience grows from nearly nothing, so that beginnings are hit too; a run that ended first was not killed.
killed = 0
while killed < kills:
    status = attempt(chance.uniform(0.0, 0.05 + 0.02 * killed))
    if os.WIFEXITED(status):
        sys.exit("the run ended before it could be killed" if os.WEXITSTATUS(status) == 0 else "an attempt failed")
    killed += 1
sys.exit(0 if attempt(None) == 0 else "the last attempt failed")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    table = override(tomllib.loads(RECIPE), [f"data.train={folder}", f"data.val={folder}"])
    results = []
    for kills in (0, KILLS):
        run = tmp_path / f"killed-{kills}"
        command = [sys.executable, "-c", PROGRAM, json.dumps(table), str(run), str(kills)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        # Speed is the clock's, and the window that codebook use is taken over starts anew with each call.
        lost = ("images_per", "usage/", "perplexity/", "dead/", "entropy_")
        lines = [{key: line[key] for key in line if not key.startswith(lost)} for line in lines]
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        results.append((lines, state["model"], state["average"], tv.load(run, device="cpu").state_dict()))
        assert not list(run.glob(".*")), "a killed run left files aside"
    (lines, *weights), (killed_lines, *killed_weights) = results
    assert len(lines) == 120 + 3 and lines == killed_lines
    for one, other in zip(weights, killed_weights, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_a_kill_left_aside_goes_with_the_next_call(tmp_path: Path) -> None:
    """safetensors writes aside under a name of its own, which a kill leaves; a user's own hidden files stay."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "0.png")
    table = override(tomllib.loads(RECIPE), [f"data.train={tmp_path / 'data'}", "optim.steps=1", "log.save_every=1"])
    run = tmp_path / "run"
    fit(table, run)
    left = [".0123456789abcdef.pt", ".0123456789abcdef.safetensors", ".tmp7r0V5b"]
    for name in (*left, ".gitignore", ".tmp-notes"):
        (run / name).touch()
    resume(run)
    assert sorted(path.name for path in run.glob(".*")) == [".gitignore", ".tmp-notes"]
