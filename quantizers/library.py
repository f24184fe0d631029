"""Any quantizer of vector-quantize-pytorch behind our contract (https://github.com/lucidrains/vector-quantize-pytorch)."""

from __future__ import annotations

import copy
import difflib
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.quantizers.float32 import keep_dtype

NOT_SERVED = {
    "BinaryMapper": "it gives one-hot vectors, not codes",
    "EvoLFQ": "it is a whole autoencoder; its quantizer is LFQ",
    "HierarchicalVQ": "its levels have different numbers of tokens",
    "LatentQuantize": "its lookup does not follow the values it learns",
    "RandomProjectionQuantizer": "it gives ids only, no codes",
    "Sequential": "it is no quantizer",
}
MAX_PRODUCT = 2**24  # past it the library sums FSQ ids inexactly in float32, and it allocates the whole codebook


class Library(Quantizer):
    """A class of vector-quantize-pytorch, built with its own options, giving ``Quantized`` and lookups.

    name: the class, e.g. "VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "FSQ", "ResidualFSQ", "LFQ", "SimVQ".
    dim: width of z and of the codes.
    options: everything else that the class takes, by its own names, e.g. {codebook_size = 512, num_quantizers = 4}.

    ids: b n k; one codebook per head or residual level; of groups the first group's levels come first.
    With ``quantize_dropout``, ids of levels that were dropped in a training step are -1.
    loss: the class's own, already weighted, summed over levels; in ``parts`` as "library".

    The constructor tries the class on two small inputs, and raises ``ValueError`` when the package is missing, when
    there is no such class, when the options do not fit it, or when its own lookup does not give the codes back.
    """

    def __init__(self, *, name: str, dim: int, options: dict[str, Any]) -> None:
        super().__init__()
        cls = _find(_package(), name)
        if "dim" in options:
            raise ValueError(f"dim stands beside options, not inside: got dim={dim} and options={options}")
        levels = options.get("levels", ())
        if isinstance(levels, (list, tuple)) and math.prod(levels) > MAX_PRODUCT:
            raise ValueError(f"{name}: the product of levels is at most 2^24, got {levels}; kind 'fsq' takes more")
        # Tables give lists; ResidualVQ knows one size per level by its being a tuple.
        options = {k: tuple(v) if k == "codebook_size" and isinstance(v, list) else v for k, v in options.items()}
        self.name = name
        self.dim = dim
        try:
            self.module = cls(dim=dim, **options)
        except Exception as error:  # asserts, TypeErrors and einops errors alike mean that the options do not fit
            raise ValueError(f"{name} of vector-quantize-pytorch refuses dim={dim}, {options}: {error}") from error
        self._probe()

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            codes, ids, *rest = self.module(z)
            loss = rest[0].float().sum() if rest else z.new_zeros(())
            parts = {"library": loss.detach()} if rest else {}
        return Quantized(codes.float(), self._to_ours(ids), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return self._decode(self.module, self._to_theirs(self.check_ids(ids).long())).float()

    def _probe(self) -> None:
        """Learns the layout of ids and the codebook sizes, and checks that lookup gives the codes back.

        Works on a copy, because some classes start their codebook at the first input; the random state is kept.
        """
        module = copy.deepcopy(self.module).eval()
        device = next(itertools.chain(module.parameters(), module.buffers())).device
        n = 3 if self.dim != 3 else 5  # unequal to dim, so that a channel-first layout cannot pass unseen
        generator = torch.Generator("cpu").manual_seed(0)
        z = torch.randn(2, n, self.dim, generator=generator, device="cpu").to(device)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                codes, ids, *_ = module(z)
                self._ids_ndim = ids.ndim
                self._groups = len(module.rvqs) if hasattr(module, "rvqs") else 1
                k = self._to_ours(ids).shape[-1]
                again = self._decode(module, self._to_theirs(self._to_ours(ids)))
        except Exception as error:
            raise ValueError(
                f"{self.name} with these options cannot be used on b n {self.dim} (batch, tokens, width): {error}; "
                f"leave out options that change the layout of inputs, or the number of heads"
            ) from error
        if codes.shape != z.shape or again.shape != z.shape or not torch.allclose(codes, again, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"{self.name} with these options cannot be used: looking its ids up gives {tuple(again.shape)} codes "
                f"that are not the ones of forward, {tuple(codes.shape)}; try it with its defaults"
            )
        self.codebook_sizes = _sizes(module, k)

    def _to_ours(self, ids: Tensor) -> Tensor:
        pattern = {2: "b n -> b n 1", 3: "b n k -> b n k", 4: "g b n k -> b n (g k)"}[self._ids_ndim]
        return rearrange(ids.long(), pattern)

    def _to_theirs(self, ids: Tensor) -> Tensor:
        if self._ids_ndim == 2:
            return rearrange(ids, "b n 1 -> b n")
        return rearrange(ids, "b n (g k) -> g b n k", g=self._groups) if self._ids_ndim == 4 else ids

    @staticmethod
    def _decode(module: nn.Module, ids: Tensor) -> Tensor:
        decode = getattr(module, "get_output_from_indices", None) or module.indices_to_codes
        return decode(ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Library:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"name={self.name}, {super().extra_repr()}"


def _package() -> ModuleType:
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ValueError(
            "kind 'library' needs the package vector-quantize-pytorch: pip install vector-quantize-pytorch"
        ) from error
    return vector_quantize_pytorch


def _find(package: ModuleType, name: str) -> type[nn.Module]:
    if name in NOT_SERVED:
        raise ValueError(f"{name} of vector-quantize-pytorch cannot be used here: {NOT_SERVED[name]}")
    found = {key: value for key, value in vars(package).items() if isinstance(value, type)}
    found = {key: cls for key, cls in found.items() if issubclass(cls, nn.Module) and key not in NOT_SERVED}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"vector-quantize-pytorch has no quantizer {name!r}.{hint} There are: {', '.join(sorted(found))}."
        )
    return found[name]


def _sizes(module: nn.Module, k: int) -> tuple[int, ...]:
    """Codes of each of k codebooks: of groups, of levels within a group, of heads."""
    if hasattr(module, "rvqs"):
        return tuple(size for group in module.rvqs for size in _sizes(group, k // len(module.rvqs)))
    if hasattr(module, "layers"):
        return tuple(int(layer.codebook_size) for layer in module.layers)
    return (int(module.codebook_size),) * k
