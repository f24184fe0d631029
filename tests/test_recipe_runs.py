"""Training from recipes: the small ones learn, TiTok's two stages each tune what they should, misfits are told.

The large ones: tests/test_recipes.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tokenizers_vis as tv
from tokenizers_vis.config import ConfigError, build, override
from tokenizers_vis.decoders.vqgan_codes import VQGANCodes
from tokenizers_vis.encoders.base import Encoder
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.loop import fit, list_recipes, read_recipe
from tokenizers_vis.train.task import read_config
from tokenizers_vis.train.tokenizer_task import untrained
from tokenizers_vis.train.tower import adopt_tower

SMALL = [name for name in list_recipes() if "small" in name and "task" not in read_recipe(name)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


# Small ones


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth pictures of 48 x 40: random colours in the corners."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(8):
        corners = Image.fromarray(random.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((48, 40), Image.Resampling.BILINEAR).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of MobileNetV2, untrained."""
    import timm

    path = tmp_path_factory.mktemp("teacher") / "mobilenetv2.safetensors"
    net = timm.create_model("mobilenetv2_100", pretrained=False)
    save_file(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def runs(photographs: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``runs(name)``: the folder of three steps of a small recipe, after those that it starts from."""
    root = tmp_path_factory.mktemp("work")
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(name: str) -> Path:
        folder = root / "runs" / name
        if folder.exists():
            return folder
        table = read_recipe(name)
        if before := table.get("init", {}).get("tokenizer"):
            run(Path(before).name)
        words = ["optim.steps=3", "optim.batch_size=4", "data.workers=0", "log.every=1", "precision=fp32", "device=cpu"]
        if table.get("loss", {}).get("align"):
            words += [f"loss.align.0.weights={teacher}", "loss.align.0.size=32"]
        if "gan" in table.get("loss", {}):
            words += ["loss.gan.start=1"]
        assert fit(override(table, [*words, f"data.train={photographs}"]), folder).finished
        return folder

    yield run
    torch.set_num_threads(threads)
    patch.undo()


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_trains(name: str, runs: Any) -> None:
    folder = runs(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if line["kind"] == "train"]
    assert len(losses) == 3 and all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in losses)
    tok = tv.load(folder, device="cpu")
    assert tok.image_size == 32 and sum(p.numel() for p in tok.parameters()) < 4e6
    tokens = tok.encode(torch.rand(2, 3, 40, 40))
    assert tok.decode(tokens).shape == (2, 3, 32, 32)
    table = read_recipe(name)
    parts = set(losses[-1])
    assert ("critic" in parts and "gan" in parts) == ("gan" in table.get("loss", {}))
    assert ("align" in parts) == ("align" in table.get("loss", {}))


def test_a_small_recipe_runs_without_any_download(runs: Any) -> None:
    """But for a teacher, whose local file an override may name, no recipe asks for a net."""
    for name in SMALL:
        loss = read_config(override(read_recipe(name), ["data.train=x"])).loss
        assert not loss.perceptual and not loss.gram and not loss.classifier.weight
        assert bool(loss.align) == (name in ("fqgan-small", "tokenflow-small"))


# Two stages


@pytest.mark.parametrize("family", ["titok", "one-d-piece"])
def test_the_second_stage_tunes_what_paints_and_nothing_else(family: str, runs: Any) -> None:
    first, second = (tv.load(runs(f"{family}-small-stage{stage}"), device="cpu") for stage in (1, 2))
    one, two = first.state_dict(), second.state_dict()
    assert {key for key in one if key not in two} == {key for key in one if key.startswith("canvas.encoder.")}
    still = {key for key in two if torch.equal(one[key], two[key])}
    moved = two.keys() - still
    assert {key for key in two if key.startswith(("encoder.", "quantizer."))} == still
    assert {"canvas.codebook", "decoder.mask_token", "decoder.head.hidden.weight"} <= moved
    assert any(key.startswith("canvas.decoder.") for key in moved)
    # So either decodes the other's tokens.
    tokens = first.encode(torch.rand(2, 3, 32, 32))
    assert second.codes == first.name and second.encode(torch.rand(2, 3, 32, 32)).tokenizer == tokens.tokenizer
    assert second.decode(tokens).shape == (2, 3, 32, 32)
    assert first.nested == second.nested == (family == "one-d-piece")


def test_the_first_stage_leaves_its_teacher_alone(runs: Any) -> None:
    vqgan, first = (tv.load(runs(name), device="cpu") for name in ("maskgit-vqgan-small", "titok-small-stage1"))
    assert isinstance(first.canvas, VQGANCodes)
    assert torch.equal(first.canvas.codebook, vqgan.quantizer.codebook)
    images = torch.rand(2, 3, 32, 32)
    # Its targets are the VQGAN's own tokens, and sure of these, it paints the VQGAN's own picture.
    tokens = vqgan.encode(images)
    target = first.canvas.target(images)
    assert torch.equal(target.flatten(1), tokens.ids[..., 0])
    sure = 200.0 * torch.nn.functional.one_hot(target, 256).movedim(-1, 1)
    torch.testing.assert_close(first.canvas.paint(sure).clamp(0, 1), vqgan.decode(tokens), rtol=0, atol=1e-4)


def test_the_first_stage_compares_codes_the_second_pictures(runs: Any) -> None:
    images = torch.rand(3, 3, 32, 32)
    first, second = (Tokenizer.from_file(runs(f"titok-small-stage{i}") / "tokenizer.safetensors") for i in (1, 2))
    for tok in (first, second):
        tok.train().requires_grad_(True)
    done = first.training_pass(images)
    logits, target = done.decoded.estimate, first.canvas.target(images)
    expected = torch.nn.functional.cross_entropy(logits.flatten(2), target.flatten(1))
    torch.testing.assert_close(done.decoded.loss, expected)
    done = second.training_pass(images)
    assert done.decoded.loss == 0 and not done.decoded.loss.requires_grad and (done.decoded.weight == 1).all()
    painted = second.canvas.paint(done.decoded.estimate)
    assert painted.shape == images.shape
    (painted - images).square().mean().backward()
    for part in (second.encoder, second.decoder, second.canvas):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


# A canvas from a release


def test_flextok_takes_the_canvas_of_a_release_alone(tmp_path: Path) -> None:
    vae = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 1}
    vae |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 16}
    table = read_recipe("flextok-d18-d28")
    shape = {"size": 16, "width": 32, "depth": 2, "heads": 2, "max_tokens": 8}
    small = {part: {**table["tokenizer"][part], **shape} for part in ("encoder", "decoder")}
    canvas = {"kind": "vae", "size": 32, "scaling_factor": 0.5, **vae}
    release = {"name": "release", **table["tokenizer"], **small, "canvas": canvas}
    source = Tokenizer.from_config(release)
    source.save(tmp_path / "release.safetensors")
    table["tokenizer"] |= {part: {**small[part], "width": 64} for part in small}
    table["init"]["tokenizer"] = str(tmp_path / "release.safetensors")
    made = untrained(read_config(override(table, ["data.train=x"])))
    assert made.config["canvas"] == source.config["canvas"] and made.codes == made.name == "my-flextok-d18-d28"
    for key, value in source.canvas.state_dict().items():
        assert torch.equal(made.canvas.state_dict()[key], value)
    assert not any(p.requires_grad for p in made.canvas.parameters()) and made.encoder.registers.shape == (8, 64)
    done = made.train().training_pass(torch.rand(2, 3, 32, 32))
    assert done.decoded.loss.isfinite() and made.canvas.paint(done.decoded.estimate).shape == (2, 3, 32, 32)


# What does not fit


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("titok-small", ["tokenizer.quantizer.dim=8"], "must agree on the width of a code; got 16 from the encoder"),
        ("titok-small", ["tokenizer.decoder.dim=8"], "16 into and 16 out of the quantizer, 8 into the decoder"),
        ("flextok-small", ["tokenizer.quantizer.levels=[8, 8]"], "got 4 from the encoder, 2 into"),
        ("titok-small", ["tokenizer.decoder.max_tokens=8"], "the encoder makes 16 tokens, the decoder takes 8"),
        ("titok-small", ["tokenizer.encoder.patch=5"], "tokenizer.encoder|encoder: .*32.*5"),
        ("titok-small", ["tokenizer.canvas.size=64"], "of 64 px, is 64 x 64 where the encoder works, .* for 32 x 32"),
        (
            "titok-small",
            ["tokenizer.decoder.size=64"],
            "is 32 x 32 where the decoder works, which is built for 64 x 64",
        ),
        ("titok-small-stage2", ["init.tokenizer=mini"], "the canvas, of 32 px, is 32 x 32 where the encoder works"),
        (
            "titok-small-stage1",
            ["tokenizer.decoder.patch=8"],
            "is 8 x 8 where the decoder works, .* for 4 x 4: .*patch",
        ),
        ("fqgan-small", ["tokenizer.encoder.branches=3"], "dim is a multiple of branches"),
        ("tokenflow-small", ["tokenizer.quantizer.scales=[1, 2, 4]"], "the quantizer takes 16 vectors an image"),
        ("flextok-small", ['tokenizer.encoder.lengths={kind="levels", levels=[64]}'], "go up to max_tokens, 32"),
        ("titok-small-stage2", ["init.adopt=[]"], "tokenizer.canvas differs from that of"),
        ("titok-small-stage2", ["tokenizer.canvas.ch=64"], "does not fit its config; of another shape"),
        ("titok-small-stage2", ['init.freeze=["canvas"]'], "canvas is not among parts"),
        ("titok-small-stage1", ["init.tokenizer=mini"], "mini has pixels, flextok, fsq, vit"),
        (
            "titok-small",
            ["init.tokenizer=mini", 'init.adopt=["canvas"]'],
            "'vqgan_codes' adopts weights, Pixels does not",
        ),
        ("titok-small-stage1", ["init.tokenizer=runs/none"], "there is no preset, file or folder 'runs/none'"),
        ("titok-small-stage1", ["init.tower=vit_tiny_patch16_224"], "tower is what an encoder starts from"),
        ("titok-small", ["init.tower=vit_tiny_patch16_224"], "init.tower fills the transformer of encoder 'dual'"),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value and " " not in value else "",
)
def test_parts_that_do_not_fit(name: str, words: list[str], message: str, runs: Any) -> None:
    if name.endswith(("stage1", "stage2")):
        runs(name)
    with pytest.raises(ValueError, match=message):
        untrained(read_config(override(read_recipe(name), ["data.train=x", *words])))


def test_a_second_stage_without_losses_on_pictures(runs: Any, photographs: Path, tmp_path: Path) -> None:
    runs("titok-small-stage1")
    words = ["loss.l2=0.0", "loss.gan.weight=0.0", f"data.train={photographs}", "device=cpu"]
    with pytest.raises(ConfigError, match="losses on pictures alone, so give one a weight, such as loss.l2"):
        fit(override(read_recipe("titok-small-stage2"), words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# TokenFlow's start


@pytest.mark.parametrize(
    ("model", "style", "depth"),
    [("vit_base_patch16_clip_quickgelu_224.openai", "clip", 3), ("vit_base_patch16_siglip_224.webli", "siglip", 2)],
)
def test_a_dual_encoder_starts_from_clip(model: str, style: str, depth: int, tmp_path: Path) -> None:
    import timm

    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    net = timm.create_model(model, pretrained=False, num_classes=0, **small).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    semantic = {"size": 16, "patch": 8, "width": 32, "depth": depth, "heads": 2, "hidden": 128, "style": style}
    pixels = {"dim": 4, "size": 4, "ch": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8}
    table = {"kind": "dual", "semantic_dim": 4, "semantic": semantic, "pixels": pixels}
    encoder = build(Encoder, table).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizers_vis.train.tower.timm_net", lambda *_: (net, False))
        adopt_tower(encoder, model)
        wide = build(Encoder, {**table, "semantic": {**semantic, "hidden": 64}})
        with pytest.raises(ConfigError, match=f"encoder.semantic is no {model}: .*of another shape"):
            adopt_tower(wide, model)
    x = 2 * torch.rand(2, 3, 16, 16) - 1
    with torch.no_grad():
        if style == "clip":
            expected = net.forward_features(x)[:, 1:]
        else:  # without the last block and the norm
            expected = net.blocks[:-1](net.patch_embed(x) + net.pos_embed)
        found = encoder.semantic(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if style == "clip" else 3e-3)  # timm's GELU is exact
