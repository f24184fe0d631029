"""LPIPS 0.1, the learned perceptual distance: https://arxiv.org/abs/1801.03924."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.eval.perceptual import Perceptual, read_weights, unit_differences

# Position of the layers that LPIPS looks at within torchvision's ``features``, and the ImageNet statistics as LPIPS
# writes them: shift and scale of pictures in [-1, 1], here for [0, 1].
_LAYERS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11), "squeeze": (1, 4, 7, 9, 10, 11, 12)}
_MEAN = tuple((1 + shift) / 2 for shift in (-0.030, -0.088, -0.188))
_STD = tuple(scale / 2 for scale in (0.458, 0.448, 0.450))


class LPIPS(Perceptual):
    """Differences of unit-normalised features, weighted per channel by heads fitted to human judgement.

    net: "vgg" (the usual training loss), "alex" (the usual metric) or "squeeze".
    weights: torchvision's ImageNet weights of VGG16, AlexNet or SqueezeNet 1.1 as a local ``.pth`` or ``.safetensors``
        file; "" is torch's own cache, or a download. The heads come with torchmetrics. A file that is not torchvision's
        own, by its sha256, gives a distance of another name: "lpips-vgg-0a1b2c3d", with the file's first 8 digits.

    Raises ``ValueError`` for another net, and for weights that cannot be had or are of another net.
    """

    def __init__(self, *, net: str = "vgg", weights: str = "", size: int = 0) -> None:
        if net not in _LAYERS:
            raise ValueError(f"LPIPS has the nets {', '.join(_LAYERS)}; got {net!r}")
        super().__init__(mean=_MEAN, std=_STD, size=size)
        self.backbone = net
        self.least = {"vgg": 16, "alex": 31, "squeeze": 17}[net]
        self.net, self.foreign = torchvision_features(net, weights, _LAYERS[net][-1] + 1)
        for i, head in enumerate(_heads(net)):
            self.register_buffer(f"head{i}", head, persistent=False)
        self._freeze()

    @property
    def name(self) -> str:
        return f"lpips-{self.backbone}{self.foreign}"

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in _LAYERS[self.backbone]:
                maps.append(x)
        return maps

    def compare(self, fx: list[Tensor], fy: list[Tensor]) -> Tensor:
        heads = [self.get_buffer(f"head{i}") for i in range(len(fx))]
        differences = zip(unit_differences(fx, fy), heads, strict=True)
        return torch.stack([(d * head).sum(dim=1).mean(dim=(1, 2)) for d, head in differences]).sum(dim=0)


def torchvision_features(net: str, weights: str, layers: int) -> tuple[nn.Sequential, str]:
    """The first ``layers`` layers of torchvision's ``features``, and what a name carries for weights that are not its.

    net: "vgg", "alex" or "squeeze". weights: a file, or "". The name's part is "" for torchvision's own file, which is
    told by the sha256 that its published name holds; "-0a1b2c3d" for another one.

    Raises ``ValueError`` for weights that cannot be had or are of another net.
    """
    import torchvision.models as models

    build, entry = {
        "vgg": (models.vgg16, models.VGG16_Weights.IMAGENET1K_V1),
        "alex": (models.alexnet, models.AlexNet_Weights.IMAGENET1K_V1),
        "squeeze": (models.squeezenet1_1, models.SqueezeNet1_1_Weights.IMAGENET1K_V1),
    }[net]
    file, foreign = entry.url.rpartition("/")[2], ""
    if weights:
        state, _ = read_weights(weights)
        with Path(weights).expanduser().open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        foreign = "" if digest.startswith(Path(file).stem.rpartition("-")[2]) else f"-{digest[:8]}"
    else:
        try:
            state = entry.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"torchvision's {build.__name__} needs {torch.hub.get_dir()}/checkpoints/{file}, which cannot be had "
                f"from {entry.url} ({type(error).__name__}); go online once, put the file there, or give its path as "
                "weights"
            ) from error
    # On meta: the classifier, most of the parameters, is never allocated.
    with torch.device("meta"):
        features = build(weights=None).features[:layers]
    wanted = {f"features.{key}": key for key in features.state_dict()}
    found = {key: state[name] for name, key in wanted.items() if name in state}
    try:
        features.load_state_dict(found, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights or entry.url} is not torchvision's {build.__name__}: {error}") from error
    return features, foreign


def _heads(net: str) -> list[Tensor]:
    """The weight of each channel, c 1 1 per layer, from the files that torchmetrics carries."""
    import torchmetrics

    state, _ = read_weights(Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{net}.pth")
    return [rearrange(state[f"lin{i}.model.1.weight"], "1 c 1 1 -> c 1 1") for i in range(len(_LAYERS[net]))]
