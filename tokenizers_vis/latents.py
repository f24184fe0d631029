"""Continuous tokens: what ``encode`` gives where a tokenizer has no codebook."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_vis.files import write_atomically


@dataclass(frozen=True, eq=False)
class Latents:
    """Vectors instead of ids, for a batch of images.

    values: b n d, floats, d numbers a token.
    tokenizer: the name of the tokenizer whose they are.
    """

    values: Tensor
    tokenizer: str

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.ndim != 3 or not self.values.is_floating_point():
            got = getattr(self.values, "shape", type(self.values).__name__)
            raise ValueError(f"latents are floats b n d (batch, tokens, width), got {got}")
        if 0 in self.values.shape:
            raise ValueError(f"a batch holds at least one image of at least one token, got {tuple(self.values.shape)}")
        if not self.tokenizer:
            raise ValueError("latents carry the name of the tokenizer that made them, got an empty one")

    @property
    def n_tokens(self) -> int:
        return self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Latents:
        """A part of the batch, by a number, a slice or a list; tokens of one image are not divided."""
        if isinstance(rows, tuple):
            raise ValueError("latents take [images] alone: continuous tokens of one image belong together")
        values = self.values[rows]
        return replace(self, values=values if values.ndim == 3 else values[None])

    def __iter__(self) -> Iterator[Latents]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        b, n, d = self.values.shape
        return f"Latents({b} x {n} tokens of {d} numbers, of {self.tokenizer}, {self.values.dtype})"

    def to(self, device: torch.device | str) -> Latents:
        return replace(self, values=self.values.to(device))

    def cpu(self) -> Latents:
        return self.to("cpu")

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        header = {"format": "tokenizers_vis.latents", "version": "1", "tokenizer": json.dumps(self.tokenizer)}
        tensors = {"values": self.values.detach().cpu().contiguous()}
        write_atomically(Path(path), lambda target: save_file(tensors, target, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> Latents:
        """Reads what ``save`` wrote. Raises ``ValueError`` for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != "tokenizers_vis.latents":
                    raise ValueError(f"{path} holds no latents: its header does not say so")
                return cls(file.get_tensor("values"), json.loads(header["tokenizer"]))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
