"""The bundled tokenizer keeps what its card promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokenizers_vis as tv
from tokenizers_vis.catalogue import FOLDER, preset
from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.metrics import CodebookUsage, psnr
from tokenizers_vis.eval.perceptual import perceptual
from tokenizers_vis.eval.thumbnail import thumbnail
from tokenizers_vis.images import load_image
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.data import val_batches

LENGTHS = powers_of_two(64)


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
