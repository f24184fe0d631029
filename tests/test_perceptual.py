"""Perceptual distances on small nets of random weights: LPIPS, DISTS, DreamSim, the features of any timm model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_vis.eval.dists import DISTS
from tokenizers_vis.eval.lpips import LPIPS
from tokenizers_vis.eval.perceptual import FeatureDistance, Perceptual, perceptual
from tokenizers_vis.eval.thumbnail import thumbnail

MODEL = "mobilenetv3_small_050"
MOBILENET_V2 = "mobilenetv2_100_same_imagenet1001.fp16.safetensors"


def random_weights(path: Path, model: str = MODEL, **options: object) -> str:
    import timm

    torch.save(timm.create_model(model, **options).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small net with random weights, as a file."""
    torch.manual_seed(0)
    return random_weights(tmp_path_factory.mktemp("weights") / "net.pth")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """``backbone("vgg16")``: the convolutions of a torchvision model with random weights, under its names."""
    import torchvision

    folder = tmp_path_factory.mktemp("weights")

    def made(model: str) -> str:
        path = folder / f"{model}.pth"
        if not path.is_file():
            torch.manual_seed(0)
            with torch.device("meta"):  # the classifier, most of the parameters, is never allocated
                features = torchvision.models.get_model(model, weights=None).features
            features.to_empty(device="cpu")
            for module in features.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, path)
        return str(path)

    return made


@pytest.fixture(params=["features", "lpips", "dists"])
def distance(request: pytest.FixtureRequest, weights: str, backbone: Callable[[str], str]) -> Perceptual:
    if request.param == "lpips":
        return perceptual("lpips-alex", backbone("alexnet"))
    if request.param == "dists":
        return perceptual("dists", backbone("vgg16"))
    return perceptual(MODEL, weights)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    x = torch.rand(3, 3, 64, 64)
    return x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1)


def test_a_distance_is_zero_for_equal_pictures_symmetric_and_of_each_picture_alone(
    distance: Perceptual, pair: tuple[Tensor, Tensor]
) -> None:
    x, y = pair
    d = distance(x, y)
    assert d.shape == (3,)
    assert d.dtype == torch.float32
    assert (d > 0).all()
    assert torch.equal(distance(x, x), torch.zeros(3))
    torch.testing.assert_close(distance(y, x), d)
    torch.testing.assert_close(torch.cat([distance(a[None], b[None]) for a, b in zip(x, y, strict=True)]), d)


def test_the_gradient_reaches_the_picture_and_not_the_net(distance: Perceptual, pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    x.requires_grad_()
    distance(x, y).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in distance.parameters())
    step = (x - 1e-3 * x.grad / x.grad.norm()).detach()
    assert distance(step, y).sum() < distance(x, y).sum()


def test_the_gradient_of_blank_pictures_is_finite(distance: Perceptual) -> None:
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    distance(x, torch.ones(1, 3, 64, 64)).sum().backward()
    assert x.grad.isfinite().all()


def test_training_mode_does_not_move_the_net(distance: Perceptual, pair: tuple[Tensor, Tensor]) -> None:
    before = {key: value.clone() for key, value in distance.state_dict().items()}
    d = distance(*pair)
    torch.nn.Sequential(distance).train()
    assert not any(module.training for module in distance.modules())
    assert torch.equal(distance(*pair), d)
    for key, value in distance.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_under_autocast_the_distance_is_float32_and_close(distance: Perceptual, pair: tuple[Tensor, Tensor]) -> None:
    exact = distance(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        d = distance(*pair)
    assert d.dtype == torch.float32
    assert not torch.equal(d, exact)
    torch.testing.assert_close(d, exact, rtol=0.2, atol=1e-4)


def test_wrong_pictures_are_refused(distance: Perceptual) -> None:
    with pytest.raises(ValueError, match="b 3 h w"):
        distance(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 32))
    with pytest.raises(ValueError, match="b 3 h w"):
        distance(torch.rand(3, 64, 64), torch.rand(3, 64, 64))


def test_the_feature_distance_is_the_mean_over_stages(weights: str, pair: tuple[Tensor, Tensor]) -> None:
    whole = FeatureDistance(model=MODEL, weights=weights)
    n_stages = len(whole.net(pair[0]))
    stages = [FeatureDistance(model=MODEL, weights=weights, layers=(i,))(*pair) for i in range(n_stages)]
    torch.testing.assert_close(torch.stack(stages).mean(dim=0), whole(*pair))
    # By hand, for one stage: 2 - 2 cos between the features, averaged over positions.
    x, y = ((p - whole.mean) / whole.std for p in pair)
    cosine = torch.cosine_similarity(whole.net(x)[1], whole.net(y)[1], dim=1)
    torch.testing.assert_close((2 - 2 * cosine).mean(dim=(1, 2)), stages[1], rtol=1e-3, atol=1e-5)


def test_size_resizes_the_short_side(weights: str) -> None:
    sized = FeatureDistance(model=MODEL, weights=weights, size=48)
    assert sized._prepare(torch.rand(1, 3, 96, 128)).shape == (1, 3, 48, 64)
    assert sized._prepare(torch.rand(1, 3, 32, 24)).shape == (1, 3, 64, 48)


def test_wrapped_nets_find_their_weights(tmp_path: Path, pair: tuple[Tensor, Tensor]) -> None:
    """timm renames ``stages.0`` to ``stages_0`` in a ConvNeXt that gives features."""
    import timm

    path = random_weights(tmp_path / "net.pth", "convnext_atto", num_classes=7)
    torch.manual_seed(1)
    full = timm.create_model("convnext_atto", num_classes=7).eval()
    full.load_state_dict(torch.load(path, weights_only=True))
    distance = FeatureDistance(model="convnext_atto", weights=path, options={"num_classes": 7}, layers=(0, 1))
    x = distance._prepare(pair[0])
    expected = full.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for ours, theirs in zip(distance.features(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_classifier_of_1001_classes_means_tensorflow_conventions(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("mobilenetv2_035", num_classes=1001).half().state_dict()
    save_file(state, tmp_path / "net.safetensors")
    distance = perceptual("mobilenetv2_035", str(tmp_path / "net.safetensors"))
    assert distance.mean.flatten().tolist() == distance.std.flatten().tolist() == [0.5, 0.5, 0.5]
    assert type(distance.net.conv_stem).__name__ == "Conv2dSame"
    assert {p.dtype for p in distance.parameters()} == {torch.float32}
    assert distance.name == "mobilenetv2_035"


def test_weights_of_another_net_are_refused(tmp_path: Path, weights: str) -> None:
    with pytest.raises(ValueError, match="is not a file of mobilenetv3_small_075: it lacks"):
        FeatureDistance(model="mobilenetv3_small_075", weights=weights)
    deeper = random_weights(tmp_path / "deeper.pth", "test_convnext2")
    state = torch.load(deeper, weights_only=True)
    torch.save({**state, "stages.3.blocks.9.weight": torch.zeros(1)}, deeper)
    with pytest.raises(ValueError, match=r"not of it: stages\.3\.blocks\.9"):
        FeatureDistance(model="test_convnext2", weights=deeper)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match="is not a file of weights"):
            perceptual(MODEL, str(tmp_path / name))
    with pytest.raises(ValueError, match="is not torchvision's vgg16"):
        perceptual("lpips-vgg", weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mobilenetv3_smal_050"}, "Did you mean 'mobilenetv3_small_050'"),
        ({"weights": "random"}, "there is no weights file random"),
        ({"layers": (0, 9)}, r"cannot build the stages \(0, 9\)"),
        ({"layers": (1, 0)}, "ascending"),
        ({"options": {"colour": 1}}, "colour"),
        ({"std": (0.0, 1.0, 1.0)}, "std above 0"),
        ({"size": -1}, "short side"),
    ],
)
def test_a_wrong_option_is_refused(weights: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureDistance(**{"model": MODEL, "weights": weights, **options})


def test_missing_pretrained_weights_say_where_they_would_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("offline")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=f"huggingface.co/timm/{MODEL}.*give a local"):
        perceptual(MODEL)
    for name in ("lpips-vgg", "dists"):
        with pytest.raises(ValueError, match=r"vgg16-397923af\.pth.*give its path"):
            perceptual(name)
    with pytest.raises(ValueError, match="LPIPS has the nets vgg, alex, squeeze"):
        perceptual("lpips-resnet")


@pytest.mark.parametrize(("net", "model"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_lpips_is_that_of_torchmetrics(
    net: str, model: str, backbone: Callable[[str], str], pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as theirs

    ours = LPIPS(net=net, weights=backbone(model))
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda name, pretrained=False: features(model, backbone))
    reference = theirs._LPIPS(net=net)
    expected = reference(*pair, normalize=True).flatten()
    torch.testing.assert_close(ours(*pair), expected, rtol=1e-4, atol=1e-6)


def test_dists_is_that_of_torchmetrics(
    backbone: Callable[[str], str], pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import dists as theirs

    built = SimpleNamespace(features=features("vgg16", backbone))
    monkeypatch.setattr(theirs, "vgg16", lambda weights: built)
    expected = theirs.DISTSNetwork()(*pair)
    torch.testing.assert_close(DISTS(weights=backbone("vgg16"))(*pair), expected, rtol=1e-4, atol=1e-6)


def features(model: str, backbone: Callable[[str], str]) -> torch.nn.Sequential:
    """torchvision's, with the weights of the file."""
    import torchvision

    with torch.device("meta"):
        found = torchvision.models.get_model(model, weights=None).features
    state = torch.load(backbone(model), weights_only=True)
    found.load_state_dict({key.removeprefix("features."): value for key, value in state.items()}, assign=True)
    return found


def test_only_torchvisions_own_file_has_the_plain_name(
    backbone: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published name holds the first digits of the file's sha256."""
    from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

    names = [entry.IMAGENET1K_V1.url.rpartition("/")[2] for entry in (AlexNet_Weights, VGG16_Weights)]
    assert names == ["alexnet-owt-7be5be79.pth", "vgg16-397923af.pth"]
    assert SqueezeNet1_1_Weights.IMAGENET1K_V1.url.endswith("/squeezenet1_1-b8a52dc0.pth")
    path = Path(backbone("alexnet"))
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    other = perceptual("lpips-alex", str(path))
    assert other.name == f"lpips-alex-{digits}"
    monkeypatch.setattr(AlexNet_Weights.IMAGENET1K_V1.value, "url", f"https://example.com/alexnet-owt-{digits}.pth")
    own = perceptual("lpips-alex", str(path))
    assert own.name == "lpips-alex" and own.sha256 == other.sha256


def test_the_hash_of_a_distance_is_that_of_its_values(backbone: Callable[[str], str], tmp_path: Path) -> None:
    state = torch.load(backbone("alexnet"), weights_only=True)
    save_file(state, tmp_path / "same.safetensors")
    state["features.0.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    first, same, other = (
        perceptual("lpips-alex", path).sha256
        for path in (backbone("alexnet"), str(tmp_path / "same.safetensors"), str(tmp_path / "other.pth"))
    )
    assert first == same != other


def test_pictures_too_small_for_a_net_are_refused(backbone: Callable[[str], str]) -> None:
    for name, model, least in (("alex", "alexnet", 31), ("squeeze", "squeezenet1_1", 17), ("vgg", "vgg16", 16)):
        distance = perceptual(f"lpips-{name}", backbone(model))
        assert distance(*torch.rand(2, 1, 3, least, least)).isfinite().all()
        with pytest.raises(ValueError, match=f"of {least} pixels and more"):
            distance(*torch.rand(2, 1, 3, least, least - 1))
        with pytest.raises(ValueError, match=f"of {least} pixels and more"):  # losses make the features by themselves
            distance.maps(torch.rand(1, 3, least, least - 1))


# DreamSim


def test_dreamsim_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with pytest.raises(ValueError, match="there is no dreamsim-dino. Did you mean 'dino_vitb16'"):
        perceptual("dreamsim-dino")
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ValueError, match="pip install dreamsim"):
        perceptual("dreamsim")
    monkeypatch.setitem(sys.modules, "dreamsim", SimpleNamespace(dreamsim=None))
    with pytest.raises(ValueError, match=r"holds no weights of DreamSim; unpack dreamsim_ensemble_checkpoint\.zip"):
        perceptual("dreamsim", str(tmp_path))


@pytest.mark.slow
def test_dreamsim_is_that_of_its_authors(tmp_path: Path, photos: list[Path]) -> None:
    """On random weights, as their package lays them out; of a ViT-B, 350 MB."""
    dreamsim = pytest.importorskip("dreamsim", reason="compares with the package of DreamSim's authors")
    from dreamsim.config import dreamsim_args
    from dreamsim.feature_extraction.vision_transformer import vit_base
    from dreamsim.model import PerceptualModel
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    net = vit_base(patch_size=32)
    net.pos_drop = torch.nn.LayerNorm(768)
    state = {**net.state_dict(), "proj": 0.03 * torch.randn(768, 512)}
    torch.save({"state_dict": state}, tmp_path / "clip_vitb32_pretrain.pth.tar")
    shape = dreamsim_args["model_config"]["clip_vitb32"]
    model = PerceptualModel(**shape, device="cpu", load_dir=str(tmp_path), normalize_embeds=True)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(tmp_path / "clip_vitb32_single_lora")
    reference, prepare = dreamsim.dreamsim(device="cpu", cache_dir=str(tmp_path), dreamsim_type="clip_vitb32")
    ours = perceptual("dreamsim-clip_vitb32", str(tmp_path))
    opened = [Image.open(path).convert("RGB") for path in photos[:2]]
    x, y = (to_tensor(picture)[None] for picture in opened)
    torch.testing.assert_close(ours(x, y), reference(*map(prepare, opened)), rtol=1e-2, atol=1e-3)  # they resize 8 bits
    assert ours(x, x).item() == 0 and ours.name == "dreamsim-clip_vitb32"


def test_the_shared_mobilenet_ranks_damage(shared: Path, photos: list[Path]) -> None:
    import numpy as np
    from PIL import Image

    file = shared / "weights" / MOBILENET_V2
    if not file.is_file() or not photos:
        pytest.skip(f"needs {file} and the package's photographs")
    arrays = [np.array(Image.open(p).convert("RGB").resize((128, 128))) for p in photos[:4]]
    x = torch.stack([torch.from_numpy(a).permute(2, 0, 1) / 255 for a in arrays])
    distance = perceptual("mobilenetv2_100", str(file))
    by_bytes = [distance(x, thumbnail(x, n).reconstruction) for n in (48, 768, 12288)]
    assert (by_bytes[0] > by_bytes[1]).all()
    assert (by_bytes[1] > by_bytes[2]).all()
    assert (distance(x, x.roll(1, dims=0)) > by_bytes[1]).all()


def test_several_nets_are_their_mean_and_share_the_work_of_a_loss(
    weights: str, tmp_path: Path, pair: tuple[Tensor, Tensor]
) -> None:
    other = random_weights(tmp_path / "other.pth")
    both = perceptual(f"{MODEL}+{MODEL}", f"{weights},{other}")
    far = torch.stack([perceptual(MODEL, file)(*pair) for file in (weights, other)])
    assert both.name == f"{MODEL}+{MODEL}"
    torch.testing.assert_close(both(*pair), far.mean(dim=0))
    # As a loss, picture 0 and 2 are seen by the first net, picture 1 by the second.
    shared = both.compare(both.maps(pair[0]), both.maps(pair[1]))
    torch.testing.assert_close(shared, torch.stack([far[0, 0], far[1, 1], far[0, 2]]))
    alone = both.compare(both.maps(pair[0][:1]), both.maps(pair[1][:1]))
    torch.testing.assert_close(alone, far[0, :1])
    with pytest.raises(ValueError, match="is 2 nets, their weights are as many files with commas between"):
        perceptual(f"{MODEL}+{MODEL}", weights)
