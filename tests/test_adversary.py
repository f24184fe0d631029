"""The adversarial loss: critics and regularisers as their authors compute them, and who learns from what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError
from tokenizers_vis.train.adversary import (
    Critic,
    GanConfig,
    balance,
    critic_loss,
    deceiver_loss,
    lecam,
    nearest_weight,
)
from tokenizers_vis.train.critics import BlurNet, PatchNet
from tokenizers_vis.train.feature_critic import FeatureCriticConfig, FeatureNet, GroupedBatchNorm, Head, augmented
from tokenizers_vis.train.optim import OptimConfig

Official = Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]]
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def fill(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives a net the weights of one whose layers come in the same order under other names."""

    def place(key: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]

    kept = sorted((key for key in weights if not key.endswith(".kernel")), key=place)
    net.load_state_dict(
        {mine: weights[key] for mine, key in zip(sorted(net.state_dict(), key=place), kept, strict=True)}
    )


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights for timm's test_vit."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return str(path)


def features(vit: str, **options: object) -> GanConfig:
    net = FeatureCriticConfig(model="test_vit", weights=vit, size=32, blocks=(1, 3))
    return GanConfig(weight=1.0, critic="features", features=dataclasses.replace(net, **options))


# As their authors


def test_the_blur_critic_and_lecam_are_titoks(official: Official) -> None:
    weights, tensors, options = official("titok_losses")
    config = GanConfig(weight=1.0, critic="blur", width=32, depth=1, lecam=0.5, lecam_decay=0.9)
    critic = Critic(config, 22)
    fill(critic.net, weights)
    critic.real_average.fill_(options["averages"][0])
    critic.fake_average.fill_(options["averages"][1])
    real, fake = tensors["real"].float(), tensors["fake"].float()
    torch.testing.assert_close(critic.logits(real), tensors["logits"].float(), rtol=1e-3, atol=1e-3)
    for i in range(2):  # the averages move between the steps
        losses = critic(fake, real)
        torch.testing.assert_close(losses.total, tensors[f"loss{i}"], **TOLERANCE)
        torch.testing.assert_close(0.5 * losses.parts["lecam"], tensors[f"lecam{i}"].squeeze(), **TOLERANCE)
    losses.total.backward()
    gradient = critic.net.layers[-1].weight.grad
    torch.testing.assert_close(gradient, tensors["gradient"].float(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(critic.real_average, tensors["real_average"].squeeze(), **TOLERANCE)
    torch.testing.assert_close(critic.fake_average, tensors["fake_average"].squeeze(), **TOLERANCE)


def test_the_blur_critic_has_the_papers_size() -> None:
    assert round(sum(p.numel() for p in BlurNet().parameters()) / 1e6, 2) == 1.91


def test_the_patch_critic_and_its_losses_are_llamagens(official: Official) -> None:
    weights, tensors, options = official("llamagen_losses")
    net = PatchNet(width=options["ndf"], depth=options["n_layers"])
    fill(net, weights)
    real, fake = ((tensors[key].float() + 1) / 2 for key in ("real", "fake"))
    real_logits, fake_logits = net(real), net(fake)
    torch.testing.assert_close(real_logits, tensors["real_logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.layers[3].running_mean, tensors["running_mean"], **TOLERANCE)
    for objective in ("hinge", "vanilla"):
        loss = critic_loss(objective, real_logits, fake_logits)
        torch.testing.assert_close(loss, tensors[objective], **TOLERANCE)
        torch.testing.assert_close(deceiver_loss(objective, fake_logits).mean(), tensors["generator"], **TOLERANCE)
    torch.testing.assert_close(critic_loss("nonsaturating", real_logits, fake_logits), tensors["vanilla"], **TOLERANCE)
    # The adaptive weight, at the layer that the graph leads to.
    last = nn.Conv2d(4, 3, 3, padding=1)
    fill(last, {key: value.float() for key, value in tensors.items() if key.startswith("last.")})
    picture = last(tensors["x"].float())
    assert nearest_weight((picture + 1) / 2) is last.weight
    rec = (picture - tensors["real"].float()).square().mean()
    doubt = deceiver_loss("hinge", net((picture + 1) / 2)).mean()
    torch.testing.assert_close(balance(rec, doubt, last.weight), tensors["adaptive"], rtol=1e-3, atol=1e-5)


def test_the_feature_critics_heads_are_imagefolders(official: Official) -> None:
    """In evaluation, where the norm of the weights is not estimated anew."""
    weights, tensors, options = official("imagefolder_critic")
    head = Head(options["channels"]).eval()
    theirs = ("0.0", "1.fn.0", "2")
    for prefix, conv in zip(theirs, (head.place.conv, head.around.conv, head.to_logits), strict=True):
        norm = conv.parametrizations.weight
        names = {"weight_orig": norm.original, "weight_u": norm[0]._u, "weight_v": norm[0]._v, "bias": conv.bias}
        for name, value in names.items():
            value.data.copy_(weights[f"{prefix}.{name}"])
    for prefix, norm in (("0.1", head.place.norm), ("1.fn.1", head.around.norm)):
        norm.load_state_dict({name: weights[f"{prefix}.{name}"] for name in ("weight", "bias")})
    found = head(tensors["x"].float())
    torch.testing.assert_close(found, tensors["evaluated"].squeeze(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_augmentation_is_imagefolders(official: Official, seed: int) -> None:
    """The same draws give the same pictures."""
    _, tensors, options = official("imagefolder_critic")
    torch.manual_seed(seed)
    found = augmented(tensors["pictures"].float(), options["prob"][seed], options["cutout"])
    torch.testing.assert_close(found, tensors[f"augmented{seed}"].float(), rtol=2e-3, atol=2e-3)


def test_lecam_of_each_logit_is_imagefolders(official: Official) -> None:
    _, tensors, options = official("imagefolder_critic")
    found = lecam(tensors["lecam_real"], tensors["lecam_fake"], *map(torch.tensor, options["averages"]))
    torch.testing.assert_close(found, tensors["lecam"], **TOLERANCE)


# Who learns


@pytest.mark.parametrize("kind", ["patch", "blur", "features"])
def test_the_critic_learns_to_tell_and_the_maker_to_deceive(kind: str, vit: str) -> None:
    """The critic's loss falls on pictures that differ; a picture that follows ``doubt`` looks more real to it."""
    torch.manual_seed(0)
    config = features(vit, augment=0.0) if kind == "features" else GanConfig(weight=1.0, critic=kind, width=32, depth=2)
    critic = Critic(config, 32)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    ramp = torch.linspace(0, 1, 32).expand(8, 3, 32, 32)
    real, fake = ramp + 0.1 * torch.randn(8, 3, 32, 32), ramp.mT + 0.1 * torch.randn(8, 3, 32, 32)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        total, parts, _ = critic(fake, real)
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.7 * losses[0]
    assert parts["critic_real"] > parts["critic_fake"]

    before = {name: value.clone() for name, value in critic.named_parameters()}
    optimizer.zero_grad()
    picture = fake.clone().requires_grad_()
    critic.doubt(picture).mean().backward()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert all(torch.equal(before[name], value) for name, value in critic.named_parameters())
    with torch.no_grad():
        step = picture - 0.3 * picture.grad / picture.grad.abs().amax()
        assert critic.doubt(step).mean() < critic.doubt(picture).mean()


def test_the_doubt_of_an_image_is_its_own(vit: str) -> None:
    critic = Critic(GanConfig(weight=1.0, critic="blur", width=32, depth=1), 16)
    x = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(critic.doubt(x)[1:], critic.doubt(x[1:]))
    assert critic.doubt(x).shape == (3,)


def test_lecams_averages_are_in_the_checkpoint() -> None:
    config = GanConfig(weight=1.0, critic="blur", width=32, depth=1, lecam=0.1)
    one, other = Critic(config, 16), Critic(config, 16)
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    one(x, y)
    other.load_state_dict(one.state_dict())
    assert one.real_average != 0
    assert torch.equal(one(x, y).total, other(x, y).total)


def test_a_frozen_transformer_is_borne_but_not_kept(vit: str) -> None:
    net = FeatureNet(features(vit).features)
    assert not any("blocks" in name for name in net.state_dict())
    assert all(not p.requires_grad for p in net.borne["net"].parameters())
    net.train().double()
    assert next(net.borne["net"].parameters()).dtype == torch.float64
    assert not net.borne["net"].training


@pytest.mark.parametrize("side", [24, 32, 40])
def test_the_feature_critic_sees_pictures_of_any_size(vit: str, side: int) -> None:
    net = FeatureNet(features(vit).features)
    logits = net(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 3 * 4) and logits.isfinite().all()
    # In evaluation nothing is drawn.
    x = torch.rand(2, 3, side, side)
    assert torch.equal(net.eval()(x), net(x))


@pytest.mark.parametrize("b", [1, 8, 9, 12])
def test_grouped_batch_norm_takes_any_batch(b: int) -> None:
    """Every group of images has mean 0 and variance 1 in each channel."""
    y = GroupedBatchNorm(4)(5 + 3 * torch.randn(b, 4, 50))
    assert y.shape == (b, 4, 50)
    assert y.mean(dim=(0, 2)).abs().max() < 1e-4
    assert (y.var(dim=(0, 2), correction=0) - 1).abs().max() < 1e-3


def test_autocast_leaves_a_critics_losses_finite_and_close(vit: str) -> None:
    critic = Critic(GanConfig(weight=1.0, width=8, depth=2, lecam=0.1), 16)
    x, y = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    wanted = critic(x, y).total
    critic.real_average.zero_(), critic.fake_average.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        found = critic(x, y).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


# The adaptive weight


def test_balance_makes_the_gradients_equal() -> None:
    w = torch.randn(5, requires_grad=True)
    one, other = w.square().sum(), 0.01 * w.sin().sum()
    factor = balance(one, other, w)
    norms = [torch.autograd.grad(term, w, retain_graph=True)[0].norm() for term in (one, factor * other)]
    torch.testing.assert_close(*norms, rtol=2e-2, atol=0)
    assert balance(one, 1e-12 * other, w, most=7.0) == 7.0


def test_balance_and_nearest_weight_say_what_is_missing() -> None:
    w = torch.randn(5, requires_grad=True)
    with pytest.raises(ValueError, match="give a loss on pictures a weight"):
        balance(torch.zeros((), requires_grad=True) * 1, w.sum(), w)
    with pytest.raises(ValueError, match="needs a layer that is trained"):
        nearest_weight(w * 2)


# Config


def test_the_weight_starts_and_ramps() -> None:
    config = GanConfig(weight=0.4, start=10, ramp=3)
    assert [config.weight_at(step) for step in (0, 9, 10, 11, 12, 13, 99)] == pytest.approx(
        [0, 0, 0.1, 0.2, 0.3, 0.4, 0.4]
    )
    assert GanConfig(weight=0.4, start=10).weight_at(10) == 0.4
    assert Critic(GanConfig(weight=1, start=10, ahead=4, depth=1), 16).start == 6
    assert Critic(GanConfig(weight=1, start=2, ahead=4, depth=1), 16).start == 0


def test_the_critic_has_an_optimiser_of_its_own() -> None:
    optim = OptimConfig(steps=5, batch_size=2, lr=1e-3)
    critic = Critic(GanConfig(weight=1, depth=1, rate=0.5, betas=(0.5, 0.9), weight_decay=0.0), 16)
    own = critic.optim(optim)
    assert (own.lr, own.betas, own.weight_decay, own.steps) == (5e-4, (0.5, 0.9), 0.0, 5)
    assert Critic(GanConfig(weight=1, depth=1), 16).optim(optim) == optim


@pytest.mark.parametrize(
    "options", [{"weight": -1.0}, {"start": -1}, {"depth": 0}, {"lecam_decay": 1.0}, {"weight_decay": -0.1}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        GanConfig(**options)


def test_what_does_not_fit_is_refused(vit: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sees pictures of 24 px and more, these are 16"):
        Critic(GanConfig(weight=1), 16)
    with pytest.raises(ValueError, match="multiple of 32, got 20"):
        Critic(GanConfig(weight=1, critic="blur", width=20), 64)
    with pytest.raises(ValueError, match="test_vit has blocks 0 to"):
        FeatureNet(features(vit, blocks=(1, 99)).features)
    with pytest.raises(ValueError, match="rising"):
        FeatureCriticConfig(blocks=(3, 1))
    with pytest.raises(ValueError, match="there is no weights file"):
        FeatureNet(features(str(tmp_path / "none.safetensors")).features)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="no vision transformer"):
        FeatureNet(FeatureCriticConfig(model="test_resnet", weights=str(tmp_path / "resnet.safetensors"), size=64))
    with pytest.raises(ValueError, match="is not a file of test_vit"):
        FeatureNet(features(str(tmp_path / "resnet.safetensors")).features)
