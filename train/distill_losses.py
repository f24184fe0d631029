"""What a student minimises: distances to the picture of its teacher and to the real one. See ``distill``.

Letters: b batch; y is b c h w on the canvas, pictures are b 3 h w.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.decoders.scales import means
from tokenizers_vis.eval.perceptual import Perceptual, perceptual
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.adversary import Critic, GanConfig, balance, nearest_weight
from tokenizers_vis.train.frozen import Bearer, steady
from tokenizers_vis.train.picture_losses import l1
from tokenizers_vis.train.terms import Losses, Weight, at_step, check_weights, ever


@dataclass(frozen=True)
class DistillLoss:
    """Weights of the sum that is minimised, 0 where a term is off. Any but gan's may be a ``Schedule`` over steps.

    canvas: of the squared distance to the teacher's y. l1: of the distance to its picture, in [0, 1].
    perceptual: of the distance to its picture in the features of ``net``, a timm model or "lpips-vgg", "lpips-alex", or
        several joined by "+", of which each picture is seen by one. net_weights: a local file, or several with commas
        between; "" is the usual cache or download.
    real, real_l1: of the distance in features, and of L1, to the real picture.
    gan: the adversarial loss, whose critic is shown real pictures.
    """

    canvas: Weight = 1.0
    l1: Weight = 0.0
    perceptual: Weight = 0.0
    real: Weight = 0.0
    real_l1: Weight = 0.0
    net: str = "lpips-vgg"
    net_weights: str = ""
    gan: GanConfig = field(default_factory=GanConfig)

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("canvas", "l1", "perceptual", "real", "real_l1")}
        check_weights(**weights)
        if not any(map(ever, weights.values())):
            raise ValueError("no loss has a weight: give canvas, l1, perceptual, real or real_l1 one")

    def of_teacher(self, step: int) -> bool:
        """Whether a term looks at the teacher's picture at this optimiser step."""
        return any(at_step(weight, step) for weight in (self.canvas, self.l1, self.perceptual))


class DistillSum(Bearer):
    """Computes the weighted sum. critic: what the adversarial loss is played against, or None; not registered here.

    distance: the perceptual distance, or None.
    """

    def __init__(self, config: DistillLoss, tokenizer: Tokenizer, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self._canvas = (tokenizer.canvas,)  # the tokenizer's, so in a tuple that registers nothing
        if ever(config.perceptual) or ever(config.real):
            self.bear("distance", perceptual(config.net, config.net_weights))
        self._critic = (Critic(config.gan, tokenizer.image_size).to(device) if config.gan.weight else None,)
        self.to(device)

    @property
    def distance(self) -> Perceptual | None:
        return self.borne.get("distance")

    @property
    def critic(self) -> Critic | None:
        return self._critic[0]

    def forward(self, y: Tensor, coarse: list[Tensor], wanted: Tensor | None, images: Tensor, step: int) -> Losses:
        """y, wanted: b c h w, of student and teacher; wanted is None at a step where no term looks at it. coarse:
        b c h w of smaller sizes, what the student had of its picture there. images: b 3 h w, floats in [0, 1], the real
        ones. step: the optimiser step, from 0."""
        config = self.config
        parts = {}
        if wanted is not None:
            parts["canvas"] = F.mse_loss(y, wanted)
            for estimate in coarse:
                size = estimate.shape[-1]
                parts[f"canvas_{size}"] = F.mse_loss(estimate, means(wanted, wanted.shape[-1] // size))
        total = at_step(config.canvas, step) * sum(parts.values(), start=y.new_zeros(()))
        shown = self.critic is not None and step >= self.critic.start
        names = ("perceptual", "real", "l1", "real_l1")
        near, real, *levels = (at_step(getattr(config, name), step) for name in names)
        painted = goal = None
        if shown or near or real or any(levels):
            with steady(images.device):
                painted = self._canvas[0].paint(y).float()
                goal = None if wanted is None else self._canvas[0].paint(wanted).float()
        for name, weight, other in zip(names[2:], levels, (goal, images), strict=True):
            if weight:
                parts[name] = l1(painted, other).mean()
                total = total + weight * parts[name]
        if near or real:
            with steady(images.device):
                felt = [f.float() for f in self.distance.maps(painted)]
                for name, weight, other in (("perceptual", near, goal), ("real", real, images)):
                    if weight:
                        parts[name] = self._far(felt, other)
                        total = total + weight * parts[name]
        doubted = config.gan.weight_at(step)
        if doubted:
            parts["gan"] = self.critic.doubt(painted).mean()
            if config.gan.adaptive != "off":
                at = nearest_weight(y) if config.gan.adaptive == "layer" else y
                parts["gan_weight"] = balance(total, parts["gan"], at)
                doubted = doubted * parts["gan_weight"]
            total = total + doubted * parts["gan"]
        fake = painted.detach() if shown else None
        return Losses(total, {name: value.detach() for name, value in parts.items()}, fake)

    def _far(self, felt: list[Tensor], other: Tensor) -> Tensor:
        """Scalar: from the features of the student's pictures to those of others, b 3 h w."""
        with torch.no_grad():
            maps = [f.float() for f in self.distance.maps(other)]
        with torch.autocast(other.device.type, enabled=False):
            return self.distance.compare(felt, maps).mean()
