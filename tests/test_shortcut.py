"""The shortcut decoder: jumps of the right length from the right places, and targets made of two jumps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.shortcut import ShortcutDecoder

SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(**changes: Any) -> ShortcutDecoder:
    """In eval mode, with all the weights drawn that start as zeros."""
    decoder = build(Decoder, {"kind": "shortcut", **SHAPE, **changes}).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if any(part in name for part in ("modulation", "to_patches", "read_patches", "jump")):
                parameter.normal_(std=0.2)
    return decoder


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(4, 6, 5)


class Ear:
    """Hears what ``loss`` asks of the network: x, t, level and the velocity."""

    def __init__(self, decoder: ShortcutDecoder, monkeypatch: Any) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        original = decoder._velocity

        def listen(x: Tensor, t: Tensor, level: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
            v = original(x, t, level, tokens, mask)
            self.calls.append((x, t, level, v))
            return v

        monkeypatch.setattr(decoder, "_velocity", listen)


@pytest.mark.parametrize("predict", ["velocity", "picture"])
def test_a_jump_learns_from_two_of_half_its_length(predict: str, monkeypatch: Any) -> None:
    decoder = made(predict=predict, null_rate=0.0, bootstrap=0.5, finest=8)
    ear, b = Ear(decoder, monkeypatch), 64
    target = torch.randn(b, 3, 16, 16)
    done = decoder.loss(torch.randn(b, 6, 5), target, torch.randint(1, 7, (b,)))
    (x, t, level, v), (x1, t1, level1, v1), (x2, t2, level2, v2) = ear.calls
    assert len(x1) == len(x2) == 32
    length = 0.5**level
    # Every image stands where a walk of such steps may stand.
    assert torch.equal(t / length, (t / length).round()) and (t >= length).all() and (t <= 1).all()
    assert level[:32].unique().tolist() == [0, 1, 2] and (level[32:] == 3).all()
    # The second jump starts where the first landed.
    assert torch.equal(x1, x[:32]) and torch.equal(t1, t[:32])
    assert torch.equal(level1, level[:32] + 1) and torch.equal(level2, level1)
    half = 0.5 * length[:32]
    torch.testing.assert_close(x2, x1 - half.view(-1, 1, 1, 1) * v1)
    torch.testing.assert_close(t2, t1 - half)
    noise = (x - (1 - t.view(-1, 1, 1, 1)) * target) / t.view(-1, 1, 1, 1)
    wanted = torch.cat([(v1 + v2) / 2, (noise - target)[32:]])
    torch.testing.assert_close(done.loss, (v - wanted).square().mean(), rtol=1e-3, atol=1e-3)
    assert not v1.requires_grad and not v2.requires_grad and v.requires_grad
    # Only a jump that ends in the picture makes a picture; the others are judged as a flow's.
    torch.testing.assert_close(done.estimate, x - t.view(-1, 1, 1, 1) * v)
    torch.testing.assert_close(done.weight, torch.cat([(t == length)[:32].float(), (1 - t)[32:]]))


def test_the_share_of_jumps_is_right_for_every_batch(monkeypatch: Any) -> None:
    decoder = made(bootstrap=0.3, finest=4)
    for b in (1, 3, 8):
        ear = Ear(decoder, monkeypatch)
        counts = []
        for _ in range(60):
            ear.calls.clear()
            decoder.loss(torch.randn(b, 6, 5), torch.randn(b, 3, 16, 16))
            counts.append((ear.calls[0][2] < 2).sum().item())
        assert set(counts) <= {int(0.3 * b), int(0.3 * b) + 1} and abs(sum(counts) / 60 - 0.3 * b) < 0.25


@torch.no_grad()
def test_sampling_is_plain_jumps_of_the_length_that_the_network_is_told(codes: Tensor) -> None:
    decoder, noise = made(), torch.randn(4, 3, 16, 16)
    tokens, mask = decoder._tokens(codes, None)
    for steps, level in ((1, 0), (2, 1), (4, 2)):
        x = noise
        for i in range(steps):
            t = torch.full((4,), 1 - i / steps)
            x = x - decoder._velocity(x, t, torch.full((4,), level), tokens, mask) / steps
        torch.testing.assert_close(decoder(codes, steps=steps, noise=noise), x, **CLOSE)
    assert torch.equal(decoder(codes, noise=noise), decoder(codes, noise=noise, steps=1))
    # Told another length, it goes elsewhere.
    here, there = (decoder._velocity(noise, t, torch.full((4,), level), tokens, mask) for level in (0, 7))
    assert (here - there).abs().max() > 1e-2


@torch.no_grad()
def test_guidance(codes: Tensor) -> None:
    decoder, noise = made(), torch.randn(4, 3, 16, 16)
    lengths = torch.tensor([6, 1, 3, 5])
    told = decoder(codes, lengths, noise=noise)
    untold = decoder(codes, lengths, noise=noise, guidance=0)
    torch.testing.assert_close(untold, decoder(-codes, noise=noise, guidance=0), **CLOSE)
    for batched in (False, True):
        guided = decoder(codes, lengths, noise=noise, guidance=2.0, batched=batched)
        torch.testing.assert_close(guided, untold + 2 * (told - untold), **CLOSE)
    with pytest.raises(ValueError, match="without a null token"):
        made(null_rate=0.0)(codes, guidance=2.0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_weight_learns_from_flow_and_jumps(precision: torch.dtype, codes: Tensor) -> None:
    """Under autocast too, where weights that are first cast without gradient would stay without."""
    decoder = made(bootstrap=0.5, null_rate=0.0)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        done = decoder.loss(codes, torch.randn(4, 3, 16, 16))
    done.loss.backward()
    for name, parameter in decoder.named_parameters():
        if name != "null_token":
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_network_that_goes_straight_agrees_with_itself(monkeypatch: Any) -> None:
    """With the true velocity of one picture, jumps of every length are right: the loss is nothing."""
    decoder, target = made(null_rate=0.0, bootstrap=0.5), torch.randn(8, 3, 16, 16)

    def truth(x: Tensor, t: Tensor, level: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return (x - target[: len(x)]) / t.view(-1, 1, 1, 1) + 0 * tokens.sum()

    monkeypatch.setattr(decoder, "_velocity", truth)
    done = decoder.loss(torch.randn(8, 6, 5), target)
    assert done.loss < 1e-6
    torch.testing.assert_close(done.estimate, target, atol=1e-3, rtol=0)


def test_wrong_options(codes: Tensor) -> None:
    decoder = made(finest=16)
    for steps in (3, 32, 6):
        with pytest.raises(ValueError, match=rf"takes steps of 1, 2, 4 ... 16, got {steps}"):
            decoder(codes, steps=steps)
    for steps in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="steps is a whole number from 1"):
            decoder(codes, steps=steps)
    for option in ("solver", "schedule"):
        with pytest.raises(ValueError, match=f"takes no {option}"):
            decoder(codes, **{option: "euler"})
    with pytest.raises(ValueError, match="noise is"):
        decoder(codes, noise=torch.zeros(4, 3, 8, 8))
    for wrong, message in (
        ({"finest": 12}, "finest is a power of 2 from 2, got 12"),
        ({"finest": 1}, "finest is a power of 2"),
        ({"bootstrap": 0.0}, "bootstrap is a share between 0 and 1"),
        ({"steps": 3}, "takes steps of 1, 2, 4"),
        ({"steps": 0}, "steps is a whole number from 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**wrong)
