"""The benchmark scripts of generators: sets of samples are judged as a few lines would, every variant is timed."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from tokenizers_vis.eval.distances import frechet_distance
from tokenizers_vis.eval.features import feature_net
from tokenizers_vis.generator import Generator
from tokenizers_vis.sources import open_source
from tokenizers_vis.token_shards import TokenShards
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.tokenize import Crops, tokenize

ROOT = Path(__file__).resolve().parents[1]
# n is small on purpose: a warning about it is part of what is printed.
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(markdown: str) -> list[list[str]]:
    return [re.split(r" *\| *", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]


def test_sets_of_samples_are_judged_beside_counting(
    tiny: Callable[..., dict[str, Any]],
    photos: list[Path],
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (weights,) = (shared / "weights").glob("mobilenetv2_100*.safetensors")
    tok = Tokenizer.from_config(tiny()).eval()
    tok.save(tmp_path / "tok.safetensors")
    (tmp_path / "photos").mkdir()
    for photo in photos:
        shutil.copy(photo, tmp_path / "photos")
    tokenize(str(tmp_path / "photos"), tmp_path / "tokens", tok, crops=Crops(kind="center-flip"))
    shards = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    table = {key: shards[key] for key in ("tokenizer", "hash", "codebook_sizes", "nested")}
    model = {"kind": "causal", "backbone": {"width": 16, "depth": 1, "heads": 1}}
    config = {**table, "name": "tiny", "max_tokens": 6, "classes": 0, "class_names": [], "model": model}
    Generator.from_config(config).save(tmp_path / "gen.safetensors")
    out, n = tmp_path / "out", len(photos)
    words = [tmp_path / "gen.safetensors", "--tokens", tmp_path / "tokens", "--data", tmp_path / "photos"]
    words += ["--tokenizer", tmp_path / "tok.safetensors", "--net-weights", weights, "--n", n, "--guidance", 1]
    benchmark = script("generation")
    benchmark.main([str(word) for word in [*words, "--device", "cpu", "--out", out]])
    rows = json.loads((out / "generation.json").read_text())
    kinds = ["their reconstructions", "zero order", "position", "bigram", "position bigram", "tiny, guidance 1"]
    assert [row["set"] for row in rows] == kinds and all(row["n"] == n for row in rows)
    net = feature_net("mobilenetv2", weights)
    originals = torch.cat(list(benchmark.held_out(open_source(str(tmp_path / "photos")), tok, n)))
    expected = frechet_distance(net(originals), net(tok.reconstruct(originals)))
    assert rows[0]["fd_mobilenetv2"] == pytest.approx(expected, rel=1e-4)
    # Untrained, it knows no better than that all ids are equally likely.
    assert rows[-1]["bits_per_image"] == pytest.approx(6 * 7.64, rel=0.05)
    printed = capsys.readouterr().out
    assert rows_of(printed)[0] == ["set", "n", "fd_mobilenetv2", "kd_mobilenetv2", "bits_per_image", "seconds"]
    assert (out / "generation.png").is_file()
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([str(word) for word in [*words, "--n", n + 1]])
    assert f"more than the {n} pictures" in capsys.readouterr().err


def test_every_way_to_sample_is_timed(capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    size = ["--tokens", "4", "--ids", "8", "--width", "16", "--depth", "1", "--heads", "2"]
    script("generation_speed").main(
        [*size, "--batches", "1", "2", "--rounds", "1", "--threads", str(threads), "--device", "cpu"]
    )
    rows = rows_of(capsys.readouterr().out)[2:]
    names = ["with the cache", "without a cache", "levels 1, 1, 2, 4 ..."]
    assert [row[:2] for row in rows] == [[batch, name] for batch in "12" for name in names]
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows)
    with pytest.raises(SystemExit, match="2"):
        script("generation_speed").main(["--tokens", "6"])


def test_bits_of_pictures_add_up(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tok = Tokenizer.from_config(tiny()).eval()
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * (i % 4), 90, 200)).save(tmp_path / "photos" / f"{i}.png")
    tokenize(str(tmp_path / "photos"), tmp_path / "tokens", tok)
    shards = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    table = {key: shards[key] for key in ("tokenizer", "hash", "codebook_sizes", "nested")}
    model = {"kind": "causal", "backbone": {"width": 16, "depth": 1, "heads": 1}}
    config = {**table, "name": "tiny", "max_tokens": 6, "classes": 0, "class_names": [], "model": model}
    words = ["--tokens", str(tmp_path / "tokens"), "--generator", str(tmp_path / "gen.safetensors"), "--n", "12"]
    Generator.from_config(config | {"hash": "0" * 16}).save(tmp_path / "gen.safetensors")
    with pytest.raises(SystemExit, match="2"):
        script("bits").main(words)
    assert "tiny knows 0000000000000000" in capsys.readouterr().err
    gen = Generator.from_config(config)
    ids = TokenShards(tmp_path / "tokens").gather(range(12), [0] * 12)
    gen.model.codes.bias.data[ids.unique()] = 15.0
    gen.save(tmp_path / "gen.safetensors")
    script("bits").main(words)
    rows = {name: float(bits) for name, bits, *_ in rows_of(capsys.readouterr().out)[2:]}
    assert rows["packed"] == 48
    # The same few pictures again and again: their ids are likely, and given the one before almost certain.
    assert rows["counted: bigram"] < rows["counted: zero order"] < 48
    theory = rows["tiny, no class: cross-entropy"]
    assert theory == pytest.approx(6 * math.log2(len(ids.unique())), rel=0.05)
    assert theory < rows["tiny, no class: range coded, headers apart"] < theory + 10
