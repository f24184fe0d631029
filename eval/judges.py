"""What sees (original, reconstruction, boxes) and writes rows: one judge for photographs, one for boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenizers_vis.eval.journal import Array, Row
from tokenizers_vis.eval.suites import Item, as_tensor

if TYPE_CHECKING:
    from tokenizers_vis.eval.face import FaceFidelity
    from tokenizers_vis.eval.features import FeatureNet
    from tokenizers_vis.eval.perceptual import Perceptual
    from tokenizers_vis.eval.text import TextFidelity

SSIM_SIDE, MS_SSIM_SIDE = 11, 176  # pixels that the windows take: ``metrics.ssim``, ``metrics.ms_ssim``


class Judge(ABC):
    """Abstract. ``arrays`` says what is kept of each picture besides its row."""

    arrays: dict[str, Array]

    def originals(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """What is kept of originals, each b d, under the names of ``arrays``."""
        return {}

    @abstractmethod
    def judge(
        self, items: Sequence[Item], pictures: Sequence[np.ndarray], kept: Mapping[str, np.ndarray]
    ) -> tuple[list[Row], dict[str, np.ndarray]]:
        """pictures: the reconstructions, uint8 h w 3, each of its original's size. kept: what ``originals`` gave.

        A row and a row of every array for each. The row has mse, and psnr, which is infinite for an exact picture.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the numbers, plain values."""


class PictureJudge(Judge):
    """PSNR, SSIM and MS-SSIM, perceptual distances, and feature cosines; keeps the features for set distances."""

    def __init__(
        self, nets: Sequence[FeatureNet] = (), distances: Sequence[Perceptual] = (), device: Any = None
    ) -> None:
        """Raises ``ValueError`` when two nets, or two distances, have one name."""
        for kind, given in (("net", nets), ("distance", distances)):
            names = [one.name for one in given]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the {kind} {twice[0]} is there twice; name each once")
        self.nets = {net.name: net.to(device) for net in nets}
        self.distances = [distance.to(device) for distance in distances]
        self.device = device
        self.arrays = {name: Array(net.dim) for name, net in self.nets.items()}

    def originals(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        return self.features([item.pixels for item in items])

    def judge(
        self, items: Sequence[Item], pictures: Sequence[np.ndarray], kept: Mapping[str, np.ndarray]
    ) -> tuple[list[Row], dict[str, np.ndarray]]:
        import torch

        from tokenizers_vis.eval.metrics import feature_cosine

        features = self.features(pictures)
        cosines = {
            net.metric("cosine"): feature_cosine(torch.from_numpy(kept[name]), torch.from_numpy(features[name]))
            for name, net in self.nets.items()
        }
        rows = [self._compare(item.pixels, picture) for item, picture in zip(items, pictures, strict=True)]
        for k, row in enumerate(rows):
            row |= {name: values[k].item() for name, values in cosines.items()}
        return rows, features

    def describe(self) -> dict[str, Any]:
        nets = {name: {"sha256": net.sha256, "resize": net.resize, "dim": net.dim} for name, net in self.nets.items()}
        return {"nets": nets, "distances": {distance.name: {"sha256": distance.sha256} for distance in self.distances}}

    def _compare(self, original: np.ndarray, picture: np.ndarray) -> Row:
        """A metric that the picture is too small for is not in the row."""
        import torch

        from tokenizers_vis.eval.metrics import decibels, gradient_energy, ms_ssim, mse, ssim

        x, y = (as_tensor(pixels)[None].to(self.device) for pixels in (original, picture))
        side = min(original.shape[:2])
        error = mse(y, x)
        row: Row = {"mse": error.item(), "psnr": decibels(error).item()}
        if side >= SSIM_SIDE:
            row["ssim"] = ssim(y, x).item()
        if side >= MS_SSIM_SIDE:
            row["ms_ssim"] = ms_ssim(y, x).item()
        with torch.no_grad():
            for distance in self.distances:
                if side >= distance.least or distance.size:
                    row[distance.name] = distance(y, x).item()
        if side >= 2:
            row |= {"energy": gradient_energy(y).item(), "energy_original": gradient_energy(x).item()}
        return row

    def features(self, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """uint8 h w 3 each, sizes may differ -> by the name of each net, b d."""
        if not self.nets:
            return {}
        tensors = [as_tensor(pixels) for pixels in pictures]
        return {name: net(tensors).cpu().numpy() for name, net in self.nets.items()}


class BoxJudge(Judge):
    """Text or face fidelity: a row holds the rows of its picture's instances, and the picture's own error."""

    arrays: dict[str, Array] = {}

    def __init__(self, fidelity: TextFidelity | FaceFidelity) -> None:
        self.fidelity = fidelity

    def judge(
        self, items: Sequence[Item], pictures: Sequence[np.ndarray], kept: Mapping[str, np.ndarray]
    ) -> tuple[list[Row], dict[str, np.ndarray]]:
        from tokenizers_vis.eval.metrics import decibels, mse

        rows = []
        for item, picture in zip(items, pictures, strict=True):
            error = mse(as_tensor(picture)[None], as_tensor(item.pixels)[None])
            instances = self.fidelity.score(item.pixels, picture, item.boxes, item.name)
            rows.append({"mse": error.item(), "psnr": decibels(error).item(), "instances": instances})
        return rows, {}

    def describe(self) -> dict[str, Any]:
        return self.fidelity.describe()
