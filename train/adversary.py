"""The adversarial loss: a critic learns to tell reconstructions from originals, a tokenizer to deceive it.

VQGAN, Esser et al. 2021, arXiv 2012.09841. LeCAM: Tseng et al. 2021, arXiv 2104.03310.
Letters: b batch, h w height and width; logits are b with any places behind, high for an original.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError
from tokenizers_vis.quantizers.base import is_distributed, over_ranks
from tokenizers_vis.train.critics import BlurNet, PatchNet
from tokenizers_vis.train.feature_critic import FeatureCriticConfig, FeatureNet
from tokenizers_vis.train.frozen import steady
from tokenizers_vis.train.optim import OptimConfig
from tokenizers_vis.train.terms import Losses

Objective = Literal["hinge", "vanilla", "nonsaturating"]


@dataclass(frozen=True)
class GanConfig:
    """weight: of the adversarial loss; 0 is no critic.

    critic: "patch" (VQGAN's PatchGAN), "blur" (TiTok's, of ``width`` 128), "features" (heads on a frozen vision
        transformer, see ``FeatureCriticConfig``). width, depth: of the first two; width 0 is the critic's own.
    objective: "hinge"; "vanilla" is the original GAN's for the critic and hinge's for the tokenizer, "nonsaturating"
        also the original's for the tokenizer.
    start: the step, from 0, from which the tokenizer feels the critic. ramp: steps from there to the whole weight.
    ahead: steps that the critic learns before ``start``.
    adaptive: the weight is multiplied by the ratio of the gradients' norms, those of all losses on pictures to those of
        the critic's, at the decoder's last "layer" (VQGAN) or at the "picture" itself, which is cheaper and also goes
        together with torch.compile and sharding.
    lecam: weight of the regulariser that keeps the critic near its own averages. lecam_decay: of these averages.
        lecam_of: it looks at each of the "logits", as its authors, or at their "means" over a batch, as TiTok.
    rate: learning rate, times the tokenizer's. betas, weight_decay: of AdamW; none is the tokenizer's.
    """

    weight: float = 0.0
    critic: Literal["patch", "blur", "features"] = "patch"
    width: int = 0
    depth: int = 3
    features: FeatureCriticConfig = field(default_factory=FeatureCriticConfig)
    objective: Objective = "hinge"
    start: int = 0
    ramp: int = 0
    ahead: int = 0
    adaptive: Literal["off", "layer", "picture"] = "off"
    lecam: float = 0.0
    lecam_decay: float = 0.999
    lecam_of: Literal["means", "logits"] = "means"
    rate: float = 1.0
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if min(self.weight, self.lecam, self.rate, self.weight_decay or 0) < 0 or not 0 <= self.lecam_decay < 1:
            raise ValueError(
                f"weight, lecam, rate and weight_decay are at least 0 and lecam_decay from 0 to below 1, got "
                f"{self.weight}, {self.lecam}, {self.rate}, {self.weight_decay} and {self.lecam_decay}"
            )
        if min(self.start, self.ramp, self.ahead, self.width) < 0 or self.depth < 1:
            raise ValueError("start, ramp, ahead and width are at least 0, depth is at least 1")

    def weight_at(self, step: int) -> float:
        """0 before ``start``, then up a straight line to ``weight``."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / (self.ramp + 1))


class Critic(nn.Module):
    """``critic(fake, real)`` gives its own loss; ``critic.doubt(fake)`` the tokenizer's, without touching the critic.

    start: the step from which it learns. rate: its learning rate, times the tokenizer's. image_size: of the pictures,
    for a net that needs a smallest one. LeCAM's averages are buffers: a checkpoint holds them.
    Raises ``ConfigError``, and ``ValueError`` as ``FeatureNet`` does.
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(self, config: GanConfig, image_size: int) -> None:
        super().__init__()
        self.config, self.rate = config, config.rate
        self.start = max(0, config.start - config.ahead)
        if config.critic == "features":
            self.net: nn.Module = FeatureNet(config.features)
        else:
            kind, width = {"patch": (PatchNet, 64), "blur": (BlurNet, 128)}[config.critic]
            self.net = kind(width=config.width or width, depth=config.depth)
        if image_size < self.net.least:
            raise ConfigError(
                f"loss.gan: a critic of depth {config.depth} sees pictures of {self.net.least} px and more, these are "
                f"{image_size}; give it a smaller depth"
            )
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def optim(self, config: OptimConfig) -> OptimConfig:
        """Its optimiser's options, from the tokenizer's."""
        own = {"betas": self.config.betas, "weight_decay": self.config.weight_decay}
        given = {key: value for key, value in own.items() if value is not None}
        return dataclasses.replace(config, lr=config.lr * self.rate, **given)

    def logits(self, pictures: Tensor) -> Tensor:
        """b 3 h w, about [0, 1] -> float32."""
        with steady(pictures.device):
            return self.net(pictures.float()).float()

    def forward(self, fake: Tensor, real: Tensor) -> Losses:
        """fake, real: b 3 h w, about [0, 1], without gradient."""
        real_logits, fake_logits = self.logits(real), self.logits(fake)
        total = critic_loss(self.config.objective, real_logits, fake_logits)
        means = real_logits.detach().mean(), fake_logits.detach().mean()
        parts = {"critic": total.detach(), "critic_real": means[0], "critic_fake": means[1]}
        if self.config.lecam:
            seen = (real_logits, fake_logits)
            if self.config.lecam_of == "means":
                seen = (real_logits.mean(), fake_logits.mean())
            regulariser = lecam(*seen, self.real_average, self.fake_average)
            total = total + self.config.lecam * regulariser
            parts["lecam"] = regulariser.detach()
            self._remember(*means)
        return Losses(total, parts)

    def doubt(self, fake: Tensor) -> Tensor:
        """b 3 h w with gradient -> b: the loss of whoever made the pictures. No parameter here gets a gradient."""
        with frozen(self):
            return deceiver_loss(self.config.objective, self.logits(fake))

    @torch.no_grad()
    def _remember(self, real: Tensor, fake: Tensor) -> None:
        means = torch.stack([real, fake])
        if is_distributed():
            means = over_ranks(means) / torch.distributed.get_world_size()
        for average, mean in zip((self.real_average, self.fake_average), means, strict=True):
            average.lerp_(mean, 1 - self.config.lecam_decay)


def critic_loss(objective: Objective, real: Tensor, fake: Tensor) -> Tensor:
    """Scalar, half for the originals, half for the others."""
    if objective == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def deceiver_loss(objective: Objective, fake: Tensor) -> Tensor:
    """b, the mean over the places of each image."""
    each = F.softplus(-fake) if objective == "nonsaturating" else -fake
    return each.flatten(1).mean(dim=1)


def lecam(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """Scalar: how far originals are above the average of the others, and the others below that of the originals."""
    return F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside gives no gradient to the parameters."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def balance(reference: Tensor, loss: Tensor, at: Tensor, most: float = 1e4) -> Tensor:
    """VQGAN's adaptive weight, scalar: how much larger the gradient of ``reference`` is than that of ``loss``.

    at: what the gradients are of, a weight or an activation. The graph is kept. Raises ``ValueError`` where one of the
    two losses does not depend on it.
    """
    pair = [torch.autograd.grad(term, at, retain_graph=True, allow_unused=True)[0] for term in (reference, loss)]
    if pair[0] is None or pair[1] is None:
        raise ValueError(
            "an adaptive weight compares the gradients of two losses at one place, and one of them has none there: "
            "give a loss on pictures a weight (l1, l2, perceptual; a flow's own loss is not one at the picture)"
        )
    return (pair[0].norm() / (pair[1].norm() + 1e-4)).clamp(0, most).detach()


def nearest_weight(x: Tensor) -> Tensor:
    """The weight (of a layer, no bias) that is trained and fewest operations before x. Raises ``ValueError``."""
    waiting, known = deque([x.grad_fn]), {x.grad_fn}
    while waiting:
        node = waiting.popleft()
        if node is None:
            continue
        weight = getattr(node, "variable", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            return weight
        if "CompiledFunction" in node.name():
            raise ValueError("in a compiled model no layer can be told apart: set gan.adaptive to 'picture'")
        for before, _ in node.next_functions:
            if before not in known:
                known.add(before)
                waiting.append(before)
    raise ValueError("an adaptive weight needs a layer that is trained, and nothing before it is; set adaptive off")
