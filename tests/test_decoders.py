"""Every decoder keeps the contract of decoders/base.py; positions keep their own formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders import DECODERS
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.paths import SMALLEST_T
from tokenizers_vis.decoders.refine import Refine
from tokenizers_vis.decoders.transformer import (
    attend,
    patchify,
    prefix_mask,
    scattered,
    sincos,
    sincos_2d,
    time_features,
    unpatchify,
)
from tokenizers_vis.encoders.base import Encoder

# Decoders of a whole grid of cells: no prefixes, no ragged batches.
PIXELS = {"size": 16, "ch": 32, "channel_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_channels": 32}
GRIDS = {
    "conv": {"dim": 6, **PIXELS, "attention": [3]},
    "dual": {"dim": 6, "size": 16, "pixels": {"dim": 4, **PIXELS}},
}
SEQUENCES = [kind for kind in DECODERS if kind not in GRIDS]
NARROW = {"width": 32, "depth": 1, "heads": 2}
SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FLOWS = {
    "flow": {"steps": 2},
    "flextok": {"steps": 2, "guidance": 1},
    "diffusion": {"steps": 2},
    "patch_flow": {"steps": 2},
    "shortcut": {"steps": 2},
}


def decoder(kind: str, **changes) -> Decoder:
    """In eval mode. A flow decoder starts with zeros in its last layers, so all weights are drawn again."""
    made = build(Decoder, {"kind": kind, **SHAPE, **FLOWS.get(kind, {}), **changes}).eval()
    if kind in FLOWS:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "modulation" in name or "to_patches" in name:
                    parameter.normal_(std=0.2)
    return made


def flow(**changes) -> FlowDecoder:
    return decoder("flow", **changes)


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(4, 6, 5)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_grid(kind):
    made = build(Decoder, {"kind": kind, **GRIDS[kind]}).train()
    codes = torch.randn(3, 4, 6, requires_grad=True)
    done = made.loss(codes, torch.randn(3, 3, 16, 16))
    assert made.one_pass and done.estimate.shape == (3, 3, 16, 16) and done.weight.tolist() == [1, 1, 1]
    (done.loss + done.estimate.square().mean()).backward()
    read = codes.grad.abs().sum(dim=(0, 1)) > 0
    assert read[-4:].all() and codes.grad.isfinite().all()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    made.eval().requires_grad_(False)
    alone = torch.cat([made(one[None]) for one in codes.detach()])
    torch.testing.assert_close(alone, made(codes.detach()), rtol=1e-4, atol=1e-5)
    for wrong in (codes[:, :3], codes[..., :5], codes[0]):
        with pytest.raises(ValueError, match="codes"):
            made(wrong.detach())
    with pytest.raises(ValueError, match="takes no sampling option|no sampling options"):
        made(codes.detach(), steps=3)


# -- what every decoder does


@pytest.mark.parametrize("kind", SEQUENCES)
@torch.no_grad()
def test_every_prefix_decodes(kind, codes):
    made = decoder(kind)
    whole = made(codes)
    for n in range(1, 7):
        y = made(codes[:, :n])
        assert y.shape == (4, 3, 16, 16) and y.dtype == torch.float32 and y.isfinite().all()
        assert (n == 6) == torch.equal(y, whole)  # each token counts


@pytest.mark.parametrize("kind", SEQUENCES)
@torch.no_grad()
def test_a_ragged_batch_is_its_images_one_by_one(kind, codes):
    made = decoder(kind)
    lengths = [6, 1, 3, 5]
    ragged = made(codes, torch.tensor(lengths))
    alone = torch.cat([made(codes[i : i + 1, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(ragged, alone, **CLOSE)
    beyond = codes.clone()
    beyond[1, 1:] = 1e3
    torch.testing.assert_close(made(beyond, torch.tensor(lengths)), ragged, **CLOSE)
    torch.testing.assert_close(made(codes, torch.full((4,), 6)), made(codes), **CLOSE)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_gradient_reaches_codes_and_parameters(kind, codes):
    made = decoder(kind)
    codes.requires_grad_(True)
    done = made.loss(codes, torch.randn(4, 3, 16, 16))
    assert done.loss.shape == () and done.estimate.shape == (4, 3, 16, 16) and done.weight.shape == (4,)
    assert ((done.weight >= 0) & (done.weight <= 1)).all()
    (done.loss + done.estimate.square().mean()).backward()
    assert (codes.grad.abs().sum(dim=-1) > 0).any(dim=0).all()  # every place among the tokens
    for name, parameter in made.named_parameters():
        # Of the flow decoders, only where an image was dropped, or has fewer tokens than all.
        if name != "null_token" and (kind, name) != ("flextok", "mask_token"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_ragged_loss_gives_no_gradient_past_the_length(kind, codes):
    made = decoder(kind, **({"null_rate": 0.0} if kind in FLOWS else {}))
    codes.requires_grad_(True)
    lengths = torch.tensor([6, 1, 3, 5])
    made.loss(codes, torch.randn(4, 3, 16, 16), lengths).loss.backward()
    moved = codes.grad.abs().sum(dim=-1) > 0
    assert torch.equal(moved, torch.arange(6) < lengths[:, None])


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 0, 5), (4, 6, 4), (6, 5), (4, 6, 5, 1)], ids=str)
def test_codes_of_another_shape_are_refused(kind, shape):
    made = decoder(kind)
    with pytest.raises(ValueError, match=r"takes codes b n 5 with n from 1 to 6, got \("):
        made(torch.zeros(shape))
    with pytest.raises(ValueError, match="takes codes b n 5"):
        made.loss(torch.zeros(shape), torch.zeros(4, 3, 16, 16))


@pytest.mark.parametrize("kind", SEQUENCES)
@torch.no_grad()
def test_it_runs_in_bfloat16(kind, codes):
    made = decoder(kind)
    exact = made(codes)
    rough = made.to(torch.bfloat16)(codes)
    torch.testing.assert_close(rough.float(), exact, rtol=0.15, atol=0.15)


@pytest.mark.parametrize("kind", SEQUENCES)
@torch.no_grad()
def test_options(kind, codes):
    for changes in ({"mlp": "gelu"}, {"qk_norm": False}, {"channels": 2}, {"patch": 4}):
        assert decoder(kind, **changes)(codes).shape == (4, changes.get("channels", 3), 16, 16)
    with pytest.raises(ConfigError, match="size 16 is not a multiple of patch 5"):
        decoder(kind, patch=5)


# -- the one-pass decoder


@pytest.mark.parametrize(
    "option", ["steps", "guidance", "guidance_kind", "solver", "generator", "noise", "temperature"]
)
def test_a_one_pass_decoder_takes_no_option(option, codes):
    with pytest.raises(ValueError, match=f"takes no sampling options, got {option}"):
        decoder("vit")(codes, **{option: 1})


def test_the_loss_of_a_one_pass_decoder(codes):
    target = torch.randn(4, 3, 16, 16)
    for objective, formula in (("l1", F.l1_loss), ("l2", F.mse_loss)):
        made = decoder("vit", objective=objective)
        done = made.loss(codes, target)
        assert torch.equal(done.estimate, made(codes)) and (done.weight == 1).all()
        torch.testing.assert_close(done.loss, formula(made(codes), target))


# -- the loss of the flow decoder


class Knows(torch.nn.Module):
    """In the place of the last layer: a network that gives the patches of one picture, whatever it is shown."""

    def __init__(self, picture: Tensor, patch: int) -> None:
        super().__init__()
        self.patches = patchify(picture, patch)

    def forward(self, features: Tensor) -> Tensor:
        return self.patches


@pytest.mark.parametrize("time_mean", [0.0, -4.0])  # with -4 most times are below the cap
def test_a_perfect_picture_has_no_loss(time_mean, codes):
    target = torch.randn(4, 3, 16, 16)
    made = flow(predict="picture", time_mean=time_mean, null_rate=0.0)
    made.to_patches = Knows(target, made.patch)
    for _ in range(5):
        done = made.loss(codes, target)
        assert done.loss < 1e-8
        late = done.weight < 1 - 2 * SMALLEST_T
        torch.testing.assert_close(done.estimate[late], target[late], rtol=1e-4, atol=1e-4)
    # And sampling ends in that very picture.
    torch.testing.assert_close(made(codes, steps=7, solver="euler"), target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("time_mean", [0.0, -4.0])
def test_a_perfect_velocity_has_no_loss(time_mean, codes, monkeypatch):
    target = torch.randn(4, 3, 16, 16)
    made = flow(predict="velocity", time_mean=time_mean)

    def perfect(x, t, tokens, mask):
        return (x - target) / t.view(-1, 1, 1, 1)

    monkeypatch.setattr(made, "_velocity", perfect)
    for _ in range(5):
        done = made.loss(codes, target)
        assert done.loss < 1e-8
        torch.testing.assert_close(done.estimate, target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("predict", ["velocity", "picture"])
def test_the_loss_is_the_mean_square_of_the_velocity(predict, codes, monkeypatch):
    target = torch.randn(4, 3, 16, 16)
    made = flow(predict=predict, null_rate=0.0, time_mean=2.0)
    seen = {}
    original = made._velocity

    def listen(x, t, tokens, mask):
        seen.update(x=x, t=t.view(-1, 1, 1, 1), v=original(x, t, tokens, mask))
        return seen["v"]

    monkeypatch.setattr(made, "_velocity", listen)
    done = made.loss(codes, target)
    noise = (seen["x"] - (1 - seen["t"]) * target) / seen["t"]
    torch.testing.assert_close(done.loss, (seen["v"] - (noise - target)).square().mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(done.estimate, seen["x"] - seen["t"] * seen["v"])
    torch.testing.assert_close(done.weight, 1 - seen["t"].flatten())


@pytest.mark.parametrize("lengths", [None, [6, 1, 3, 5]], ids=["all", "ragged"])
def test_a_dropped_image_ignores_its_tokens(lengths, codes):
    target = torch.randn(4, 3, 16, 16)
    lengths = None if lengths is None else torch.tensor(lengths)

    def loss(made, codes):
        torch.manual_seed(7)
        return made.loss(codes, target, lengths)

    dropped = flow(null_rate=1.0)
    first, second = loss(dropped, codes), loss(dropped, torch.randn(4, 6, 5))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.estimate, second.estimate)
    assert (first.weight == 0).all()
    kept = flow(null_rate=0.0)
    assert not torch.equal(loss(kept, codes).estimate, loss(kept, torch.randn(4, 6, 5)).estimate)


@torch.no_grad()
def test_a_dropped_image_is_the_unconditional_branch(codes):
    made = flow()
    x, t = torch.randn(4, 3, 16, 16), torch.rand(4)
    tokens, mask = made._tokens(codes, None)
    tokens, mask = made._drop(tokens, mask, torch.tensor([True, False, True, False]))
    mixed = made._velocity(x, t, tokens, mask)
    alone = made._velocity(x, t, made.null_token.expand(4, 1, -1), None)
    kept = made._velocity(x, t, *made._tokens(codes, None))
    torch.testing.assert_close(mixed, torch.stack([alone[0], kept[1], alone[2], kept[3]]), **CLOSE)


# -- patches and positions


@pytest.mark.parametrize("kind", ["vit", "flow"])
def test_convolutions_behind_the_patches_begin_as_nothing(kind, codes):
    plain, refined = decoder(kind), decoder(kind, refine=4)
    refined.load_state_dict(plain.state_dict(), strict=False)
    before = plain(codes)
    torch.testing.assert_close(refined(codes), before)
    # Then each pixel hears of its neighbours beyond the patch, and of what the transformer knew.
    torch.nn.init.normal_(refined.refine.last.weight)
    picture, features = torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 32)
    base = refined.refine(picture, features)
    dot, known = picture.clone(), features.clone()
    dot[..., 7, 7], known[:, 3] = 1, 1
    heard = (refined.refine(dot, features) != base)[0].any(dim=0)
    assert heard[:8, 8:].any() and heard[8:, 8:].any()
    assert (refined.refine(picture, known) != base)[..., 8:, 8:].all()
    refined(codes).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in refined.refine.parameters())
    with pytest.raises(ValueError, match="patch is even, got 5"):
        Refine(width=8, patch=5, channels=4)


@pytest.mark.parametrize("masked", ["", "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_that_is_written_out_is_the_fused_one(masked, scale, monkeypatch):
    """In training in bfloat16 on a CPU; values and gradients are compared with float32."""
    seen = torch.rand(3, 1, 7, 9) < 0.7
    seen[..., 0] = True
    mask = {"": None, "bool": seen, "float": torch.randn(3, 1, 7, 9)}[masked]
    exact = [torch.randn(3, 2, n, 4).bfloat16().float().requires_grad_() for n in (7, 9, 9)]
    low = [t.detach().bfloat16().requires_grad_() for t in exact]
    wanted = F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=scale)
    weight = torch.randn_like(wanted)
    (wanted * weight).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", None)  # is not called
        found = attend(*low, mask if masked != "float" else mask.bfloat16(), scale)
    assert found.dtype == torch.bfloat16
    (found * weight).sum().backward()
    torch.testing.assert_close(found.float(), wanted, rtol=0.03, atol=0.03)
    for mine, right in zip(low, exact, strict=True):
        torch.testing.assert_close(mine.grad.float(), right.grad, rtol=0.05, atol=0.05)


def test_patchify_and_back():
    x = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    patches = patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(unpatchify(patches, 4, 2), x)
    # Patches row by row; within one, pixels row by row, channels last.
    assert torch.equal(patches[1, 4].reshape(4, 4, 3), x[1, :, 4:8, 4:8].permute(1, 2, 0))


def test_sine_cosine_positions():
    table = sincos_2d(3, 5, 16)
    assert table.shape == (15, 16) and table.dtype == torch.float32
    grid = table.reshape(3, 5, 16)
    assert (grid[:, :, :8] == grid[:, :1, :8]).all() and (grid[:, :, 8:] == grid[:1, :, 8:]).all()
    torch.testing.assert_close(grid[2, 3, [0, 4, 8, 12]], torch.tensor([2.0, 2, 3, 3]).sin().where(
        torch.tensor([True, False, True, False]), torch.tensor([2.0, 2, 3, 3]).cos()))  # fmt: skip
    assert len(table.unique(dim=0)) == 15
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        sincos_2d(3, 5, 18)


def test_scattered_positions_begin_at_places_that_are_spread_evenly():
    table = scattered(64, 8, 32)
    assert table.shape == (64, 32) and table.requires_grad
    # The nearest of the grid's 64 vectors tells each one's place; each quarter of the grid has a quarter of a prefix.
    nearest = torch.cdist(table.detach(), sincos_2d(8, 8, 32)).argmin(dim=1)
    quarter = nearest // 8 // 4 * 2 + nearest % 8 // 4
    for n in (8, 16, 32, 64):
        assert quarter[:n].bincount(minlength=4).sub(n / 4).abs().max() <= 1 + n / 16
    assert len(nearest.unique()) > 40
    torch.testing.assert_close(sincos(torch.tensor([[2, 3]]), 16), sincos_2d(3, 5, 16)[13:14])


@pytest.mark.parametrize("part", [Encoder, Decoder])
def test_titoks_tables_start_as_places(part):
    """From random tables a small one stays on the mean colour for long."""
    net = build(part, {"kind": "titok", "dim": 4, "max_tokens": 16, "size": 32, "patch": 4, **NARROW})
    grid = sincos_2d(8, 8, 32)
    assert net.positions.requires_grad and torch.equal(
        torch.cdist(net.positions[1:].detach(), grid).argmin(dim=1), torch.arange(64)
    )
    spread = net.query_positions if part is Encoder else net.token_positions
    assert len(torch.cdist(spread.detach(), grid).argmin(dim=1).unique()) > 12


def test_queries_and_keys_start_equal():
    for block in decoder("vit").transformer.blocks:
        queries, keys, values = block.attention.qkv.weight.chunk(3)
        assert torch.equal(queries, keys) and not torch.equal(keys, values)


def test_time_features():
    features = time_features(torch.tensor([0.0, 0.001, 1.0]), 8)
    assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(features[1, [0, 4]], torch.tensor([math.cos(1), math.sin(1)]))
    torch.testing.assert_close(features[2, 1], torch.tensor(100.0).cos())  # 1000 / 10000^(1/4)


def test_the_prefix_mask_by_hand():
    assert prefix_mask(None, 3, 2) is None
    mask = prefix_mask(torch.tensor([1, 3]), 3, before=2)
    assert mask.shape == (2, 1, 1, 5)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
