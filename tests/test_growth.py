"""A tokenizer that learns more tokens than it has: its first ids stay, and so does all that was made with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.encoders.flextok import Standard
from tokenizers_vis.presets import load
from tokenizers_vis.token_shards import codes_hash, makes
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.loop import Run, fit, resume
from tokenizers_vis.train.tokenizer_task import TrainConfig, untrained

MORE = 11


@pytest.fixture
def small(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Tokenizer:
    """The tokenizer of 6 tokens, saved as ``small.safetensors``."""
    tok = Tokenizer.from_config(tiny()).eval()
    tok.encoder.standard.mean.normal_()
    tok.encoder.standard.variance.uniform_(0.5, 1)
    tok.save(tmp_path / "small.safetensors")
    return tok


@pytest.fixture
def recipe(small: Tokenizer, photos: list[Path], tmp_path: Path) -> dict[str, Any]:
    config = {part: dict(small.config[part]) for part in ("canvas", "encoder", "quantizer", "decoder")}
    for part in ("encoder", "decoder"):
        config[part]["max_tokens"] = MORE
    config["encoder"]["lengths"] = {"kind": "uniform", "per": "batch"}
    return {
        "name": "grown",
        "precision": "fp32",
        "tokenizer": config,
        "init": {
            "tokenizer": str(tmp_path / "small.safetensors"),
            "parts": ["quantizer"],
            "adopt": ["encoder", "decoder"],
            "freeze": True,
            "first_tokens": 6,
        },
        "optim": {"steps": 6, "batch_size": 4, "lr": 0.05, "warmup": 0, "ema": 0.5},
        "data": {"train": str(photos[0].parent), "workers": 0},
        "log": {"save_every": 2, "every": 1, "val_every": 100},
    }


def test_it_starts_as_what_it_was(small: Tokenizer, recipe: dict[str, Any]) -> None:
    grown = untrained(build(TrainConfig, recipe)).eval()
    images = torch.rand(2, 3, 16, 16)
    tokens = grown.encode(images)
    assert tokens.ids.shape[1] == grown.max_tokens == MORE
    assert torch.equal(tokens[:, :6].ids, small.encode(images).ids)
    torch.testing.assert_close(grown.decode(tokens[:, :6]), small.decode(small.encode(images)))


def test_its_first_ids_stay_and_the_others_learn(small: Tokenizer, recipe: dict[str, Any], tmp_path: Path) -> None:
    fit(recipe, tmp_path / "run")
    before, after = (
        untrained(build(TrainConfig, recipe)).state_dict(),
        load_file(tmp_path / "run/tokenizer.safetensors"),
    )
    for name in ("encoder.registers", "encoder.standard.mean", "encoder.standard.variance"):
        assert torch.equal(after[name][:6], before[name][:6]) and (after[name][6:] != before[name][6:]).any(1).all()
    stay = {name for name in after if name.startswith("encoder.")} - {f"encoder.{t}" for t in small.encoder.tables}
    assert stay and all(torch.equal(after[name], before[name]) for name in stay)
    assert not torch.equal(after["decoder.token_positions"][:6], before["decoder.token_positions"][:6])
    grown = load(tmp_path / "run", "cpu")
    images = torch.rand(8, 3, 16, 16)
    assert torch.equal(grown.encode(images, n_tokens=6).ids, small.encode(images).ids)
    # Either decodes what the other made, a generator or shards of the smaller one's ids know the larger one.
    assert grown.codes == small.codes and small.decode(grown.encode(images)[:, :6]).shape == images.shape
    recipe["tokenizer"]["encoder"].pop("lengths")
    same = Tokenizer.from_config(grown.config | {"encoder": recipe["tokenizer"]["encoder"]}).eval()
    same.load_state_dict(grown.state_dict())
    assert codes_hash(same) != codes_hash(small) == codes_hash(same, 6)
    assert makes(same, codes_hash(small), 6) and not makes(same, codes_hash(small), 5)
    same.encoder.registers.data[2] += 1
    assert not makes(same, codes_hash(small), 6)


def test_a_broken_run_goes_on_to_the_bit(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(recipe, tmp_path / "whole")
    step = Run.train_step

    def broken(run: Run, data: Any) -> dict[str, float]:
        if run.step == 3:
            raise KeyboardInterrupt
        return step(run, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_step", broken)
        fit(recipe, tmp_path / "broken")
    (tmp_path / "small.safetensors").unlink()  # a run needs no more what it grew from
    assert resume(tmp_path / "broken").finished
    one, two = (load_file(tmp_path / name / "tokenizer.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_decoder_of_the_first_ids_grows(small: Tokenizer, recipe: dict[str, Any], tmp_path: Path) -> None:
    """A decoder trained for the tokenizer before it grew learns the new tokens; what it drew of the first it draws."""
    untrained(build(TrainConfig, recipe)).save(tmp_path / "grown.safetensors")
    flow = {"kind": "flow", **{k: v for k, v in small.config["decoder"].items() if k != "kind"}, "predict": "picture"}
    early = Tokenizer.from_config(small.config | {"decoder": flow}).eval()
    early.decoder.to_patches.weight.data.normal_()
    early.save(tmp_path / "early.safetensors")
    recipe["tokenizer"] = {"canvas": recipe["tokenizer"]["canvas"], "decoder": flow | {"max_tokens": MORE}}
    recipe["init"] = {
        "tokenizer": str(tmp_path / "grown.safetensors"),
        "parts": ["encoder", "quantizer"],
        "adopt": ["decoder"],
        "freeze": True,
        "decoder": str(tmp_path / "early.safetensors"),
    }
    late = untrained(build(TrainConfig, recipe)).eval()
    tokens = late.encode(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(late.decode(tokens[:, :6]), early.decode(tokens[:, :6]))
    assert late.decode(tokens).shape == (2, 3, 16, 16)
    Tokenizer.from_config(small.config | {"codes": "others"}).save(tmp_path / "early.safetensors")
    with pytest.raises(ConfigError, match="init.decoder: .*early.safetensors decodes ids of 'others'"):
        untrained(build(TrainConfig, recipe))
    recipe["init"] |= {"parts": ["quantizer"], "adopt": ["encoder"]}
    with pytest.raises(ConfigError, match="adopt names no decoder"):
        build(TrainConfig, recipe)


def test_kept_statistics_are_those_of_evaluation() -> None:
    standard = Standard(5, 3)
    standard.mean.normal_()
    standard.kept = 2
    z = torch.randn(7, 5, 3)
    learned = standard(z)
    torch.testing.assert_close(learned[:, :2], standard.eval()(z)[:, :2])
    assert learned[:, 2:].mean(dim=0).abs().max() < 1e-6
    torch.testing.assert_close(standard.train()(z[:, :1]), learned[:, :1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": {"first_tokens": 5}}, "first_tokens is what .*small.safetensors has, 6, .* got 5 and 11"),
        ({"encoder": {"max_tokens": 6}}, "max_tokens are more; got 6 and 6"),
        ({"encoder": {"width": 64}}, "differs from that of .* in more than max_tokens: width"),
        ({"init": {"adopt": ["decoder"], "parts": ["encoder", "quantizer"]}}, "comes with an encoder that is adopted"),
        ({"init": {"freeze": False}}, "a quantizer that is frozen"),
    ],
)
def test_what_cannot_grow_is_told(recipe: dict[str, Any], change: dict[str, Any], message: str) -> None:
    recipe["init"] |= change.get("init", {})
    recipe["tokenizer"]["encoder"] |= change.get("encoder", {})
    if "encoder" in recipe["init"]["parts"]:
        recipe["tokenizer"].pop("encoder")
    if recipe["tokenizer"].get("encoder", {}).get("max_tokens") == 6:
        recipe["tokenizer"]["decoder"]["max_tokens"] = 6
    with pytest.raises(ConfigError, match=message):
        untrained(build(TrainConfig, recipe))


def test_tokens_that_depend_on_later_ones_cannot_be_kept(
    tiny: Callable[..., dict[str, Any]], recipe: dict[str, Any], tmp_path: Path
) -> None:
    table = tiny("titok")
    Tokenizer.from_config(table).save(tmp_path / "titok.safetensors")
    recipe["tokenizer"]["encoder"] = table["encoder"] | {"max_tokens": MORE}
    recipe["init"]["tokenizer"] = str(tmp_path / "titok.safetensors")
    with pytest.raises(ConfigError, match="depend on later ones"):
        untrained(build(TrainConfig, recipe))
