"""The patch flow: UniFlow's network and walk on UniFlow's weights, one transformer pass, patches by themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.patch_flow import PatchFlowDecoder, PatchMLP

SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(**changes: Any) -> PatchFlowDecoder:
    """In eval mode, with all the weights drawn that start as zeros."""
    decoder = build(Decoder, {"kind": "patch_flow", **SHAPE, "steps": 2, **changes}).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "modulation" in name or "to_patches" in name:
                parameter.normal_(std=0.2)
    return decoder


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(4, 6, 5)


# -- UniFlow's


NAMES = {
    r"net\.input_proj": "read_patches",
    r"net\.cond_embed": "read_features",
    r"net\.time_embed\.mlp": "time",
    r"net\.res_blocks\.(\d+)\.in_ln": r"blocks.\1.norm",
    r"net\.res_blocks\.(\d+)\.mlp": r"blocks.\1.mlp",
    r"net\.res_blocks\.(\d+)\.adaLN_modulation\.1": r"blocks.\1.modulation",
    r"net\.final_layer\.adaLN_modulation\.1": "modulation",
    r"net\.final_layer\.linear": "to_patches",
}


@pytest.fixture
def original(recorded: Callable[[str], Any]) -> tuple[PatchMLP, dict[str, Tensor]]:
    tensors, metadata = recorded("uniflow")
    options = json.loads(metadata["options"])
    mlp = PatchMLP(
        dim=options["target_channels"],
        features=options["z_channels"],
        width=options["width"],
        depth=options["depth"],
    )
    state = {}
    for key, value in tensors.items():
        if key.startswith("weights."):
            for pattern, name in NAMES.items():
                key = re.sub(f"^weights\\.{pattern}", name, key)
            state[key] = value.float()
    mlp.load_state_dict(state)
    return mlp, tensors


def test_the_network_is_that_of_uniflow(original: tuple[PatchMLP, dict[str, Tensor]]) -> None:
    mlp, seen = original
    out = mlp(seen["x"][:, None], seen["t"], seen["z"][:, None])[:, 0]
    torch.testing.assert_close(out, seen["out"], **CLOSE)
    out.square().sum().backward()
    torch.testing.assert_close(mlp.read_patches.weight.grad, seen["gradient"], **CLOSE)


@torch.no_grad()
def test_the_walk_is_that_of_uniflow(original: tuple[PatchMLP, dict[str, Tensor]], monkeypatch: Any) -> None:
    mlp, seen = original
    decoder = PatchFlowDecoder(dim=5, max_tokens=6, size=4, patch=2, width=12, depth=1, heads=1)
    monkeypatch.setattr(decoder, "_features", lambda tokens, mask: seen["features"])
    monkeypatch.setattr(decoder.to_patches, "forward", lambda features: torch.zeros(2, 4, 12))  # UniFlow has none

    # Theirs goes from noise at 0 to the picture at 1, and a patch is c p q.
    def flow(patches: Tensor, t: Tensor, features: Tensor) -> Tensor:
        out = mlp(rearrange(patches, "b n (p q c) -> b n (c p q)", p=2, q=2), 1 - t, features)
        return -rearrange(out, "b n (c p q) -> b n (p q c)", p=2, q=2)

    monkeypatch.setattr(decoder.flow, "forward", flow)
    noise = rearrange(seen["noise"], "(b h w) (c p q) -> b c (h p) (w q)", b=2, h=2, p=2, q=2)
    y = decoder(torch.zeros(2, 6, 5), steps=3, noise=noise)
    torch.testing.assert_close(y, seen["image"], **CLOSE)


# -- ours


@torch.no_grad()
def test_the_transformer_runs_once_whatever_the_steps(codes: Tensor) -> None:
    decoder, passes, steps = made(), [], []
    decoder.transformer.register_forward_hook(lambda *_: passes.append(1))
    decoder.flow.register_forward_hook(lambda *_: steps.append(1))
    for options, transformer, flow in (
        ({"steps": 1}, 1, 1),
        ({"steps": 5}, 1, 5),
        ({"steps": 3, "solver": "heun"}, 1, 5),
        ({"steps": 5, "guidance": 2.0, "batched": False}, 2, 10),
        ({"steps": 5, "guidance": 2.0, "batched": True}, 2, 5),
    ):
        passes.clear(), steps.clear()
        decoder(codes, **options)
        assert (len(passes), len(steps)) == (transformer, flow), options


@torch.no_grad()
def test_a_patch_hears_of_its_neighbours_through_the_tokens_alone(codes: Tensor) -> None:
    decoder, noise = made(), torch.randn(4, 3, 16, 16)
    other = noise.clone()
    other[:, :, :8, :8] = torch.randn(4, 3, 8, 8)
    moved = (decoder(codes, noise=noise) - decoder(codes, noise=other)).abs().amax(dim=1) > 0
    assert moved[:, :8, :8].all() and not moved[:, 8:].any() and not moved[:, :, 8:].any()
    changed = codes.clone()
    changed[:, 2] += 1
    assert ((decoder(codes, noise=noise) - decoder(changed, noise=noise)).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("predict", ["velocity", "picture"])
def test_the_loss_is_the_mean_square_of_the_velocity(predict: str, codes: Tensor, monkeypatch: Any) -> None:
    target = torch.randn(4, 3, 16, 16)
    decoder = made(predict=predict, null_rate=0.0, time_mean=2.0)
    seen: dict[str, Tensor] = {}
    original = decoder._velocity

    def listen(x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        seen.update(x=x, t=t.view(-1, 1, 1, 1), v=original(x, t, features))
        return seen["v"]

    monkeypatch.setattr(decoder, "_velocity", listen)
    done = decoder.loss(codes, target)
    noise = (seen["x"] - (1 - seen["t"]) * target) / seen["t"]
    torch.testing.assert_close(done.loss, (seen["v"] - (noise - target)).square().mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(done.estimate, seen["x"] - seen["t"] * seen["v"])
    torch.testing.assert_close(done.weight, 1 - seen["t"].flatten())
    assert (made(estimates="even", null_rate=0.0).loss(codes, target).weight == 1).all()


@torch.no_grad()
def test_guidance(codes: Tensor) -> None:
    decoder, noise = made(), torch.randn(4, 3, 16, 16)
    plain = decoder(codes, steps=1, noise=noise)
    assert torch.equal(decoder(codes, steps=1, noise=noise, guidance=1), plain)
    nothing = decoder(codes, steps=1, noise=noise, guidance=0)
    torch.testing.assert_close(nothing, decoder(torch.randn_like(codes), steps=1, noise=noise, guidance=0), **CLOSE)
    assert (plain - nothing).abs().max() > 1e-2
    for batched in (False, True):
        guided = decoder(codes, steps=1, noise=noise, guidance=2.5, batched=batched)
        torch.testing.assert_close(guided, nothing + 2.5 * (plain - nothing), **CLOSE)
    assert not torch.allclose(decoder(codes, guidance=2.5), decoder(codes, guidance=2.5, guidance_kind="apg"))
    with pytest.raises(ValueError, match="without a null token"):
        made(null_rate=0.0)(codes, guidance=2.0)


def test_a_dropped_image_ignores_its_tokens(codes: Tensor) -> None:
    target = torch.randn(4, 3, 16, 16)

    def loss(decoder: PatchFlowDecoder, codes: Tensor) -> Any:
        torch.manual_seed(7)
        return decoder.loss(codes, target, torch.tensor([6, 1, 3, 5]))

    decoder = made(null_rate=1.0)
    first, second = loss(decoder, codes), loss(decoder, torch.randn(4, 6, 5))
    assert torch.equal(first.loss, second.loss) and (first.weight == 0).all()


def test_wrong_options() -> None:
    for wrong, message in (
        ({"flow_depth": 0}, "flow_depth is at least 1"),
        ({"flow_width": -1}, "flow_width at least 0"),
        ({"null_rate": 1.5}, "null_rate is a share from 0 to 1, got 1.5"),
        ({"steps": 0}, "steps is a whole number from 1"),
        ({"schedule": "bent"}, "schedule is one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**wrong)
    assert made(flow_width=48, flow_depth=1)(torch.zeros(1, 6, 5)).shape == (1, 3, 16, 16)
