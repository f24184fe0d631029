"""Numbers of one picture, and of how a codebook is used. Letters: b batch, h w pixels, n tokens, k codebooks.

All take pictures b 3 h w in [0, 1] as they are: nothing is rounded to 8 bits or clamped here. Whoever wants the numbers
of saved files rounds first; at 30 dB that moves PSNR by less than 0.01 dB. The result is one float per picture, so the
mean over pictures (the usual way to quote PSNR) is the caller's; a PSNR of the pooled error is about 1 dB lower on
photographs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

PSNR_CAP = 100.0
_SSIM_WINDOW = 11
_LUMA = (0.299, 0.587, 0.114)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """-10 log10 of the mean squared error: b 3 h w twice, in [0, 1] -> b, dB, at most 100 (also for equal pictures)."""
    _check_pair("psnr", x, y)
    mse = reduce((x.float() - y.float()).square(), "b c h w -> b", "mean")
    return (-10 * mse.log10()).clamp(max=PSNR_CAP)


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
    entropy: bits per token, all positions together.
    perplexity: 2 ** entropy, from 1 to the codebook size.
    position_entropy: n, float64, bits per token at each position; nan where no token was counted.
    """

    tokens: int
    used: float
    entropy: float
    perplexity: float
    position_entropy: Tensor


class CodebookUsage:
    """Counts ids exactly, batch by batch: ``update(ids)`` as often as wanted, then ``compute()``.

    codebook_sizes: of the k codebooks. The counts take k x positions x codebook size integers of memory.
    """

    def __init__(self, codebook_sizes: tuple[int, ...]) -> None:
        if not codebook_sizes or min(codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes are one positive size or more, got {codebook_sizes}")
        self.codebook_sizes = tuple(codebook_sizes)
        self._counts = [torch.zeros(0, size, dtype=torch.int64) for size in self.codebook_sizes]

    def update(self, ids: Tensor) -> None:
        """ids: b n k, integers; -1 is the padding of a ragged batch and is not counted. n may differ between calls.

        Raises ``ValueError`` for another shape, another dtype or an id outside its codebook.
        """
        k = len(self.codebook_sizes)
        if ids.ndim != 3 or ids.shape[-1] != k or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids are integers b n {k}, got {tuple(ids.shape)} of {ids.dtype}")
        ids = ids.detach().cpu().long()
        if ids.shape[0] == 0:
            return
        positions = ids.shape[1]
        found = []
        for j, size in enumerate(self.codebook_sizes):
            column = ids[:, :, j]
            if column.numel() and (column.min() < -1 or column.max() >= size):
                raise ValueError(
                    f"ids of codebook {j} run from 0 to {size - 1}, or -1 for padding; got values from "
                    f"{column.min()} to {column.max()}"
                )
            # One count over all positions: the id of position i is moved by i codebooks.
            moved = column + size * torch.arange(positions)
            counts = torch.bincount(moved[column >= 0], minlength=positions * size)
            found.append(rearrange(counts, "(n v) -> n v", n=positions, v=size))
        for j, counts in enumerate(found):
            old = self._counts[j]
            if len(old) < positions:
                old = torch.cat([old, old.new_zeros(positions - len(old), old.shape[1])])
            old[:positions] += counts
            self._counts[j] = old

    def compute(self) -> tuple[Usage, ...]:
        """One ``Usage`` per codebook. Raises ``ValueError`` when nothing was counted."""
        if not any(counts.any() for counts in self._counts):
            raise ValueError("no ids were counted: call update(ids) first")
        return tuple(self._usage(counts) for counts in self._counts)

    @staticmethod
    def _usage(counts: Tensor) -> Usage:
        total = counts.sum(dim=0)
        entropy = _entropy(total).item()
        return Usage(
            tokens=int(total.sum()),
            used=(total > 0).double().mean().item(),
            entropy=entropy,
            perplexity=2.0**entropy,
            position_entropy=_entropy(counts),
        )


def _entropy(counts: Tensor) -> Tensor:
    """counts: ... v, integers -> ..., float64, bits; nan where all counts are 0."""
    share = counts.double() / counts.sum(dim=-1, keepdim=True)
    # 0 - x rather than -x: the entropy of a sure thing is 0, not -0.
    return 0 - torch.special.xlogy(share, share).sum(dim=-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def _check(what: str, x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"{what} takes pictures b 3 h w, floats in [0, 1]; got {tuple(x.shape)} of {x.dtype}")


def _check_pair(what: str, x: Tensor, y: Tensor) -> None:
    _check(what, x)
    _check(what, y)
    if x.shape != y.shape:
        raise ValueError(f"{what} compares pictures of one size, got {tuple(x.shape)} and {tuple(y.shape)}")
