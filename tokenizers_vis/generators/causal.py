"""The autoregressive model in the tokens' own order, as LlamaGen (Sun et al. 2024, https://arxiv.org/abs/2406.06525).

With an ordered tokenizer every prefix of a sample is an image.
"""

from __future__ import annotations

from torch import Tensor

from tokenizers_vis.generators.sequential import Sequential


class Causal(Sequential):
    """The class, then each token given those before it."""

    def prompt(self, labels: Tensor) -> Tensor:
        return self.classes(labels)[:, None]

    def read(self, stream: Tensor, start: int) -> Tensor:
        return self.codes.embed(stream) + self.places[start : start + stream.shape[1]]

    def loss(self, ids: Tensor, labels: Tensor, progress: float) -> Tensor:
        return -self.log_prob(ids, labels).mean()
