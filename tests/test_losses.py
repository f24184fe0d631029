"""The sum of losses: each term as its authors compute it, switched on by a recipe, weighed by step and by image."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, build, to_toml
from tokenizers_vis.decoders.base import DecoderLoss
from tokenizers_vis.tokenizer import Tokenizer, TrainingPass
from tokenizers_vis.train.adversary import GanConfig
from tokenizers_vis.train.anneal import AnnealConfig, anneal, perturbs
from tokenizers_vis.train.losses import LossConfig, LossSum
from tokenizers_vis.train.picture_losses import (
    ClassifierConfig,
    ClassifierDistance,
    classifier_net,
    gram,
    logit_laplace,
    logits_of,
    squeezed,
)
from tokenizers_vis.train.terms import Schedule, at_step, ever

Official = Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]]
CPU = torch.device("cpu")
GAN = {"weight": 0.5, "depth": 1, "width": 8}


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights for timm's test_resnet, classifier included."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return str(path)


@pytest.fixture
def tokenizer(tiny: Callable[..., dict[str, Any]]) -> Tokenizer:
    return Tokenizer.from_config(tiny())


@pytest.fixture
def loss_sum(tokenizer: Tokenizer) -> Callable[..., LossSum]:
    return lambda **options: LossSum(build(LossConfig, options), tokenizer, CPU)


def images(b: int = 3) -> Tensor:
    return torch.rand(b, 3, 16, 16)


# As their authors


def test_logit_laplace_is_that_of_bsq_vit(recorded: Callable[[str], Any]) -> None:
    tensors, _ = recorded("bsq_logit_laplace")
    torch.testing.assert_close(squeezed(tensors["pictures"]), tensors["squeezed"])
    found = logit_laplace(tensors["mean"], tensors["log_scale"], tensors["squeezed"]).mean()
    torch.testing.assert_close(found, tensors["loss"], rtol=1e-5, atol=1e-6)
    # A picture of logits, where theirs is neither clamped nor ours straight, has these logits again.
    mean = tensors["mean"].clamp(-2, 2)
    pictures = (torch.sigmoid(mean) - 0.1) / 0.8
    torch.testing.assert_close(logits_of(pictures), mean, rtol=1e-4, atol=1e-4)


def test_the_classifiers_distance_is_titoks(official: Official) -> None:
    _, tensors, _ = official("titok_losses")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 8, stride=32), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.gelu(self.conv(x)).mean(dim=(2, 3)))

    net = Net()
    net.load_state_dict({key: tensors[f"classifier.{key}"].float() for key in net.state_dict()})
    distance = ClassifierDistance(net=net, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224)
    found = distance(tensors["real"].float(), tensors["fake"].float())
    torch.testing.assert_close(found.mean(), tensors["perceptual"], rtol=1e-4, atol=1e-7)


# Terms on pictures


def test_logits_go_on_outside_of_the_range() -> None:
    """A decoder may leave [0, 1] by any distance: the gradient stays, is finite and points back."""
    x = torch.tensor([-3.0, -0.12, -0.05, 0.0, 0.5, 1.0, 1.05, 1.12, 4.0]).view(1, 1, 1, -1).requires_grad_()
    logits = logits_of(x)
    assert (logits.diff(dim=-1) > 0).all()
    logit_laplace(logits, torch.zeros(()), squeezed(torch.full_like(x, 0.5))).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[..., :4] < 0).all() and (x.grad[..., 5:] > 0).all()


def test_the_scale_of_logit_laplace_learns_the_error(loss_sum: Callable[..., LossSum]) -> None:
    """At the minimum the scale of a Laplace distribution is the mean absolute error."""
    losses = loss_sum(logit_laplace=1.0)
    assert [name for name, _ in losses.named_parameters()] == ["log_scale"]
    error = torch.rand(4, 3, 8, 8) * torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    y = squeezed(torch.rand(4, 3, 8, 8))
    optimizer = torch.optim.Adam(losses.parameters(), lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        logit_laplace(torch.logit(y) + error, losses.log_scale, y).mean().backward()
        optimizer.step()
    torch.testing.assert_close(losses.log_scale.exp().flatten(), error.mean(dim=(0, 2, 3)), rtol=0.02, atol=0)


def test_gram_sees_textures_and_not_places() -> None:
    f = [torch.randn(2, 4, 5, 5), torch.randn(2, 6, 3, 3)]
    moved = [x.roll((1, 2), dims=(2, 3)) for x in f]
    torch.testing.assert_close(gram(f, moved), torch.zeros(2), rtol=0, atol=1e-5)
    assert (gram(f, [torch.randn_like(x) for x in f]) > 1e-3).all()
    torch.testing.assert_close(gram(f, [3 * x for x in f]), torch.zeros(2), rtol=0, atol=1e-5)


def test_each_term_on_its_own(loss_sum: Callable[..., LossSum], tokenizer: Tokenizer, resnet: str) -> None:
    """Switched on beside nothing else, a term is 0 for the picture itself, above it for others, and has a gradient."""
    net = {"net": "test_resnet", "net_weights": resnet}
    classifier = {"weight": 1.0, "net": "test_resnet", "weights": resnet, "size": 32}
    terms: dict[str, dict[str, Any]] = {"l1": {}, "l2": {}, "perceptual": net, "gram": net, "classifier": {}}
    x = images()
    for name, options in terms.items():
        weight = {"classifier": classifier} if name == "classifier" else {name: 2.0}
        losses = loss_sum(reconstruction=0.0, quantizer=0.0, **weight, **options)
        done = tokenizer.training_pass(x)
        total, parts, fake = losses(done, x, 0)
        assert parts.keys() == {"reconstruction", *done.quantized.parts, name} and fake is None
        factor = 1.0 if name == "classifier" else 2.0
        torch.testing.assert_close(total.detach(), factor * parts[name])
        assert parts[name] > 0
        (gradient,) = torch.autograd.grad(total, done.decoded.estimate)
        assert gradient.isfinite().all() and gradient.count_nonzero()
        perfect = done._replace(decoded=done.decoded._replace(estimate=tokenizer.canvas.target(x)))
        assert losses(perfect, x, 0).parts[name] < 1e-6


def test_gram_and_perceptual_share_features(
    loss_sum: Callable[..., LossSum], tokenizer: Tokenizer, resnet: str
) -> None:
    x = images()
    done = tokenizer.training_pass(x)
    net = {"net": "test_resnet", "net_weights": resnet}
    alone, other = loss_sum(perceptual=1.0, **net)(done, x, 0), loss_sum(gram=1.0, **net)(done, x, 0)
    both = loss_sum(perceptual=1.0, gram=1.0, **net)(done, x, 0)
    torch.testing.assert_close(both.parts["perceptual"], alone.parts["perceptual"])
    torch.testing.assert_close(both.parts["gram"], other.parts["gram"])


def test_an_image_counts_by_its_weight(loss_sum: Callable[..., LossSum], tokenizer: Tokenizer) -> None:
    """What a flow decoder says of an estimate made from much noise."""
    x = images(2)
    done = tokenizer.training_pass(x)
    half = done.decoded._replace(weight=torch.tensor([1.0, 0.0]))
    losses = loss_sum(l1=1.0, l2=1.0, logit_laplace=1.0, gan=GAN)
    first = TrainingPass(done.quantized, DecoderLoss(done.decoded.loss, done.decoded.estimate[:1], torch.ones(1)), None)
    weighed, alone = losses(done._replace(decoded=half), x, 0).parts, losses(first, x[:1], 0).parts
    for name in ("l1", "l2", "logit_laplace"):
        torch.testing.assert_close(2 * weighed[name], alone[name])
    # The patch critic has batch norm, so its logits depend on the batch; its doubt of the second counts for nothing.
    doubt = losses.critic.doubt(tokenizer.canvas.paint(done.decoded.estimate.detach()))
    torch.testing.assert_close(2 * weighed["gan"], doubt[0])


# Weights that move


def test_a_schedule() -> None:
    line = Schedule(start=1.0, end=0.5, from_step=10, to_step=20)
    assert [line.at(step) for step in (0, 10, 12, 20, 99)] == [1.0, 1.0, 0.9, 0.5, 0.5]
    jump = Schedule(start=0.0, end=2.0, from_step=7, to_step=7)
    assert [jump.at(step) for step in (6, 7)] == [0.0, 2.0]
    assert ever(jump) and not ever(Schedule(start=0.0, end=0.0, from_step=0, to_step=1))
    assert at_step(3.0, 5) == 3.0
    with pytest.raises(ValueError, match="from_step is from 0 to to_step"):
        Schedule(start=0.0, end=1.0, from_step=5, to_step=4)


def test_weights_follow_their_schedules(loss_sum: Callable[..., LossSum], tokenizer: Tokenizer) -> None:
    line = {"start": 0.0, "end": 1.0, "from_step": 2, "to_step": 4}
    losses = loss_sum(reconstruction=0.0, quantizer=0.0, l1=line)
    x = images()
    done = tokenizer.training_pass(x)
    whole = losses(done, x, 4)
    assert "l1" not in losses(done, x, 2).parts  # not computed where it weighs nothing
    torch.testing.assert_close(losses(done, x, 3).total, 0.5 * whole.parts["l1"])
    torch.testing.assert_close(whole.total, whole.parts["l1"])


def test_perturbation_is_annealed(tiny: Callable[..., dict[str, Any]]) -> None:
    table = tiny("flextok", "vq", "vit")
    part = {"kind": "perturb", "quantizer": {"kind": "vq", "dim": 2, "codebook_size": 16}, "neighbours": 8}
    table["quantizer"] = {"kind": "product", "part": part, "count": 2}
    model = Tokenizer.from_config(table)
    line = {"from_step": 0, "to_step": 4}
    config = build(
        AnnealConfig, {"rate": {"start": 1.0, "end": 0.0, **line}, "neighbours": {"start": 9, "end": 2, **line}}
    )
    LossSum(LossConfig(anneal=config), model, CPU)
    assert len(perturbs(model)) == 2
    for step, rate, neighbours in ((0, 1.0, 9), (1, 0.75, 7), (4, 0.0, 2), (9, 0.0, 2)):
        anneal(model, config, step)
        for module in perturbs(model):
            assert (module.rate, module.neighbours, module.share) == (rate, neighbours, 0.1)
            assert isinstance(module.neighbours, int)
    anneal(model, AnnealConfig(), 0)
    assert perturbs(model)[0].neighbours == 2  # nothing named, nothing set
    model.train().training_pass(images())


def test_annealing_what_is_not_there_is_refused(tokenizer: Tokenizer, tiny: Callable[..., dict[str, Any]]) -> None:
    line = Schedule(start=1.0, end=0.5, from_step=0, to_step=4)
    with pytest.raises(ConfigError, match="no quantizer is perturbed: wrap it"):
        LossSum(LossConfig(anneal=AnnealConfig(rate=line)), tokenizer, CPU)
    table = tiny("flextok", "vq", "vit")
    table["quantizer"] = {
        "kind": "perturb",
        "quantizer": {"kind": "vq", "dim": 4, "codebook_size": 16},
        "neighbours": 8,
    }
    with pytest.raises(ConfigError, match="goes to 99, but the codebook has 16"):
        far = AnnealConfig(neighbours=Schedule(start=99, end=1, from_step=0, to_step=1))
        LossSum(LossConfig(anneal=far), Tokenizer.from_config(table), CPU)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        AnnealConfig(share=Schedule(start=2.0, end=0.5, from_step=0, to_step=4))


# The adversarial loss in the sum


@pytest.mark.parametrize("adaptive", ["off", "layer", "picture"])
@pytest.mark.parametrize("decoder", ["vit", "flow"])
def test_the_critic_in_the_sum(adaptive: str, decoder: str, tiny: Callable[..., dict[str, Any]]) -> None:
    """From its steps on: first the critic gets pictures, then the tokenizer feels it; the critic gets no gradient."""
    tokenizer = Tokenizer.from_config(tiny("flextok", "fsq", decoder))
    with torch.no_grad():  # a flow's last layers start at zero, where no gradient is to compare
        tokenizer.decoder.to_patches.weight.add_(0.02 * torch.randn_like(tokenizer.decoder.to_patches.weight))
    gan = GanConfig(**GAN, start=3, ahead=1, adaptive=adaptive)
    losses = LossSum(LossConfig(l2=1.0, gan=gan), tokenizer, CPU)
    x = images(4)
    for step in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            total, parts, fake = losses(tokenizer.training_pass(x), x, step)
        total.backward()
        assert (fake is not None) == (step >= 2) and ("gan" in parts) == (step >= 3)
        assert ("gan_weight" in parts) == (step >= 3 and adaptive != "off")
        assert total.isfinite() and all(value.isfinite() and not value.requires_grad for value in parts.values())
    assert fake.shape == x.shape and not fake.requires_grad
    assert all(p.grad is None and p.requires_grad for p in losses.critic.parameters())
    assert not list(losses.parameters()) and not losses.state_dict()  # the critic is not the tokenizer's to train
    losses.critic(fake, x).total.backward()
    assert all(p.grad is not None for p in losses.critic.parameters())


def test_the_tokenizer_feels_the_critic(loss_sum: Callable[..., LossSum], tokenizer: Tokenizer) -> None:
    x = images()
    done = tokenizer.training_pass(x)
    losses = loss_sum(reconstruction=0.0, quantizer=0.0, gan=GAN)
    total, parts, _ = losses(done, x, 0)
    torch.testing.assert_close(total.detach(), 0.5 * parts["gan"])
    total.backward()
    assert any(p.grad is not None and p.grad.count_nonzero() for p in tokenizer.encoder.parameters())


# Whole


def test_only_what_is_switched_on_is_there(loss_sum: Callable[..., LossSum], tokenizer: Tokenizer) -> None:
    losses = loss_sum()
    assert not losses.borne and losses.distance is None and losses.critic is None and not losses.state_dict()
    x = images()
    done = tokenizer.training_pass(x)
    total, parts, fake = losses(done, x, 0)
    torch.testing.assert_close(total, done.decoded.loss + done.quantized.loss)
    assert parts.keys() == {"reconstruction", *done.quantized.parts} and fake is None


def test_frozen_nets_move_and_are_not_kept(loss_sum: Callable[..., LossSum], resnet: str) -> None:
    losses = loss_sum(perceptual=1.0, net="test_resnet", net_weights=resnet)
    assert not losses.state_dict() and not list(losses.parameters())
    weight = next(losses.distance.parameters())
    assert not weight.requires_grad and not losses.train().distance.training
    losses.to(torch.float64)
    assert next(losses.distance.parameters()).dtype == torch.float64


def test_a_frozen_encoder_is_left_alone(loss_sum: Callable[..., LossSum], tokenizer: Tokenizer) -> None:
    tokenizer.encoder.requires_grad_(False)
    losses = loss_sum(l2=1.0, gan={**GAN, "adaptive": "layer"})
    x = images()
    losses(tokenizer.training_pass(x), x, 0).total.backward()
    assert all(p.grad is None for p in tokenizer.encoder.parameters())
    assert any(p.grad is not None for p in tokenizer.decoder.parameters())


def test_a_config_is_the_same_after_a_file() -> None:
    line = {"start": 0.0, "end": 1.0, "from_step": 2, "to_step": 4}
    table = {
        "l1": 1,
        "l2": line,
        "gan": {"weight": 0.1, "critic": "features", "features": {"blocks": [1, 2]}, "betas": [0.5, 0.9]},
        "classifier": {"weight": line},
        "align": [{"teacher": "test_vit", "tail": 0.1}, {"teacher": "test_vit", "weight": line, "match": "mean"}],
        "anneal": {"rate": {**line, "end": 0.5}},
    }
    config = build(LossConfig, table)
    assert config.l2 == Schedule(**line) and config.align[1].weight == Schedule(**line)
    assert build(LossConfig, tomllib.loads(to_toml(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"l1": -1.0}, "l1 is a weight, 0 or more; got -1.0"),
        ({"l1": "much"}, "loss.l1 is a table of options, got 'much'"),
        ({"l3": 1.0}, "Did you mean 'l"),
        ({"gan": {"critic": "patches"}}, "loss.gan.critic is one of"),
        ({"align": [{"weight": 1.0}]}, "needs teacher"),
        ({"classifier": {"size": 0}}, "size is a number of pixels"),
    ],
)
def test_wrong_recipes_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(LossConfig, table, "loss")


def test_a_classifier_that_cannot_be_had(tmp_path: Any, resnet: str) -> None:
    with pytest.raises(
        ValueError, match="torchvision has no classifier 'convnext_smal'.*Did you mean 'convnext_small'"
    ):
        classifier_net("torchvision:convnext_smal")
    with pytest.raises(ValueError, match="is not torchvision's resnet18"):
        classifier_net("torchvision:resnet18", resnet)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "headless.safetensors")
    with pytest.raises(ValueError, match="has no classifier"):
        ClassifierDistance.of(
            ClassifierConfig(net="test_vit", weights=str(tmp_path / "headless.safetensors"), size=160)
        )


def test_torchvisions_own_classifier_from_a_file(tmp_path: Any) -> None:
    from torchvision import models

    net = models.shufflenet_v2_x0_5(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    found, mean, std = classifier_net("torchvision:shufflenet_v2_x0_5", str(tmp_path / "net.pth"))
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(found.eval()(x), net(x))
    assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)
