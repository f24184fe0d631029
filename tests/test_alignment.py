"""Alignment: as its authors compute it, on every kind of feature, and it makes features alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError
from tokenizers_vis.decoders.dual import DualDecoder, FeatureHead
from tokenizers_vis.quantizers.base import Quantized
from tokenizers_vis.tokenizer import Tokenizer, TrainingPass
from tokenizers_vis.train.adversary import balance, nearest_weight
from tokenizers_vis.train.alignment import AlignConfig, Alignment
from tokenizers_vis.train.frozen import Features, Teacher
from tokenizers_vis.train.likeness import contrastive, difference, masked_mean, relations, resized_grid, tapered
from tokenizers_vis.train.losses import LossConfig, LossSum

Official = Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return str(path)


@pytest.fixture
def tokenizer(tiny: Callable[..., dict[str, Any]]) -> Tokenizer:
    """16 px, 6 tokens of 4 numbers, patches on a 2 x 2 grid; nested, lengths drawn for each image."""
    table = tiny("flextok", "vq", "vit")
    table["encoder"]["lengths"] = {"kind": "uniform"}
    return Tokenizer.from_config(table)


def config(vit: str, **options: Any) -> AlignConfig:
    return AlignConfig(**{"teacher": "test_vit", "weights": vit, "size": 32, "hidden": 16} | options)


def done_with(codes: Tensor, lengths: list[int] | None = None) -> TrainingPass:
    """A pass in which nothing matters but the codes and lengths."""
    quantized = Quantized(codes, codes.new_zeros(*codes.shape[:2], 1).long(), codes.new_zeros(()), {})
    return TrainingPass(quantized, None, None if lengths is None else torch.tensor(lengths))


# As their authors


def test_margin_and_adaptive_weight_are_vavaes(official: Official) -> None:
    _, tensors, options = official("vavae_alignment")
    parts = {"encoder": nn.Conv2d(3, 8, 4, 4), "decoder": nn.ConvTranspose2d(8, 3, 4, 4)}
    parts["head"] = nn.Conv2d(8, 10, 1, bias=False)
    for name, part in parts.items():
        part.load_state_dict({key: tensors[f"{name}.{key}"].float() for key in part.state_dict()})
    images, teacher = tensors["images"].float(), tensors["teacher"].float()
    z = parts["encoder"](images)
    mine, wanted = (x.flatten(2).mT for x in (parts["head"](z), teacher))
    loss = difference("margin", mine, wanted, options["cos_margin"]).mean()
    loss = loss + relations(mine, wanted, options["distmat_margin"]).mean()
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-4, atol=1e-6)
    reconstruction = (parts["decoder"](z) - images).abs().sum() / len(images)
    assert nearest_weight(z) is parts["encoder"].weight
    weight = options["vf_weight"] * balance(reconstruction, loss, nearest_weight(z), most=1e8)
    torch.testing.assert_close(weight, tensors["weight"], rtol=1e-3, atol=0)


def test_the_contrastive_loss_is_fqgans(recorded: Callable[[str], Any]) -> None:
    tensors, _ = recorded("fqgan_teacher")
    found = contrastive(tensors["head"][:, 0], tensors["teacher"]).mean()
    torch.testing.assert_close(found, tensors["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("match", "theirs"), [("tokens", "repeat"), ("mean", "global")])
def test_codes_are_aligned_as_softvqs(
    recorded: Callable[[str], Any], match: str, theirs: str, tiny: Callable[..., dict[str, Any]]
) -> None:
    """Its loss is minus the cosine, ours 1 minus it."""
    tensors, _ = recorded("softvq_alignment")
    table = tiny("flextok", "vq", "vit")
    for part in ("encoder", "decoder"):
        table[part] |= {"dim": 6, "max_tokens": 4}
    table["quantizer"]["dim"] = 6
    alignment = Alignment(AlignConfig(teacher="any", match=match, head="linear"), Tokenizer.from_config(table), 9)
    alignment.head.weight.data.copy_(tensors["head"])
    places = tensors["teacher"]
    target = Features(places.mT.unflatten(2, (4, 4)), places.mean(dim=1))
    loss, _ = alignment(done_with(tensors["codes"]), target)
    torch.testing.assert_close(loss - 1, tensors[theirs], rtol=1e-5, atol=1e-5)


# The parts


def test_a_teacher_gives_what_timm_gives(vit: str) -> None:
    teacher = Teacher(model="test_vit", weights=vit)
    net = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(teacher.net.state_dict())
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        tokens, pooled = net.forward_features(images * 2 - 1), net(images * 2 - 1)
    found = teacher(images)
    torch.testing.assert_close(found.patches.flatten(2).mT, tokens[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-4)
    assert found.patches.shape == (2, teacher.dim, 10, 10) and found.pooled.shape == (2, teacher.pooled_dim)
    assert not teacher.train().net.training


def test_a_convolutional_teacher(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    teacher = Teacher(model="test_resnet", weights=str(path), size=64)
    found = teacher(torch.rand(2, 3, 16, 16))
    assert found.patches.shape == (2, teacher.dim, 2, 2) and found.pooled.shape == (2, teacher.pooled_dim)
    torch.testing.assert_close(found.patches.mean(dim=(2, 3)), found.pooled)


def test_the_shared_teacher(shared: Any) -> None:
    """A net that came from TensorFlow: pictures in [-1, 1]."""
    file = shared / "weights" / "mobilenetv2_100_same_imagenet1001.fp16.safetensors"
    teacher = Teacher(model="mobilenetv2_100", weights=str(file), size=64)
    assert teacher.mean.flatten().tolist() == [0.5] * 3
    assert teacher(torch.rand(1, 3, 32, 32)).patches.shape == (1, 1280, 2, 2)


def test_differences_are_zero_for_equals_and_blind_to_what_they_should_be() -> None:
    x = torch.randn(3, 5, 4)
    for kind in ("cosine", "mse"):
        assert difference(kind, x, x).abs().max() < 1e-6
    assert difference("cosine", 7 * x, x).abs().max() < 1e-6
    turned = x @ torch.linalg.qr(torch.randn(4, 4))[0]
    assert relations(x, turned, 0.0).abs().max() < 1e-5  # a rotation keeps all angles between places
    assert difference("margin", x, -x, 0.5).allclose(torch.tensor(1.5))
    near = x + 0.1 * torch.randn_like(x)
    assert difference("margin", near, x, 1.0).count_nonzero() == 0


def test_the_taper_falls_from_one_to_the_tail() -> None:
    weights = tapered(torch.arange(5), 5, 0.2)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))
    assert tapered(torch.zeros(1), 1, 0.2) == 1


def test_masked_mean_and_resized_grid() -> None:
    x = torch.randn(2, 4, 3)
    found = masked_mean(x, torch.tensor([1, 3]))
    torch.testing.assert_close(found[:, 0], torch.stack([x[0, 0], x[1, :3].mean(dim=0)]))
    flat = torch.ones(1, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    torch.testing.assert_close(resized_grid(flat, (3, 5)), torch.tensor([1.0, 2.0, 3.0]).expand(1, 15, 3))


def test_prefixes_count_more_than_the_tail(vit: str, tokenizer: Tokenizer) -> None:
    """The gradient of each token falls with its place, and tokens that are not kept have none."""
    torch.manual_seed(0)
    alignment = Alignment(config(vit, match="tokens", tail=0.1, loss="mse", head="linear"), tokenizer, 8)
    target = Features(torch.ones(1, 8, 6, 6), torch.ones(1, 8))
    codes = torch.randn(1, 1, 4).repeat(1, 6, 1).requires_grad_()  # equal tokens: only their places differ
    alignment(done_with(codes), target)[0].backward()
    sizes = codes.grad.norm(dim=-1)[0]
    torch.testing.assert_close(sizes / sizes[0], tapered(torch.arange(6), 6, 0.1))
    codes.grad = None
    alignment(done_with(codes, [2]), target)[0].backward()
    assert codes.grad[0, :2].count_nonzero() == 8 and codes.grad[0, 2:].count_nonzero() == 0
    codes.grad = None
    alignment(done_with(codes), Features(torch.ones(1, 8, 2, 2), torch.ones(1, 8)))[0].backward()
    assert codes.grad.count_nonzero() == 24  # also where the teacher has fewer places than there are tokens
    # A grid counts by its image's own prefix.
    whole = Alignment(config(vit, match="mean", tail=0.1, loss="mse", head="linear"), tokenizer, 8)
    equal = codes.detach()
    long, short = (whole(done_with(equal, [n]), target)[0] for n in (6, 1))
    torch.testing.assert_close(long / short, torch.tensor(0.1))


# In a tokenizer


AT = {
    "codes, tokens": {"at": "codes", "match": "tokens"},
    "codes, mean": {"at": "codes", "match": "mean", "loss": "mse"},
    "encoder, contrastive": {"at": "encoder", "match": "mean", "loss": "contrastive"},
    "block, cosine": {"at": "decoder.transformer.blocks.0"},
    "block, margin": {"at": "decoder.transformer.blocks.0", "loss": "margin", "head": "linear", "adaptive": True},
    "patches": {"at": "encoder.read_patches", "loss": "margin", "dim": 32},
}
CASES = [("vit", options) for options in AT.values()] + [("flow", AT["codes, tokens"]), ("flow", AT["block, margin"])]


@pytest.mark.parametrize(("decoder", "options"), CASES, ids=[*AT, "flow, codes", "flow, block"])
def test_training_on_it_makes_features_alike(
    decoder: str, options: dict[str, Any], vit: str, tiny: Callable[..., dict[str, Any]]
) -> None:
    """The term falls on one batch under autocast, its gradient reaches the tokenizer and the head, none the teacher."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_config(tiny("flextok", "vq", decoder))
    losses = LossSum(LossConfig(align=(config(vit, **options),)), tokenizer, CPU)
    # A learner of the features alone: the other losses keep a small weight.
    optimizer = torch.optim.Adam([*tokenizer.parameters(), *losses.parameters()], lr=5e-3)
    images, found = torch.rand(6, 3, 16, 16), []
    for step in range(25):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total, parts, _ = losses(tokenizer.training_pass(images), images, step)
        total.backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in losses.parameters())
            grown = [p.grad for p in tokenizer.encoder.parameters() if p.grad is not None]
            assert any(gradient.count_nonzero() for gradient in grown)
            assert all(p.grad is None for net in losses.borne.values() for p in net.parameters())
        optimizer.step()
        found.append(parts["align"].item())
    assert sum(found[-3:]) < (0.97 if "contrastive" in options.values() else 0.9) * sum(found[:3])


def test_the_heads_of_a_dual_decoder(vit: str) -> None:
    """FQGAN's and TokenFlow's: what is foretold from the codes is compared with two teachers' features."""
    part = {"ch": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8}
    head = {"grid": 8, "width": 16, "heads": 2, "depth": 1}
    table = {
        "name": "dual",
        "canvas": {"kind": "pixels", "size": 16},
        "encoder": {"kind": "grid", "dim": 8, "size": 16, **part},
        "quantizer": {"kind": "vq", "dim": 8, "codebook_size": 16},
        "decoder": {
            "kind": "dual",
            "dim": 8,
            "size": 16,
            "pixels": {"dim": 8, "size": 16, **part},
            "heads": [{"dim": 4, "out": 64, "style": "tokenflow", **head}, {"start": 4, "dim": 4, "out": 16, **head}],
        },
    }
    tokenizer = Tokenizer.from_config(table)
    assert isinstance(tokenizer.decoder, DualDecoder) and isinstance(tokenizer.decoder.heads[0], FeatureHead)
    align = (
        config(vit, at="heads.0", head="none"),
        config(vit, at="heads.1", match="first", loss="contrastive", head="linear"),
    )
    losses = LossSum(LossConfig(align=align), tokenizer, CPU)
    assert len(losses.borne) == 1  # one teacher looks once for both
    images = torch.rand(3, 3, 16, 16)
    total, parts, _ = losses(tokenizer.training_pass(images), images, 0)
    total.backward()
    assert {"align_0", "align_1"} <= parts.keys()
    assert all(p.grad is not None for p in tokenizer.decoder.heads.parameters())


def test_a_hook_leaves_copies_and_validation_alone(vit: str, tokenizer: Tokenizer) -> None:
    losses = LossSum(LossConfig(align=(config(vit, at="decoder.transformer.blocks.0"),)), tokenizer, CPU)
    alignment = losses.alignments[0]
    average = copy.deepcopy(tokenizer).eval()
    images = torch.rand(2, 3, 16, 16)
    done = tokenizer.training_pass(images)
    held = alignment._source.seen[0]
    average.reconstruct(images)
    assert alignment._source.seen[0] is held
    losses(done, images, 0)
    assert not alignment._source.seen  # nothing is held until the next pass


# Dynamo asks every input for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_block_is_watched_too(vit: str, tiny: Callable[..., dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_config(tiny("flextok", "fsq", "vit"))  # fsq does not learn between the passes
    losses = LossSum(LossConfig(align=(config(vit, at="decoder.transformer.blocks.0"),)), tokenizer, CPU)
    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    wanted = losses(tokenizer.training_pass(images), images, 0).parts["align"]
    tokenizer.decoder.transformer.blocks[0].compile(backend="eager")
    torch.manual_seed(0)
    found = losses(tokenizer.training_pass(images), images, 0).parts["align"]
    torch.testing.assert_close(found, wanted)


def test_teachers_are_not_in_the_state(vit: str, tokenizer: Tokenizer) -> None:
    losses = LossSum(LossConfig(align=(config(vit, match="tokens"),)), tokenizer, CPU)
    assert {key.split(".")[2] for key in losses.state_dict()} == {"head"}
    assert {name.split(".")[2] for name, _ in losses.named_parameters()} == {"head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "decoder.transformer.block"}, "Did you mean 'decoder.transformer.blocks'"),
        ({"at": "heads.0"}, "the decoder has 0 heads"),
        ({"at": "decoder.norm", "head": "none"}, "are 32 wide, those of test_vit 64"),
        ({"teacher": "test_vitt"}, "Did you mean 'test_vit"),
        ({"weights": "nowhere.safetensors"}, "there is no weights file"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str, vit: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        LossSum(LossConfig(align=(config(vit, **options),)), tokenizer, CPU)


def test_codes_that_are_no_grid_are_refused(vit: str, tokenizer: Tokenizer) -> None:
    losses = LossSum(LossConfig(align=(config(vit, at="codes"),)), tokenizer, CPU)
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ConfigError, match="set match to 'tokens' or 'mean'"):
        losses(tokenizer.training_pass(images)._replace(lengths=None), images, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "margin", "match": "tokens"}, "set match to 'grid'"),
        ({"loss": "contrastive"}, "set match to 'mean' or 'first'"),
        ({"tail": 2.0}, "0 to 1; got 2.0"),
        ({"weight": -1.0}, "0 or more; got -1.0"),
        ({"hidden": 0}, "hidden is 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(teacher="test_vit", **options)
