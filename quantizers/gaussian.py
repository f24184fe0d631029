"""A Gaussian posterior in place of a codebook: the continuous tokens of a VAE (Kingma and Welling 2013, https://arxiv.org/abs/1312.6114)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option

LOG_VARIANCE = (-30.0, 20.0)


class Gaussian(Quantizer):
    """z holds a mean and a log variance for every channel of a code; training draws from them, eval takes the mean.

    dim: width of a code; z is b n (2 dim), the means first.
    kl: weight of the divergence from a standard normal, summed over tokens and channels, averaged over images.

    There are no ids: ``codebook_sizes`` is empty, ids are b n 0, and a ``Tokenizer`` around it gives ``Latents``.
    """

    codebook_sizes = ()
    discrete = False

    def __init__(self, *, dim: int, kl: float = 1e-6) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(kl >= 0, "kl is 0 or more", kl)
        self.dim, self.kl = dim, kl

    @property
    def in_dim(self) -> int:
        return 2 * self.dim

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = z.chunk(2, dim=-1)
            log_variance = log_variance.clamp(*LOG_VARIANCE)
            codes = mean
            if self.training:
                codes = mean + (log_variance / 2).exp() * torch.randn_like(mean)
            loss, parts = z.new_zeros(()), {}
            if self.kl:
                # KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2, appendix B.
                divergence = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
                kl = divergence.sum(dim=(1, 2)).mean()
                loss, parts = self.kl * kl, {"kl": kl.detach()}
        ids = torch.zeros(*z.shape[:2], 0, dtype=torch.int64, device=z.device)
        return Quantized(codes, ids, loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        """Raises ``ValueError``: continuous tokens have no ids."""
        raise ValueError("a Gaussian's tokens are continuous and have no ids; decode the latents that encode gave")
