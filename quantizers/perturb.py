"""Latent perturbation: some codes are swapped for near ones in training, so that the decoder learns to bear a
generator's mistakes (RobustTok, Qiu et al. 2025, https://arxiv.org/abs/2503.08354)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizers_vis.cuda.ops import nearest_codes
from tokenizers_vis.quantizers.base import Quantized, Quantizer, check_option, straight_through


class Perturb(Quantizer):
    """The inner quantizer, whose codes are perturbed in training; in eval it is the inner one.

    quantizer: with one codebook and a ``table()``: vq, sim_vq, vqgan_lc. The parts of a product are wrapped one by one.
    rate: share of the vectors of a perturbed image that draw another code, 0 to 1; alpha in the paper.
    share: share of a batch's images that are perturbed, 0 to 1; beta. They are the first ones. Where b * share is no
        whole number, one more is perturbed with the probability of the rest, so that small batches are not left out.
    neighbours: a vector draws among so many codes nearest to it, its own included, 1 to the codebook size; delta.

    codes: b n d, perturbed, with the gradient that the inner codes have: only what the codes are decoded to feels it.
    ids, loss, parts: those of the inner quantizer, without perturbation.

    ``rate``, ``share`` and ``neighbours`` may be changed between steps. The published run starts from the defaults and
    lowers rate and neighbours to a half from epoch 40 to 120. Draws from torch's global random state.
    Raises ``ValueError`` for options out of range.
    """

    def __init__(self, *, quantizer: Quantizer, rate: float = 1.0, share: float = 0.1, neighbours: int = 100) -> None:
        super().__init__()
        if not hasattr(quantizer, "table") or not hasattr(quantizer, "distance"):
            raise ValueError(
                f"perturb wraps a quantizer with one table of codes: vq, sim_vq, vqgan_lc; "
                f"{type(quantizer).__name__} has none; wrap the parts of a product one by one"
            )
        (k,) = quantizer.codebook_sizes
        check_option(0 <= rate <= 1, "rate is a share from 0 to 1", rate)
        check_option(0 <= share <= 1, "share is a share from 0 to 1", share)
        check_option(1 <= neighbours <= k, f"neighbours is from 1 to codebook_size ({k})", neighbours)
        self.quantizer = quantizer
        self.rate = rate
        self.share = share
        self.neighbours = neighbours
        self.dim = quantizer.dim
        self.codebook_sizes = quantizer.codebook_sizes
        self.order = quantizer.order

    def forward(self, z: Tensor) -> Quantized:
        out = self.quantizer(z)
        if not self.training or not self.rate or not self.share:
            return out
        wanted = round(self.share * z.shape[0], 6)
        count = math.ceil(wanted)
        codes = self._perturbed(z[:count], out.codes[:count])
        if wanted < count:
            chosen = torch.rand((), device=z.device) < wanted - (count - 1)
            codes = torch.cat([codes[:-1], torch.where(chosen, codes[-1:], out.codes[count - 1 : count])])
        return out._replace(codes=torch.cat([codes, out.codes[count:]]))

    def lookup(self, ids: Tensor) -> Tensor:
        return self.quantizer.lookup(ids)

    def _perturbed(self, z: Tensor, codes: Tensor) -> Tensor:
        """z, codes: b n d -> b n d, the codes of all these images perturbed."""
        table = self.quantizer.table().detach()
        rows = rearrange(z.detach(), "b n d -> (b n) d").float()
        near = nearest_codes(rows, table, self.neighbours, metric=self.quantizer.distance)
        draws = torch.rand(len(rows), device=z.device) <= self.rate
        place = torch.randint(self.neighbours, (len(rows),), device=z.device).where(draws, 0)
        others = F.embedding(near[torch.arange(len(rows), device=z.device), place], table)
        # Place 0 is the code that the vector has.
        others = torch.where(place[:, None] > 0, others, rearrange(codes.detach(), "b n d -> (b n) d"))
        return straight_through(rearrange(others, "(b n) d -> b n d", b=z.shape[0]), codes)
