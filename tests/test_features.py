"""Feature nets: FID's Inception against torch-fidelity, timm models by name, and what pictures they take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.eval import features
from tokenizers_vis.eval.features import InceptionFeatures, TimmFeatures, feature_net, inception_in_cache
from tokenizers_vis.eval.inception import FIDInception, tf1_bilinear

MODEL = "mobilenetv3_small_050"
MOBILENET_V2 = "mobilenetv2_100_same_imagenet1001.fp16.safetensors"


def seeded(net: nn.Module) -> nn.Module:
    """Random weights that keep signals alive through all layers; those of the recording."""
    generator = torch.Generator().manual_seed(0)
    for key, value in sorted(net.state_dict().items()):
        if value.is_floating_point():
            random = torch.randn(value.shape, generator=generator)
            if value.ndim == 4:
                random *= (2 / value[0].numel()) ** 0.5
            elif key.endswith(("bn.weight", "running_var")):
                random = 1 + 0.1 * random.clamp(-3, 3)
            else:
                random *= 0.1
            value.copy_(random)
    return net.eval()


@pytest.fixture(scope="module")
def inception() -> FIDInception:
    return seeded(FIDInception())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small net with random weights, as a file."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(timm.create_model(MODEL).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def net(weights: str) -> TimmFeatures:
    return TimmFeatures(MODEL, weights, size=64)


# FID's Inception


@torch.no_grad()
def test_inception_gives_what_torch_fidelity_recorded(inception: FIDInception, recorded: Callable) -> None:
    tensors, _ = recorded("fid")
    found = inception(tf1_bilinear(tensors["pictures"].float(), 299))
    torch.testing.assert_close(found, tensors["inception"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inception.logits(found), tensors["inception_logits"], rtol=1e-4, atol=1e-4)
    # Far closer than the two pictures are to each other, so that equality says something.
    assert (found - tensors["inception"]).abs().max() < 0.01 * (found[0] - found[1]).abs().mean()


@torch.no_grad()
def test_inception_is_torch_fidelitys_at_any_size(inception: FIDInception, tmp_path: Path) -> None:
    reference = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(inception.state_dict(), tmp_path / "net.pth")
    path = str(tmp_path / "net.pth")
    theirs = reference.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=path)
    for size in ((17, 33), (320, 299)):
        pictures = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        (expected,) = theirs(pictures)
        torch.testing.assert_close(inception(tf1_bilinear(pictures.float(), 299)), expected, rtol=1e-4, atol=1e-4)


def test_tensorflows_bilinear_resize_keeps_pixel_zero_in_place() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert tf1_bilinear(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert tf1_bilinear(ramp.mT, 8)[0, 0, :, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert tf1_bilinear(ramp, 2)[0, 0, 1].tolist() == [0, 2]
    x = torch.rand(2, 3, 9, 5)
    assert torch.equal(tf1_bilinear(tf1_bilinear(x, 7), 7), tf1_bilinear(x, 7))


def test_fid_is_called_so_with_the_right_weights_alone(
    inception: FIDInception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "inception.pth"
    torch.save(inception.state_dict(), path)
    with pytest.raises(
        ValueError, match=r"inception\.pth has sha256 .*6726825d0af5.*Download https://.* give its path"
    ):
        feature_net("inception", path)
    with pytest.raises(ValueError, match="there is no weights file .*nothing.pth; Download"):
        feature_net("inception", tmp_path / "nothing.pth")
    # As if this file were the one: what it gives then, and how it is called.
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    net = feature_net("inception", path)
    assert isinstance(net, InceptionFeatures) and net.dim == 2048
    names = [net.metric(kind) for kind in ("fd", "kd", "fd_infinity", "precision")]
    assert names == ["fid", "kid", "fid_infinity", "precision_inception"]
    x = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        expected = inception(tf1_bilinear(x.float(), 299))
    torch.testing.assert_close(net(x), expected)
    assert net.logits(expected).shape == (1, 1008)


def test_inception_is_found_in_the_cache_or_its_absence_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("offline")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert inception_in_cache() is None
    with pytest.raises(ValueError, match="pt_inception-2015-12-05-6726825d.pth, which cannot be had.*give its path"):
        feature_net("inception")
    kept = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    kept.write_bytes(b"damaged")
    assert inception_in_cache() == kept
    with pytest.raises(ValueError, match="weights-inception.* has sha256"):
        feature_net("inception")


# timm


def test_a_timm_net_gives_its_pooled_features(net: TimmFeatures, weights: str) -> None:
    import timm

    full = timm.create_model(MODEL).eval()
    full.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    normalised = (x / 255 - torch.tensor(full.default_cfg["mean"])[:, None, None]) / torch.tensor(
        full.default_cfg["std"]
    )[:, None, None]
    with torch.no_grad():
        expected = full.forward_head(full.forward_features(normalised), pre_logits=True)
    found = net(x)
    assert found.shape == (2, net.dim) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert net.metric("fd") == f"fd_{MODEL}"
    # The resize is the one it says it is.
    large = torch.rand(1, 3, 90, 120).mul(255).round()
    assert net.resize == "bicubic, antialiased, to 64 x 64"
    small = F.interpolate(large, size=(64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    assert torch.equal(net.fit(large), small)


def test_features_do_not_depend_on_form_or_batch(net: TimmFeatures) -> None:
    x = torch.randint(0, 256, (3, 3, 80, 48), dtype=torch.uint8)
    expected = net(x)
    torch.testing.assert_close(net(x / 255), expected)
    torch.testing.assert_close(net(x / 255 + 0.4 / 255 * (x < 255)), expected)  # rounded, as a file would be
    torch.testing.assert_close(torch.cat([net(one[None]) for one in x]), expected, rtol=1e-4, atol=1e-5)
    mixed = net([x[0], torch.zeros(3, 20, 30), x[2]])
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x), expected)
    assert not net.train().net.training and not any(p.requires_grad for p in net.parameters())


def test_the_hash_is_of_the_weights_and_not_of_the_file(net: TimmFeatures, weights: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "net.safetensors")
    assert TimmFeatures(MODEL, tmp_path / "net.safetensors").sha256 == net.sha256
    state["conv_stem.weight"][0, 0, 0, 0] += 1e-3
    save_file(state, tmp_path / "net.safetensors")
    assert TimmFeatures(MODEL, tmp_path / "net.safetensors").sha256 != net.sha256


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 64, 64), "b 3 h w"),
        (torch.rand(2, 1, 64, 64), "b 3 h w"),
        (torch.rand(0, 3, 64, 64), "empty"),
        ([], "empty"),
        (torch.rand(1, 3, 8, 8) * 2 - 1, "run from -"),
        (torch.full((1, 3, 8, 8), float("nan")), "hold NaN"),
        ([torch.rand(3, 8, 8), torch.full((3, 8, 8), float("inf"))], "run from inf to inf"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "torch.int64"),
    ],
)
def test_wrong_pictures_are_refused(net: TimmFeatures, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net(images)


def test_nets_and_weights_that_cannot_be_had_are_told(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"huggingface.co/timm/{MODEL}.*give a local"):
        feature_net(MODEL)
    with pytest.raises(ValueError, match=r"Did you mean 'mobilenetv2'\? It is inception"):
        feature_net("mobilenet2")
    with pytest.raises(ValueError, match="mobilenetv2 needs its file of weights"):
        feature_net("mobilenetv2")
    with pytest.raises(ValueError, match="there is no weights file"):
        feature_net("mobilenetv2", tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="is not a file of mobilenetv3_small_075.*another shape"):
        feature_net("mobilenetv3_small_075", weights)


def test_a_net_from_tensorflow_sees_pictures_as_there(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("mobilenetv2_035", num_classes=1001).state_dict(), tmp_path / "net.pth")
    net = TimmFeatures("mobilenetv2_035", tmp_path / "net.pth", size=32)
    assert type(net.net.conv_stem).__name__ == "Conv2dSame"
    assert net.mean.flatten().tolist() == net.std.flatten().tolist() == [127.5] * 3


def test_the_shared_mobilenet_knows_a_cat(shared: Path, photos: list[Path]) -> None:
    """Its features, through the classifier of its file, name what is on a photograph: the pictures reach it right."""
    from safetensors.torch import load_file

    from tokenizers_vis.images import load_image

    file = shared / "weights" / MOBILENET_V2
    if not file.is_file():
        pytest.skip(f"needs {file}")
    net = feature_net("mobilenetv2", file)
    assert (net.name, net.dim, net.metric("kd")) == ("mobilenetv2", 1280, "kd_mobilenetv2")
    head = load_file(file)
    cat = load_image(next(path for path in photos if path.stem == "cat"))
    scores = net(cat[None]) @ head["classifier.weight"].float().T + head["classifier.bias"].float()
    cats = np.arange(281, 286) + 1  # of ImageNet's classes; class 0 is background here
    assert int(scores.argmax()) in cats
