"""Numbers of one picture, and of how a codebook is used. Letters: b batch, h w pixels, n tokens, k codebooks.

All take pictures b 3 h w in [0, 1] as they are: nothing is rounded to 8 bits or clamped here. Whoever wants the numbers
of saved files rounds first; at 30 dB that moves PSNR by less than 0.01 dB. The result is one float per picture, so the
mean over pictures (the usual way to quote PSNR) is the caller's; ``pooled_psnr``, also in use, is about 1 dB lower on
photographs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

PSNR_CAP = 100.0
_SSIM_WINDOW = 11
# Weights of the scales of MS-SSIM, from full size down: https://doi.org/10.1109/ACSSC.2003.1292216
_MS_SSIM_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_MERGE = 2**20  # ids that wait before they are counted
_LUMA = (0.299, 0.587, 0.114)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """-10 log10 of the mean squared error: b 3 h w twice, in [0, 1] -> b, dB, at most 100 (also for equal pictures)."""
    _check_pair("psnr", x, y)
    mse = reduce((x.float() - y.float()).square(), "b c h w -> b", "mean")
    return (-10 * mse.log10()).clamp(max=PSNR_CAP)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error: b 3 h w twice, in [0, 1] -> b, float64, 0 for equal pictures."""
    _check_pair("mse", x, y)
    return reduce((x.double() - y.double()).square(), "b c h w -> b", "mean")


def decibels(error: Tensor) -> Tensor:
    """-10 log10 of mean squared errors, of any shape: PSNR without a cap, inf where the error is 0."""
    return -10 * error.double().log10()


def pooled_psnr(errors: Tensor) -> float:
    """PSNR of the mean of the pictures' mean squared errors (m, from ``mse``), each picture counted alike; dB.

    Never above the mean of the pictures' own PSNR, and inf when all errors are 0. Raises ``ValueError`` for none.
    """
    if errors.ndim != 1 or not len(errors):
        raise ValueError(f"errors are one for each picture, 1 or more; got {tuple(errors.shape)}")
    return decibels(errors.double().mean()).item()


def feature_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine between the features of picture and reconstruction, b d twice -> b, float64; 1 where they are equal.

    To be named after the net whose features they are, ``FeatureNet.metric("cosine")``. 0 where one of two is all zero.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"features are b d twice, of one shape; got {tuple(x.shape)} and {tuple(y.shape)}")
    # Equal ones are set: their cosine may come out as 1 - 1e-16, and of two zeros it would be 0.
    return torch.cosine_similarity(x.double(), y.double(), dim=1).clamp(max=1).where((x != y).any(dim=1), 1.0)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity over 5 scales, Gaussian window of 11, sigma 1.5: b 3 h w twice, in [0, 1] -> b, at most 1.

    Contrasts below 0 count as 0. Raises ``ValueError`` for pictures with a side below 176, of which the smallest scale
    is smaller than the window.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    _check_pair("ms_ssim", x, y)
    least = _SSIM_WINDOW * 2 ** (len(_MS_SSIM_SCALES) - 1)
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"ms_ssim needs pictures of at least {least} by {least} pixels, its window after 4 halvings; got "
            f"{x.shape[-2]} by {x.shape[-1]} (h by w)"
        )
    options = {"sigma": 1.5, "kernel_size": _SSIM_WINDOW, "data_range": 1.0, "betas": _MS_SSIM_SCALES}
    values = [
        multiscale_structural_similarity_index_measure(
            a[None].float(), b[None].float(), normalize="relu", reduction="none", **options
        )
        for a, b in zip(x, y, strict=True)
    ]
    return torch.cat([value.reshape(1) for value in values]) if values else x.new_zeros(0, dtype=torch.float32)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, Gaussian window of 11 with sigma 1.5: b 3 h w twice, in [0, 1] -> b, at most 1.

    Raises ``ValueError`` for pictures smaller than the window. Libraries differ by about 1e-3 at the borders, and by
    up to 0.03 with scikit-image's default, a flat window of 7.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair("ssim", x, y)
    if min(x.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"ssim needs pictures of at least {_SSIM_WINDOW} by {_SSIM_WINDOW} pixels, the size of its window; got "
            f"{x.shape[-2]} by {x.shape[-1]} (h by w)"
        )
    # One picture at a time: the five filtered maps of a whole batch of large pictures do not fit into memory.
    values = [
        structural_similarity_index_measure(
            a[None].float(), b[None].float(), sigma=1.5, kernel_size=_SSIM_WINDOW, data_range=1.0, reduction="none"
        )
        for a, b in zip(x, y, strict=True)
    ]
    return torch.cat([value.reshape(1) for value in values]) if values else x.new_zeros(0, dtype=torch.float32)


def gradient_energy(x: Tensor) -> Tensor:
    """How sharp a picture is: the mean squared step of luma to the next pixel, over both directions.

    x: b 3 h w in [0, 1] -> b, from 0 (one grey) to 1 (a checkerboard of black and white). Against that of the original
    it tells blur (below it) from invented detail and noise (above it).
    """
    _check("gradient_energy", x)
    if min(x.shape[-2:]) < 2:
        raise ValueError(f"gradient_energy needs at least 2 by 2 pixels, got {x.shape[-2]} by {x.shape[-1]} (h by w)")
    luma = torch.einsum("bchw,c->bhw", x.float(), torch.tensor(_LUMA, device=x.device))
    across = reduce(luma.diff(dim=2).square(), "b h w -> b", "mean")
    down = reduce(luma.diff(dim=1).square(), "b h w -> b", "mean")
    return (across + down) / 2


class Usage(NamedTuple):
    """How one codebook was used.

    tokens: how many ids were counted. The entropies below are those of the counts, too low by about
        (codebook size - 1) / (2 tokens ln 2) bits: quote them with this number.
    used: share of the codebook's codes that occurred, 0 to 1.
    dead: how many of the codes did not occur.
    entropy: bits per token, all positions together.
    perplexity: 2 ** entropy, from 1 to the codebook size.
    position_entropy: n, float64, bits per token at each position; nan where no token was counted.
    """

    tokens: int
    used: float
    dead: int
    entropy: float
    perplexity: float
    position_entropy: Tensor


class CodebookUsage:
    """Counts ids exactly, batch by batch: ``update(ids)`` as often as wanted, then ``compute()``.

    codebook_sizes: of the k codebooks, of any size up to 2^63. Only ids that occurred are held, 24 bytes for each pair
        of position and id, so the memory is bounded by the ids that were seen and not by the codebook.
    """

    def __init__(self, codebook_sizes: tuple[int, ...]) -> None:
        if not codebook_sizes or min(codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes are one positive size or more, got {codebook_sizes}")
        self.codebook_sizes = tuple(codebook_sizes)
        # Per codebook: pairs (position, id) in order, and how often each came.
        self._pairs = [torch.zeros(0, 2, dtype=torch.int64) for _ in self.codebook_sizes]
        self._counts = [torch.zeros(0, dtype=torch.int64) for _ in self.codebook_sizes]
        self._pending: list[list[Tensor]] = [[] for _ in self.codebook_sizes]
        self._waiting = 0

    def update(self, ids: Tensor) -> None:
        """ids: b n k, integers; -1 is the padding of a ragged batch and is not counted. n may differ between calls.

        Raises ``ValueError`` for another shape, another dtype or an id outside its codebook.
        """
        k = len(self.codebook_sizes)
        if ids.ndim != 3 or ids.shape[-1] != k or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids are integers b n {k}, got {tuple(ids.shape)} of {ids.dtype}")
        ids = ids.detach().cpu().long()
        for j, size in enumerate(self.codebook_sizes):
            column = ids[:, :, j]
            if column.numel() and (column.min() < -1 or column.max() > size - 1):
                raise ValueError(
                    f"ids of codebook {j} run from 0 to {size - 1}, or -1 for padding; got values from "
                    f"{column.min()} to {column.max()}"
                )
        position = torch.arange(ids.shape[1]).expand(ids.shape[:2])
        for j in range(k):
            real = ids[:, :, j] >= 0
            self._pending[j].append(torch.stack([position[real], ids[:, :, j][real]], dim=-1))
        self._waiting += ids.shape[0] * ids.shape[1]
        if self._waiting > max(_MERGE, len(self._counts[0])):
            self._merge()

    def compute(self) -> tuple[Usage, ...]:
        """One ``Usage`` per codebook. Raises ``ValueError`` when nothing was counted."""
        self._merge()
        if not any(len(counts) for counts in self._counts):
            raise ValueError("no ids were counted: call update(ids) first")
        return tuple(map(self._usage, self._pairs, self._counts, self.codebook_sizes))

    def _merge(self) -> None:
        for j, pending in enumerate(self._pending):
            pairs = torch.cat([self._pairs[j], *pending])
            ones = torch.ones(len(pairs) - len(self._counts[j]), dtype=torch.int64)
            self._pairs[j], self._counts[j] = _add_up(pairs, torch.cat([self._counts[j], ones]))
        self._pending = [[] for _ in self.codebook_sizes]
        self._waiting = 0

    @staticmethod
    def _usage(pairs: Tensor, counts: Tensor, size: int) -> Usage:
        _, totals = _add_up(pairs[:, 1:], counts)
        position = pairs[:, 0]
        n = int(position.max()) + 1 if len(pairs) else 0
        entropy = _entropy(totals, torch.zeros_like(totals), 1).item()
        return Usage(
            tokens=int(counts.sum()),
            used=len(totals) / size,
            dead=size - len(totals),
            entropy=entropy,
            perplexity=2.0**entropy,
            position_entropy=_entropy(counts, position, n),
        )


def _add_up(keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of keys (m c), in order, with the sum of the counts (m) of each."""
    order = torch.arange(len(keys))
    for column in reversed(range(keys.shape[1])):  # stable sorts, the last key first: much faster than unique(dim=0)
        order = order[keys[order, column].argsort(stable=True)]
    keys, counts = keys[order], counts[order]
    starts = torch.ones(len(keys), dtype=torch.bool)
    starts[1:] = (keys[1:] != keys[:-1]).any(dim=1)
    group = starts.long().cumsum(dim=0) - 1
    return keys[starts], torch.zeros(int(starts.sum()), dtype=torch.int64).index_add_(0, group, counts)


def _entropy(counts: Tensor, group: Tensor, n: int) -> Tensor:
    """counts and the group 0 to n - 1 that each is of, m -> n, float64, bits; nan for a group without counts."""
    counts = counts.double()
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, group, counts)
    share = counts / total[group]
    # 0 - x rather than -x: the entropy of a sure thing is 0, not -0.
    nats = 0 - torch.zeros(n, dtype=torch.float64).index_add_(0, group, torch.special.xlogy(share, share))
    return torch.where(total > 0, nats / torch.log(torch.tensor(2.0, dtype=torch.float64)), torch.nan)


def _check(what: str, x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"{what} takes pictures b 3 h w, floats in [0, 1]; got {tuple(x.shape)} of {x.dtype}")


def _check_pair(what: str, x: Tensor, y: Tensor) -> None:
    _check(what, x)
    _check(what, y)
    if x.shape != y.shape:
        raise ValueError(f"{what} compares pictures of one size, got {tuple(x.shape)} and {tuple(y.shape)}")
