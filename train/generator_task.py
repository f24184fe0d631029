"""Learning a generator: ids in, cross-entropy out, judged in bits beside what counting alone would give.

The data are shards of ids as ``tokenizers-vis tokenize`` writes them; the tokenizer itself is not needed, but for
looking at samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tokenizers_vis.catalogue import downloaded, list_presets
from tokenizers_vis.config import ConfigError
from tokenizers_vis.generator import FILE, Generator
from tokenizers_vis.generators.ngram import NGram
from tokenizers_vis.presets import load
from tokenizers_vis.token_shards import TokenShards
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.train.losses import Losses
from tokenizers_vis.train.task import RunConfig, Task, Validation
from tokenizers_vis.train.token_data import TokenBatch, TokenBatches

BASELINES = ("zero_order", "bigram")
# Enough to count on; more would cost memory and change little.
MOST_COUNTED = 20_000_000
SHEET_ROWS, SHEET_COLUMNS = 8, 6


@dataclass(frozen=True, kw_only=True)
class TokenDataConfig:
    """What a run learns from.

    train, val: folders of token shards; an empty ``val`` is no validation. val_images: how many to validate on, evenly
        spaced, the first crop of each.
    tokenizer: decodes samples to look at: a preset, file or folder. "" is the one that the shards name, where it is at
        hand without a download.
    """

    train: str = ""
    val: str = ""
    val_images: int = 1000
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.val_images < 1:
            raise ValueError(f"val_images is at least 1, got {self.val_images}")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(RunConfig):
    """model: table of a ``TokenModel``: kind, backbone, codes and what else the kind takes.

    sampling: options that samples of it are drawn with where a user does not say otherwise.
    label_dropout: share of training images that are shown without their class, which guidance needs.
    """

    task: str = "generator"
    model: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    data: TokenDataConfig
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout is a share from 0 to 1, got {self.label_dropout}")


class GeneratorTask(Task):
    """See ``Task``."""

    config_type = GeneratorConfig

    def __init__(self, config: GeneratorConfig, device: torch.device, built: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, device, built)
        if not config.data.train:
            raise ConfigError("data.train is empty: say where the shards of ids are (--tokens DIR)")
        self.shards = TokenShards(config.data.train)
        self.val = TokenShards(config.data.val) if config.data.val else None
        if self.val is not None:
            self._check_val()
        self.fingerprint = self.shards.fingerprint
        self.model = Generator.from_config(self._table() if built is None else built)
        # In tuples: what is in them is neither trained nor saved.
        self._tokenizer = (self._find_tokenizer(),)
        self._baselines: dict[str, float] = {}

    @property
    def built(self) -> dict[str, Any]:
        return self.model.config

    def batches(self, start: int, rank: int, world: int) -> TokenBatches:
        return TokenBatches(
            self.shards,
            batch_size=self.config.optim.batch_size,
            seed=self.config.seed,
            start=start,
            rank=rank,
            world=world,
        )

    def forward(self, data: TokenBatch) -> Losses:
        labels = self._labels(data.labels)
        dropped = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
        labels = labels.masked_fill(dropped, self.model.classes)
        loss = self.model.model.loss(data.ids, labels, self.step / self.config.optim.steps)
        return Losses(loss, {"bits_per_token": loss.detach() / math.log(2)})

    @torch.no_grad()
    def validate(self, model: Generator) -> Validation | None:
        """Bits of held-out ids under the averaged weights, and under models that count; and a sheet of samples."""
        if self.val is None:
            return None
        ids, labels = self._val_ids()
        bits = 0.0
        for start in range(0, len(ids), 64):
            part = ids[start : start + 64].to(model.device)
            rows = self._labels(labels[start : start + 64].to(model.device))
            bits -= model.model.log_prob(part, rows).sum().item() / math.log(2)
        scalars = {"bits_per_token": bits / ids[..., 0].numel(), "bits_per_image": bits / len(ids)}
        if not self._baselines:
            self._baselines = self._count(ids)
        return Validation(scalars | self._baselines, self._sheet(model))

    def score(self, scalars: Mapping[str, float]) -> float | None:
        return -scalars["bits_per_token"]

    def save(self, model: Generator, folder: Path, name: str | None = None) -> None:
        model.save(folder / (name or FILE))

    def _table(self) -> dict[str, Any]:
        """The config of the generator, from the recipe and what the shards say of themselves."""
        shards = self.shards
        return {
            "name": self.config.name,
            "tokenizer": shards.tokenizer,
            "hash": shards.hash,
            "codebook_sizes": list(shards.codebook_sizes),
            "nested": shards.nested,
            "max_tokens": shards.n_tokens,
            "classes": len(shards.classes) or max(0, int(shards.labels.max()) + 1),
            "class_names": list(shards.classes),
            "model": self.config.model,
            "sampling": self.config.sampling,
        }

    def _check_val(self) -> None:
        for key in ("tokenizer", "hash", "codebook_sizes", "n_tokens"):
            train, val = getattr(self.shards, key), getattr(self.val, key)
            if train != val:
                raise ConfigError(
                    f"data.val and data.train are not of the same ids: {key} is {val!r} in {self.val.path}, "
                    f"{train!r} in {self.shards.path}. Tokenize both with one tokenizer"
                )

    def _labels(self, labels: Tensor) -> Tensor:
        """-1, an image without a class, as the model counts it: after the last class."""
        most = int(labels.max())
        if most >= self.model.classes:
            raise ValueError(f"the shards hold label {most}, the generator has {self.model.classes} classes, from 0")
        return labels.masked_fill(labels < 0, self.model.classes)

    def _val_ids(self) -> tuple[Tensor, Tensor]:
        count = min(self.config.data.val_images, len(self.val))
        images = np.arange(count) * len(self.val) // count
        return self.val.gather(images, np.zeros_like(images)), torch.from_numpy(self.val.labels[images])

    def _count(self, val: Tensor) -> dict[str, float]:
        """Bits per token of validation ids under models that counted the training ids."""
        shards = self.shards
        count = min(len(shards), max(1, MOST_COUNTED // (shards.n_tokens * len(shards.codebook_sizes))))
        images = np.arange(count) * len(shards) // count
        train = shards.gather(images, np.zeros_like(images))
        k = len(shards.codebook_sizes)
        pair = [_flat(ids, shards.codebook_sizes) for ids in (train, val)]
        return {
            f"bits_per_token/{kind}": k * NGram(pair[0], sum(shards.codebook_sizes), kind).bits(pair[1])
            for kind in BASELINES
        }

    def _find_tokenizer(self) -> Tokenizer | None:
        """What decodes samples, on the CPU, or None."""
        name = self.config.data.tokenizer
        if name:
            tokenizer = load(name, "cpu")
            self.model.check(tokenizer)
            return tokenizer
        name = self.shards.tokenizer
        if name not in list_presets() or not downloaded(name):
            return None
        tokenizer = load(name, "cpu")
        try:
            self.model.check(tokenizer)
        except ValueError as error:
            warnings.warn(f"no samples will be drawn: {error}", stacklevel=2)
            return None
        return tokenizer

    def _sheet(self, model: Generator) -> Any:
        """A row of samples for each of some classes."""
        tokenizer = self._tokenizer[0]
        if tokenizer is None:
            return None
        from tokenizers_vis.pictures import contact_sheet

        count = min(SHEET_ROWS, max(1, model.classes))
        labels = [i * model.classes // count for i in range(count)] if model.classes else [None]
        tokens = model.sample([label for label in labels for _ in range(SHEET_COLUMNS)])
        with torch.autocast(model.device.type, enabled=False):
            pictures = tokenizer.decode(tokens.cpu())
        names = [model.class_names[i] if model.class_names else f"class {i}" for i in labels]
        return contact_sheet(list(rearrange(pictures, "(r c) ... -> r c ...", r=count)), row_labels=names)


def _flat(ids: Tensor, codebook_sizes: tuple[int, ...]) -> np.ndarray:
    """ids: b n k -> b (n k), one vocabulary."""
    return Tokens(ids, codebook_sizes=codebook_sizes, tokenizer="").to_sequence().numpy()
