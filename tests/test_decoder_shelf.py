"""Every decoder on the shelf makes a tokenizer: it learns from a recipe's parts, is saved, and draws what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tokenizers_vis.config import override
from tokenizers_vis.decoders import DECODERS
from tokenizers_vis.images import load_image
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.loop import fit, read_recipe
from tokenizers_vis.train.task import read_config
from tokenizers_vis.train.tokenizer_task import untrained

SHAPE = {"dim": 3, "max_tokens": 4, "size": 16, "patch": 4, "width": 32, "depth": 1, "heads": 2}
CONV = {"size": 16, "ch": 32, "channel_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_channels": 32}
VAE = {
    "kind": "vae",
    "size": 16,
    "scaling_factor": 1.0,
    "latent_channels": 2,
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
LATENT = {"size": 8, "channels": 2}
NOISY = {"flow": {}, "flextok": {"guidance": 1.0}, "diffusion": {}, "patch_flow": {}, "shortcut": {}}
# name -> the options of a decoder; "latents" paint on a VAE's
SHELF: dict[str, dict[str, Any]] = {
    "vit": {**SHAPE},
    "titok": {**SHAPE},
    "conv": {"dim": 3, **CONV},
    "dual": {"dim": 3, "size": 16, "pixels": {"dim": 2, **CONV}},
    **{kind: {**SHAPE, "steps": 2, **options} for kind, options in NOISY.items()},
    "edm": {"kind": "diffusion", "noise": "edm", "steps": 2, **SHAPE},
    "flow-latents": {"kind": "flow", "steps": 2, **SHAPE, **LATENT},
    "diffusion-latents": {"kind": "diffusion", "data_std": 1.0, "steps": 2, **SHAPE, **LATENT},
    "patch_flow-latents": {"kind": "patch_flow", "steps": 2, **SHAPE, **LATENT},
}
STARTS = [name for name in SHELF if name.partition("-")[0] in (*NOISY, "edm")]
NESTED = [name for name in SHELF if name not in ("conv", "dual")]


def table(name: str) -> dict[str, Any]:
    latents = name.endswith("latents")
    lengths = {"kind": "uniform", "full": 0.5} if name in NESTED else {"kind": "full"}
    return {
        "name": f"tiny-{name}",
        "canvas": VAE if latents else {"kind": "pixels", "size": 16},
        "encoder": {"kind": "flextok", **SHAPE, **(LATENT if latents else {}), "lengths": lengths},
        "quantizer": {"kind": "fsq", "levels": [8, 5, 5]},
        "decoder": {"kind": name, **SHELF[name]},
    }


@pytest.fixture
def images() -> Tensor:
    """Four soft pictures of 16 px."""
    return torch.nn.functional.interpolate(torch.rand(4, 3, 3, 3), 16, mode="bicubic").clamp(0, 1)


@pytest.fixture
def learned(images: Tensor) -> Callable[[str], Tokenizer]:
    """``learned(name)``: a tokenizer after a few steps, so that tokens and noise both count."""

    def make(name: str, steps: int = 6) -> Tokenizer:
        torch.manual_seed(1)
        tok = Tokenizer.from_config(table(name)).train()
        optimizer = torch.optim.AdamW([p for p in tok.parameters() if p.requires_grad], 3e-3)
        for _ in range(steps):
            step(tok, images, optimizer)
        return tok.eval()

    return make


def step(tok: Tokenizer, images: Tensor, optimizer: torch.optim.Optimizer | None) -> float:
    """The loss on one batch, always with the same draws; with an optimizer, a step of it."""
    torch.manual_seed(5)
    done = tok.training_pass(images)
    loss = done.decoded.loss + done.quantized.loss
    if optimizer is not None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_the_shelf_is_whole() -> None:
    assert {options.get("kind", name) for name, options in SHELF.items()} == set(DECODERS)


@pytest.mark.parametrize("name", SHELF)
def test_two_steps_make_it_better(name: str, images: Tensor) -> None:
    tok = Tokenizer.from_config(table(name)).train()
    optimizer = torch.optim.AdamW([p for p in tok.parameters() if p.requires_grad], 1e-3)
    losses = [step(tok, images, optimizer), step(tok, images, optimizer), step(tok, images, None)]
    assert all(np.isfinite(losses)) and losses[2] < losses[0]


@pytest.mark.parametrize("name", SHELF)
def test_what_is_saved_draws_the_same(
    name: str, images: Tensor, learned: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    tok = learned(name)
    tokens = tok.encode(images)
    pictures = tok.decode(tokens)
    assert pictures.shape == (4, 3, 16, 16) and pictures.isfinite().all()
    assert torch.equal(tok.decode(tokens), pictures)
    tok.save(tmp_path / "tok.safetensors")
    again = Tokenizer.from_file(tmp_path / "tok.safetensors").eval()
    assert again.config == tok.config and torch.equal(again.encode(images).ids, tokens.ids)
    torch.testing.assert_close(again.decode(tokens), pictures, rtol=0, atol=1e-6)
    apart = torch.cat([tok.decode(tokens[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(apart, pictures, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tok.decode(tokens, batch_size=3), pictures, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NESTED)
def test_tokens_past_the_length_do_not_matter(name: str, images: Tensor, learned: Callable[[str], Tokenizer]) -> None:
    tok = learned(name)
    ragged = tok.decode(tok.encode(images, n_tokens=[4, 1, 2, 3]))
    alone = torch.cat([tok.decode(tok.encode(images[i : i + 1], n_tokens=n)) for i, n in enumerate([4, 1, 2, 3])])
    torch.testing.assert_close(ragged, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", STARTS)
def test_a_seed_makes_a_picture(name: str, images: Tensor, learned: Callable[[str], Tokenizer]) -> None:
    tok = learned(name)
    tokens = tok.encode(images)
    drawn = tok.decode(tokens, generator=torch.Generator().manual_seed(3))
    assert torch.equal(tok.decode(tokens, generator=torch.Generator().manual_seed(3)), drawn)
    split = tok.decode(tokens, generator=torch.Generator().manual_seed(3), batch_size=2)
    torch.testing.assert_close(split, drawn, rtol=1e-3, atol=1e-4)
    assert (tok.decode(tokens, generator=torch.Generator().manual_seed(4)) - drawn).abs().max() > 1e-4
    noise = torch.randn(4, *tok.decoder.shape)
    assert torch.equal(tok.decode(tokens, noise=noise), tok.decode(tokens, noise=noise))


@pytest.mark.parametrize("name", STARTS)
def test_bad_options_are_told(name: str, images: Tensor) -> None:
    tok = Tokenizer.from_config(table(name)).eval()
    tokens = tok.encode(images)
    for options, message in (
        ({"steps": 0}, "steps is a whole number from 1"),
        ({"noise": torch.zeros(4, 5, 16, 16)}, "noise is"),
        ({"guidance": float("nan")}, "guidance is a number"),
        ({"guidance_kind": "pag"}, "guidance_kind is"),
        ({"temperature": 1.0}, "no option temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            tok.decode(tokens, **options)


@pytest.mark.parametrize("name", SHELF)
def test_it_trains_under_autocast(name: str, images: Tensor) -> None:
    tok = Tokenizer.from_config(table(name)).train()
    with torch.autocast("cpu", torch.bfloat16):
        done = tok.training_pass(images)
    assert done.decoded.estimate.dtype == torch.float32
    (done.decoded.loss + done.quantized.loss).backward()
    gradients = [p.grad for p in tok.decoder.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert tok.eval().decode(tok.encode(images)).isfinite().all()


@pytest.mark.parametrize("kind", ["flow", "diffusion", "patch_flow", "shortcut"])
@torch.no_grad()
def test_it_starts_where_a_one_pass_decoder_ended(kind: str) -> None:
    """What ``init.adopt`` does: with all that fits, its first picture is the other's, whatever the noise."""
    from tokenizers_vis.decoders.vit import ViTDecoder

    vit = ViTDecoder(**SHAPE).eval()
    decoder = DECODERS[kind](**SHAPE, predict="picture").eval()
    own = decoder.state_dict()
    fitting = {key: value for key, value in vit.state_dict().items() if key in own and own[key].shape == value.shape}
    assert len(fitting) >= 10
    decoder.load_state_dict(own | fitting)
    codes = torch.randn(2, 4, 3)
    lengths = torch.tensor([4, 2])
    torch.testing.assert_close(decoder(codes, lengths, steps=1), vit(codes, lengths), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(codes, lengths, steps=2, seed=4), vit(codes, lengths), rtol=1e-3, atol=1e-4)


# -- from a recipe


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_recipe_trains_a_flow_in_the_latents_of_a_vae(tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(np.random.randint(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    parts = {key: value for key, value in table("flow-latents").items() if key != "name"}
    recipe = {
        "name": "latents",
        "precision": "fp32",
        "device": "cpu",
        "tokenizer": parts,
        "optim": {"steps": 2, "batch_size": 2, "warmup": 1},
        "data": {"train": str(tmp_path), "workers": 0},
    }
    before = Tokenizer.from_config({"name": "latents", **parts})
    assert fit(recipe, tmp_path / "run").finished
    tok = Tokenizer.from_file(tmp_path / "run" / "tokenizer.safetensors").eval()
    assert tok.decoder.shape == (2, 8, 8) and tok.image_size == 16
    picture = tok.reconstruct(tmp_path / "0.png", steps=2)
    assert picture.shape == (1, 3, 16, 16) and picture.isfinite().all()
    assert before.state_dict().keys() == tok.state_dict().keys()


@pytest.mark.parametrize("name", ["decoder-diffusion", "decoder-patch-flow", "decoder-shortcut"])
def test_a_recipe_begins_with_the_pictures_of_mini(name: str, photos: list[Path]) -> None:
    """Its encoder and codebook stay, so that it draws mini's tokens; before any step it draws mini's pictures, without
    the convolutions behind their patches."""
    from tokenizers_vis import load

    config = read_config(override(read_recipe(name), ["data.train=somewhere"]))
    assert set(config.init.frozen) == {"encoder", "quantizer"}
    mini, tok = load("mini", device="cpu"), untrained(config).eval()
    torch.nn.init.zeros_(mini.decoder.refine.last.weight)
    torch.nn.init.zeros_(mini.decoder.refine.last.bias)
    tokens = mini.encode(load_image(photos[0]))
    assert torch.equal(tok.encode(load_image(photos[0])).ids, tokens.ids) and tok.codes == mini.codes
    torch.testing.assert_close(tok.decode(tokens, steps=1, guidance=1), mini.decode(tokens), rtol=0, atol=2e-3)


# -- does it learn?


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "flow", "diffusion", "patch_flow", "shortcut"])
def test_it_learns_eight_pictures(kind: str, photos: list[Path]) -> None:
    """At least 4 dB better than each picture's mean colour, within about a minute of one core."""
    from tokenizers_vis.decoders.canvas import fit as fitted

    images = torch.stack([fitted(load_image(path), 32, "crop") for path in photos])
    images = torch.cat([images, images[:2].flip(-1)])
    shape = SHAPE | {"max_tokens": 16, "size": 32, "patch": 8, "width": 96, "depth": 2, "heads": 4}
    picture = {"predict": "picture"} if kind != "vit" else {}
    late = {"time_mean": 0.8} if kind not in ("vit", "diffusion") else {}
    short = {"finest": 8} if kind == "shortcut" else {}  # each length of a jump is learned from a share of the images
    config = table("vit") | {"canvas": {"kind": "pixels", "size": 32}}
    config["encoder"] = {"kind": "flextok", **shape, "standardize": True}
    config["decoder"] = {"kind": kind, **shape, **picture, **late, **short}
    torch.manual_seed(0)
    tok = Tokenizer.from_config(config).train()
    optimizer = torch.optim.AdamW(tok.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=500, pct_start=0.05)
    for _ in range(500):
        done = tok.training_pass(images.repeat(2, 1, 1, 1))
        optimizer.zero_grad()
        (done.decoded.loss + done.quantized.loss).backward()
        torch.nn.utils.clip_grad_norm_(tok.parameters(), 1.0)
        optimizer.step()
        rate.step()
    tok.eval()
    seen = tok.decode(tok.encode(images), **({} if kind == "vit" else {"steps": 2}))

    def decibels(other: Tensor) -> float:
        return (-10 * (other - images).square().flatten(1).mean(dim=1).log10()).mean().item()

    assert decibels(seen) > decibels(images.mean(dim=(2, 3), keepdim=True).expand_as(images)) + 4
