"""Alignment: features of a tokenizer learn to be like those of a frozen net, a teacher.

REPA: Yu et al. 2024, arXiv 2410.06940. VA-VAE: Yao et al. 2025, arXiv 2501.01423. FQGAN: Bai et al. 2024, arXiv
2411.16681. TokenFlow: Qu et al. 2024, arXiv 2412.03069. SoftVQ: Chen et al. 2024, arXiv 2412.10958.

Letters: b batch, m places (or tokens), d width of a feature, i j a grid of places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, did_you_mean
from tokenizers_vis.tokenizer import Tokenizer, TrainingPass
from tokenizers_vis.train.frozen import Features
from tokenizers_vis.train.likeness import (
    contrastive,
    difference,
    masked_mean,
    places,
    relations,
    resized_grid,
    tapered,
)
from tokenizers_vis.train.terms import Weight, check_weights


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """teacher: a timm net. weights: its local file; "" is timm's own. size: of its pictures, 0 is its own.

    weight: of this term.
    at: what is aligned: "codes"; "heads.0", what a head of the decoder tells from the codes (FQGAN, TokenFlow); or the
        path of any module of the tokenizer, whose output is taken: "encoder" (before it is quantized),
        "decoder.transformer.blocks.1", "encoder.path".
    match: "grid" compares place by place, the teacher's grid resized to this one; "tokens" lets each token, in order,
        stand for its share of the teacher's places in raster order (SoftVQ's "repeat"); "mean" compares the mean of all
        places or kept tokens with the teacher's pooled feature (class token, or mean); "first" the first place.
    first, grid: in a sequence the grid starts at place ``first`` and has ``grid`` rows; 0 is the decoder's own grid for
        a module in it, else a square of all places.
    loss: "cosine", 1 - cos; "mse"; "margin", VA-VAE's (with "grid" alone); "contrastive", which picks the own picture's
        pooled feature among the batch's (with "mean" and "first" alone), FQGAN's.
    margin, relation_margin: of "margin": cosines above 1 - margin are good enough, and so are two places whose cosine
        differs from the teacher's by less than relation_margin.
    head: from the width of the features to the teacher's: "mlp", three layers of ``hidden`` with SiLU (REPA),
        "linear" without bias (VA-VAE), "none". dim: width of the features; 0 finds it out where it can.
    tail: what is left of the weight at the last token, in a straight line from 1 at the first: prefixes learn meaning,
        the tail is free for detail (ReTok). Places of a grid count by the length of their image's prefix.
    adaptive: the weight is multiplied by the ratio of the gradients' norms, as for a critic, at the layer before the
        features (VA-VAE).
    """

    teacher: str
    weights: str = ""
    size: int = 0
    weight: Weight = 1.0
    at: str = "codes"
    match: Literal["grid", "tokens", "mean", "first"] = "grid"
    first: int = 0
    grid: int = 0
    loss: Literal["cosine", "mse", "margin", "contrastive"] = "cosine"
    margin: float = 0.5
    relation_margin: float = 0.25
    head: Literal["mlp", "linear", "none"] = "mlp"
    hidden: int = 2048
    dim: int = 0
    tail: float = 1.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_weights(weight=self.weight)
        if self.loss == "margin" and self.match != "grid":
            raise ValueError(f"loss 'margin' compares the places of a grid: set match to 'grid', not {self.match!r}")
        if self.loss == "contrastive" and self.match not in ("mean", "first"):
            raise ValueError(
                f"loss 'contrastive' compares pictures: set match to 'mean' or 'first', not {self.match!r}"
            )
        if not 0 <= self.tail <= 1:
            raise ValueError(f"tail is the share of the weight that is left at the last token, 0 to 1; got {self.tail}")
        if min(self.first, self.grid, self.size, self.dim) < 0 or self.hidden < 1:
            raise ValueError("first, grid, size and dim are 0 or more, hidden is 1 or more")

    @property
    def net(self) -> tuple[str, str, int]:
        """What tells one teacher from another."""
        return self.teacher, self.weights, self.size


class Alignment(nn.Module):
    """One term: ``alignment(done, teacher's features)`` -> its loss, scalar, and the features it is about.

    width: of the teacher's features. The head is trained and checkpointed with the run, not saved with the tokenizer.
    Raises ``ConfigError`` where the tokenizer has nothing of the name ``at``, or its width is not known.
    """

    def __init__(self, config: AlignConfig, tokenizer: Tokenizer, width: int) -> None:
        super().__init__()
        self.config = config
        self.max_tokens = tokenizer.encoder.max_tokens
        self.grid = config.grid
        self._source = Source(tokenizer, config.at)
        if config.at.startswith("decoder.") and not self.grid:
            self.grid = getattr(tokenizer.decoder, "grid", 0)
        dim = config.dim or self._source.dim
        if config.head != "none" and not dim:
            raise ConfigError(f"loss.align: the width of the features at {config.at!r} is not known; give it as dim")
        if config.head == "none" and dim not in (0, width):
            raise ConfigError(
                f"loss.align: features at {config.at!r} are {dim} wide, those of {config.teacher} {width}; "
                "with head = 'mlp' or 'linear' one becomes the other"
            )
        self.head = projection(config.head, dim, config.hidden, width)

    def forward(self, done: TrainingPass, target: Features) -> tuple[Tensor, Tensor]:
        features = self._source(done)
        x, n = places(features), self.max_tokens
        kept = torch.full((len(x),), n) if done.lengths is None else done.lengths
        kept = kept.to(x.device)
        if self.config.match == "tokens":
            return self._tokens(x, target, kept), features
        each = self._grid(x, target, features) if self.config.match == "grid" else self._picture(x, target, kept)
        return (each * tapered(kept - 1, n, self.config.tail)).mean(), features

    def _picture(self, x: Tensor, target: Features, kept: Tensor) -> Tensor:
        """One vector of each picture: b."""
        config = self.config
        if config.match == "first":
            x = x[:, :1]
        else:
            x = masked_mean(x, kept) if config.at in ("codes", "encoder") else x.mean(dim=1, keepdim=True)
        mine = self.head(x).float()
        if config.loss == "contrastive":
            return contrastive(mine[:, 0], target.pooled)
        return difference(config.loss, mine, target.pooled[:, None])[:, 0]

    def _grid(self, x: Tensor, target: Features, features: Tensor) -> Tensor:
        """Place by place: b."""
        x, grid = self._on_grid(x, features)
        mine, wanted = self.head(x).float(), resized_grid(target.patches, grid)
        each = difference(self.config.loss, mine, wanted, self.config.margin).mean(dim=1)
        return each + relations(mine, wanted, self.config.relation_margin) if self.config.loss == "margin" else each

    def _tokens(self, x: Tensor, target: Features, kept: Tensor) -> Tensor:
        """Each token against its share of the teacher's places, scalar; tokens that an image does not keep are out."""
        mine, wanted = self.head(x).float(), places(target.patches)
        m, p = mine.shape[1], wanted.shape[1]
        pair = torch.arange(max(m, p), device=x.device)
        token, place = (pair * count // max(m, p) for count in (m, p))
        each = difference(self.config.loss, mine[:, token], wanted[:, place])
        each = each * tapered(token, self.max_tokens, self.config.tail)
        real = (token < kept[:, None]).float()
        return (each * real).sum() / real.sum().clamp_min(1)

    def _on_grid(self, x: Tensor, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The places that stand on a grid, and its rows and columns."""
        if features.ndim == 4:
            return x, (features.shape[2], features.shape[3])
        first, m = self.config.first, x.shape[1] - self.config.first
        side = self.grid or int(m**0.5)
        if side**2 > m or not self.grid and side**2 != m:
            raise ConfigError(
                f"loss.align: {self.config.at!r} has {m} places from place {first} on, which are no grid of "
                f"{side} x {side}; say where it is with first and grid, or set match to 'tokens' or 'mean'"
            )
        return x[:, first : first + side**2], (side, side)


class Source:
    """The features of a pass under a name, as ``AlignConfig.at`` says. dim: their width, 0 where it is not known."""

    def __init__(self, tokenizer: Tokenizer, at: str) -> None:
        self.at = at
        self.head: tuple[nn.Module, ...] = ()  # of the decoder; in a tuple, since it is registered there
        self.seen: list[Tensor] = []
        part, _, rest = at.partition(".")
        decoder, modules = tokenizer.decoder, dict(tokenizer.named_modules())
        if at == "codes":
            self.dim = tokenizer.quantizer.dim
        elif part == "heads":
            heads = getattr(decoder, "heads", ())
            if not rest.isdigit() or int(rest) >= len(heads):
                raise ConfigError(f"loss.align.at is {at!r}, and the decoder has {len(heads)} heads")
            self.head = (heads[int(rest)],)
            with torch.no_grad():
                self.dim = self.head[0](torch.zeros(1, decoder.max_tokens, decoder.dim)).shape[-1]
        elif at and at in modules:
            self.dim = tokenizer.encoder.dim if at == "encoder" else tokenizer.config.get(part, {}).get("width", 0)
            watch(modules[at], self.seen)
        else:
            raise ConfigError(
                f"loss.align.at is {at!r}, and the tokenizer has no such module.{did_you_mean(at, modules)} It is "
                "codes, heads.0, encoder, or the path of a module"
            )

    def __call__(self, done: TrainingPass) -> Tensor:
        if self.at == "codes":
            return done.quantized.codes
        if self.head:
            return self.head[0](done.quantized.codes)
        if not self.seen or not isinstance(self.seen[0], Tensor) or self.seen[0].ndim not in (3, 4):
            raise ConfigError(
                f"loss.align.at is {self.at!r}, which gave no features b m d or b d i j in this pass; name another"
            )
        return self.seen.pop()


def watch(module: nn.Module, seen: list[Tensor]) -> None:
    """Leaves the module's latest output in ``seen``, where gradients are asked for: validation leaves nothing.

    The hook holds the list alone, so that a copy of the module (its moving average) carries nothing else along.
    """

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            seen[:] = [output]

    module.register_forward_hook(keep)


def projection(kind: str, dim: int, hidden: int, width: int) -> nn.Module:
    """Features b m dim -> b m width."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(dim, width, bias=False)
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
    )
