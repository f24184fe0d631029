"""What a tokenizer's training minimises: the decoder's own loss and, beside it, whatever a recipe switches on.

docs/losses.md has the formulas. Letters: b batch, h w height and width of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError
from tokenizers_vis.eval.perceptual import Perceptual, perceptual
from tokenizers_vis.tokenizer import Tokenizer, TrainingPass
from tokenizers_vis.train.adversary import Critic, GanConfig, balance, nearest_weight
from tokenizers_vis.train.alignment import AlignConfig, Alignment
from tokenizers_vis.train.anneal import AnnealConfig, check_anneal
from tokenizers_vis.train.frozen import Bearer, Teacher, steady
from tokenizers_vis.train.picture_losses import (
    ClassifierConfig,
    ClassifierDistance,
    gram,
    l1,
    l2,
    logit_laplace,
    logits_of,
    squeezed,
)
from tokenizers_vis.train.terms import Losses, Weight, at_step, check_weights, ever


@dataclass(frozen=True)
class LossConfig:
    """Weights of the sum that is minimised, 0 where a term is off. Any weight may be a ``Schedule`` over steps.

    reconstruction: of the decoder's own loss. quantizer: of the quantizer's (commitment, entropy, disentanglement have
        weights of their own in its table).
    l1, l2: of the distance between pictures in [0, 1]. logit_laplace: of DALL-E's, with a scale per colour that learns.
    perceptual: of a distance in the features of ``net``, a timm model or "lpips-vgg", "lpips-alex", or several joined
        by "+", of which each picture is seen by one. gram: of the distance between the Gram matrices of the same
        features. net_weights: a local file, or several with commas between; "" is the usual cache or download.
    classifier: the distance between the class scores of the two pictures. gan: the adversarial loss.
    align: features that learn to be like those of a frozen net, one table a term.
    anneal: latent perturbation over the steps of a run.

    A loss on pictures counts an image as much as the decoder says that its estimate deserves.
    """

    reconstruction: Weight = 1.0
    quantizer: Weight = 1.0
    perceptual: Weight = 0.0
    net: str = "lpips-vgg"
    net_weights: str = ""
    l1: Weight = 0.0
    l2: Weight = 0.0
    logit_laplace: Weight = 0.0
    gram: Weight = 0.0
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    align: tuple[AlignConfig, ...] = ()
    anneal: AnnealConfig = field(default_factory=AnnealConfig)

    def __post_init__(self) -> None:
        check_weights(
            reconstruction=self.reconstruction,
            quantizer=self.quantizer,
            perceptual=self.perceptual,
            l1=self.l1,
            l2=self.l2,
            logit_laplace=self.logit_laplace,
            gram=self.gram,
        )
        if ever(self.gram) and "+" in self.net:
            raise ValueError(f"gram compares the textures of one net, not of several; got {self.net}")


class LossSum(Bearer):
    """Computes the weighted sum for one training pass.

    critic: what the adversarial loss is played against, or None. It is not registered here: its optimiser is its own.
    distance: the perceptual distance, or None.
    Registered are the heads of alignments and the scales of logit-Laplace: they train with the tokenizer.

    Raises ``ConfigError`` or ``ValueError`` for a loss that does not fit the tokenizer, and for weights of a frozen net
    that cannot be had.
    """

    def __init__(self, config: LossConfig, tokenizer: Tokenizer, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self._canvas = (tokenizer.canvas,)  # the tokenizer's, so in a tuple that registers nothing
        check_anneal(tokenizer, config.anneal)
        on_pictures = (config.l1, config.l2, config.perceptual, config.gram, config.logit_laplace)
        heavier = (config.classifier.weight, config.gan.weight)
        if tokenizer.canvas.pictures_only and not any(map(ever, (*on_pictures, *heavier))):
            raise ConfigError(
                "the canvas has no codes to aim at (a second stage): what paints learns from losses on pictures alone, "
                "so give one a weight, such as loss.l2 = 1.0"
            )
        if ever(config.perceptual) or ever(config.gram):
            self.bear("distance", perceptual(config.net, config.net_weights))
        if ever(config.classifier.weight):
            self.bear("classifier", ClassifierDistance.of(config.classifier))
        if ever(config.logit_laplace):
            self.log_scale = nn.Parameter(torch.zeros(3, 1, 1))
        self.alignments = nn.ModuleList()
        for term in config.align:
            if term.net not in self.borne:
                self.bear(term.net, Teacher(model=term.teacher, weights=term.weights, size=term.size))
            teacher = self.borne[term.net]
            width = teacher.dim if term.match in ("grid", "tokens") else teacher.pooled_dim
            self.alignments.append(Alignment(term, tokenizer, width))
        self._critic = (Critic(config.gan, tokenizer.image_size).to(device) if config.gan.weight else None,)
        self.to(device)

    @property
    def distance(self) -> Perceptual | None:
        return self.borne.get("distance")

    @property
    def critic(self) -> Critic | None:
        return self._critic[0]

    def forward(self, done: TrainingPass, images: Tensor, step: int) -> Losses:
        """images: b 3 h w, floats in [0, 1]. step: the optimiser step, from 0."""
        config, decoded, quantized = self.config, done.decoded, done.quantized
        parts = {"reconstruction": decoded.loss, **quantized.parts}
        pictured = at_step(config.reconstruction, step) * decoded.loss
        total = at_step(config.quantizer, step) * quantized.loss
        shown = self.critic is not None and step >= self.critic.start
        painted = None
        if shown or self._looks(step):
            with steady(images.device):
                painted = self._canvas[0].paint(decoded.estimate.float()).float()
            for name, weight, each in self._on_pictures(painted, images, step):
                parts[name] = (each * decoded.weight).mean()
                pictured = pictured + weight * parts[name]
        for name, term, value, features in self._aligned(done, images):
            parts[name] = value
            weight = at_step(term.weight, step)
            if term.adaptive:
                weight = weight * balance(pictured, value, nearest_weight(features), most=1e8)
            total = total + weight * value
        felt = config.gan.weight_at(step)
        if felt:
            parts["gan"] = (self.critic.doubt(painted) * decoded.weight).mean()
            if config.gan.adaptive != "off":
                estimate = decoded.estimate
                at = nearest_weight(estimate) if config.gan.adaptive == "layer" else estimate
                parts["gan_weight"] = balance(pictured, parts["gan"], at)
                felt = felt * parts["gan_weight"]
            total = total + felt * parts["gan"]
        fake = painted.detach() if shown else None
        return Losses(pictured + total, {name: value.detach() for name, value in parts.items()}, fake)

    def _looks(self, step: int) -> bool:
        """Whether a loss on pictures has a weight now. One with a parameter always counts, so that none is unused."""
        config = self.config
        weights = (config.l1, config.l2, config.perceptual, config.gram, config.classifier.weight)
        return ever(config.logit_laplace) or any(at_step(weight, step) for weight in weights)

    def _on_pictures(self, x: Tensor, y: Tensor, step: int) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight, and b numbers of each loss on pictures that is on. x: painted, y: original, b 3 h w."""
        config = self.config
        for name, loss in (("l1", l1), ("l2", l2)):
            if weight := at_step(getattr(config, name), step):
                yield name, weight, loss(x, y)
        if ever(config.logit_laplace):
            weight = at_step(config.logit_laplace, step)
            yield "logit_laplace", weight, logit_laplace(logits_of(x), self.log_scale, squeezed(y))
        with steady(y.device):
            yield from self._looked_through(x, y, step)

    def _looked_through(self, x: Tensor, y: Tensor, step: int) -> Iterator[tuple[str, float, Tensor]]:
        """The losses on pictures that a frozen net is needed for."""
        config = self.config
        near, textures = at_step(config.perceptual, step), at_step(config.gram, step)
        if textures or near:
            # Both look at the same features, which are made once.
            fx, fy = ([f.float() for f in self.distance.maps(z)] for z in (x, y))
            with torch.autocast(y.device.type, enabled=False):
                if textures:
                    yield "gram", textures, gram(fx, fy)
                if near:
                    yield "perceptual", near, self.distance.compare(fx, fy)
        if weight := at_step(config.classifier.weight, step):
            yield "classifier", weight, self.borne["classifier"](x, y)

    def _aligned(self, done: TrainingPass, images: Tensor) -> Iterator[tuple[str, AlignConfig, Tensor, Tensor]]:
        """Name, config, scalar, and the features themselves. Always computed: a head without a gradient is an error
        where processes average gradients."""
        seen = {net: self.borne[net](images) for net in {term.net: None for term in self.config.align}}
        for i, (term, alignment) in enumerate(zip(self.config.align, self.alignments, strict=True)):
            name = f"align_{i}" if len(self.config.align) > 1 else "align"
            yield name, term, *alignment(done, seen[term.net])
