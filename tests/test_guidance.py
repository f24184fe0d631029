"""Guidance keeps its formulas, as numbers and as objects, and costs nothing where its scale is 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import build
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.guidance import (
    AdaptiveProjected,
    AutoGuidance,
    ClassifierFree,
    adaptive_projected,
    classifier_free,
)

SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def decoder(kind: str = "flow", **changes) -> Decoder:
    """In eval mode. It starts with zeros in its last layers, so that these are drawn again."""
    made = build(Decoder, {"kind": kind, **SHAPE, "steps": 2, "guidance": 1, **changes}).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(part in name for part in ("modulation", "to_patches", "read_patches", "jump")):
                parameter.normal_(std=0.2)
    return made.requires_grad_(False)


def flow(**changes) -> FlowDecoder:
    return decoder("flow", **changes)


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(4, 6, 5)


# -- guidance


def test_classifier_free_guidance_is_its_formula():
    c, u = torch.randn(2, 3, 2, 4, 4)
    torch.testing.assert_close(classifier_free(c, u, 1.0), c)
    assert torch.equal(classifier_free(c, u, 0.0), u)
    torch.testing.assert_close(classifier_free(c, u, 2.5), 2.5 * c - 1.5 * u)


def test_adaptive_projected_guidance():
    c, u = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    same, difference = adaptive_projected(c, u, 1.0, None)
    assert torch.equal(same, c)
    assert torch.equal(difference, c - u)

    # What is added is orthogonal to the conditional prediction, image by image.
    guided, _ = adaptive_projected(c, u, 3.0, None)
    added = guided - c
    assert (added * c).sum(dim=(1, 2, 3)).abs().max() < 1e-9
    assert added.norm() > 1

    # With all of the part along it, and no limit, it is classifier-free.
    whole, _ = adaptive_projected(c, u, 3.0, None, eta=1.0, threshold=1e9)
    torch.testing.assert_close(whole, classifier_free(c, u, 3.0))
    half, _ = adaptive_projected(c, u, 3.0, None, eta=0.5, threshold=1e9)
    none, _ = adaptive_projected(c, u, 3.0, None, threshold=1e9)
    torch.testing.assert_close(half, (whole + none) / 2)

    # Limited to a norm of 2.5 per image; a short difference is left as it is.
    far, _ = adaptive_projected(c, c - 1000 * (c - u), 2.0, None, threshold=2.5)
    norms = (far - c).flatten(1).norm(dim=1)
    assert (norms <= 2.5 + 1e-9).all() and (norms > 1).all()
    for scale in (1e-3, 1e-2):  # within the threshold: linear
        near, _ = adaptive_projected(c, c - scale * (c - u), 2.0, None)
        small, _ = adaptive_projected(c, c - scale / 2 * (c - u), 2.0, None)
        torch.testing.assert_close(near - c, 2 * (small - c))

    # The same, one image at a time.
    alone = torch.cat([adaptive_projected(c[i : i + 1], u[i : i + 1], 3.0, None)[0] for i in range(3)])
    torch.testing.assert_close(guided, alone)


def test_the_momentum_of_adaptive_projected_guidance():
    c, u, previous = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64)
    guided, difference = adaptive_projected(c, u, 3.0, previous, momentum=-0.5)
    torch.testing.assert_close(difference, c - u - 0.5 * previous)
    # As if the difference had been that one from the start.
    torch.testing.assert_close(guided, adaptive_projected(c, c - difference, 3.0, None)[0])
    assert (guided - adaptive_projected(c, u, 3.0, None)[0]).abs().max() > 1e-2


def test_a_parallel_difference_adds_nothing_and_zeros_make_no_nan():
    c = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(adaptive_projected(c, 0.5 * c, 5.0, None)[0], c)
    zero = torch.zeros(2, 3, 4, 4)
    assert torch.equal(adaptive_projected(zero, zero, 5.0, None)[0], zero)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: ClassifierFree("3"), "scale of a guidance is a number"),
        (lambda: ClassifierFree(math.inf), "scale of a guidance is a number"),
        (lambda: ClassifierFree(True), "scale of a guidance is a number"),
        (lambda: ClassifierFree(2, interval=(0.5, 0.1)), "interval is the lowest and the highest t"),
        (lambda: ClassifierFree(2, interval=(0.17, 1.02)), "interval is the lowest and the highest t"),
        (lambda: ClassifierFree(2, interval=0.5), "interval is the lowest and the highest t"),
        (lambda: AdaptiveProjected(2, momentum=None), "momentum is a number"),
        (lambda: AdaptiveProjected(2, threshold=0), "threshold is a norm above 0"),
        (lambda: ClassifierFree(lambda t: None).at(0.5), "gives a number; at t = 0.5 it does not"),
    ],
)
def test_guidance_that_cannot_be(made, message):
    with pytest.raises(ValueError, match=message):
        made()


# -- guidance in sampling


def test_a_number_is_the_object_of_its_kind(codes):
    made = flow(steps=3)
    plain = made(codes)
    for kind, rule in (("cfg", ClassifierFree), ("apg", AdaptiveProjected)):
        assert torch.equal(made(codes, guidance=1, guidance_kind=kind), plain)
        assert torch.equal(made(codes, guidance=rule(1.0)), plain)
        guided = made(codes, guidance=3.0, guidance_kind=kind)
        assert (guided - plain).abs().max() > 1e-3
        assert torch.equal(made(codes, guidance=rule(3.0)), guided)
        assert torch.equal(made(codes, guidance=rule(lambda t: 3.0)), guided)
    cfg, apg = (made(codes, guidance=3.0, guidance_kind=kind) for kind in ("cfg", "apg"))
    assert not torch.allclose(cfg, apg)
    # With scale 0 the tokens say nothing any more.
    torch.testing.assert_close(made(codes, guidance=0), made(torch.randn_like(codes), guidance=0), **CLOSE)
    # One Euler step of guided velocity by hand: x - v.
    noise = torch.randn(4, 3, 16, 16)
    c = noise - made(codes, steps=1, noise=noise)
    u = noise - made(codes, steps=1, noise=noise, guidance=0)
    expected = noise - classifier_free(c, u, 2.0)
    torch.testing.assert_close(made(codes, steps=1, noise=noise, guidance=2.0), expected, **CLOSE)


def test_adaptive_guidance_carries_its_momentum_from_step_to_step(codes):
    made, noise = flow(), torch.randn(4, 3, 16, 16)
    tokens, mask = made._tokens(codes, None)
    nothing = made.null_token.expand(4, 1, -1)
    x, previous = noise, None
    for t in (1.0, 0.5):
        time = torch.full((4,), t)
        c, u = made._velocity(x, time, tokens, mask), made._velocity(x, time, nothing, None)
        v, previous = adaptive_projected(c, u, 3.0, previous, momentum=-0.7, threshold=1.5, eta=0.2)
        x = x - 0.5 * v
    options = {"guidance": AdaptiveProjected(3.0, -0.7, 1.5, 0.2), "noise": noise, "steps": 2}
    torch.testing.assert_close(made(codes, **options), x, **CLOSE)
    assert torch.equal(made(codes, **options), made(codes, **options))  # and not from call to call


def counted(made: FlowDecoder) -> list[int]:
    """How many images each pass through the network held, from now on."""
    passes: list[int] = []
    made.norm.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    return passes


def test_guidance_on_an_interval_costs_nothing_outside(codes):
    made = flow(steps=4)
    passes = counted(made)
    within = made(codes, guidance=ClassifierFree(3.0, interval=(0.5, 0.8)))  # of 1, .75, .5, .25
    assert len(passes) == 6
    passes.clear()
    stepped = made(codes, guidance=ClassifierFree(lambda t: 3.0 if 0.5 <= t <= 0.8 else 1.0))
    assert len(passes) == 6 and torch.equal(within, stepped)
    assert torch.equal(made(codes, guidance=ClassifierFree(3.0, interval=(0.3, 0.4))), made(codes))
    assert torch.equal(made(codes, guidance=ClassifierFree(3.0, interval=(0.2, 1.0))), made(codes, guidance=3.0))
    ramp = made(codes, guidance=ClassifierFree(lambda t: 1 + 2 * t))
    assert not torch.allclose(ramp, made(codes, guidance=3.0))


def test_autoguidance(codes):
    made, weak = flow(steps=1, null_rate=0.0), flow(depth=1)
    noise = torch.randn(4, 3, 16, 16)
    strong_v, weak_v = (noise - d(codes, steps=1, noise=noise) for d in (made, weak))
    expected = noise - classifier_free(strong_v, weak_v, 1.8)
    torch.testing.assert_close(made(codes, noise=noise, guidance=AutoGuidance(1.8, weak)), expected, **CLOSE)
    # By itself it is no guidance; a ragged batch reaches both.
    torch.testing.assert_close(made(codes, guidance=AutoGuidance(4.0, made)), made(codes), **CLOSE)
    lengths = torch.tensor([6, 1, 3, 5])
    ragged = made(codes, lengths, guidance=AutoGuidance(2.0, weak))
    alone = [made(codes[i : i + 1, :n], guidance=AutoGuidance(2.0, weak)) for i, n in enumerate(lengths)]
    torch.testing.assert_close(ragged, torch.cat(alone), **CLOSE)


def test_a_model_that_cannot_guide(codes):
    one_pass = build(Decoder, {"kind": "vit", **SHAPE})
    for model in (one_pass, flow(size=32), None):
        with pytest.raises(ValueError, match=r"AutoGuidance takes a flow decoder of the same canvas, \(3, 16, 16\)"):
            flow()(codes, guidance=AutoGuidance(2.0, model))
    with pytest.raises(ValueError, match="takes codes b n 4"):
        flow()(codes, guidance=AutoGuidance(2.0, flow(dim=4)))


@pytest.mark.parametrize("kind", ["flow", "patch_flow", "shortcut"])
def test_guidance_needs_a_null_token(kind, codes):
    made = decoder(kind, null_rate=0.0)
    assert made(codes, guidance=1).shape == (4, 3, 16, 16)
    for rule in (2.0, AdaptiveProjected(2.0), ClassifierFree(lambda t: 1.0)):
        with pytest.raises(ValueError, match="guidance must be 1"):
            made(codes, guidance=rule)
