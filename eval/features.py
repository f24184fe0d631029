"""Nets whose features are compared: one vector for each picture. Every number that uses one is named after it.

``feature_net("inception", weights)`` is the net of FID, from the one file of weights that makes it that;
``feature_net("dinov2")``, ``feature_net("mobilenetv2", weights)`` or any timm model by its name are other spaces.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.config import did_you_mean
from tokenizers_vis.eval.inception import DIM, SIZE, FIDInception, tf1_bilinear
from tokenizers_vis.eval.perceptual import not_at_hand, read_weights, tensors_sha256
from tokenizers_vis.weights import CheckpointError, load_strictly

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
_HOW_TO_GET = f"Download {INCEPTION_URL} (96 MB) and give its path as weights"
# The same bytes, as pytorch-fid and as torch-fidelity keep them.
_INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")

# What a short name stands for: the timm model, its options, the size of its pictures. DINOv2 as in
# https://arxiv.org/abs/2306.04675: ViT-L/14, 224 px, the class token.
_SHORT = {
    "mobilenetv2": ("mobilenetv2_100", {}, 224),
    "dinov2": ("vit_large_patch14_dinov2", {"dynamic_img_size": True}, 224),
}
_TOLERANCE = 1e-3  # how far outside [0, 1] floats may lie: resampling and half precision overshoot by this much


class FeatureNet(nn.Module, ABC):
    """Abstract. ``net(images)`` gives b d, float32, on the net's device; without gradients, always in eval mode.

    name: of the space. sha256: of the weights. resize: how pictures come to the net's size, in words. dim: d.
    """

    name: str
    sha256: str
    resize: str
    dim: int

    @abstractmethod
    def fit(self, x: Tensor) -> Tensor:
        """x: b 3 h w, whole numbers from 0 to 255, float32 -> b 3 s s of the net's size, not rounded."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """x: b 3 s s from ``fit`` -> b d."""

    @torch.no_grad()
    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """images: b 3 h w, uint8 or float in [0, 1]; or a list of 3 h w of any sizes. Floats are rounded to 8 bits
        first, as a file would hold them.

        Raises ``ValueError`` for another shape, dtype or range, NaN, or no picture.
        """
        batches = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        if not batches or not len(batches[0]):
            raise ValueError(f"{self.name} has no features of no pictures: the batch is empty")
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            x = torch.cat([self.fit(_in_bytes(self.name, batch).to(device)) for batch in batches])
            return self.embed(x).float()

    def train(self, mode: bool = True) -> FeatureNet:
        """Stays in eval mode."""
        return super().train(False)

    def metric(self, kind: str) -> str:
        """The name of a metric in this space: ``metric("fd")`` is "fd_mobilenetv2", say."""
        return f"{kind}_{self.name}"


class InceptionFeatures(FeatureNet):
    """The net of FID, KID and the Inception Score, from the file of weights that all of them are quoted with.

    Whole numbers from 0 to 255 go in; the numbers that come out are torch-fidelity's.
    """

    name = "inception"
    resize = f"TensorFlow 1 bilinear, not antialiased, to {SIZE} x {SIZE}"
    dim = DIM

    def __init__(self, weights: str | Path = "") -> None:
        """weights: the file; "" takes it from torch's cache, or downloads it there.

        Raises ``ValueError`` for a file that cannot be had, or with another sha256.
        """
        super().__init__()
        path = Path(weights).expanduser() if weights else inception_in_cache() or _download_inception()
        if not path.is_file():
            raise ValueError(f"there is no weights file {path}; {_HOW_TO_GET}")
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 != INCEPTION_SHA256:
            raise ValueError(
                f"{path} has sha256 {self.sha256[:8]}..., and only {INCEPTION_SHA256} is the Inception of FID: what "
                f"another net gives is not to be called so. {_HOW_TO_GET}"
            )
        with torch.device("meta"):
            self.net = FIDInception()
        self.net.load_state_dict(read_weights(path)[0], assign=True)
        _freeze(self)

    def fit(self, x: Tensor) -> Tensor:
        return tf1_bilinear(x, SIZE)

    def embed(self, x: Tensor) -> Tensor:
        return self.net(x)

    def logits(self, features: Tensor) -> Tensor:
        """b 2048 -> b 1008, for ``distances.inception_score``."""
        return self.net.logits(features.to(self.net.fc.weight.device))

    def metric(self, kind: str) -> str:
        """ "fid" for "fd" and "kid" for "kd", also in "fd_infinity"; the others are named after the net."""
        for ours, published in (("fd", "fid"), ("kd", "kid")):
            if kind.partition("_")[0] == ours:
                return published + kind.removeprefix(ours)
        return super().metric(kind)


class TimmFeatures(FeatureNet):
    """What a timm model gives before its classifier; pictures are scaled to its square, whatever their aspect."""

    def __init__(
        self, model: str, weights: str | Path = "", *, name: str = "", options: Mapping | None = None, size: int = 0
    ) -> None:
        """model: timm's name.

        weights: a ``.safetensors`` or ``.pth`` file with timm's names of parameters; "" is timm's own, from its cache
            or the network. 1001 classes in it mean a net from TensorFlow: pictures in [-1, 1], "same" padding.
        name: of the space; "" is the model's. options: of ``timm.create_model``. size: of its pictures; 0 is its own.

        Raises ``ValueError`` for a model that timm does not have, and weights that cannot be had or are of another.
        """
        super().__init__()
        import timm

        if not timm.is_model(model.partition(".")[0]):
            near = did_you_mean(model, [*timm.list_models(), *_SHORT, "inception"])
            raise ValueError(f"there is no feature net {model!r}.{near} It is inception, {', '.join(_SHORT)} or timm's")
        self.name = name or model
        self.net, from_tensorflow = timm_net(model, str(weights), dict(options or {}))
        config = timm.data.resolve_model_data_config(self.net)
        mean, std = ((0.5,) * 3, (0.5,) * 3) if from_tensorflow else (config["mean"], config["std"])
        self.register_buffer("mean", rearrange(torch.tensor(mean) * 255, "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(torch.tensor(std) * 255, "c -> c 1 1"), persistent=False)
        self.size = size or config["input_size"][-1]
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.resize = f"{self.mode}, antialiased, to {self.size} x {self.size}"
        self.sha256 = tensors_sha256(self.net.state_dict())
        _freeze(self)
        self.dim = self(torch.zeros(1, 3, self.size, self.size)).shape[1]

    def fit(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        x = F.interpolate(x, size=(self.size, self.size), mode=self.mode, antialias=True, align_corners=False)
        return x.clamp(0, 255)

    def embed(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def feature_net(name: str, weights: str | Path = "") -> FeatureNet:
    """A net by its name: "inception", "mobilenetv2", "dinov2", or any timm model.

    weights: a local file; "" is the cache or the network. "mobilenetv2" is a net that came from TensorFlow, which only
    a file holds (timm's own is "mobilenetv2_100"). Raises ``ValueError`` as the two classes do.
    """
    if name == "inception":
        return InceptionFeatures(weights)
    if name == "mobilenetv2" and not weights:
        raise ValueError(
            "mobilenetv2 needs its file of weights (mobilenetv2_100_same_imagenet1001.fp16.safetensors); timm's own "
            "MobileNetV2 is mobilenetv2_100"
        )
    model, options, size = _SHORT.get(name, (name, {}, 0))
    return TimmFeatures(model, weights, name=name, options=options, size=size)


def inception_in_cache() -> Path | None:
    """The file of FID's Inception where pytorch-fid or torch-fidelity left it; None when it is not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in _INCEPTION_FILES if (folder / name).is_file()), None)


def _download_inception() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILES[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"FID needs {path}, which cannot be had from the network ({type(error).__name__}). {_HOW_TO_GET}, or put "
            "it there"
        ) from error
    return path


def timm_net(model: str, weights: str, options: dict, *, classifier: bool = False) -> tuple[nn.Module, bool]:
    """The model with or without its classifier, weights loaded, and whether it came from TensorFlow."""
    import timm

    if not weights:
        try:
            kept = {} if classifier else {"num_classes": 0}
            return timm.create_model(model, pretrained=True, **kept, **options), False
        except Exception as error:  # the hub's client raises errors of several libraries when it cannot connect
            raise not_at_hand(model, error) from error
    state, metadata = read_weights(weights)
    head = timm.get_pretrained_cfg(model).classifier
    found = state.get(f"{head[0] if isinstance(head, tuple) else head}.weight")
    classes = 0 if found is None else found.shape[0]
    if classes == 1001:
        options["pad_type"] = metadata.get("pad_type", "same")
    net = timm.create_model(model, num_classes=classes, **options)
    for key in net.state_dict():
        if key.endswith("num_batches_tracked"):  # some files leave it out; in eval mode it means nothing
            state.setdefault(key, torch.tensor(0))
    try:
        load_strictly(net, state, weights)
    except CheckpointError as error:
        raise ValueError(f"{weights} is not a file of {model}: {error}; give the weights of this very model") from error
    if not classifier:
        net.reset_classifier(0)
    return net, classes == 1001


def _freeze(net: FeatureNet) -> None:
    net.requires_grad_(False).eval()


def _in_bytes(name: str, images: Tensor) -> Tensor:
    """b 3 h w, uint8 or float in [0, 1] -> float32, whole numbers from 0 to 255."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"{name} takes pictures b 3 h w, got {tuple(images.shape)}; a list holds pictures of mixed sizes"
        )
    if images.dtype == torch.uint8:
        return images.float()
    if not images.is_floating_point():
        raise ValueError(f"{name} takes uint8, or float in [0, 1]; got {images.dtype}")
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        problem = "hold NaN" if low != low or high != high else f"run from {low:.4g} to {high:.4g}"
        raise ValueError(f"{name} takes floats in [0, 1]; these pictures {problem}")
    return (images.float().clamp(0, 1) * 255).round()
