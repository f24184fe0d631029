"""Continuous tokens: the Gaussian bottleneck, a tokenizer around it, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.latents import Latents
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.gaussian import Gaussian
from tokenizers_vis.tokenizer import Tokenizer


@pytest.fixture
def vae(tiny: Any) -> Tokenizer:
    table = tiny("titok", "fsq", "vit")
    table["encoder"]["dim"], table["quantizer"] = 8, {"kind": "gaussian", "dim": 4, "kl": 1e-3}
    table["decoder"]["dim"] = 4
    return Tokenizer.from_config(table | {"name": "vae"}).eval()


def test_eval_gives_the_mean_and_training_draws_around_it():
    quantizer = Gaussian(dim=3).eval()
    z = torch.randn(2, 5, 6)
    assert torch.equal(quantizer(z).codes, z[..., :3]) and quantizer(z).ids.shape == (2, 5, 0)
    z[..., 3:] = 2 * torch.log(torch.tensor(0.5))
    draws = torch.stack([quantizer.train()(z).codes for _ in range(4000)])
    torch.testing.assert_close(draws.mean(dim=0), z[..., :3], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(dim=0), torch.full((2, 5, 3), 0.5), atol=0.03, rtol=0)


def test_the_loss_is_the_divergence_from_a_standard_normal():
    z = torch.randn(4, 5, 6)
    mean, log_variance = z.chunk(2, dim=-1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2)).mean()
    out = Gaussian(dim=3, kl=0.5)(z)
    torch.testing.assert_close(out.parts["kl"], expected)
    torch.testing.assert_close(out.loss, 0.5 * expected)
    assert not Gaussian(dim=3, kl=0.0)(z).parts


def test_extreme_variances_stay_finite():
    z = torch.tensor([[[0.0, 1e4], [0.0, -1e4]]], requires_grad=True)
    out = Gaussian(dim=1)(z)
    (out.codes.sum() + out.loss).backward()
    assert out.codes.isfinite().all() and out.loss.isfinite() and z.grad.isfinite().all()


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="no ids"):
        Gaussian(dim=3).lookup(torch.zeros(1, 1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="b n 6"):
        Gaussian(dim=3)(torch.zeros(1, 2, 3))
    for wrong in ({"dim": 0}, {"dim": 2, "kl": -1.0}):
        with pytest.raises(ConfigError):
            build(Quantizer, {"kind": "gaussian", **wrong})


def test_a_tokenizer_gives_latents_and_takes_them_back(vae: Tokenizer, tmp_path: Path):
    images = torch.rand(3, 3, 16, 16)
    latents = vae.encode(images, batch_size=2)
    assert isinstance(latents, Latents) and latents.values.shape == (3, 6, 4) and latents.tokenizer == "vae"
    assert vae.continuous and vae.codebook_sizes == () and vae.bits_per_token == 64
    pictures = vae.decode(latents)
    torch.testing.assert_close(vae.decode(latents.values), pictures)
    torch.testing.assert_close(vae.reconstruct(images), pictures)
    torch.testing.assert_close(vae.decode(latents[1]), pictures[1:2], atol=1e-5, rtol=1e-5)
    latents.save(tmp_path / "x.safetensors")
    again = Latents.load(tmp_path / "x.safetensors")
    assert torch.equal(again.values, latents.values) and again.tokenizer == "vae"
    vae.save(tmp_path / "vae.safetensors")
    again = Tokenizer.from_file(tmp_path / "vae.safetensors").eval().encode(images, batch_size=2)
    assert torch.equal(again.values, latents.values)
    assert (
        "vectors" in vae.describe()["codebooks"] and "4 numbers each" in repr(vae) and "6 tokens of 4" in repr(latents)
    )


def test_latents_of_another_tokenizer_or_shape_are_refused(vae: Tokenizer, tmp_path: Path):
    for wrong in (
        Latents(torch.zeros(1, 6, 4), "other"),
        torch.zeros(1, 5, 4),
        torch.zeros(1, 6, 3),
        torch.zeros(1, 6, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="Latents|latents|tokens of 4 numbers"):
            vae.decode(wrong)
    with pytest.raises(ValueError, match="b n d"):
        Latents(torch.zeros(2, 3), "vae")
    with pytest.raises(ValueError, match="belong together"):
        vae.encode(torch.rand(1, 3, 16, 16))[:, :2]
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        Latents.load(tmp_path / "no.safetensors")
