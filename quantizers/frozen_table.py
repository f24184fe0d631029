"""Codes that are a learned linear map of a frozen table, so that every step moves all of them and none dies.

SimVQ (Zhu et al. 2024, https://arxiv.org/abs/2411.02038): the table is random. VQGAN-LC (Zhu et al. 2024,
https://arxiv.org/abs/2406.11837): it is made of features of a pretrained image encoder.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizers_vis.cuda.ops import nearest_code
from tokenizers_vis.quantizers.base import (
    Quantized,
    Quantizer,
    check_option,
    rotation_trick,
    straight_through,
    weighted,
)
from tokenizers_vis.quantizers.float32 import keep_dtype


class FrozenTable(Quantizer):
    """What SimVQ and VQGAN-LC share: the nearest of the codes W t + bias, where the table t stays and W is learned.

    frozen: k t, the table; it is saved with the weights. The other options are those of SimVQ.
    """

    distance = "euclidean"  # as VQ's option: Perturb looks for near codes by it

    def __init__(
        self,
        *,
        frozen: Tensor,
        dim: int,
        bias: bool,
        gradient: str,
        commitment: float,
        codebook_weight: float,
    ) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        passes = ("straight_through", "rotation")
        check_option(gradient in passes, "gradient is 'straight_through' or 'rotation'", gradient)
        check_option(commitment >= 0, "commitment is a weight, 0 or more", commitment)
        check_option(codebook_weight >= 0, "codebook_weight is a weight, 0 or more", codebook_weight)
        self.dim = dim
        self.codebook_sizes = (len(frozen),)
        self.gradient = gradient
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.register_buffer("frozen", frozen)
        self.projection = nn.Linear(frozen.shape[1], dim, bias=bias, dtype=torch.float32)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            table = self.table()
            ids = nearest_code(rearrange(z.detach(), "b n d -> (b n) d"), table.detach())
            ids = rearrange(ids, "(b n) -> b n", b=z.shape[0])
            codes = F.embedding(ids, table)
            loss, parts = self._loss(z, codes)
            codes = rotation_trick(codes, z) if self.gradient == "rotation" else straight_through(codes, z)
        return Quantized(codes, rearrange(ids, "b n -> b n 1"), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(self.check_ids(ids)[..., 0], self.table())

    def table(self) -> Tensor:
        """The codes as they come out: k d, float32. All are mapped, so that a code's bits are always the same."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.projection(self.frozen)

    def _loss(self, z: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses: dict[str, tuple[float, Tensor]] = {}
        if self.commitment:
            losses["commitment"] = self.commitment, F.mse_loss(z, codes.detach())
        if self.codebook_weight:
            losses["codebook"] = self.codebook_weight, F.mse_loss(codes, z.detach())
        return weighted(losses, z)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTable:
        return super()._apply(keep_dtype(fn), recurse)


class SimVQ(FrozenTable):
    """The nearest of the codes W t + bias, where the table t is random and frozen and only W and the bias are learned.

    dim: width of a code, and of the table.
    codebook_size: number of codes, 2 or more.
    bias: the map has one, as in the published code. vector-quantize-pytorch's has none.
    gradient: how the gradient passes from the code to z: "straight_through", as if they were equal, or "rotation",
        turned and scaled as z is to become the code (https://arxiv.org/abs/2410.06424).
    commitment: weight of mse(z, sg c), which draws the encoder to the codes.
    codebook_weight: weight of mse(c, sg z), which draws the codes, that is the map, to the encoder.

    ids: b n 1; of equally near codes, the lowest. parts: commitment, codebook.

    The default weights are those of the published runs, which set ``legacy: false``; with the published class's own
    default, ``legacy=True``, they are the other way round: commitment 1 and codebook_weight 0.25. There
    ``get_codebook_entry`` gives rows of the table; ``lookup`` gives the codes.
    Table and map stay in float32 when the model is cast. Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        bias: bool = True,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
    ) -> None:
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        super().__init__(
            frozen=random_table(codebook_size, dim),
            dim=dim,
            bias=bias,
            gradient=gradient,
            commitment=commitment,
            codebook_weight=codebook_weight,
        )


class VQGANLC(FrozenTable):
    """The nearest of the codes W t + bias, where the rows of the frozen table t are features of images.

    dim: width of a code; 8 as published.
    codebook_size: number of codes, 2 or more; 100000 as published.
    table_dim: width of the table; 768 for the published centres of CLIP's patch features.
    table: a file with the table, codebook_size by table_dim: .npy, .safetensors with one tensor, or .pt / .pth with one
        tensor (read with ``weights_only``). It is read once, and then part of the weights: a model whose weights come
        from a checkpoint needs no file. Without it the table is random, normal with rows of length about 1.
    commitment: weight of mse(z, sg c), which draws the encoder to the codes.
    codebook_weight: weight of mse(c, sg z), which draws the codes, that is the map, to the encoder.

    ids: b n 1; of equally near codes, the lowest. parts: commitment, codebook.
    The published training multiplies the whole loss by 0.1 (``rate_q``).
    Table and map stay in float32 when the model is cast. Raises ``ValueError`` for options out of range, and for a file
    that is missing, cannot be read, or has another shape.
    """

    def __init__(
        self,
        *,
        dim: int = 8,
        codebook_size: int = 100_000,
        table_dim: int = 768,
        table: Path | None = None,
        commitment: float = 1.0,
        codebook_weight: float = 0.33,
    ) -> None:
        check_option(table_dim >= 1, "table_dim is 1 or more", table_dim)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        shape = codebook_size, table_dim
        super().__init__(
            frozen=random_table(*shape) if table is None else read_table(table, *shape),
            dim=dim,
            bias=True,
            gradient="straight_through",
            commitment=commitment,
            codebook_weight=codebook_weight,
        )
        nn.init.normal_(self.projection.weight, std=dim**-0.5)


def random_table(k: int, d: int) -> Tensor:
    """k d, normal, with rows of length about 1."""
    return torch.randn(k, d, dtype=torch.float32) * d**-0.5


READERS: Mapping[str, Callable[[Path], Any]] = {
    ".npy": lambda path: torch.from_numpy(np.load(path, allow_pickle=False)),
    ".safetensors": load_file,
    ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True),
    ".pth": lambda path: torch.load(path, map_location="cpu", weights_only=True),
}


def read_table(path: Path, k: int, d: int) -> Tensor:
    """A table of k rows of width d, float32. Raises ``ValueError`` when the file does not hold one."""
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"a table is a file that ends in {', '.join(READERS)}; got {path}")
    if not path.is_file():
        raise ValueError(f"there is no table at {path}; name its file, or leave table out to start from a random one")
    try:
        found = READERS[path.suffix](path)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if isinstance(found, dict) and len(found) == 1:
        (found,) = found.values()
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{path} holds {type(found).__name__}, not one tensor; save the table alone, codebook_size by table_dim"
        )
    if found.shape != (k, d):
        raise ValueError(
            f"the table in {path} is {tuple(found.shape)}, not {k} by {d}; set codebook_size and table_dim to its shape"
        )
    found = found.float()
    if not found.isfinite().all():
        raise ValueError(f"the table in {path} holds numbers that are not finite")
    return found.contiguous()
