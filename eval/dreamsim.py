"""DreamSim, the distance of whole pictures as people see it (https://arxiv.org/abs/2306.09344), by its own package."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.config import did_you_mean
from tokenizers_vis.eval.perceptual import Perceptual

KINDS = ("ensemble", "dino_vitb16", "clip_vitb32", "open_clip_vitb32", "dinov2_vitb14", "synclr_vitb16")
_SIDE = 224
_RELEASES = "https://github.com/ssundaram21/dreamsim/releases"


class DreamSim(Perceptual):
    """1 - the cosine of what fine-tuned ViTs say of the two pictures; each is scaled to 224 x 224, whatever its aspect.

    kind: "ensemble" of three, or one net alone. weights: the folder that the authors' zip was unpacked into; "" is
        torch's own cache, filled from the network when it is empty.

    Raises ``ValueError`` for another kind, when the package is not installed, and when weights cannot be had.
    """

    def __init__(self, *, kind: str = "ensemble", weights: str = "") -> None:
        if kind not in KINDS:
            raise ValueError(f"there is no dreamsim-{kind}.{did_you_mean(kind, KINDS)} There are: {', '.join(KINDS)}")
        super().__init__(mean=(0, 0, 0), std=(1, 1, 1), size=0)
        try:
            from dreamsim import dreamsim
        except ImportError as error:
            raise ValueError(f"DreamSim needs the package of its authors ({error}): pip install dreamsim") from error
        folder = Path(weights).expanduser() if weights else Path(torch.hub.get_dir()) / "checkpoints" / "dreamsim"
        if weights and not any(folder.glob("*lora")):
            raise ValueError(
                f"{folder} holds no weights of DreamSim; unpack dreamsim_{kind}_checkpoint.zip from {_RELEASES} there"
            )
        folder.mkdir(parents=True, exist_ok=True)
        hub = torch.hub.get_dir()
        try:
            # It prints what it downloads, and peft warns of how the package puts its adapters on.
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
                self.net, _ = dreamsim(pretrained=True, device="cpu", cache_dir=str(folder), dreamsim_type=kind)
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"the weights of dreamsim-{kind} are not whole in {folder} and cannot be had from {_RELEASES} "
                f"({type(error).__name__}: {error}); go online once, or unpack dreamsim_{kind}_checkpoint.zip there"
            ) from error
        finally:
            torch.hub.set_dir(hub)  # it moves torch's cache
        self.kind = kind
        self._freeze()

    @property
    def name(self) -> str:
        return "dreamsim" if self.kind == "ensemble" else f"dreamsim-{self.kind}"

    def features(self, x: Tensor) -> list[Tensor]:
        x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        for part in self.net.modules():
            if type(part).__name__ == "ViTExtractor":  # it notes its device, and asks there for what is no parameter
                part.device = x.device
        # One by one: the package drops the batch's axis of a single picture, and keeps it otherwise.
        return [torch.cat([self.net.embed(one[None]).flatten(1) for one in x])]

    def compare(self, fx: list[Tensor], fy: list[Tensor]) -> Tensor:
        x, y = (F.normalize(f, dim=-1) for f in (fx[0], fy[0]))
        return (x - y).square().sum(dim=-1) / 2  # the same as 1 - their product, and exactly 0 for equal ones
