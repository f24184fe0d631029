"""Training in random order that anneals to raster order: RAR (Yu et al. 2024, https://arxiv.org/abs/2411.00776).

A share r of the sequences is shuffled, each its own way; r goes from 1 to 0 in the course of training. Which position
comes next cannot be told from a shuffled prefix, so every input also holds a vector for the position it predicts
(target-aware positions). Sampling is in raster order.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.generators.backbone import Backbone
from tokenizers_vis.generators.base import Space
from tokenizers_vis.generators.codes import Codes
from tokenizers_vis.generators.sequential import Sequential
from tokenizers_vis.quantizers.base import check_option


class RandomOrder(Sequential):
    """anneal: the parts of training between which r falls from 1 to 0; RAR's are 200 and 300 of 400 epochs."""

    def __init__(
        self, *, space: Space, backbone: Backbone, codes: Codes, anneal: tuple[float, float] = (0.5, 0.75)
    ) -> None:
        super().__init__(space=space, backbone=backbone, codes=codes)
        check_option(0 <= anneal[0] <= anneal[1] <= 1, "anneal is two parts of the run, 0 <= start <= end <= 1", anneal)
        self.anneal = anneal
        self.targets = nn.Parameter(0.02 * torch.randn(self.length, backbone.width))

    def prompt(self, labels: Tensor) -> Tensor:
        return (self.classes(labels) + self.targets[0])[:, None]

    def read(self, stream: Tensor, start: int) -> Tensor:
        end = start + stream.shape[1]
        # Nobody reads past the last position but one, so that each has a next.
        return self.codes.embed(stream) + self.places[start:end] + self.targets[start + 1 : end + 1]

    def loss(self, ids: Tensor, labels: Tensor, progress: float) -> Tensor:
        stream = self.codes.to_stream(ids)
        orders = random_orders(len(ids), self.length, random_share(progress, self.anneal), ids.device)
        shuffled = stream.gather(1, orders[..., None].expand_as(stream))
        x = ordered_inputs(self.codes.embed(shuffled), self.classes(labels), self.places, self.targets, orders)
        # Position 0 of the rotary embedding is the class; a token turns by where it stands in the image.
        rotary = nn.functional.pad(orders[:, :-1] + 1, (1, 0))
        hidden = self.backbone(x, rotary)
        return -self.codes.log_prob(hidden, shuffled, orders).mean() * self.codes.per_token


def random_share(progress: float, anneal: tuple[float, float]) -> float:
    """r: 1 until the first part of training, then linearly down to 0 at the second."""
    start, end = anneal
    if progress < start:
        return 1.0
    return 0.0 if progress >= end else 1 - (progress - start) / (end - start)


def random_orders(b: int, length: int, share: float, device: torch.device) -> Tensor:
    """b length: for each row a random order of the positions with probability ``share``, else their own."""
    shuffled = torch.rand(b, length, device=device).argsort(dim=1)
    own = torch.arange(length, device=device).expand(b, length)
    return torch.where(torch.rand(b, 1, device=device) < share, shuffled, own)


def ordered_inputs(embedded: Tensor, classes: Tensor, places: Tensor, targets: Tensor, orders: Tensor) -> Tensor:
    """Inputs of a shuffled sequence: b p d.

    embedded: b p d, already in the order of ``orders``, b p, which says what position each is. classes: b d.
    places, targets: p d. The class holds the target of the first, each token its own place and the target of the next;
    the last token, which nothing follows, is left out.
    """
    first = rearrange(classes, "b d -> b 1 d")
    own = embedded[:, :-1] + places[orders[:, :-1]]
    return torch.cat([first, own], dim=1) + targets[orders]
