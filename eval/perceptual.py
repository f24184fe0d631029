"""Perceptual distances: how far two pictures are apart in the features of a frozen net. A metric and a training loss.

``perceptual("mobilenetv2_100", weights)`` compares the plain features of any timm net. ``perceptual("lpips-vgg")`` is
the learned distance LPIPS (https://arxiv.org/abs/1801.03924), "dists" and "dreamsim" are in files of their own. These
are different quantities: a distance is always called by its ``name``, and only that of published weights is LPIPS.
"""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.config import did_you_mean


class Perceptual(nn.Module, ABC):
    """Abstract. ``forward(x, y)`` takes pictures, b 3 h w in [0, 1], and gives a distance per picture, b, float32.

    The net is frozen and stays in eval mode, also after ``.train()``. Gradients flow into x (and y) but not into the
    net; a picture that needs no gradient costs a forward pass only. Under autocast the net runs in the lower precision
    and the distance in float32.
    """

    mean: Tensor
    std: Tensor
    least = 1  # pixels of the shorter side, below which the net's poolings leave nothing

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std are three numbers each, std above 0; got mean {mean} and std {std}")
        if size < 0:
            raise ValueError(f"size is the short side in pixels, or 0 for pictures as they are; got {size}")
        self.size = size
        self.register_buffer("mean", rearrange(torch.tensor(mean), "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(torch.tensor(std), "c -> c 1 1"), persistent=False)

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call this distance in a table."""

    @abstractmethod
    def features(self, x: Tensor) -> list[Tensor]:
        """x: b 3 h w, normalised -> the feature maps, each b c h w."""

    @abstractmethod
    def compare(self, fx: list[Tensor], fy: list[Tensor]) -> Tensor:
        """The feature maps of both, each b c h w, float32 -> b."""

    @cached_property
    def sha256(self) -> str:
        """Of all that decides the distance but code: names and values of parameters and buffers."""
        return tensors_sha256({**dict(self.named_parameters()), **dict(self.named_buffers())})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: b 3 h w in [0, 1] -> b, float32, 0 for equal pictures. Raises ``ValueError`` for other shapes."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape != y.shape:
            raise ValueError(
                f"{self.name} compares two batches b 3 h w of one size, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        # Two passes, not one over both: the net is frozen, so the pass over the original keeps nothing for backward.
        fx, fy = self.maps(x), self.maps(y)
        with torch.autocast(x.device.type, enabled=False):
            return self.compare([f.float() for f in fx], [f.float() for f in fy])

    def maps(self, x: Tensor) -> list[Tensor]:
        """x: b 3 h w in [0, 1] -> the feature maps, each b c h w. Raises ``ValueError`` for pictures too small."""
        if not self.size and min(x.shape[-2:]) < self.least:
            raise ValueError(f"{self.name} takes pictures of {self.least} pixels and more, got {tuple(x.shape[-2:])}")
        return self.features(self._prepare(x))

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in eval mode: the BatchNorms of a frozen net must not move."""
        return super().train(False)

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.size and min(x.shape[-2:]) != self.size:
            scale = self.size / min(x.shape[-2:])
            to = [max(self.size, round(side * scale)) for side in x.shape[-2:]]
            x = F.interpolate(x, size=to, mode="bicubic", antialias=True, align_corners=False)
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _freeze(self) -> None:
        # Channels last is what convolutions want, on CPU too: 1.4 times quicker for MobileNetV2 at 64 px.
        self.requires_grad_(False).to(memory_format=torch.channels_last)
        self.eval()


class FeatureDistance(Perceptual):
    """Squared difference of unit-normalised features, summed over channels, averaged over positions, then stages.

    model: a timm model name that can give its stages (``features_only``).
    weights: a ``.safetensors`` or ``.pth`` file with timm's names of parameters; "" is timm's own pretrained weights,
        from its cache or the network.
    layers: stages to compare, ascending, counted from 0; () is all of them. Stages after the last one are not computed.
    options: more arguments of ``timm.create_model``.
    mean, std: per channel, for pictures in [0, 1]; () is what the timm model was trained with.
    size: pictures are resized to this short side first (bicubic, antialiased); 0 leaves them as they are.

    Raises ``ValueError`` for a model, stage or option that timm does not have, and for weights that cannot be had or
    are of another net.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str = "",
        layers: tuple[int, ...] = (),
        options: dict | None = None,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        size: int = 0,
    ) -> None:
        net = _timm_features(model, weights, tuple(layers), dict(options or {}))
        config = net.pretrained_cfg if hasattr(net, "pretrained_cfg") else net.default_cfg
        super().__init__(mean=mean or config["mean"], std=std or config["std"], size=size)
        self.model = model
        self.layers = tuple(layers)
        self.channels_inside = getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.net = net
        self._freeze()

    @property
    def name(self) -> str:
        return self.model

    def features(self, x: Tensor) -> list[Tensor]:
        maps = self.net(x)
        return [rearrange(m, "b h w c -> b c h w") for m in maps] if self.channels_inside else list(maps)

    def compare(self, fx: list[Tensor], fy: list[Tensor]) -> Tensor:
        return torch.stack([d.sum(dim=1).mean(dim=(1, 2)) for d in unit_differences(fx, fy)]).mean(dim=0)


class Several(Perceptual):
    """The mean of distances in several nets. What learns from one net learns its faults too; several share few.

    As a loss (``maps`` and ``compare``) each picture of a batch is seen by one of the nets, in turn, so that more nets
    cost no more. ``forward``, the metric, has all of them see every picture.
    """

    def __init__(self, distances: Sequence[Perceptual]) -> None:
        if len(distances) < 2:
            raise ValueError(f"several distances are two or more, got {len(distances)}")
        super().__init__(mean=(0, 0, 0), std=(1, 1, 1), size=0)
        self.distances = nn.ModuleList(distances)
        self.least = max(0 if distance.size else distance.least for distance in distances)
        with torch.no_grad():
            tiny = torch.zeros(1, 3, *2 * [max(64, self.least)])
            self._counts = [len(distance.maps(tiny)) for distance in distances]

    @property
    def name(self) -> str:
        return "+".join(distance.name for distance in self.distances)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([distance(x, y) for distance in self.distances]).mean(dim=0)

    def maps(self, x: Tensor) -> list[Tensor]:
        """x: b 3 h w in [0, 1] -> the maps of net after net; net i of k sees pictures i, i + k, i + 2 k ..."""
        k = len(self.distances)
        return [m for i, distance in enumerate(self.distances[: len(x)]) for m in distance.maps(x[i::k])]

    def features(self, x: Tensor) -> list[Tensor]:
        return self.maps(x)

    def compare(self, fx: list[Tensor], fy: list[Tensor]) -> Tensor:
        far, start, k = [], 0, len(self.distances)
        for distance, count in zip(self.distances, self._counts, strict=True):
            own = slice(start, start := start + count)
            if fx[own]:
                far.append(distance.compare(fx[own], fy[own]))
        out = far[0].new_empty(sum(map(len, far)))
        for i, found in enumerate(far):
            out[i::k] = found
        return out


def perceptual(net: str, weights: str = "") -> Perceptual:
    """The distance by its name: "lpips-vgg", "lpips-alex", "dists", "dreamsim", or any timm model with stages.

    Names joined by "+" are ``Several``; their weights are then joined by commas, "" for those without a file.

    weights: a local file, or "" for the cache or the network; of dreamsim a folder. A classifier of 1001 classes in it
    (class 0 is background) tells a net that comes from TensorFlow: its pictures are in [-1, 1], its convolutions pad as
    there.

    Raises ``ValueError`` as ``LPIPS``, ``DISTS``, ``DreamSim`` and ``FeatureDistance`` do.
    """
    if "+" in net:
        nets, files = net.split("+"), weights.split(",") if weights else []
        if len(files) not in (0, len(nets)):
            raise ValueError(
                f"{net} is {len(nets)} nets, their weights are as many files with commas between; got {weights!r}"
            )
        return Several([perceptual(one, file) for one, file in zip(nets, files or [""] * len(nets), strict=True)])
    if net.startswith("lpips-"):
        from tokenizers_vis.eval.lpips import LPIPS

        return LPIPS(net=net.removeprefix("lpips-"), weights=weights)
    if net == "dists":
        from tokenizers_vis.eval.dists import DISTS

        return DISTS(weights=weights)
    if net.partition("-")[0] == "dreamsim":
        from tokenizers_vis.eval.dreamsim import DreamSim

        return DreamSim(kind=net.partition("-")[2] or "ensemble", weights=weights)
    if not weights:
        return FeatureDistance(model=net)
    state, metadata = read_weights(weights)
    heads = [state[key] for key in ("classifier.weight", "fc.weight", "head.fc.weight", "head.weight") if key in state]
    from_tensorflow = any(head.shape[0] == 1001 for head in heads)
    half = (0.5, 0.5, 0.5) if from_tensorflow else ()
    pad_type = metadata.get("pad_type", "same" if from_tensorflow else "")
    options = {"pad_type": pad_type} if pad_type else {}
    return FeatureDistance(model=net, weights=weights, options=options, mean=half, std=half)


def unit(f: Tensor) -> Tensor:
    """b c h w with the channels at each position scaled to length 1."""
    # The epsilon is inside the root: outside of it, the gradient at an all-zero position is not a number.
    return f * torch.rsqrt(f.square().sum(dim=1, keepdim=True) + 1e-10)


def unit_differences(fx: Sequence[Tensor], fy: Sequence[Tensor]) -> list[Tensor]:
    """Squared differences of unit-normalised features, each b c h w."""
    return [(unit(x) - unit(y)).square() for x, y in zip(fx, fy, strict=True)]


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Of names and values as float32, so that the same net has one hash from whichever file it came."""
    digest = hashlib.sha256()
    for key in sorted(key for key in state if not key.endswith("num_batches_tracked")):
        digest.update(f"{key} {tuple(state[key].shape)}".encode())
        digest.update(state[key].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a ``.safetensors`` or torch file, floating ones as float32, and the metadata of the former.

    Code is never unpickled. Raises ``ValueError`` for a file that is not there or holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}; give a .safetensors or .pth file")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, _safetensors_error()) as error:
        raise ValueError(f"{path} is not a file of weights (.safetensors or torch state dict): {error}") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds more than tensors; give a plain state dict")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, metadata


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _timm_features(model: str, weights: str, layers: tuple[int, ...], options: dict) -> nn.Module:
    """The timm net that gives its stages, weights loaded."""
    import timm

    if not timm.is_model(model.partition(".")[0]):
        hint = did_you_mean(model, timm.list_models())
        raise ValueError(f"timm has no model {model!r}.{hint} LPIPS is 'lpips-vgg' or 'lpips-alex'.")
    if list(layers) != sorted(set(layers)) or min(layers, default=0) < 0:
        raise ValueError(f"layers are stages in ascending order, counted from 0; got {layers}")
    arguments = {**options, **({"out_indices": layers} if layers else {})}
    try:
        net = timm.create_model(model, features_only=True, **arguments)
    except (TypeError, RuntimeError, AssertionError, IndexError, ValueError) as error:
        raise ValueError(
            f"timm cannot build the stages {layers or 'all'} of {model} with {options or 'no options'}: {error!r}"
        ) from error
    if layers and len(net.feature_info.channels()) != len(layers):
        raise ValueError(f"{model} has no stages {layers}; leave layers empty to get all it has")
    if weights:
        net.load_state_dict(_matching(net, model, weights, options))
        return net
    try:
        return timm.create_model(model, features_only=True, pretrained=True, **arguments)
    except Exception as error:  # the hub's client raises errors of several libraries when it cannot connect
        raise not_at_hand(model, error) from error


def not_at_hand(model: str, error: Exception) -> ValueError:
    """What to raise when timm's pretrained weights cannot be had."""
    import timm

    config = timm.get_pretrained_cfg(model)
    where = f"https://huggingface.co/{config.hf_hub_id}" if config and config.hf_hub_id else "nowhere timm knows"
    return ValueError(
        f"the pretrained weights of {model} are not in the cache and cannot be had from {where} "
        f"({type(error).__name__}); go online once, or give a local .safetensors or .pth file as weights"
    )


def _matching(net: nn.Module, model: str, weights: str, options: dict) -> dict[str, Tensor]:
    """The file's tensors under the names of ``net``. Missing ones, other shapes and another model's are errors."""
    import timm

    state, _ = read_weights(weights)
    wanted = net.state_dict()
    # timm's wrappers rename the first part of a key: ``stages.0.`` is ``stages_0.``, or everything is under ``model.``.
    found = {}
    for key, value in wanted.items():
        first, dot, rest = key.partition(".")
        names = (key, first[::-1].replace("_", ".", 1)[::-1] + dot + rest, key.removeprefix("model."))
        name = next((n for n in names if n in state and state[n].shape == value.shape), None)
        if name is not None:
            found[key] = state[name]
        elif key.endswith("num_batches_tracked"):
            found[key] = value
    missing = [key for key in wanted if key not in found]
    # What the file has beyond the stages is the rest of the same model; anything else is another, deeper one.
    foreign = sorted(set(state) - set(timm.create_model(model, **options).state_dict()))
    if missing or foreign:
        problem = f"lacks (or has in another shape) {len(missing)} tensors: {', '.join(missing[:5])}"
        if not missing:
            problem = f"holds {len(foreign)} tensors that are not of it: {', '.join(foreign[:5])}"
        raise ValueError(f"{weights} is not a file of {model}: it {problem}; give the weights of this very model")
    return found
