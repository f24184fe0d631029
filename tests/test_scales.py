"""Sampling from coarse to fine: the right variance at every time, at a fraction of the cost, from one noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.guidance import AdaptiveProjected, AutoGuidance, ClassifierFree
from tokenizers_vis.decoders.sampling import Branches, Sampling, Stage, draw
from tokenizers_vis.decoders.scales import (
    coarse_time,
    cost,
    details,
    foretold,
    means,
    refine,
    spread,
    surprise,
    white_noises,
)
from tokenizers_vis.decoders.transformer import sincos_2d
from tokenizers_vis.tokenizer import Tokenizer

SHAPE = {"dim": 5, "max_tokens": 6, "size": 32, "patch": 4, "width": 32, "depth": 2, "heads": 2}
SCALES = (8, 16, 32)


def decoder(**changes) -> FlowDecoder:
    """In eval mode, with all its weights away from zero."""
    made = build(Decoder, {"kind": "flow", **SHAPE, "scales": list(SCALES), "steps": [4, 2, 1], **changes}).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(part in name for part in ("modulation", "to_patches", "read_patches", "scale")):
                parameter.normal_(std=0.2)
    return made.requires_grad_(False)


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(3, 6, 5)


# -- the maths


def test_means_and_details():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for factor in (1, 2, 4):
        assert means(x, factor).shape == (2, 3, 8 // factor, 8 // factor)
        torch.testing.assert_close(spread(means(x, factor), factor) + details(x, factor), x)
        assert means(details(x, factor), factor).abs().max() < 1e-12
        torch.testing.assert_close(means(spread(x, factor), factor), x)


def test_times_of_coarse_pictures():
    """The mean of 4 pixels halves noise and keeps the picture."""
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        seen, noise = 1 - t, t / 2
        assert coarse_time(t, 2) == pytest.approx(noise / (seen + noise))
        assert coarse_time(coarse_time(t, 2), 2) == pytest.approx(coarse_time(t, 4))
        assert coarse_time(t, 1) == t


def test_one_noise_is_white_at_every_scale():
    noises = white_noises(torch.randn(3000, 1, 8, 8), 3)
    assert [tuple(noise.shape[2:]) for noise in noises] == [(2, 2), (4, 4), (8, 8)]
    for noise in noises:
        covariance = noise.flatten(1).T.cov()
        assert (covariance - torch.eye(len(covariance))).abs().max() < 0.12
    torch.testing.assert_close(2 * means(noises[2], 2), noises[1])


@pytest.mark.parametrize("unknown", [0.0, 0.8])
def test_refining_keeps_the_variance_of_the_time(unknown):
    """Pictures whose coarse pixels are independent, and whose details are noise that nobody can foretell."""
    t, std = 0.4, 0.7
    b = 20000
    coarse, (rough, fine) = std * torch.randn(b, 1, 2, 2), white_noises(torch.randn(b, 1, 4, 4), 2)
    picture = spread(coarse, 2) + unknown * details(torch.randn(b, 1, 4, 4), 2)
    c = coarse_time(t, 2)
    x = refine((1 - c) * coarse + c * rough, coarse, t, fine, unknown)
    # What bicubic interpolation adds is of the picture; the rest is as at the time t.
    x = x - (1 - t) * foretold(coarse)
    expected = (1 - t) * picture + t * torch.randn(b, 1, 4, 4)
    torch.testing.assert_close(x.flatten(1).T.cov(), expected.flatten(1).T.cov(), rtol=0, atol=0.02)
    # To the bit the same means: the picture and the noise that x was made of.
    torch.testing.assert_close(means(x, 2), (1 - t) * coarse + t * means(fine, 2))


def test_what_is_foretold_and_what_surprises(photos):
    from tokenizers_vis.images import load_images

    pictures = torch.stack([F.avg_pool2d(image.float() / 255 * 2 - 1, 4) for image in load_images(photos)])
    true, guess = details(pictures, 2), foretold(means(pictures, 2))
    assert (true - guess).square().mean() < 0.85 * true.square().mean()
    assert means(guess, 2).abs().max() < 1e-5
    left = (true - guess).square().mean().sqrt()
    assert surprise(pictures) == pytest.approx(left.item() / 0.75**0.5, rel=1e-4)
    assert surprise(torch.randn(64, 3, 32, 32)) > 1  # noise is worse than unforetold


def test_cost():
    assert cost(25) == 25 and cost([25]) == 25 and cost(5, guided=True) == 10
    assert cost((4, 4, 4)) == 4 / 16 + 4 / 4 + 4
    # Heun's step into the picture is one evaluation, its step up to a finer scale two.
    assert cost((3, 2), "heun") == 6 / 4 + 3 and cost(2, "heun", guided=True) == 6


# -- a field whose answer is known


class Field:
    """Draws Gaussian pictures of 16 px: means over 4 and 8 px and the rest are independent noises of three sizes.

    The velocity is the exact one at each scale, so that samples have the variances of the pictures, but for what the
    walk itself does wrong.
    """

    shape, sizes = (1, 16, 16), (4, 8, 16)
    stds = (1.0, 0.5, 0.25)

    def check_codes(self, codes: Tensor) -> None:
        pass

    def unknown(self, size: int) -> float:
        # Not ``surprise``: what is foretold of independent noises is wrong, and counts for itself.
        return self.stds[self.sizes.index(size)]

    def parts(self, x: Tensor) -> list[Tensor]:
        """x: b 1 h w as a sum of its bands, the coarsest first."""
        bands = []
        while x.shape[-1] > 4:
            bands.append(details(x, 2))
            x = means(x, 2)
        bands.append(x)
        size = bands[0].shape[-1]
        return [spread(band, size // band.shape[-1]) for band in reversed(bands)]

    def branches(self, codes: Tensor, lengths: None, stage: Stage) -> Branches:
        def velocity(x: Tensor, t: float) -> Tensor:
            v = torch.zeros_like(x)
            for level, (band, std) in enumerate(zip(self.parts(x), self.stds, strict=False)):
                # Means over more pixels hold less of the noise.
                noise = 0.5 ** (self.sizes.index(stage.size) - level)
                variance = ((1 - t) * std) ** 2 + (t * noise) ** 2
                v = v + (t * noise**2 - (1 - t) * std**2) / variance * band
            return v

        return Branches(velocity, velocity, lambda x, t: (velocity(x, t), velocity(x, t)))


def variances(field: Field, pictures: Tensor) -> list[float]:
    """Of the bands, in units of what they shall be; details hold 3/4 of the variance of noise."""
    stds = [(band.square().mean() / (0.75 if i else 1)).sqrt() for i, band in enumerate(field.parts(pictures))]
    return [found.item() / std for found, std in zip(stds, field.stds, strict=True)]


def test_samples_have_the_variances_of_the_pictures(monkeypatch):
    field, codes = Field(), torch.zeros(3000, 1, 1)
    noise = torch.randn(3000, *field.shape)

    def drawn(steps: object) -> Tensor:
        return draw(field, codes, None, Sampling(steps, solver="heun", noise=noise))

    whole = drawn(40)
    assert variances(field, whole) == pytest.approx([1, 1, 1], abs=0.03)
    monkeypatch.setattr("tokenizers_vis.decoders.scales.foretold", lambda picture: torch.zeros(()))
    for steps in ((14, 14, 12), (20, 12, 8)):
        scaled = drawn(steps)
        assert variances(field, scaled) == pytest.approx([1, 1, 1], abs=0.03)
        # The coarse walk is the fine one, seen from afar: the same noise gives the same means.
        assert F.mse_loss(means(scaled, 4), means(whole, 4)) < 1e-3
    monkeypatch.setattr(field, "unknown", lambda size: 0.0)
    assert variances(field, drawn((20, 12, 8)))[2] < 0.93


# -- the decoder


def test_every_scale_is_drawn(codes):
    made = decoder()
    shapes: list[tuple[int, ...]] = []
    whole = made(codes, callback=lambda step, steps, estimate: shapes.append((step, steps, *estimate.shape)))
    assert whole.shape == (3, 3, 32, 32)
    assert shapes == [(i + 1, 7, 3, 3, s, s) for i, s in enumerate([8] * 4 + [16] * 2 + [32])]
    assert torch.equal(whole, made(codes, steps=(4, 2, 1)))
    assert made(codes, steps=(2, 2)).shape == made(codes, steps=3).shape == whole.shape
    for options in (
        {"solver": "heun"},
        {"guidance": 2.0},
        {"guidance": AdaptiveProjected(2.0)},
        {"schedule": "shifted:2"},
        {"steps": (2, 2)},
        {"steps": 7},
    ):
        other = made(codes, **options)
        assert other.shape == whole.shape and not torch.allclose(other, whole)
        assert torch.equal(made(codes, **options), other)


def test_a_scale_by_hand(codes):
    made, noise = decoder(steps=[1, 1]), torch.randn(3, 3, 32, 32)
    made.surprises.fill_(0.3)
    tokens, mask = made._tokens(codes, None)
    rough, fine = white_noises(noise, 2)
    v = made._velocity(rough, torch.ones(3), tokens, mask)
    c = coarse_time(0.5, 2)
    x = refine(rough + (c - 1) * v, rough - v, 0.5, fine, 0.3)
    expected = x - 0.5 * made._velocity(x, torch.full((3,), 0.5), tokens, mask)
    torch.testing.assert_close(made(codes, noise=noise), expected, rtol=1e-4, atol=1e-5)


def test_the_same_seed_is_the_same_picture(codes):
    made, seeds = decoder(), [4, 9, 4]
    whole = made(codes, seed=seeds, guidance=2.0)
    for places in ([2, 0], [1]):
        some = made(codes[places], seed=[seeds[i] for i in places], guidance=2.0)
        torch.testing.assert_close(some, whole[places], rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([6, 1, 3])
    ragged = made(codes, lengths, seed=seeds, guidance=2.0)
    alone = [made(codes[i : i + 1, :n], seed=seeds[i], guidance=2.0) for i, n in enumerate(lengths)]
    torch.testing.assert_close(ragged, torch.cat(alone), rtol=1e-4, atol=1e-5)
    one = made(codes, lengths, seed=seeds, guidance=2.0, batched=True)
    torch.testing.assert_close(one, ragged, rtol=0, atol=1e-5)


def test_guidance_goes_by_the_time_at_full_size(codes):
    made, seen = decoder(), []
    rule = ClassifierFree(lambda t: seen.append(t) or 2.0)
    made(codes, guidance=rule)
    assert seen == pytest.approx([i / 7 for i in range(7, 0, -1)])


def test_a_coarse_grid_covers_the_same_picture():
    made = decoder()
    full, half = sincos_2d(8, 8, 32).view(8, 8, 32), made._positions(4).view(4, 4, 32)
    assert torch.equal(made._positions(8), made.positions)
    # Half way between the centres of the two patches that one of the coarser ones covers.
    assert (half - full[::2, ::2]).norm() < (full[2::2, 2::2] - full[:-2:2, :-2:2]).norm()
    angle = torch.tensor([0.5, 2.5, 4.5, 6.5])
    torch.testing.assert_close(half[:, 0, 0], angle.sin())
    torch.testing.assert_close(half[0, :, 16], angle.sin())


def test_the_loss_draws_a_scale_for_each_batch(codes, monkeypatch):
    made, target = decoder(null_rate=0.0).train(), torch.randn(3, 3, 32, 32)
    made.requires_grad_(True)
    seen, original = [], FlowDecoder._velocity
    monkeypatch.setattr(
        FlowDecoder, "_velocity", lambda self, x, *rest: seen.append(x.shape[-1]) or original(self, x, *rest)
    )
    for _ in range(30):
        done = made.loss(codes, target)
        assert done.estimate.shape == target.shape and done.loss.isfinite()
        factor = 32 // seen[-1]
        # Details finer than the scale are the target's, and so nobody's fault.
        torch.testing.assert_close(details(done.estimate, factor), details(target, factor), rtol=1e-4, atol=1e-5)
    assert set(seen) == set(SCALES)
    (done.loss + done.estimate.square().mean()).backward()
    assert made.scale.grad.abs().sum() > 0
    assert decoder(rollout=2).loss(codes, target).estimate.shape == target.shape


def test_training_notes_what_surprises(codes):
    made, target = decoder(), torch.randn(3, 3, 32, 32)
    made.loss(codes, target)
    assert (made.surprises == 0).all()  # at rest nothing is learnt
    made.train().loss(codes, target)
    expected = [surprise(means(target, factor)).item() for factor in (2, 1)]
    assert made.surprises.tolist() == pytest.approx([0, *expected])
    made.loss(codes, 2 * target)
    assert made.surprises.tolist() == pytest.approx([0, *(1.01 * value for value in expected)])
    assert made.unknown(32) == made.surprises[2]


def test_wrong_scales_are_refused(codes):
    with pytest.raises(ValueError, match=r"steps has a number for each of 2 scales, .*trained at 32 px alone"):
        decoder(scales=[], steps=3)(codes, steps=(2, 2))
    for steps, message in (((1, 1, 1, 1), "trained at 8, 16, 32 px"), ((2, 0, 1), "whole number"), ((), "got none")):
        with pytest.raises(ValueError, match=message):
            decoder()(codes, steps=steps)
    for scales in ([16, 24, 32], [8, 16], [8, 32], [64]):
        with pytest.raises(ConfigError, match="scales double from one to the next and end at size 32"):
            decoder(scales=scales)
    with pytest.raises(ConfigError, match="size 2 is not a multiple of patch 4"):
        decoder(scales=[2, 4, 8, 16, 32])
    with pytest.raises(ValueError, match="noise is"):
        decoder()(codes, noise=torch.zeros(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"AutoGuidance's model was trained at \(32,\) px; 8 px is asked of it"):
        decoder()(codes, guidance=AutoGuidance(2.0, decoder(scales=[], steps=2)))


def test_a_decoder_without_scales_has_no_weights_for_them():
    assert not {"scale", "surprises"} & decoder(scales=[], steps=2).state_dict().keys()


def test_it_is_saved_and_loaded(tiny, tmp_path, codes):
    table = tiny("flextok", "fsq", "flow")
    table["decoder"] |= {"scales": [8, 16], "steps": [2, 1]}
    tok = Tokenizer.from_config(table)
    tok.train().training_pass(torch.rand(4, 3, 16, 16))
    tok.eval().save(tmp_path / "made.safetensors")
    again = Tokenizer.from_file(tmp_path / "made.safetensors").eval()
    assert again.decoder.sizes == (8, 16) and again.decoder.unknown(16) == tok.decoder.unknown(16) > 0
    tokens = tok.encode(torch.rand(2, 3, 16, 16))
    assert torch.equal(again.decode(tokens), tok.decode(tokens))
