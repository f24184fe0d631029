"""The most memory that a piece of work took, by what it is known to take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizers_vis.eval import memory
from tokenizers_vis.eval.memory import peak_memory
from tokenizers_vis.eval.methods import parse_methods

CPU = torch.device("cpu")
HERE = pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="resident memory is measured on Linux")


# In a process of its own: in the tests' one, threads and caches of earlier tests may give memory back meanwhile.
PEAKS = """
import numpy as np
from types import SimpleNamespace
from tokenizers_vis.eval.memory import peak_memory

for megabytes in (100, 200):
    large = np.ones(300 << 17)  # what was held before, or freed, does not count
    del large
    with peak_memory(SimpleNamespace(type="cpu")) as peak:
        for _ in range(2):  # one after the other
            held = np.ones(megabytes << 17)
            del held
    print(peak.bytes)
"""


@HERE
def test_it_is_what_was_held_at_once_also_when_it_is_free_again() -> None:
    run = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    # The kernel counts pages in batches.
    assert [int(line) for line in run.stdout.split()] == pytest.approx([100 << 20, 200 << 20], rel=0.25)


@HERE
def test_a_method_takes_its_weights_and_more() -> None:
    (method,) = parse_methods(["mini@4"], device="cpu")
    weights = 4 * method.describe()["parameters"]
    (found,) = method.reconstruct([np.zeros((64, 64, 3), np.uint8)], ["a"])
    assert weights <= found.peak_bytes < weights + 400e6
    (codec,) = parse_methods(["jpeg@q5"])
    assert codec.reconstruct([np.zeros((64, 64, 3), np.uint8)], ["a"])[0].peak_bytes is None


def test_where_it_cannot_be_measured_it_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "nothing")
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_torch_allocates() -> None:
    with peak_memory(torch.device("cuda")) as peak:
        held = torch.ones(64 << 18, device="cuda")
        del held
    assert peak.bytes == 64 << 20
