"""benchmarks/learning.py: pairs are pairs, finished runs are kept, and what is said of them is arithmetic."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tokenizers_vis.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--steps", "2", "--batch-size", "4", "--width", "32", "--tokens", "4", "--size", "16", "--seeds", "2"]


@pytest.fixture(scope="module")
def learning() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_learning", ROOT / "benchmarks" / "learning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Random pictures of 20 px, four in each of three folders, which are their classes."""
    for i in range(12):
        folder = tmp_path / "noise" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 20, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "noise"


@pytest.fixture
def teacher(tmp_path: Path) -> list[str]:
    """Arguments that name a net of random weights."""
    import timm

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "teacher.safetensors")
    return ["--teacher", "test_resnet", "--teacher-weights", str(tmp_path / "teacher.safetensors")]


def test_finished_runs_are_kept_and_judged(
    learning: ModuleType, noise: Path, teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    data = ["--data", str(noise), "--val", str(noise), "--classes", str(noise), "--classes-val", str(noise)]
    arguments = [*data, *teacher, *SMALL, "--out", str(out)]
    for study, arms in (("nested", 4), ("disentangle", 2), ("alignment", 2), ("perturbation", 2)):
        # Nothing is learned of noise in two steps, and nothing is concluded; but the runs are there.
        with pytest.raises(SystemExit, match=f"{study}, .*seed 0: .*has not learned"):
            learning.main([study, *arguments])
        runs = sorted((out / "runs").glob(f"{study}-*.json"))
        assert len(runs) == 2 * arms
        assert all(json.loads(path.read_text())["found"]["mean_colour"] > 5 for path in runs)
    assert not list(out.glob("*.json"))

    trained = []
    monkeypatch.setattr(learning, "trained", lambda table, *_: trained.append(table["seed"]) or pytest.fail("again"))
    with pytest.raises(SystemExit, match="has not learned"):
        learning.main(["nested", *arguments])
    assert not trained
    with pytest.raises(pytest.fail.Exception, match="again"):
        learning.main(["nested", *arguments, "--width", "64"])

    monkeypatch.setattr(learning, "LEAST", -100.0)
    learning.main(["nested", *arguments])
    result = json.loads((out / "nested.json").read_text())
    assert list(result["runs"]["nested"]) == ["0%", "20%", "50%", "100%"]
    with Image.open(out / "learning.png") as plot:
        assert plot.size[0] > 500


def test_alignment_needs_classes(learning: ModuleType, noise: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        learning.main(["alignment", "--data", str(noise), "--val", str(noise)])
    assert "give --classes and --classes-val" in capsys.readouterr().err


def test_arms_of_a_pair_differ_in_one_part_alone(learning: ModuleType) -> None:
    options = argparse.Namespace(teacher="t", teacher_weights="", size=24, tokens=16, width=96, steps=9, batch_size=2)
    options.data = "photos"
    differing = {
        "nested": ("tokenizer", "encoder", "lengths"),
        "disentangle": ("tokenizer", "quantizer"),
        "alignment": ("loss",),
        "perturbation": ("tokenizer", "quantizer"),
    }
    for study, keys in differing.items():
        tables = [learning.recipe(arm, 1, options) for arm in learning.STUDIES[study].arms(options).values()]
        parts = []
        for table in tables:
            *path, last = keys
            for key in path:
                table = table[key]
            parts.append(json.dumps(table.pop(last), sort_keys=True))
        assert len(set(parts)) == len(parts)
        assert all(table == tables[0] for table in tables)


def test_views_are_crops_of_the_photographs_the_same_for_one_seed(learning: ModuleType) -> None:
    photos = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    views = learning.views(photos, 64, 4, torch.Generator().manual_seed(3))
    assert torch.equal(views, learning.views(photos, 64, 4, torch.Generator().manual_seed(3)))
    crops = photos.unfold(2, 4, 1).unfold(3, 4, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)
    allowed = {tuple(crop.flatten().tolist()) for crop in torch.cat([crops, crops.flip(-1)])}
    assert len(allowed) == 2 * 9 * 2
    assert {tuple(view.flatten().tolist()) for view in views} <= allowed


def test_what_is_said_of_runs(learning: ModuleType) -> None:
    def claims(study: str, runs: dict) -> dict[str, tuple[list[float], bool | None]]:
        told = learning.STUDIES[study].claims(runs)
        said = learning.report(study, runs, told).splitlines()
        assert sum(line.startswith("| ") for line in said) == 2 + len(runs) + 2 + len(told)
        return {claim.what: (pytest.approx(claim.values), claim.holds) for claim in told}

    def nested(*values: float) -> dict[str, float]:
        return dict(zip(("psnr@1", "psnr@2", "psnr@3", "mean_colour"), values, strict=True))

    none, some = [nested(10, 12, 20, 9), nested(11, 13, 21, 9)], [nested(13, 14, 19, 9), nested(13, 14, 20.5, 9)]
    found = claims("nested", {"0%": none, "20%": some})
    prefixes, full = (next(v for what, v in found.items() if word in what) for word in ("prefixes", "full length"))
    assert ([2.5, 1.5], None) == prefixes and ([1.0, 0.5], None) == full

    base = {"psnr": 20.0, "mean_colour": 14.0}
    found = claims("disentangle", {"off": [base | {"cosine_squared": 0.4}], "on": [base | {"cosine_squared": 0.1}]})
    assert found["mean squared cosine, on / off"] == ([0.25], True)

    off, on = base | {"probe": 20.0}, base | {"probe": 19.0}
    assert claims("alignment", {"off": [off], "on": [on]})["linear probe of the codes, points gained"] == ([-1], False)

    off = base | {"any_wrong": 16.0, "near_wrong": 18.0}
    on = {"psnr": 19.5, "mean_colour": 14.0, "any_wrong": 17.5, "near_wrong": 18.5}
    found = claims("perturbation", {"off": [off], "on": [on]})
    assert found["PSNR lost without wrong ids, dB"] == ([0.5], False)
    assert found["less PSNR lost to 10% wrong ids, any of the codebook, %"] == ([50.0], True)
    assert found["less PSNR lost to 10% wrong ids, among the 16 nearest, %"] == ([50.0], None)


def test_measures_are_those_of_the_library(learning: ModuleType, tiny) -> None:
    tok = Tokenizer.from_config(tiny()).eval()
    images = torch.rand(3, 3, 16, 16)
    found = learning.nested_measures(tok, images, argparse.Namespace())
    assert list(found) == ["psnr@1", "psnr@2", "psnr@4", "psnr@6"]
    errors = (tok.reconstruct(images, 2) - images).square().mean(dim=(1, 2, 3))
    assert found["psnr@2"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-4)
    spread = images.var(dim=(2, 3), correction=0).mean(dim=1)
    assert learning.mean_colour(images) == pytest.approx((-10 * spread.log10()).mean().item(), abs=1e-4)


@pytest.mark.slow
def test_a_pair_on_photographs(learning: ModuleType, shared: Path, tmp_path: Path) -> None:
    photos = shared / "data" / "photos-160"
    arguments = ["--data", str(photos / "train-0.tar"), "--val", str(photos / "val.tar"), "--seeds", "1"]
    learning.main(["disentangle", *arguments, "--out", str(tmp_path)])
    claims = json.loads((tmp_path / "disentangle.json").read_text())["claims"]["disentangle"]
    assert claims[0]["holds"]
