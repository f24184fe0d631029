"""The diffusion decoder: the papers' targets, diffusers' levels, and every scheduler ends where it should."""

from __future__ import annotations

import math
import sys
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.diffusion import SCHEDULERS, DiffusionDecoder, scheduler_of, seed_of
from tokenizers_vis.decoders.guidance import AutoGuidance, ClassifierFree

SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# diffusers hands tensors to NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
EVERY = [(noise, name) for noise, names in SCHEDULERS.items() for name in names]
# Those that leave a last bit of noise in the picture, by design or because their last level is not 0.
ROUGH = {"DEISMultistep": 0.03, "SASolver": 0.1, "TCD": 0.08}


def made(**changes: Any) -> DiffusionDecoder:
    """In eval mode, with all the weights drawn that start as zeros."""
    decoder = build(Decoder, {"kind": "diffusion", **SHAPE, "steps": 2, **changes}).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if any(part in name for part in ("modulation", "to_patches", "read_patches")):
                parameter.normal_(std=0.2)
    return decoder


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(4, 6, 5)


# -- what is learned


def kept() -> Tensor:
    """alpha² of a DDPM, from Ho et al.'s betas."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()


class Ear:
    """Hears what ``loss`` shows the network: x and t, and what it answers."""

    def __init__(self, decoder: DiffusionDecoder, monkeypatch: Any) -> None:
        original = decoder._out

        def listen(x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
            self.x, self.t, self.out = x, t, original(x, t, tokens, mask)
            return self.out

        monkeypatch.setattr(decoder, "_out", listen)


@pytest.mark.parametrize("predict", ["epsilon", "v", "picture"])
def test_the_targets_of_a_ddpm(predict: str, monkeypatch: Any) -> None:
    decoder = made(predict=predict, null_rate=0.0, data_std=0.5)
    ear, target = Ear(decoder, monkeypatch), 0.5 * torch.randn(16, 3, 16, 16)
    done = decoder.loss(torch.randn(16, 6, 5), target)
    assert torch.equal(ear.t, ear.t.round()) and ear.t.min() >= 0 and ear.t.max() <= 999 and len(ear.t.unique()) > 8
    alpha, sigma = (v.sqrt().view(-1, 1, 1, 1) for v in (kept()[ear.t.long()], 1 - kept()[ear.t.long()]))
    u = target / 0.5
    noise = (ear.x - alpha * u) / sigma
    assert 0.9 < noise.std() < 1.1
    wanted, estimate = {
        "epsilon": (noise, (ear.x - sigma * ear.out) / alpha * 0.5),
        "v": (alpha * noise - sigma * u, (alpha * ear.x - sigma * ear.out) * 0.5),
        "picture": (target, ear.out),
    }[predict]
    torch.testing.assert_close(done.loss, (ear.out - wanted).square().mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(done.estimate, estimate, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(done.weight, alpha.flatten() ** 2, rtol=1e-3, atol=1e-5)


def test_the_loss_of_edm_as_karras_et_al_write_it(monkeypatch: Any) -> None:
    decoder = made(noise="edm", null_rate=0.0, data_std=0.6)
    ear, target = Ear(decoder, monkeypatch), torch.randn(64, 3, 16, 16)
    done = decoder.loss(torch.randn(64, 6, 5), target)
    sigma = (4 * ear.t).exp()  # c_noise = ln(sigma) / 4
    assert abs(sigma.log().mean() + 1.2) < 0.6 and abs(sigma.log().std() - 1.2) < 0.4
    sigma, data = sigma.view(-1, 1, 1, 1), 0.6
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    c_in = 1 / (sigma**2 + data**2).sqrt()
    noisy = ear.x / c_in
    assert 0.95 < ((noisy - target) / sigma).std() < 1.05
    denoised = c_skip * noisy - c_out * ear.out  # v is -F
    torch.testing.assert_close(done.estimate, denoised, rtol=1e-3, atol=1e-4)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    torch.testing.assert_close(done.loss, (weight * (denoised - target).square()).mean(), rtol=2e-3, atol=1e-3)


@torch.no_grad()
def test_levels_are_those_of_the_schedulers() -> None:
    alpha, sigma = made()._level(torch.arange(1000.0))
    theirs = scheduler_of("DDIM", "ddpm", 0.5).alphas_cumprod
    torch.testing.assert_close(alpha.flatten() ** 2, theirs, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    between = made()._level(torch.tensor([500.5]))[1].item()
    assert sigma[500].item() < between < sigma[501].item()
    walk = scheduler_of("EDMEuler", "edm", 0.5)
    walk.set_timesteps(5)
    alpha, sigma = made(noise="edm")._level(walk.timesteps)
    torch.testing.assert_close((sigma / alpha).flatten() * 0.5, walk.sigmas[:-1], rtol=1e-4, atol=0)


# -- sampling


@pytest.mark.parametrize(("noise", "name"), EVERY)
@torch.no_grad()
def test_every_scheduler_ends_in_the_picture_that_the_network_sees(noise: str, name: str, monkeypatch: Any) -> None:
    target = 0.5 * torch.randn(1, 3, 16, 16)
    for predict in ("epsilon", "v", "picture"):
        decoder = made(noise=noise, predict=predict, scheduler=name)

        def truth(x: Tensor, t: Tensor, *_: Any, decoder: DiffusionDecoder = decoder, predict: str = predict) -> Tensor:
            alpha, sigma = decoder._level(t)
            u = target / decoder.data_std
            eps = (x - alpha * u) / sigma
            return {"epsilon": eps, "v": alpha * eps - sigma * u, "picture": target.expand_as(x)}[predict]

        monkeypatch.setattr(decoder, "_out", truth)
        for steps in (1, 2, 5):
            y = decoder(torch.zeros(2, 6, 5), steps=steps, seed=[3, 4])
            torch.testing.assert_close(y, target.expand(2, -1, -1, -1), rtol=0, atol=ROUGH.get(name, 1e-3))


@pytest.mark.parametrize(("noise", "name"), EVERY)
@torch.no_grad()
def test_a_picture_depends_on_its_own_seed_alone(noise: str, name: str, codes: Tensor) -> None:
    decoder = made(noise=noise, scheduler=f"{name}Scheduler")
    state = torch.get_rng_state()
    whole = decoder(codes, steps=3, seed=[1, 2, 3, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.isfinite().all() and torch.equal(decoder(codes, steps=3, seed=[1, 2, 3, 2]), whole)
    alone = torch.cat([decoder(codes[i : i + 1], steps=3, seed=[s]) for i, s in enumerate([1, 2, 3, 2])])
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-3)
    assert (decoder(codes, steps=3, seed=9) - whole).abs().max() > 1e-2


@torch.no_grad()
def test_noise_on_the_way_comes_from_the_noise_at_the_start(codes: Tensor) -> None:
    decoder, noise = made(scheduler="DDPM", steps=4), torch.randn(4, 3, 16, 16)
    assert torch.equal(decoder(codes, noise=noise), decoder(codes, noise=noise.clone()))
    same = codes[:1].expand(2, -1, -1)
    twice = decoder(same, noise=noise[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(twice[0], twice[1], **CLOSE)
    assert seed_of(noise[0]) != seed_of(noise[1]) and 0 <= seed_of(noise[0]) < 2**63
    # DDIM adds none: from the same start it goes another way.
    assert (decoder(codes, noise=noise, scheduler="DDIM") - decoder(codes, noise=noise)).abs().max() > 1e-2


@torch.no_grad()
def test_one_step_of_ddim_is_the_estimate_and_guidance_works_on_it(codes: Tensor) -> None:
    decoder, noise = made(steps=1), torch.randn(4, 3, 16, 16)
    tokens, mask = decoder._tokens(codes, None)
    told = decoder(codes, noise=noise)
    torch.testing.assert_close(told, decoder._picture(noise, torch.tensor([999.0]), tokens, mask), **CLOSE)
    untold = decoder(codes, noise=noise, guidance=0)
    torch.testing.assert_close(untold, decoder(-codes, noise=noise, guidance=0), **CLOSE)
    torch.testing.assert_close(decoder(codes, noise=noise, guidance=3.0), untold + 3 * (told - untold), **CLOSE)
    apg = decoder(codes, noise=noise, guidance=3.0, guidance_kind="apg")
    assert not torch.allclose(apg, decoder(codes, noise=noise, guidance=3.0))
    # The first step stands at pure noise, where this guidance does not count.
    torch.testing.assert_close(decoder(codes, noise=noise, guidance=ClassifierFree(3.0, interval=(0.0, 0.9))), told)
    with pytest.raises(ValueError, match="without a null token"):
        made(null_rate=0.0)(codes, guidance=2.0)
    with pytest.raises(ValueError, match="not AutoGuidance"):
        decoder(codes, guidance=AutoGuidance(2.0, decoder))


@torch.no_grad()
def test_the_callback_sees_clean_pictures(codes: Tensor) -> None:
    seen: list[Any] = []
    decoder = made(steps=3, scheduler="HeunDiscrete")
    y = decoder(codes, callback=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i, 5) for i in range(1, 6)]  # two evaluations, but in the last step
    assert seen[-1][2].shape == y.shape
    seen.clear()
    y = decoder(codes, scheduler="DDIM", callback=lambda *step: seen.append(step))
    assert len(seen) == 3
    torch.testing.assert_close(seen[-1][2], y, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_bfloat16_weights_see_the_same_levels(codes: Tensor) -> None:
    exact, rough = made()(codes, steps=8), made().to(torch.bfloat16)
    assert torch.equal(rough._level(torch.tensor([7.0]))[1], made()._level(torch.tensor([7.0]))[1])
    assert rough(codes, steps=8).shape == exact.shape and rough(codes, steps=8).dtype == torch.float32


# -- wrong input


def test_wrong_options(codes: Tensor, monkeypatch: Any) -> None:
    decoder = made()
    for name in ("euler", "EDMEuler", "PNDM", "DDIMInverse"):
        with pytest.raises(ValueError, match=rf"noise 'ddpm': DDIM, DDPM, .*; got '{name}'"):
            decoder(codes, scheduler=name)
    with pytest.raises(ConfigError, match="noise 'edm': EDMEuler, EDMDPMSolverMultistep; got 'DDIM'"):
        made(noise="edm", scheduler="DDIM")
    for option in ("solver", "schedule", "batched"):
        with pytest.raises(ValueError, match=f"takes no {option}; scheduler names one of diffusers'"):
            decoder(codes, **{option: "euler"})
    for steps in (0, -2, 1.5, True, (2, 2)):
        with pytest.raises(ValueError, match="steps"):
            decoder(codes, steps=steps)
    with pytest.raises(ValueError, match="noise is"):
        decoder(codes, noise=torch.zeros(4, 3, 16, 8))
    with pytest.raises(ValueError, match="no option temperature"):
        decoder(codes, temperature=1.0)
    for wrong in ({"data_std": 0.0}, {"data_std": -1.0}, {"steps": 0}, {"predict": "x0"}, {"noise": "cosine"}):
        with pytest.raises(ConfigError):
            made(**wrong)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenizers-vis\[latents\]'"):
        made()


def test_the_schedulers_are_diffusers_own() -> None:
    for noise, name in EVERY:
        assert isinstance(scheduler_of(name, noise, 0.5), getattr(diffusers, f"{name}Scheduler"))
    walk = scheduler_of("DDIM", "ddpm", 0.5)
    walk.set_timesteps(4)
    assert walk.timesteps[0] == 999 and not walk.config.clip_sample  # from pure noise on
    assert math.isclose(scheduler_of("EDMEuler", "edm", 0.3).config.sigma_data, 0.3)
