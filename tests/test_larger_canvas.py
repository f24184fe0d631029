"""Decoders that draw larger pictures than the encoder reads, and how they take over a smaller one's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.canvas import Pixels
from tokenizers_vis.decoders.transformer import patchify, unpatchify
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.tokenizer_task import TrainConfig, resized_patches, untrained


def test_a_decoder_may_draw_larger_pictures_than_the_encoder_reads(tiny: Callable[..., dict[str, Any]]):
    small = tiny("flextok", "fsq", "flow")
    side = small["canvas"]["size"]
    large = {**small, "canvas": {"kind": "pixels", "size": 2 * side, "read_size": side}}
    large["decoder"] = small["decoder"] | {"size": 2 * side, "patch": 2 * small["decoder"]["patch"]}
    one, two = (Tokenizer.from_config(config).eval() for config in (small, large))
    for part in ("encoder", "quantizer"):
        getattr(two, part).load_state_dict(getattr(one, part).state_dict())
    assert two.image_size == 2 * side and two.canvas.sides == (side, 2 * side)
    photos = torch.rand(2, 3, 5 * side, 4 * side)
    assert torch.equal(one.encode(photos).ids, two.encode(photos).ids)
    assert two.reconstruct(photos).shape == (2, 3, 2 * side, 2 * side)
    images = torch.rand(2, 3, 2 * side, 2 * side)
    x, y = two.canvas.views(images)
    assert x.shape[-1] == side and torch.equal(y, images * 2 - 1)
    assert torch.equal(two.canvas.read(images[..., :side, :side]), images[..., :side, :side] * 2 - 1)
    two.training_pass(images).decoded.loss.backward()
    with pytest.raises(ValueError, match="read_size is at most size 8, or 0 for the same; got 16"):
        Pixels(size=8, read_size=16)


@pytest.mark.parametrize("factor", [2, 3])
def test_patches_of_another_size_are_resized(factor: int) -> None:
    """The larger patch reads the mean pixels as the smaller one reads pixels, and writes the same picture, enlarged."""
    before, after, width = 4, 4 * factor, 5
    read, write = torch.randn(width, 3 * before**2), torch.randn(3 * before**2, width)
    wide = resized_patches("read_patches.weight", read, (width, 3 * after**2))
    picture = torch.rand(1, 3, after, after)
    mean = F.avg_pool2d(picture, factor)
    torch.testing.assert_close(patchify(picture, after) @ wide.T, patchify(mean, before) @ read.T)
    tall = resized_patches("to_patches.weight", write, (3 * after**2, width))
    code = torch.randn(1, 1, width)
    drawn, small = unpatchify(code @ tall.T, after, 1), unpatchify(code @ write.T, before, 1)
    enlarged = F.interpolate(small, (after, after), mode="bicubic", align_corners=False)
    torch.testing.assert_close(drawn, enlarged)
    bias = torch.randn(3 * before**2)
    assert resized_patches("to_patches.bias", bias, (3 * after**2,)).shape == (3 * after**2,)
    for key, shape in (("to_patches.weight", write.shape), ("other.weight", (1,)), ("to_patches.weight", (7, width))):
        assert resized_patches(key, write, shape) is write


def test_a_larger_canvas_keeps_the_encoder_and_adopts_the_decoder(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    small = tiny("flextok", "fsq", "vit")
    source = Tokenizer.from_config(small).eval()
    source.save(tmp_path / "source.safetensors")
    side, patch = small["canvas"]["size"], small["decoder"]["patch"]
    table = {
        "name": "larger",
        "tokenizer": {
            "canvas": {"kind": "pixels", "size": 2 * side, "read_size": side},
            "decoder": tiny("flextok", "fsq", "flow")["decoder"] | {"size": 2 * side, "patch": 2 * patch},
        },
        "init": {
            "tokenizer": str(tmp_path / "source.safetensors"),
            "parts": ["encoder", "quantizer"],
            "freeze": True,
            "adopt": ["decoder"],
        },
        "optim": {"steps": 1, "batch_size": 2},
        "data": {"train": "unused"},
    }
    larger = untrained(build(TrainConfig, table)).eval()
    photos = torch.rand(2, 3, 3 * side, 3 * side)
    assert larger.codes == source.name and torch.equal(larger.encode(photos).ids, source.encode(photos).ids)
    assert larger.decoder.to_patches.weight.abs().sum() > 0  # a fresh one is zero
    table["tokenizer"]["canvas"] |= {"span": "unit"}
    with pytest.raises(ConfigError, match="tokenizer.canvas differs from that of"):
        untrained(build(TrainConfig, table))
