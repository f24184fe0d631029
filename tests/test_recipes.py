"""The recipes: each is strict and says what it is, the large ones are the models and configs of their papers.

A large one is built without memory, on torch's meta device, and compared with the preset of the released weights. That
the small ones train: tests/test_recipe_runs.py.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenizers_vis.catalogue import preset
from tokenizers_vis.config import ConfigError, override
from tokenizers_vis.convert import convert
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.loop import list_recipes, read_recipe
from tokenizers_vis.train.recipe_list import FOLDER, describe
from tokenizers_vis.train.task import read_config

RECIPES = [name for name in list_recipes() if read_recipe(name).get("task", "tokenizer") == "tokenizer"]
SMALL = [name for name in RECIPES if "small" in name]
# A small one names its large sibling; the rest are of this library's own.
SIBLINGS = {name: re.search(r"sibling of ([\w-]+)", (FOLDER / f"{name}.toml").read_text()) for name in SMALL}
LARGE = sorted({match[1] for match in SIBLINGS.values() if match})
MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """key.sub -> value."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def model_of(name: str) -> dict[str, Any]:
    """The table of a recipe's tokenizer, with the parts that a second stage takes from its first."""
    table = read_recipe(name)
    first = read_recipe(name.replace("stage2", "stage1"))["tokenizer"] if name.endswith("stage2") else {}
    found = {"name": table["name"], **first, **table["tokenizer"]}
    if name == "flextok-d18-d28":  # whose canvas is that of a release
        found["canvas"] = {"kind": "vae", "size": 256, "scaling_factor": 1.0}
    return found


# What a recipe says of itself


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_what_it_is_and_its_command(name: str) -> None:
    comment = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").partition("\nname = ")[0].splitlines()
    assert all(line.startswith("# ") and len(line) <= 120 for line in comment)
    assert describe(name) == comment[0][2:] and 40 <= len(describe(name)) <= 100
    assert comment[1].startswith("# tokenizers-vis train ") and "--data " in comment[1]
    text = " ".join(comment)
    assert ("A100" if name in LARGE else "CPU cores") in text and ("xpect" in text or "Beside it" in text)
    if name in (*SMALL, *LARGE):
        assert f" train {name} --data '" in comment[1]
        assert name in SMALL or "https://arxiv.org/abs/" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_strict_and_whole(name: str) -> None:
    config = read_config(override(read_recipe(name), ["data.train=somewhere"]))
    assert config.task == "tokenizer"
    if name in (*SMALL, *LARGE):
        assert config.data.square  # nothing in these papers is stretched
    with pytest.raises(ConfigError, match="optim.stebs.*Did you mean 'steps'"):
        read_config(override(read_recipe(name), ["optim.stebs=3"]))


def test_norms_of_a_small_net_have_as_many_channels_a_group_as_those_of_a_large_one() -> None:
    def nets(table: Any) -> list[tuple[int, int]]:
        if not isinstance(table, dict):
            return []
        own = [(table["ch"], table.get("norm_groups", 32))] if "ch" in table else []
        return own + [net for value in table.values() for net in nets(value)]

    found = {name: nets(model_of(name)) for name in (*SMALL, *LARGE)}
    assert all(ch // groups == 4 for several in found.values() for ch, groups in several)
    assert sum(bool(several) for name, several in found.items() if name in SMALL) >= 6


def test_every_large_recipe_is_there() -> None:
    assert set(LARGE) <= set(RECIPES) and len(LARGE) == 10
    assert [name for name, match in SIBLINGS.items() if not match] == ["maskgit-vqgan-small"]


# Large ones: shapes


def released(name: str) -> Tokenizer:
    """A preset's tokenizer without memory, of the shapes of the released file."""
    for path in MANIFESTS.glob("*.json.gz"):
        shapes = json.loads(gzip.decompress(path.read_bytes())).get(name)
        if shapes:
            state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
            config, state = convert(preset(name)["family"], preset(name)["official"], state)
            return Tokenizer.from_state({"name": name, **config}, state, name)
    raise KeyError(name)


PRESETS = {
    "titok-l-32-stage2": "titok-l-32",
    "titok-bl-64-vq8k": "titok-bl-64-vq8k",
    "one-d-piece-l-256-stage2": "one-d-piece-l-256",
    "llamagen-vq-16": "llamagen-vq-16",
    "fqgan-dual-16": "fqgan-dual-16",
}


@pytest.mark.parametrize(("name", "other"), PRESETS.items())
def test_a_large_recipe_trains_the_released_model(name: str, other: str) -> None:
    with torch.device("meta"):
        mine = Tokenizer.from_config(model_of(name))
    theirs = released(other)
    shapes = [{key: tuple(value.shape) for key, value in tok.state_dict().items()} for tok in (mine, theirs)]
    assert shapes[0] == shapes[1]
    for part in ("encoder", "quantizer", "decoder"):
        options = [flat(tok.config[part]) for tok in (mine, theirs)]
        both = options[0].keys() & options[1].keys()
        assert len(both) >= 4 and {key: options[0][key] for key in both} == {key: options[1][key] for key in both}
    assert mine.nested == theirs.nested and mine.codebook_sizes == theirs.codebook_sizes
    assert mine.encoder.lengths == theirs.encoder.lengths and mine.canvas.resize == theirs.canvas.resize


# Millions of parameters: encoder, quantizer, decoder, canvas. TiTok's and One-D-Piece's are those of the authors'
# classes, LlamaGen's sum 71.9 that of their model, FlexTok's that of its release, but for a table of positions.
MILLIONS = {
    "titok-l-32-stage1": (303.4, 0.05, 306.8, 54.5),
    "titok-l-32-stage2": (303.4, 0.05, 306.8, 30.7),
    "one-d-piece-l-256-stage1": (303.9, 0.05, 307.1, 54.5),
    "one-d-piece-l-256-stage2": (303.9, 0.05, 307.1, 30.7),
    "titok-bl-64-vq8k": (86.0, 0.52, 303.5, 0),
    "flextok-d18-d28": (287.0, 0, 2169.3, 83.8),
    "fqgan-dual-16": (68.6, 0.26, 81.6, 0),
    "tokenflow": (115.7, 1.31, 65.1, 0),
    "llamagen-vq-16": (29.3, 0.13, 42.5, 0),
    "instella-128": (115.0, 0.10, 270.7, 0),
}


@pytest.mark.parametrize("name", LARGE)
def test_parameters_of_a_large_recipe(name: str) -> None:
    with torch.device("meta"):
        tok = Tokenizer.from_config(model_of(name))
    parts = (tok.encoder, tok.quantizer, tok.decoder, tok.canvas)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert counts == pytest.approx(MILLIONS[name], abs=0.06)
    frozen = {"titok-l-32-stage1": 54.5, "one-d-piece-l-256-stage1": 54.5, "flextok-d18-d28": 83.8}
    still = sum(p.numel() for p in tok.parameters() if not p.requires_grad) / 1e6
    assert still == pytest.approx(frozen.get(name, 0), abs=0.06)


@pytest.mark.parametrize(
    ("overrides", "other"),
    [
        (["max_tokens=64", "width=768", "depth=12", "heads=12"], "titok-b-64"),
        (["max_tokens=128", "width=512", "depth=8", "heads=8"], "titok-s-128"),
    ],
    ids=["B-64", "S-128"],
)
def test_other_sizes_are_overrides(overrides: list[str], other: str) -> None:
    table = {"tokenizer": model_of("titok-l-32-stage2")}
    words = [f"tokenizer.{part}.{word}" for part in ("encoder", "decoder") for word in overrides]
    with torch.device("meta"):
        mine = Tokenizer.from_config(override(table, words)["tokenizer"])
    theirs = released(other)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


# Large ones: hyper-parameters, as data with their source. Batches are global: per GPU x GPUs x accumulation.

SQUARE = {"data.crop": (1.0, 1.0), "data.square": True, "data.flip": 0.5}
ADM = {"data.crop": (0.8, 1.0), "data.square": True, "data.flip": 0.5}  # random_crop_arr
COSINE = {"optim.lr": 1e-4, "optim.final": 0.1, "optim.weight_decay": 1e-4, "optim.clip": 1.0, "optim.ema": 0.999}
ADAM = {"optim.warmup": 0, "optim.final": 1.0, "optim.weight_decay": 0.0, "optim.clip": 1.0, "optim.ema": 0.0}
IMAGENET = 1_281_167
VQGAN_LOSSES = {
    "loss.reconstruction": 1.0,  # l2 in [-1, 1], the canvas' own range
    "loss.quantizer": 1.0,
    "loss.perceptual": 1.0,
    "loss.net": "lpips-vgg",
    "loss.gan.critic": "patch",
    "loss.gan.weight": 0.5,
    "loss.gan.start": 20_000,
    "loss.gan.objective": "hinge",
    "loss.gan.adaptive": "off",
    "loss.gan.lecam": 0.0,
    "optim.betas": (0.9, 0.95),
}
STAGE1 = {
    **SQUARE,
    **COSINE,
    "seed": 42,
    "optim.steps": 1_000_000,
    "optim.warmup": 10_000,
    "optim.betas": (0.9, 0.99),
    "loss.quantizer": 1.0,
    "loss.gan.weight": 0.0,
    "loss.perceptual": 0.0,
}
STAGE2 = {
    **SQUARE,
    **COSINE,
    "seed": 42,
    "optim.steps": 500_000,
    "optim.warmup": 5_000,
    "optim.betas": (0.9, 0.999),
    "loss.quantizer": 0.0,
    "loss.l2": 1.0,
    "loss.perceptual": 0.0,
    "loss.classifier.net": "torchvision:convnext_small",
    "loss.classifier.weight": 0.1,
    "loss.gan.critic": "blur",
    "loss.gan.weight": 0.01,
    "loss.gan.start": 20_000,
    "loss.gan.lecam": 0.001,
    "loss.gan.lecam_of": "means",
    "loss.gan.rate": 1.0,
}
SINGLE = {
    **STAGE2,
    "optim.warmup": 10_000,
    "loss.quantizer": 1.0,
    "loss.reconstruction": 1.0,  # l2 in [0, 1], the canvas' own range
    "loss.l2": 0.0,
    "loss.perceptual": 1.0,
    "loss.net": "lpips-vgg",
    "loss.gan.weight": 0.1,
    "loss.gan.start": 200_000,
}
# Recipe -> where the original says it, and what it says there.
ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    "titok-l-32-stage1": (
        "bytedance/1d-tokenizer, configs/training/TiTok/stage1/titok_l32.yaml, 8 GPUs",
        {**STAGE1, "optim.batch_size": 32 * 8, "precision": "fp16", "tokenizer.quantizer.commitment": 0.25},
    ),
    "titok-l-32-stage2": (
        "bytedance/1d-tokenizer, configs/training/TiTok/stage2/titok_l32.yaml, 8 GPUs",
        {**STAGE2, "optim.batch_size": 32 * 8, "precision": "fp16"},
    ),
    "one-d-piece-l-256-stage1": (
        "turingmotors/One-D-Piece, configs/training/stage1/one-d-piece_l256.yaml and train_tokenizer.sh",
        {**STAGE1, "optim.batch_size": 32 * 8 * 4, "precision": "bf16", "tokenizer.quantizer.commitment": 0.25},
    ),
    "one-d-piece-l-256-stage2": (
        "turingmotors/One-D-Piece, configs/training/stage2/one-d-piece_l256.yaml and train_tokenizer.sh",
        {**STAGE2, "optim.batch_size": 32 * 8 * 2, "precision": "bf16"},
    ),
    "titok-bl-64-vq8k": (
        "bytedance/1d-tokenizer, configs/training/TA-TiTok/tatitok_bl64_vq.yaml; steps and batch of issue 67",
        {**SINGLE, "optim.batch_size": 256, "optim.steps": 1_000_000, "precision": "fp16"},
    ),
    "llamagen-vq-16": (
        "FoundationVision/LlamaGen, scripts/tokenizer/train_vq.sh and tokenizer/tokenizer_image/vq_train.py",
        {
            **ADM,
            **ADAM,
            **VQGAN_LOSSES,
            "seed": 0,
            "precision": "bf16",
            "optim.lr": 1e-4,
            "optim.batch_size": 128,
            "optim.steps": IMAGENET // 128 * 40,
            "tokenizer.quantizer.commitment": 0.25,
        },
    ),
    "fqgan-dual-16": (
        "showlab/FQGAN, train_fqgan_dual.sh, tokenizer/vq_train_dual.py and models/clip_encoder.py",
        {
            **ADM,
            **ADAM,
            **VQGAN_LOSSES,
            "seed": 0,
            "precision": "bf16",
            "optim.lr": 2e-4,
            "optim.batch_size": 256,
            "optim.steps": IMAGENET // 256 * 40,
            "tokenizer.quantizer.disentangle": 0.1,
            "tokenizer.quantizer.part.entropy": 0.03,
            "tokenizer.quantizer.part.commitment": 0.25,
            "loss.align.0.teacher": "vit_large_patch14_clip_quickgelu_224.openai",
            "loss.align.0.weight": 0.5,
            "loss.align.0.match": "first",
            "loss.align.0.loss": "contrastive",
        },
    ),
    "tokenflow": (
        "ByteVisionLab/TokenFlow, tokenflow/scripts/train_vq.sh, tokenizer/vq_train.py and vq_loss.py",
        {
            **ADM,
            **ADAM,
            **VQGAN_LOSSES,
            "seed": 0,
            "optim.lr": 1e-4,
            "optim.batch_size": 512,
            "optim.steps": IMAGENET // 512 * 100,
            "tokenizer.quantizer.part.codebook_size": 32768,
            "tokenizer.quantizer.part.commitment": 0.25,
            "loss.align.0.teacher": "vit_base_patch16_clip_quickgelu_224.openai",
            "loss.align.0.weight": 1.0,
            "loss.align.0.loss": "cosine",
        },
    ),
    "flextok-d18-d28": (
        "apple/ml-flextok, the released d18-d28 (no training code): shape, lengths, times, null token, REPA",
        {
            "tokenizer.quantizer.levels": [8, 8, 8, 5, 5, 5],
            "tokenizer.encoder.max_tokens": 256,
            "tokenizer.encoder.attention_scale": 8 / 64,
            "tokenizer.decoder.attention_scale": 8 / 64,
            "tokenizer.decoder.times": "mode",
            "tokenizer.decoder.mode_scale": 0.25,
            "loss.align.0.teacher": "vit_large_patch14_dinov2.lvd142m",
            "loss.align.0.at": "decoder.blocks.1",
            "loss.align.0.weight": 1.0,
        },
    ),
    "instella-128": (
        "AMD-AIG-AIMA/Instella-T2I, configs/bae_config.py and bae/bnl.py (no training code)",
        {
            "tokenizer.encoder.depth": 12,
            "tokenizer.encoder.heads": 12,
            "tokenizer.encoder.width": 12 * 64,
            "tokenizer.encoder.patch": 16,
            "tokenizer.encoder.max_tokens": 128,
            "tokenizer.decoder.depth": 16,
            "tokenizer.decoder.heads": 16,
            "tokenizer.decoder.width": 16 * 64,
            "tokenizer.quantizer.bits": 64,
            "tokenizer.quantizer.temperature": 0.1,
        },
    ),
}


def test_every_large_recipe_names_its_original() -> None:
    assert set(ORIGINALS) == set(LARGE)


@pytest.mark.parametrize("name", LARGE)
def test_hyper_parameters_are_the_originals(name: str) -> None:
    config = read_config(override(read_recipe(name), ["data.train=somewhere"]))
    found = flat(dataclasses.asdict(config))
    for i, term in enumerate(found["loss.align"]):
        found |= flat(term, f"loss.align.{i}.")
    _, wanted = ORIGINALS[name]
    assert {key: found[key] for key in wanted} == wanted
