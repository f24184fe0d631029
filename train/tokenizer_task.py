"""Learning a tokenizer: images in, losses out, reconstructions at several lengths to judge it by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizers_vis.config import ConfigError, build, did_you_mean
from tokenizers_vis.decoders.canvas import Canvas, Pixels
from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.metrics import CodebookUsage, psnr
from tokenizers_vis.presets import load
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import PARTS, Tokenizer
from tokenizers_vis.train.adversary import Critic
from tokenizers_vis.train.anneal import anneal
from tokenizers_vis.train.canvas import adopt_canvas
from tokenizers_vis.train.data import DataConfig, TrainBatches, val_batches
from tokenizers_vis.train.health import CodeHealth
from tokenizers_vis.train.losses import LossConfig, Losses, LossSum
from tokenizers_vis.train.task import RunConfig, Task, Validation
from tokenizers_vis.train.tower import adopt_tower

Part = Literal["canvas", "encoder", "quantizer", "decoder"]


@dataclass(frozen=True)
class InitConfig:
    """What is taken from a trained tokenizer: a preset, file or run folder.

    weights: for a preset, its authors' file, in place of a download.
    parts: taken whole, config and weights. freeze: those of them that stay as they are; true is all.
    adopt: parts of another architecture, which take over the weights of the same name and shape; those of patches are
        resized to the size of the own. A canvas of VQGAN codes adopts all it has, from another such canvas or from the
        2D VQGAN itself.

    first_tokens: all tokens of ``tokenizer``, of which the recipe's has more: the same ids first, then new ones. The
        encoder is adopted and learns nothing but the tokens that are new; a decoder that is adopted grows as well. The
        quantizer is taken whole and frozen.

    decoder: another trained tokenizer whose decoder is adopted in place of that of ``tokenizer``. Its ids are the same,
        or the first of them: with fewer tokens it grows.

    tower, tower_weights: a timm model of CLIP or SigLIP, and a local file of it or "" for a download, from which the
        transformer of a dual encoder starts (TokenFlow).

    The canvas is taken whole where it is not adopted; one of pixels may differ in the size that is decoded.
    """

    tokenizer: str = ""
    weights: str = ""
    parts: tuple[Part, ...] = ()
    freeze: bool | tuple[Part, ...] = False
    adopt: tuple[Part, ...] = ()
    first_tokens: int = 0
    decoder: str = ""
    tower: str = ""
    tower_weights: str = ""

    def __post_init__(self) -> None:
        if self.tokenizer and self.tower:
            raise ValueError("tower is what an encoder starts from that is of no trained tokenizer: give one of them")
        if bool(self.tokenizer) != bool(self.parts or self.adopt):
            raise ValueError("tokenizer comes with parts or adopt: which trained tokenizer, and which of its parts")
        if both := set(self.parts) & set(self.adopt):
            raise ValueError(f"{', '.join(both)} is either taken whole (parts) or adopted, not both")
        if not isinstance(self.freeze, bool) and (loose := set(self.freeze) - set(self.parts)):
            raise ValueError(f"freeze names parts that are taken whole; {', '.join(loose)} is not among parts")
        if self.decoder and "decoder" not in self.adopt:
            raise ValueError("decoder is the tokenizer whose decoder is adopted: adopt names no decoder")
        if self.first_tokens and not ("encoder" in self.adopt and "quantizer" in self.frozen):
            raise ValueError("first_tokens comes with an encoder that is adopted and a quantizer that is frozen")

    @property
    def frozen(self) -> tuple[Part, ...]:
        return (self.parts if self.freeze else ()) if isinstance(self.freeze, bool) else self.freeze


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """``tokenizer`` is a preset's table: canvas, encoder, quantizer, decoder."""

    tokenizer: dict[str, Any] = field(default_factory=dict)
    data: DataConfig
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)


class TokenizerTask(Task):
    """See ``Task``."""

    config_type = TrainConfig

    def __init__(self, config: TrainConfig, device: torch.device, built: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, device, built)
        if not config.data.train:
            raise ConfigError("data.train is empty: say where the images are (--data PATH)")
        self.source = open_source(config.data.train)
        self.fingerprint = self.source.fingerprint
        self.model = untrained(config) if built is None else Tokenizer.from_config(built)
        for part in config.init.frozen:
            getattr(self.model, part).requires_grad_(False)
        if config.init.first_tokens:
            self.model.encoder.keep(config.init.first_tokens)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError("init.freeze leaves nothing to train: name fewer parts")
        self.losses = LossSum(config.loss, self.model, device)
        model = self.model
        self.health = None if model.continuous else CodeHealth(model.codebook_sizes, model.max_tokens)

    @property
    def critic(self) -> Critic | None:  # no attribute, which would register it here
        return self.losses.critic

    @property
    def built(self) -> dict[str, Any]:
        return self.model.config

    def batches(self, start: int, rank: int, world: int) -> TrainBatches:
        size, batch_size, seed = self.model.image_size, self.config.optim.batch_size, self.config.seed
        place = {"start": start, "rank": rank, "world": world}
        return TrainBatches.of(
            self.source, self.config.data, image_size=size, batch_size=batch_size, seed=seed, **place
        )

    def set_modes(self) -> None:
        self.train()
        for part in self.config.init.frozen:
            getattr(self.model, part).eval()

    def forward(self, data: Tensor) -> Losses:
        """data: b 3 h w, uint8."""
        anneal(self.model, self.config.loss.anneal, self.step)
        images = data.float() / 255
        done = self.model.training_pass(images)
        if self.health is not None:
            self.health.update(done.quantized.ids)
        return self.losses(done, images, self.step)

    def scalars(self) -> dict[str, float]:
        return {} if self.health is None else self.health.compute()

    def real(self, data: Tensor) -> Tensor:
        return data.float() / 255

    @torch.no_grad()
    def validate(self, model: Tokenizer) -> Validation | None:
        """PSNR (and the perceptual distance) of the averaged weights at each length, codebook use, and a picture."""
        data = self.config.data
        if not data.val:
            return None
        lengths = powers_of_two(model.max_tokens) if model.nested else [model.max_tokens]
        if len(lengths) > 4 and not model.decoder.one_pass:
            # Each length is a whole sampling run.
            lengths = sorted({*lengths[2::2], lengths[-1]})
        sums: dict[str, float] = {}
        count, rows = 0, []
        usage = None if model.continuous else CodebookUsage(model.codebook_sizes)
        for batch in val_batches(open_source(data.val), model.image_size, data.val_images, 64):
            images = batch.to(model.device).float() / 255
            tokens = model.encode(images, batch_size=64)
            if usage is not None:
                usage.update(tokens.ids)
            columns = []
            for n in lengths:
                pictures = model.decode(tokens[:, :n], batch_size=64)
                columns.append(pictures[:8].cpu())
                scores = {f"psnr@{n}": psnr(pictures, images)}
                if self.losses.distance is not None:
                    with torch.autocast(images.device.type, enabled=False):
                        scores[f"perceptual@{n}"] = self.losses.distance(pictures, images)
                for key, value in scores.items():
                    sums[key] = sums.get(key, 0.0) + value.sum().item()
            count += len(images)
            rows = rows or [[*(column[i] for column in columns), image.cpu()] for i, image in enumerate(images[:8])]
        scalars = {key: value / count for key, value in sums.items()}
        for k, used in enumerate(usage.compute() if usage else ()):
            scalars[f"codebook_use/{k}"] = used.used
        from tokenizers_vis.pictures import contact_sheet

        heads = [f"{n} token" if n == 1 else f"{n} tokens" for n in lengths]
        return Validation(scalars, contact_sheet(rows, columns=[*heads, "original"]))

    def score(self, scalars: Mapping[str, float]) -> float | None:
        """The perceptual distance with all tokens where it is trained on, else PSNR."""
        n = self.model.max_tokens
        return -scalars[f"perceptual@{n}"] if f"perceptual@{n}" in scalars else scalars.get(f"psnr@{n}")

    def save(self, model: Tokenizer, folder: Path, name: str | None = None) -> None:
        model.save(folder / (name or "tokenizer.safetensors"))


def untrained(config: TrainConfig) -> Tokenizer:
    """The tokenizer of a recipe, with the parts that ``init`` names taken from a trained one."""
    for part in config.tokenizer:
        if part not in PARTS:
            raise ConfigError(f"a tokenizer has no {part!r}.{did_you_mean(part, PARTS)} It has: {', '.join(PARTS)}.")
    table = {"name": config.name, **config.tokenizer}
    init = config.init
    if not init.tokenizer:
        tokenizer = Tokenizer.from_config(table)
        if init.tower:
            adopt_tower(tokenizer.encoder, init.tower, init.tower_weights)
        return tokenizer
    source = load(init.tokenizer, device="cpu", weights=init.weights or None)
    whole = [part for part in dict.fromkeys(("canvas", *init.parts)) if part not in init.adopt]
    for part in whole:
        if table.setdefault(part, source.config[part]) != source.config[part] and not (
            part == "canvas" and _reads_alike(table[part], source)
        ):
            raise ConfigError(f"tokenizer.{part} differs from that of {init.tokenizer}, which init takes; leave it out")
    if {"encoder", "quantizer"} <= set(init.frozen) or init.first_tokens:
        table["codes"] = source.codes  # the same ids: either decodes the other's files
    tokenizer = Tokenizer.from_config(table)
    # The canvas may hold weights of its own (a VAE, a VQGAN); a tokenizer that is tuned keeps those.
    for part in whole:
        getattr(tokenizer, part).load_state_dict(getattr(source, part).state_dict())
    if init.first_tokens:
        _check_grows(tokenizer, source, init)
    drawer = load(init.decoder, device="cpu") if init.decoder else source
    if init.decoder and drawer.codes != tokenizer.codes:
        raise ConfigError(
            f"init.decoder: {init.decoder} decodes ids of {drawer.codes!r}, the recipe's tokenizer makes those of "
            f"{tokenizer.codes!r}"
        )
    for part in init.adopt:
        if part == "canvas":
            adopt_canvas(tokenizer.canvas, source, init.tokenizer)
            continue
        giver = drawer if part == "decoder" else source
        own, other = (getattr(t, part).state_dict() for t in (tokenizer, giver))
        resized = {key: resized_patches(key, value, own[key].shape) for key, value in other.items() if key in own}
        if giver.codes == tokenizer.codes:
            resized = with_rows(resized, own, getattr(tokenizer, part).tables)
        fitting = {key: value for key, value in resized.items() if own[key].shape == value.shape}
        if not fitting:
            name = init.decoder if giver is not source else init.tokenizer
            raise ConfigError(f"init.adopt: the {part} of {name} has no weight of the same name and shape")
        getattr(tokenizer, part).load_state_dict({**own, **fitting})
    return tokenizer


def _check_grows(tokenizer: Tokenizer, source: Tokenizer, init: InitConfig) -> None:
    """Raises ``ConfigError`` unless the tokenizer is the source with more tokens."""
    encoder, name = source.encoder, init.tokenizer
    if not (encoder.causal and encoder.tables):
        raise ConfigError(f"init.first_tokens: the tokens of {name} depend on later ones, they would not stay the same")
    if encoder.max_tokens != init.first_tokens or tokenizer.max_tokens <= encoder.max_tokens:
        raise ConfigError(
            f"init.first_tokens is what {name} has, {encoder.max_tokens}, and the recipe's max_tokens are more; got "
            f"{init.first_tokens} and {tokenizer.max_tokens}"
        )
    free = ("max_tokens", "lengths")
    mine, its = ({k: v for k, v in t.config["encoder"].items() if k not in free} for t in (tokenizer, source))
    if mine != its:
        keys = ", ".join(key for key in {**mine, **its} if mine.get(key) != its.get(key))
        raise ConfigError(f"tokenizer.encoder differs from that of {name} in more than max_tokens: {keys}")


def with_rows(state: dict[str, Tensor], own: Mapping[str, Tensor], tables: Sequence[str]) -> dict[str, Tensor]:
    """``state`` with as many tokens as ``own``: the rows of its ``tables`` are cut, or followed by those of ``own``."""
    shared = [key for key in tables if key in state and state[key].shape[1:] == own[key].shape[1:]]
    return state | {key: torch.cat([state[key][: len(own[key])], own[key][len(state[key]) :]]) for key in shared}


def resized_patches(key: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """A weight of patches (p p c numbers in or out) resized to those of another size, others as they are.

    What is written is enlarged by bicubic interpolation in the plane of the patch; what reads does so by mean pixels,
    the least squares of FlexiViT (https://arxiv.org/abs/2212.08013) for whole multiples.
    """
    part = key.rpartition(".")[0]
    if part not in ("read_patches", "to_patches") or value.shape == tuple(shape):
        return value
    axis = 1 if part == "read_patches" else 0
    sides = [math.isqrt(size[axis] // 3) for size in (value.shape, shape)]
    if [3 * side**2 for side in sides] != [value.shape[axis], shape[axis]]:
        return value
    before, after = sides
    planes = rearrange(value.movedim(axis, 0).float(), "(p q c) ... -> c (...) p q", p=before, q=before)
    if part == "read_patches":
        planes = F.interpolate(planes, (after, after), mode="area") * (before / after) ** 2
    else:
        planes = F.interpolate(planes, (after, after), mode="bicubic", align_corners=False)
    flat = rearrange(planes, "c n p q -> (p q c) n")
    resized = flat[:, 0] if value.ndim == 1 else flat.movedim(0, axis)
    return resized.to(value.dtype).contiguous()


def _reads_alike(canvas: dict[str, Any], source: Tokenizer) -> bool:
    built = build(Canvas, canvas, "canvas")
    return isinstance(built, Pixels) and built.reads_like(source.canvas)
