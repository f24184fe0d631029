"""DISTS, the distance of structure and texture (https://arxiv.org/abs/2004.07728): a patch of grass is like another.

The net is VGG16; how much the mean and the spread of each channel count was fitted to human judgement, and comes with
torchmetrics, whose numbers these are.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from tokenizers_vis.eval.lpips import torchvision_features
from tokenizers_vis.eval.perceptual import Perceptual, read_weights

_LAYERS = (3, 8, 15, 22, 29)  # the last ReLU of each stage within torchvision's ``features``
_EPSILON = 1e-6


class DISTS(Perceptual):
    """1 - the weighted similarity of means and of spreads over all channels: 0 for equal pictures.

    weights: torchvision's ImageNet weights of VGG16 as a local ``.pth`` or ``.safetensors`` file; "" is torch's own
        cache, or a download. Another file's distance carries its sha256 in its name, as with LPIPS.
    size: pictures are resized to this short side first; 0 leaves them as they are. The authors' script has 256.

    Raises ``ValueError`` for weights that cannot be had or are of another net.
    """

    def __init__(self, *, weights: str = "", size: int = 0) -> None:
        super().__init__(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=size)
        self.net, self.foreign = torchvision_features("vgg", weights, _LAYERS[-1] + 1)
        import torchmetrics

        file = Path(torchmetrics.__file__).parent / "functional" / "image" / "dists_models" / "weights.pt"
        if not file.is_file():
            raise ValueError("this torchmetrics has no weights of DISTS; a newer one has: pip install -U torchmetrics")
        fitted = read_weights(file)[0]
        total = sum(weight.sum() for weight in fitted.values())
        for key in ("alpha", "beta"):
            self.register_buffer(key, rearrange(fitted[key] / total, "1 c 1 1 -> c"), persistent=False)
        window = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("window", rearrange(torch.outer(window, window), "h w -> 1 1 h w"), persistent=False)
        self._freeze()

    @property
    def name(self) -> str:
        return f"dists{self.foreign}"

    def features(self, x: Tensor) -> list[Tensor]:
        maps = [x * self.std + self.mean]  # the picture itself is the first stage
        for i, layer in enumerate(self.net):
            x = self._pool(x) if isinstance(layer, nn.MaxPool2d) else layer(x)
            if i in _LAYERS:
                maps.append(x)
        return maps

    def compare(self, fx: list[Tensor], fy: list[Tensor]) -> Tensor:
        means, spreads = [], []
        for x, y in zip(fx, fy, strict=True):
            mx, my = (reduce(f, "b c h w -> b c 1 1", "mean") for f in (x, y))
            dx, dy = x - mx, y - my
            # (mx - my)^2 over mx^2 + my^2, and the same of what is left: each is exactly 0 for equal pictures.
            means.append((mx - my).square().flatten(1) / (mx.square() + my.square() + _EPSILON).flatten(1))
            vx, vy, apart = (reduce(f.square(), "b c h w -> b c", "mean") for f in (dx, dy, dx - dy))
            spreads.append(apart / (vx + vy + _EPSILON))
        return torch.cat(means, dim=1) @ self.alpha + torch.cat(spreads, dim=1) @ self.beta

    def _pool(self, x: Tensor) -> Tensor:
        """Half the size, the root mean square under a Hann window, where VGG takes the largest: no aliasing."""
        squares = F.conv2d(x.square(), self.window.expand(x.shape[1], 1, 3, 3), stride=2, padding=1, groups=x.shape[1])
        return (squares + 1e-12).sqrt()
