"""Post-training quantization of continuous latents, channel by channel (TokenBridge, https://arxiv.org/abs/2503.16430)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, over_ranks, straight_through
from tokenizers_vis.quantizers.float32 import keep_dtype

MAX_BITS = 16
TINY = 1e-8  # stands for the deviation of a channel that never changes


class TokenBridge(Quantizer):
    """Each channel of a trained, continuous latent becomes one of 2^bits values of its own.

    dim: channels of the latent.
    bits: of each channel; 1 to 9 with the default clip.
    mean, std: of the latent, one number for all channels or one for each; ``fit`` measures them instead.
    reach: so many standard deviations on either side are covered; what lies beyond becomes the outermost value.
    clip: the normal distribution whose bins these are ends at so many of its own standard deviations.

    The values are laid out for x = (z - mean) / std * clip / reach. A standard normal falls into 2^bits bins of equal
    mass; the outer two are cut off at -clip and clip, and the values are the means of the bins. Each x takes the value
    nearest to it, so that two ids meet midway between two values, not at the edge of a bin; of two values equally near
    the lower is taken.
    The defaults are the published setting, for latents of mean 0 and deviation 1.

    codes: b n dim. ids: b n dim, one codebook of 2^bits per channel, rising with z. There is no loss.
    The gradient passes straight through to z. ``fit`` changes mean and std, nothing else does; they are saved with the
    state, and stay in float32 when the model is cast.

    Raises ``ValueError`` for options out of range, or for so many bits that a bin lies beyond the clip: it would be
    empty, and the official code gives it the value 0.
    """

    def __init__(
        self,
        *,
        dim: int,
        bits: int = 6,
        mean: tuple[float, ...] | float = 0.0,
        std: tuple[float, ...] | float = 1.0,
        reach: float = 5.0,
        clip: float = 3.0,
    ) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(1 <= bits <= MAX_BITS, f"bits is a whole number from 1 to {MAX_BITS}", bits)
        check_option(0 < reach < math.inf, "reach is above 0, in standard deviations", reach)
        check_option(0 < clip < math.inf, "clip is above 0, in standard deviations", clip)
        beyond = math.erfc(clip / math.sqrt(2)) / 2
        if 2**-bits <= beyond:
            raise ValueError(
                f"each of 2^bits bins holds more than the mass beyond the clip, {beyond:.2g} at {clip}; got {bits} "
                f"bits; take fewer bits, or a larger clip"
            )
        self.dim = dim
        self.bits = bits
        self.reach = float(reach)
        self.clip = float(clip)
        self.codebook_sizes = (2**bits,) * dim
        mean, std = _per_channel(mean, dim, "mean"), _per_channel(std, dim, "std")
        check_option(all(math.isfinite(m) for m in mean), "mean is finite", mean)
        check_option(all(0 < s < math.inf for s in std), "std is above 0 and finite", std)
        values, edges = gaussian_values(bits, self.clip)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))  # vectors that fit has seen
        self.register_buffer("values", values.float(), persistent=False)
        self.register_buffer("edges", edges.float(), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            x = (z.detach() - self.mean) / self.std.clamp_min(TINY) * (self.clip / self.reach)
            ids = torch.bucketize(x, self.edges)
            codes = straight_through(self._codes(ids), z)
        return Quantized(codes, ids, z.new_zeros(()), {})

    def lookup(self, ids: Tensor) -> Tensor:
        return self._codes(self.check_ids(ids))

    @torch.no_grad()
    def fit(self, z: Tensor) -> None:
        """Sets mean and std to those of all vectors that it was ever given. z: b n dim, finite.

        Call it once with a set of latents, or batch by batch; the first call replaces the constructor's numbers. Under
        torch.distributed every rank calls it with vectors of its own, and all get the numbers of all.
        """
        if not bool(z.isfinite().all()):
            raise ValueError("fit takes finite latents, got nan or infinity; leave those images out")
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            rows = rearrange(z, "b n d -> (b n) d")
            n = over_ranks(self.count.new_tensor(len(rows)))
            mean = over_ranks(rows.sum(dim=0)) / n
            variance = over_ranks((rows - mean).square().sum(dim=0)) / n
            # The variance of two sets together: within each, and between their means.
            share = n / (self.count + n)
            apart = (mean - self.mean).square()
            together = self.std.square().lerp(variance, share) + share * (1 - share) * apart
            self.mean.lerp_(mean, share)
            self.std.copy_(together.sqrt())
            self.count.add_(n)

    def _codes(self, ids: Tensor) -> Tensor:
        return self.values[ids] * (self.reach / self.clip) * self.std.clamp_min(TINY) + self.mean

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenBridge:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bits={self.bits}, reach={self.reach}, clip={self.clip}"


def gaussian_values(bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """The 2^bits values of a standard normal, rising, and the 2^bits - 1 edges midway between them; float64.

    Bin i lies from a = q(i / 2^bits) to b = q((i + 1) / 2^bits), q the inverse of the distribution function P, cut at
    -clip and clip; its value is its mean, (p(a) - p(b)) / (P(b) - P(a)) with the density p.
    """
    a_b = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64)
    a_b = torch.special.ndtri(a_b).clamp(-clip, clip)
    density = (-a_b.square() / 2).exp() / math.sqrt(2 * math.pi)
    values = -density.diff() / torch.special.ndtr(a_b).diff()
    return values, (values[1:] + values[:-1]) / 2


def _per_channel(numbers: tuple[float, ...] | float, dim: int, name: str) -> tuple[float, ...]:
    if isinstance(numbers, (int, float)):
        return (float(numbers),) * dim
    check_option(len(numbers) == dim, f"{name} is one number, or one for each of {dim} channels", numbers)
    return tuple(float(number) for number in numbers)
