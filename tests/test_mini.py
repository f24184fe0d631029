"""The bundled tokenizers and the bundled generator keep what their cards promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tokenizers_vis as tv
from tokenizers_vis import cli
from tokenizers_vis.catalogue import FOLDER, preset
from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.metrics import CodebookUsage, psnr
from tokenizers_vis.eval.perceptual import perceptual
from tokenizers_vis.eval.thumbnail import thumbnail
from tokenizers_vis.generator import FOLDER as GENERATORS
from tokenizers_vis.images import load_image
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.data import val_batches

LENGTHS = powers_of_two(128)


@pytest.fixture(scope="module")
def mini() -> Tokenizer:
    return tv.load(device="cpu")


def validation(shared: Path, size: int, count: int) -> torch.Tensor:
    source = open_source(str(shared / "data" / "photos-160" / "val.tar"))
    return torch.cat(list(val_batches(source, size, count, 50))).float() / 255


def test_its_file_is_small_and_its_preset_tells_the_truth(mini: Tokenizer) -> None:
    assert (FOLDER / "mini.safetensors").stat().st_size <= 12e6
    row = preset("mini")
    told = (row["max_tokens"], row["nested"], tuple(row["codebook_sizes"]), row["image_size"])
    assert told == (mini.max_tokens, mini.nested, mini.codebook_sizes, mini.image_size)
    assert mini.name == mini.codes == "mini" and not mini.training
    assert not any(p.requires_grad for p in mini.parameters())


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="the device 'abacus' cannot be used here"):
        tv.load(device="abacus")


def test_every_doubling_brings_the_photographs_closer(mini: Tokenizer, photos: list[Path]) -> None:
    originals = torch.stack([mini.canvas.fit(load_image(photo)) for photo in photos])
    tokens = mini.encode(photos)
    scores = [psnr(mini.decode(tokens[:, :n]), originals).mean().item() for n in LENGTHS]
    assert scores == sorted(scores), scores
    assert scores[-1] > scores[0] + 4


def test_half_precision_codes_the_same_pictures(mini: Tokenizer, photos: list[Path]) -> None:
    half = tv.load(device="cpu", dtype=torch.bfloat16)
    exact, rough = mini.encode(photos).ids, half.encode(photos).ids
    assert (exact == rough).float().mean() > 0.7
    torch.testing.assert_close(half.decode(exact), mini.decode(exact), atol=0.1, rtol=0)


def test_it_beats_a_thumbnail_of_no_fewer_bytes(mini: Tokenizer, shared: Path) -> None:
    images = validation(shared, mini.image_size, 100)
    tokens = mini.encode(images)
    scores = [psnr(mini.decode(tokens[:, :n]), images).mean().item() for n in LENGTHS]
    assert scores == sorted(scores), scores
    small = thumbnail(images, tokens.nbytes[0], no_fewer=True).reconstruction
    assert scores[-1] >= psnr(small, images).mean().item() + 2.0
    net = shared / "weights" / "mobilenetv2_100_same_imagenet1001.fp16.safetensors"
    distance = perceptual("mobilenetv2_100", str(net))
    with torch.no_grad():
        assert distance(mini.decode(tokens), images).mean() <= 0.75 * distance(small, images).mean()


def test_it_uses_its_codebook(mini: Tokenizer, shared: Path) -> None:
    usage = CodebookUsage(mini.codebook_sizes)
    usage.update(mini.encode(validation(shared, mini.image_size, 500)).ids)
    assert usage.compute()[0].used >= 0.8


@pytest.fixture(scope="module")
def mini_flow() -> Tokenizer:
    return tv.load("mini-flow", device="cpu")


def test_all_that_is_bundled_is_small() -> None:
    files = [*FOLDER.glob("*.safetensors"), *GENERATORS.glob("*.safetensors")]
    assert {file.stem for file in files} == {"mini", "mini-flow", "mini-tiny-imagenet"}
    assert all(file.stat().st_size <= 16e6 for file in files)
    assert sum(file.stat().st_size for file in files) <= 48e6


def test_one_file_decodes_with_either(
    mini: Tokenizer, mini_flow: Tokenizer, photos: list[Path], tmp_path: Path
) -> None:
    mini.encode(photos, n_tokens=32).save(tmp_path / "photos.tok")
    tokens = tv.Tokens.load(tmp_path / "photos.tok")
    assert torch.equal(mini_flow.encode(photos, n_tokens=32).ids, tokens.ids)
    assert mini.decode(tokens).shape == (len(photos), 3, 64, 64)
    drawn = mini_flow.decode(tokens)
    assert drawn.shape == (len(photos), 3, 128, 128) and mini_flow.image_size == preset("mini-flow")["image_size"]
    assert mini_flow.decoder.defaults["steps"] == 1 and mini_flow.decoder.defaults["guidance"] == 1
    torch.testing.assert_close(drawn[:2], mini_flow.decode(tokens[:2]), atol=1e-4, rtol=0)  # whatever stands beside
    assert (mini_flow.decode(tokens[:2], seed=1) - drawn[:2]).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="without a null token"):
        mini_flow.decode(tokens, guidance=1.5)


def test_the_command_line_gives_both_the_same_ids(photos: list[Path], tmp_path: Path) -> None:
    for name in ("mini", "mini-flow"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["encode", *map(str, photos), "--out", str(tmp_path / name), "--tokenizer", name])
        assert ended.value.code == 0
    for photo in photos:
        one, other = (tv.Tokens.load(tmp_path / name / f"{photo.stem}.tok") for name in ("mini", "mini-flow"))
        assert torch.equal(one.ids, other.ids), photo.stem


def test_the_flow_decoder_is_nearer_than_an_enlarged_picture(
    mini: Tokenizer, mini_flow: Tokenizer, shared: Path
) -> None:
    images = validation(shared, 128, 60)
    distance = perceptual(
        "mobilenetv2_100", str(shared / "weights" / "mobilenetv2_100_same_imagenet1001.fp16.safetensors")
    )
    tokens = mini.encode(images)
    for n in (16, 64, 128):
        enlarged = F.interpolate(mini.decode(tokens[:, :n]), (128, 128), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            assert distance(mini_flow.decode(tokens[:, :n]), images).mean() < distance(enlarged, images).mean()


def test_the_bundled_generator_knows_the_tokens_of_mini(mini: Tokenizer, shared: Path) -> None:
    gen = tv.load_generator("mini-tiny-imagenet", device="cpu")
    gen.check(mini)
    source = open_source(str(shared / "data" / "tiny-imagenet" / "val.tar"))
    count = 64
    every = [k * len(source) // count for k in range(count)]
    labels = [source.labels(i, i + 1)[0] for i in every]
    tokens = mini.encode(torch.cat(list(val_batches(source, 64, count, count))), n_tokens=gen.max_tokens)
    told, untold = (gen.bits(tokens, given).mean().item() for given in (labels, None))
    assert told < untold < 9.0 < 0.8 * mini.bits_per_token
    drawn = gen.sample(["goldfish", 145, None], n_tokens=8, seed=3)
    assert drawn.ids.shape == (3, 8, 1) and drawn.tokenizer == "mini"
    assert torch.equal(drawn.ids[:1], gen.sample("goldfish", n_tokens=8, seed=3).ids)
