"""The benchmark scripts: their numbers are those that a few lines of torch give; nonsense is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import tokenizers_vis as tv
from tokenizers_vis.eval.thumbnail import thumbnail
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.data import val_batches

ROOT = Path(__file__).resolve().parents[1]
FLOW = {"kind": "flow", "steps": 2}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(path: Path, encoder: str = "flextok", **decoder: object) -> str:
    """An untrained tokenizer of 4 tokens, named as its file."""
    part = {"dim": 2, "max_tokens": 4, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
    config = {
        "name": path.stem,
        "canvas": {"kind": "pixels", "size": 16},
        "encoder": {"kind": encoder, **part},
        "quantizer": {"kind": "fsq", "levels": [8, 8]},
        "decoder": {"kind": "vit", **part, **decoder},
    }
    Tokenizer.from_config(config).save(path)
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return saved(tmp_path / "tiny.safetensors")


@pytest.fixture
def data(tmp_path: Path, photos: list[Path]) -> str:
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos[:3]:
        shutil.copy(photo, folder)
    return str(folder)


def rows_of(markdown: str) -> list[list[str]]:
    return [re.split(r" *\| *", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]


def test_quality_measures_what_it_says(tiny: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    script("quality").main(
        [tiny, "--data", data, "--images", "3", "--batch-size", "2", "--show", "2", "--out", str(out)]
    )
    result = json.loads((out / "quality.json").read_text())
    tokenizer, baseline = result["rows"][:3], result["rows"][3:]
    assert [(row["tokens"], row["bytes"]) for row in tokenizer] == [(1, 1), (2, 2), (4, 3)]
    assert all(row["images"] == 3 for row in result["rows"]) and result["protocol"]["images"] == 3
    # One pixel takes 3 bytes: all three lengths are compared with the same thumbnail.
    assert [(row["method"], row["bytes"]) for row in baseline] == [("bicubic thumbnail, 1 x 1", 3)]

    images = torch.cat(list(val_batches(open_source(data), 16, 3, 3))).float() / 255
    tok = tv.load(tiny, "cpu")
    versions = [tok.reconstruct(images, n) for n in (1, 2, 4)] + [thumbnail(images, 3).reconstruction]
    for row, version in zip(result["rows"], versions, strict=True):
        version = (version * 255).round() / 255
        errors = (version - images).square().flatten(1).mean(1)
        assert row["psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-3)
        assert set(row) == {"method", "tokens", "bytes", "image_size", "images", "psnr", "ssim", "gradient_energy"}
    assert baseline[0]["gradient_energy"] == 0  # one colour
    (book,) = result["codebooks"]
    ids = tok.encode(images).ids
    assert book["tokens"] == 12 and book["used"] == pytest.approx(len(ids.unique()) / 64)

    printed = rows_of(capsys.readouterr().out)
    assert printed[0] == ["tokenizer", "px", "tokens", "bytes", "PSNR", "SSIM", "gradient energy"]
    assert printed[2][:4] == ["tiny", "16", "1", "1"] and float(printed[2][4]) == pytest.approx(
        tokenizer[0]["psnr"], abs=0.01
    )
    with Image.open(out / "quality.png") as sheet:
        assert sheet.width > 4 * 96 and sheet.height > 2 * 96


def test_quality_compares_tokenizers_of_every_kind(
    tiny: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = saved(tmp_path / "plain.safetensors", "titok")
    flow = saved(tmp_path / "flow.safetensors", **FLOW)
    script("quality").main([tiny, plain, flow, "--data", data, "--steps", "1", "--out", str(tmp_path / "out")])
    rows = rows_of(capsys.readouterr().out)
    assert [row[:3] for row in rows[2:9]] == [
        *(["tiny", "16", n] for n in "124"),
        ["plain", "16", "4"],  # not nested: one length
        *(["flow", "16", n] for n in "124"),
    ]


def test_quality_heads_the_distance_with_its_net(
    tiny: str, data: str, shared: Path, capsys: pytest.CaptureFixture
) -> None:
    (weights,) = (shared / "weights").glob("mobilenetv2_100*.safetensors")
    script("quality").main([tiny, "--data", data, "--net", "mobilenetv2_100", "--net-weights", str(weights)])
    rows = rows_of(capsys.readouterr().out)
    assert rows[0][6] == "mobilenetv2_100" and 0 < float(rows[2][6]) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4"], "of flow decoders"),
        (["--net-weights", "net.safetensors"], "needs --net"),
        (["--images", "0"], "count"),
        (["--show", "0"], "at least 1"),
    ],
)
def test_quality_refuses_what_makes_no_sense(
    tiny: str, data: str, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script("quality").main([tiny, "--data", data, *options])
    assert message in capsys.readouterr().err


def test_judging_knows_the_perfect_and_the_flat(data: str) -> None:
    batches = [batch.float() / 255 for batch in val_batches(open_source(data), 16, 3, 2)]
    scores = script("quality").judge(
        batches, lambda x: [("same", x), ("flat", torch.full_like(x, 0.5))], None, torch.device("cpu")
    )
    assert scores["same"] == {"psnr": 100, "ssim": pytest.approx(1), "gradient_energy": 1, "images": 3}
    assert scores["flat"]["gradient_energy"] == 0 and scores["flat"]["psnr"] < 20


@pytest.mark.slow
def test_speed_times_and_weighs(tiny: str, capsys: pytest.CaptureFixture) -> None:
    script("speed").main(["--tokenizer", tiny, "--threads", "1", "--counts", "2", "4", "--starts", "1", "--calls", "2"])
    rows = rows_of(capsys.readouterr().out)
    times = {row[0]: float(row[1].removesuffix(" ms")) for row in rows if row[-1].endswith(" ms")}
    assert len(times) == 6 and times["`import tokenizers_vis`"] < times["`import tokenizers_vis as tv; tv.load`"]
    peaks = [(row[0], float(row[1].removesuffix(" MiB"))) for row in rows if row[1].endswith("MiB")]
    assert [count for count, _ in peaks] == ["2", "4"] and all(50 < peak < 5000 for _, peak in peaks)


def test_photographs_for_speed_differ() -> None:
    made = [script("speed").photograph(i) for i in (0, 6, 12)]
    assert all(picture.size == (640, 480) for picture in made)
    assert len({picture.tobytes() for picture in made}) == 3


class TestQuantizerBenchmarks:
    @pytest.mark.parametrize("method", ["vector-quantize-pytorch", "ours, plain torch"])
    def test_a_training_step_is_measured(self, method: str) -> None:
        pytest.importorskip("vector_quantize_pytorch")
        found = script("training_step").measure(method, codes=64, dim=4, repeats=1, threads=torch.get_num_threads())
        assert found["cpu"] > 0 and found["wall"] > 0 and found["memory"] >= 0

    def test_the_table_holds_ratios(self) -> None:
        step = script("training_step")
        times = dict(zip(step.METHODS, (100.0, 10.0, 4.0), strict=True))
        results = {(8192, 8, name): {"cpu": cpu, "wall": cpu, "memory": 1.0} for name, cpu in times.items()}
        lines = step.table([(8192, 8)], results, 2).splitlines()
        assert [len(line.split("|")) for line in lines[:3]] == [13] * 3
        assert "| 10.0 | 1 | 10.0 | 4.0 | 1 | 25.0 |" in lines[2]
