"""Training a generator: it learns a known law, a stopped run goes on to the bit, and wrong data are refused."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenizers_vis as tv
from tokenizers_vis.config import ConfigError, override
from tokenizers_vis.generator import load_generator
from tokenizers_vis.sources import Part
from tokenizers_vis.token_shards import Origin, begin, codes_hash, write_shard
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.train.loop import RunError, fit, read_recipe, resume

SIZE, LENGTH = 8, 6
BASE = """
task = "generator"
name = "tiny"
precision = "fp32"
device = "cpu"
label_dropout = 0.1
[model]
kind = "causal"
backbone = { width = 32, depth = 2, heads = 2 }
[optim]
steps = 12
batch_size = 8
lr = 5e-3
warmup = 2
ema = 0.9
[data]
train = ""
[log]
every = 1
val_every = 6
save_every = 5
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tokens(folder: Path, ids: np.ndarray, labels: np.ndarray, **over: Any) -> Path:
    """ids: i n k, one crop of each image."""
    values = {"tokenizer": "source", "hash": "1" * 16, "codebook_sizes": (SIZE,), "nested": True}
    values |= {"n_tokens": ids.shape[1], "augmentation": {"kind": "center", "crops": 1}, "classes": ("a", "b")}
    origin, part = Origin(**values | over), Part("part-0", 0, len(ids), "0" * 16)
    begin(folder, origin, [part.name])
    keys = [f"{i:05}" for i in range(len(ids))]
    write_shard(folder, origin, part, keys=keys, ids=torch.from_numpy(ids[:, None]), labels=labels, skipped={})
    return folder


class Source:
    """Two classes, each a Markov chain with a law of its own."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.first = random.dirichlet(np.full(SIZE, 0.5), 2)
        self.law = random.dirichlet(np.full(SIZE, 0.3), (2, SIZE))

    def draw(self, b: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        labels = random.integers(2, size=b)
        ids = np.zeros((b, LENGTH), dtype=np.int64)
        for place in range(LENGTH):
            law = self.law[labels, ids[:, place - 1]] if place else self.first[labels]
            ids[:, place] = (random.random(b)[:, None] > law.cumsum(axis=1)).sum(axis=1).clip(max=SIZE - 1)
        return ids[..., None], labels

    def bits(self, ids: np.ndarray, labels: np.ndarray) -> float:
        """Of a token, under the law itself; what it gives less than 1/1000 counts as that."""
        p = [self.first[labels, ids[:, 0, 0]]]
        p += [self.law[labels, ids[:, i, 0], ids[:, i + 1, 0]] for i in range(LENGTH - 1)]
        return float(-np.log2(np.maximum(np.stack(p), 1e-3)).mean())


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


@pytest.fixture(scope="module")
def tokens(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of ids to learn from, and to judge by."""
    folder = tmp_path_factory.mktemp("tokens")
    return write_tokens(folder / "train", *source.draw(3000, 1)), write_tokens(folder / "val", *source.draw(400, 2))


@pytest.fixture
def recipe(tokens: tuple[Path, Path]) -> Callable[..., dict[str, Any]]:
    data = [f"data.train={tokens[0]}", f"data.val={tokens[1]}"]
    return lambda *overrides: override(tomllib.loads(BASE), [*data, *overrides])


def last_validation(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "val"][-1]


LEARN = ["optim.steps=200", "optim.batch_size=32", "optim.lr=1e-2"]
LEARN += ["log.every=100", "log.val_every=200", "log.save_every=200"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("causal", []),
        ("random_order", ["model.anneal=[0.1, 0.3]"]),
        ("levels", ["model.levels=[1, 1, 1, 1, 1, 1]"]),
    ],
)
def test_it_learns_the_law_of_a_markov_source(
    kind: str, more: list[str], recipe: Callable[..., dict[str, Any]], source: Source, tmp_path: Path
) -> None:
    fit(recipe(f"model.kind={kind}", *more, *LEARN), tmp_path / "run")
    found = last_validation(tmp_path / "run")
    assert found["bits_per_token"] < source.bits(*source.draw(400, 2)) + 0.12
    # The class tells which of two laws it is, which counting does not see.
    assert found["bits_per_token"] < found["bits_per_token/bigram"] - 0.1
    assert found["bits_per_token/bigram"] < found["bits_per_token/zero_order"] - 0.3
    assert found["bits_per_image"] == pytest.approx(LENGTH * found["bits_per_token"])
    gen = load_generator(tmp_path / "run", "cpu")
    ids = gen.sample(["a"] * 400 + ["b"] * 400, batch_size=800).ids.numpy()
    # Samples cost under the law what its own do, and much more under that of the other class.
    labels = np.arange(800) // 400
    own = source.bits(ids, labels)
    assert own == pytest.approx(source.bits(*source.draw(800, 3)), abs=0.35)
    assert source.bits(ids, 1 - labels) > own + 1


def test_a_masked_generator_learns_too(recipe: Callable[..., dict[str, Any]], source: Source, tmp_path: Path) -> None:
    fit(recipe("model.kind=masked", *LEARN, "optim.steps=400", "optim.lr=5e-3", "log.val_every=400"), tmp_path / "run")
    found = last_validation(tmp_path / "run")
    assert found["bits_per_token"] < found["bits_per_token/zero_order"] - 0.3
    gen = load_generator(tmp_path / "run", "cpu")
    ids = gen.sample(["a"] * 200 + ["b"] * 200, steps=6, choice_temperature=1.0).ids.numpy()
    labels = np.arange(400) // 200
    assert source.bits(ids, 1 - labels) > source.bits(ids, labels) + 1


def test_a_stopped_run_goes_on_to_the_bit(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    from tokenizers_vis.train import generator_task

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    dropout = "model.backbone.dropout=0.2"
    assert fit(recipe(dropout), whole).finished
    forward, calls = generator_task.GeneratorTask.forward, 0

    def until(task: Any, data: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return forward(task, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_task.GeneratorTask, "forward", until)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe(dropout), stopped)
    assert resume(stopped).step == 12
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, stopped))
    for key in ("model", "average"):
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


def test_the_file_says_whose_ids_these_are(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fit(recipe("optim.steps=1", "sampling.guidance=2.5"), tmp_path / "run")
    gen = tv.load_generator(tmp_path / "run", "cpu")
    assert (gen.name, gen.tokenizer, gen.hash) == ("tiny", "source", "1" * 16)
    assert (gen.codebook_sizes, gen.max_tokens, gen.class_names, gen.nested) == ((SIZE,), LENGTH, ("a", "b"), True)
    assert gen.config["sampling"] == {"guidance": 2.5}


def test_images_without_a_class_are_learned_as_of_none(
    source: Source, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    ids, labels = source.draw(40, 1)
    folder = write_tokens(tmp_path / "none", ids, np.full_like(labels, -1), classes=())
    fit(recipe("optim.steps=1", f"data.train={folder}", "data.val="), tmp_path / "run")
    gen = load_generator(tmp_path / "run", "cpu")
    assert gen.classes == 0 and gen.sample([None, None]).n_tokens == LENGTH
    with pytest.raises(ValueError, match="got 0"):
        gen.sample([0])


def test_samples_are_drawn_where_the_tokenizer_is_at_hand(
    tiny: Callable[..., dict[str, Any]], recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tok = Tokenizer.from_config(tiny()).eval()
    tok.save(tmp_path / "tok.safetensors")
    own = {"tokenizer": tok.codes, "codebook_sizes": tok.codebook_sizes}
    ids = torch.randint(0, 200, (20, 6, 1)).numpy()
    for name in ("train", "val"):
        write_tokens(tmp_path / name, ids, np.arange(20) % 2, hash=codes_hash(tok), **own)
    data = [f"data.{name}={tmp_path / name}" for name in ("train", "val")]
    table = recipe("optim.steps=1", *data, f"data.tokenizer={tmp_path / 'tok.safetensors'}")
    fit(table, tmp_path / "run")
    (sheet,) = (tmp_path / "run" / "samples").glob("*.png")
    assert sheet.stat().st_size > 0
    write_tokens(tmp_path / "others", ids, np.arange(20) % 2, hash="2" * 16, **own)
    with pytest.raises(ValueError, match="mean other things"):
        fit(override(table, [f"data.train={tmp_path / 'others'}", "data.val="]), tmp_path / "run2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hash": "2" * 16}, "hash is '2222222222222222'.*'1111111111111111'"),
        ({"tokenizer": "other"}, "tokenizer is 'other'"),
    ],
)
def test_validation_on_the_ids_of_another_tokenizer_is_refused(
    change: dict[str, Any], message: str, source: Source, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = write_tokens(tmp_path / "val", *source.draw(10, 1), **change)
    with pytest.raises(ConfigError, match=message):
        fit(recipe(f"data.val={folder}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train="], "data.train is empty"),
        (["label_dropout=1.5"], "a share from 0 to 1"),
        (["data.val_images=0"], "at least 1"),
        (["model.kind=casual"], "Did you mean 'causal'"),
        (["model.dropout=0.1"], "no option 'dropout'"),
        (["sampling.guide=2"], "Did you mean 'guidance'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(
    overrides: list[str], message: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(recipe(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_kept(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fit(recipe("optim.steps=1"), tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        fit(recipe(), tmp_path / "run")


# The command line


def run(*words: object) -> None:
    from tokenizers_vis.cli import main

    try:
        main([str(word) for word in words])
    except SystemExit as error:
        if error.code:
            raise


def test_trained_and_drawn_from_the_command_line(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tok = Tokenizer.from_config(tiny()).eval()
    tok.save(tmp_path / "tok.safetensors")
    ids = torch.randint(0, 200, (20, 6, 1)).numpy()
    own = {"tokenizer": tok.codes, "codebook_sizes": tok.codebook_sizes, "hash": codes_hash(tok)}
    for name in ("train", "val"):
        write_tokens(tmp_path / name, ids, np.arange(20) % 2, **own)
    (tmp_path / "tiny.toml").write_text(BASE)
    folder, out, tokenizer = tmp_path / "run", tmp_path / "out", tmp_path / "tok.safetensors"
    words = ["--tokens", tmp_path / "train", "--val", tmp_path / "val", "--tokenizer", tokenizer, "--out", folder]
    run("train-generator", tmp_path / "tiny.toml", "optim.steps=2", *words)
    assert f"the generator is {folder / 'generator.safetensors'}" in capsys.readouterr().out
    draw = ["generate", folder, "--tokenizer", tokenizer, "--class", "b", "--class", 0, "--n", 3, "--seed", 7]
    run(*draw, "--guidance", 3, "--n-tokens", 4, "--device", "cpu", "--out", out, "--batch-size", 4)
    assert "drew 6 images" in capsys.readouterr().out
    names = ["0-10", "0-11", "0-12", "b-7", "b-8", "b-9"]
    assert sorted(path.stem for path in out.glob("*.tok")) == names and (out / "grid.png").is_file()
    gen = load_generator(folder, "cpu")
    assert Tokens.load(out / "0-11.tok") == gen.sample(0, 4, guidance=3.0, seed=11)
    run(*draw, "--guidance", 3, "--schedule", "power_cosine", "--top-k", 5, "--top-p", 0.9, "--out", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train-generator"], "give a recipe"),
        (["train-generator", "mini"], "no recipe of a generator"),
        (["train-generator", "generator-mini"], "data.train is empty"),
        (["train-generator", "generator-mini", "--resume", "x"], "--resume alone"),
        (["train-generator", "generator-mini", "--tokens", "nowhere"], "no folder that tokenizers-vis tokenize wrote"),
        (["generate", "nowhere"], "there is no generator 'nowhere'"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        run(*words)
    assert message in capsys.readouterr().err


def test_the_recipe_that_ships_is_one_that_the_wheel_can_hold() -> None:
    """16 MB in half precision, for the bundled tokenizer."""
    from tokenizers_vis.config import build
    from tokenizers_vis.generator import Generator
    from tokenizers_vis.train.generator_task import GeneratorConfig

    config = build(GeneratorConfig, read_recipe("generator-mini"))
    tok = tv.load("mini", "cpu")
    facts = {"tokenizer": tok.codes, "hash": codes_hash(tok), "codebook_sizes": list(tok.codebook_sizes)}
    gen = Generator.from_config(
        {**facts, "name": config.name, "nested": tok.nested, "max_tokens": tok.max_tokens, "classes": 200,
         "class_names": [], "model": config.model, "sampling": config.sampling}
    )  # fmt: skip
    gen.check(tok)
    assert sum(p.numel() for p in gen.parameters()) <= 8e6
    loss = gen.train().model.loss(tok.encode(torch.rand(2, 3, 64, 64)).ids, torch.tensor([0, 200]), 0.0)
    assert loss.item() == pytest.approx(math.log(4096), abs=0.5)
