"""Every encoder keeps the contract of encoders/base.py; FlexTok is causal; length policies draw what they say."""

from __future__ import annotations

import pytest
import torch

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.encoders import ENCODERS
from tokenizers_vis.encoders.base import Encoder, LengthPolicy
from tokenizers_vis.encoders.flextok import Standard, causal_last

# Encoders of a grid of cells: no sequence, no prefixes.
PIXELS = {"size": 16, "ch": 32, "channel_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_channels": 32}
TOWER = {"size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2, "hidden": 64}
GRIDS = {
    "grid": {"dim": 6, **PIXELS, "attention": [3]},
    "fqgan": {"dim": 6, **PIXELS, "branches": 2, "depth": 1, "heads": 2},
    "dual": {"semantic": TOWER, "pixels": {"dim": 4, **PIXELS}, "semantic_dim": 2},
}
SEQUENCES = [kind for kind in ENCODERS if kind not in GRIDS]
SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2}
PATCHES = (SHAPE["size"] // SHAPE["patch"]) ** 2


def encoder(kind: str, **changes) -> Encoder:
    return build(Encoder, {"kind": kind, **SHAPE, **changes}).eval().requires_grad_(False)


# -- what every encoder does


@pytest.mark.parametrize("kind", SEQUENCES)
def test_shapes_and_prefixes(kind):
    made = encoder(kind)
    x = torch.randn(3, 3, 16, 16)
    assert (made.dim, made.max_tokens) == (5, 6) and isinstance(made.lengths, LengthPolicy)
    for n in range(1, 7):
        z = made(x, n)
        assert z.shape == (3, n, 5) and z.isfinite().all()
        torch.testing.assert_close(z, made(x, 6)[:, :n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_each_image_is_encoded_by_itself(kind):
    made = encoder(kind)
    x = torch.randn(4, 3, 16, 16)
    alone = torch.cat([made(one[None], 6) for one in x])
    torch.testing.assert_close(made(x, 6), alone, rtol=1e-5, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # and it does look at the image


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("changes", [{"channels": 1}, {"mlp": "gelu"}, {"mlp": "swiglu"}, {"qk_norm": True}], ids=str)
def test_options(kind, changes):
    made = encoder(kind, **changes)
    assert made(torch.randn(2, changes.get("channels", 3), 16, 16), 4).shape == (2, 4, 5)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_gradient_reaches_every_parameter(kind):
    made = encoder(kind).requires_grad_(True)
    # A fixed random direction: plain squares have no gradient through a layer norm.
    (made(torch.randn(3, 3, 16, 16), 6) * torch.randn(3, 6, 5)).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", SEQUENCES)
def test_it_runs_in_bfloat16(kind):
    made = encoder(kind)
    x = torch.randn(2, 3, 16, 16)
    exact = made(x, 6)
    rough = made.to(torch.bfloat16)(x.to(torch.bfloat16), 6)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_patch_that_does_not_divide_is_refused(kind):
    with pytest.raises(ConfigError, match="encoder: size 16 is not a multiple of patch 5"):
        build(Encoder, {"kind": kind, **SHAPE, "patch": 5}, "encoder")


@pytest.mark.parametrize("kind", GRIDS)
def test_a_grid(kind):
    made = build(Encoder, {"kind": kind, **GRIDS[kind]}).train()
    x = torch.randn(3, 3, 16, 16)
    z = made(x, 4)
    assert (made.dim, made.max_tokens, made.nested) == (6, 4, False) and z.shape == (3, 4, 6) and z.isfinite().all()
    (z * torch.randn_like(z)).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    made.eval().requires_grad_(False)
    torch.testing.assert_close(torch.cat([made(one[None], 4) for one in x]), made(x, 4), rtol=1e-4, atol=1e-5)
    assert (made(x, 4)[0] - made(x, 4)[1]).abs().max() > 1e-3
    rough = made.to(torch.bfloat16)(x.to(torch.bfloat16), 4)
    assert rough.dtype == torch.bfloat16 and rough.isfinite().all()


def test_nested():
    assert encoder("flextok").nested and encoder("flextok").lengths == LengthPolicy("uniform")
    assert not encoder("titok").nested
    assert encoder("titok", lengths={"kind": "pow2"}).nested  # One-D-Piece


# -- FlexTok


def trace(made, x, n):
    """The whole sequence after the transformer: patches, then registers."""
    kept = []
    handle = made.transformer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    made(x, n)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("changed", range(6))
def test_a_register_changes_itself_and_the_later_ones_only(changed):
    made = encoder("flextok").double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = trace(made, x, 6)
    made.registers[changed] += torch.randn(32, dtype=torch.float64)
    after = trace(made, x, 6)
    moved = (after - before).abs().amax(dim=(0, 2))
    first = PATCHES + changed
    assert moved[:first].max() < 1e-12
    assert moved[first:].min() > 1e-6


@pytest.mark.parametrize("n", range(1, 7))
def test_a_short_encoding_is_the_prefix_of_the_long_one(n):
    made = encoder("flextok").double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(made(x, n), made(x, 6)[:, :n], rtol=0, atol=1e-12)
    assert trace(made, x, n).shape[1] == PATCHES + n  # and the sequence itself is short


def test_the_mask_by_hand():
    assert causal_last(2, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_standard_uses_the_batch_in_training_and_remembers_it():
    standard = Standard(6, 5)
    z = 3 * torch.randn(64, 4, 5) + torch.arange(5)
    for _ in range(500):
        out = standard(z)
    assert out.dtype == torch.float32 and out.shape == z.shape
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(4, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(dim=0, correction=0), torch.ones(4, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(standard.mean[:4], z.mean(dim=0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(standard.variance[:4], z.var(dim=0), rtol=1e-3, atol=1e-3)
    assert (standard.mean[4:] == 0).all() and (standard.variance[4:] == 1).all()  # places that were not there
    standard.eval()
    before = {key: value.clone() for key, value in standard.state_dict().items()}
    torch.testing.assert_close(standard(z), out, rtol=0, atol=0.05)
    torch.testing.assert_close(standard(z[:1, :2]), standard(z)[:1, :2])  # one image, a prefix
    assert standard(z.bfloat16()).dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in standard.state_dict().items())


def test_standardize_passes_the_gradient_and_leaves_earlier_graphs_whole():
    made = encoder("flextok", standardize=True).train().requires_grad_(True)
    losses = [(made(torch.randn(8, 3, 16, 16), n) * torch.randn(8, n, 5)).sum() for n in (6, 3)]
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    assert made.read_patches.weight.grad.abs().sum() > 0


def test_titok_standardizes_every_token_too():
    made = encoder("titok", standardize=True).train()
    z = made(torch.randn(64, 3, 16, 16), 6)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(6, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.var(dim=0, unbiased=False), torch.ones(6, 5), rtol=0, atol=0.1)  # its eps is felt
    x = torch.randn(4, 3, 16, 16)
    alone = torch.cat([made.eval()(one[None], 6)[:, :3] for one in x])
    torch.testing.assert_close(made(x, 3), alone, rtol=0, atol=1e-5)
