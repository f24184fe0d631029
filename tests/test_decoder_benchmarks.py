"""benchmarks/decoders.py: its numbers are those that a few lines give, budgets are kept, nonsense is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from tokenizers_vis.eval.metrics import psnr
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.data import val_batches

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def decoders() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_decoders", ROOT / "benchmarks" / "decoders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(photos: list[Path], shared: Path, tmp_path: Path) -> list[str]:
    """What every study is told."""
    (weights,) = (shared / "weights").glob("mobilenetv2_100*.safetensors")
    (tmp_path / "photos").mkdir()
    for photo in photos[:3]:
        shutil.copy(photo, tmp_path / "photos")
    return ["--data", str(tmp_path / "photos"), "--images", "3", "--net-weights", str(weights)]


def saved(path: Path, **decoder: Any) -> str:
    """An untrained tokenizer of 4 tokens whose codes are those of every other one."""
    part = {"dim": 2, "max_tokens": 4, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
    torch.manual_seed(0)
    config = {
        "name": path.stem,
        "codes": "shared",
        "canvas": {"kind": "pixels", "size": 16},
        "encoder": {"kind": "flextok", **part},
        "quantizer": {"kind": "fsq", "levels": [8, 8]},
        "decoder": {"kind": "vit", **part, **decoder},
    }
    tok = Tokenizer.from_config(config)
    for name, value in tok.decoder.named_parameters():
        if "patches" in name:  # zero at first: then every walk would end in grey
            torch.nn.init.normal_(value, std=0.05)
    tok.save(path)
    return str(path)


@pytest.fixture
def flow(tmp_path: Path) -> str:
    return saved(tmp_path / "flow.safetensors", kind="flow", scales=[8, 16], predict="picture", steps=3)


def rows_of(markdown: str) -> list[list[str]]:
    return [re.split(r" *\| *", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]


def test_by_tokens(
    decoders: ModuleType, words: list[str], flow: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = saved(tmp_path / "plain.safetensors")
    guided = f"{flow}:steps=2,guidance=1.5,solver=heun"
    decoders.main(["tokens", plain, guided, f"{flow}:steps=1/2", "--kept", "1", "4", *words, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "tokens.json").read_text())
    labels = ["plain", "flow steps=2,guidance=1.5,solver=heun", "flow steps=1/2"]
    assert [(row["decoder"], row["tokens"]) for row in rows] == [(label, n) for label in labels for n in (1, 4)]
    # Heun's last step asks once; each guided one asks twice; a step at half the size has a quarter of the pixels.
    assert [row["passes"] for row in rows] == [1, 1, 6, 6, 2.25, 2.25]
    tok = Tokenizer.from_file(plain).eval()
    photos = torch.cat(list(val_batches(open_source(words[1]), 16, 3, 3))).float() / 255
    made = (tok.reconstruct(photos, 1) * 255).round() / 255
    assert rows[0]["PSNR"] == pytest.approx(psnr(made, photos).mean().item(), abs=1e-4)
    assert all(row["ms a picture"] > 0 and 0 < row["distance"] < 6 for row in rows)
    with Image.open(tmp_path / "tokens.png") as sheet:
        assert sheet.width > 300 and sheet.height > 300
    assert len(rows_of(capsys.readouterr().out)) == 2 + len(rows)


def test_by_steps_and_from_coarse_to_fine(
    decoders: ModuleType, words: list[str], flow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "EVALUATIONS", (1, 2, 4))
    decoders.main(["steps", flow, *words, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "steps.json").read_text())
    euler = [row["evaluations"] for row in rows if row["solver"] == "euler"]
    assert euler == [1, 2, 4] and {row["solver"] for row in rows} == set(decoders.SOLVERS)
    one = {row["solver"]: row["distance"] for row in rows if row["steps"] == 1}
    assert one["heun"] == pytest.approx(one["euler"])  # a last step asks once
    decoders.main(["scales", flow, *words, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scales.json").read_text())
    whole = {row["steps"]: row for row in rows if "/" not in row["steps"]}
    assert whole["4"]["evaluations"] == 4 and whole["4"]["times fewer"] <= 1
    for row in rows:
        # The cheapest walk at full size that comes as near.
        near = [r["evaluations"] for r in whole.values() if r["distance"] <= row["distance"]]
        assert row["times fewer"] == (min(near) / row["evaluations"] if near else None)


def test_budgets_are_kept(decoders: ModuleType, words: list[str], flow: str, tmp_path: Path) -> None:
    decoders.main(["rate", flow, *words, "--size", "32", "--bytes", "31", "400", "1200", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "rate.json").read_text())
    assert {row["method"] for row in rows} == {"flow", "jpeg", "webp", "avif"}
    for row in rows:
        assert row["pictures"] == 0 or row["bytes"] <= row["at most, bytes"]
    by = {(row["method"], row["at most, bytes"]): row for row in rows}
    # 4 tokens of 6 bits are 3 bytes; what is left is the header, and no more is to be had.
    assert by["flow", 400]["bytes"] == by["flow", 1200]["bytes"]
    assert by["jpeg", 31]["pictures"] == 0 and by["jpeg", 1200]["pictures"] == 3
    assert by["jpeg", 1200]["distance"] <= by["webp", 31].get("distance", 9)
    assert by["webp", 1200]["distance"] < by["webp", 400]["distance"]


@pytest.mark.parametrize(
    ("study", "spec", "more", "message"),
    [
        ("tokens", "{plain}:steps=4", [], "decodes in one pass and has no steps"),
        ("tokens", "nothing-such", [], "nothing-such"),
        ("scales", "{plain}", [], "has one scale"),
        ("rate", "{plain}", ["--size", "32", "--bytes", "5"], "no .tok file is of 5 bytes"),
    ],
)
def test_what_makes_no_sense(
    decoders: ModuleType,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    study: str,
    spec: str,
    more: list[str],
    message: str,
) -> None:
    plain = saved(tmp_path / "plain.safetensors")
    with pytest.raises(SystemExit, match="2"):
        decoders.main([study, spec.format(plain=plain), *words, *more])
    assert message in capsys.readouterr().err
