"""Vector quantization: the nearest of K learned codes (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937).

With ``distance="cosine"`` both sides are l2-normalised, as in ViT-VQGAN (https://arxiv.org/abs/2110.04627), LlamaGen
and TiTok. With ``update="ema"`` the codes are moving averages, not parameters (https://arxiv.org/abs/1906.00446).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.cuda.ops import code_statistics, nearest_code, softmax_entropy
from tokenizers_vis.quantizers.base import (
    Quantized,
    Quantizer,
    check_option,
    from_first_rank,
    over_ranks,
    rotation_trick,
    straight_through,
    weighted,
)
from tokenizers_vis.quantizers.codebook import anchors, draw, kmeans, pull, smoothed_means
from tokenizers_vis.quantizers.float32 import keep_dtype


class VQ(Quantizer):
    """Replaces each vector by the nearest of ``codebook_size`` codes.

    dim: width of a code.
    codebook_size: number of codes, 2 or more.
    distance: "euclidean", or "cosine": z and the codes are l2-normalised, also in what comes out.
    update: "gradient" learns the codes by the codebook loss, "ema" by moving averages of the vectors they win.
    gradient: how the gradient passes from the code to z: "straight_through", as if they were equal, or "rotation",
        turned and scaled as z is to become the code (https://arxiv.org/abs/2410.06424).
    commitment: weight of mse(z, sg c), which draws the encoder to the codes.
    codebook_weight: weight of mse(c, sg z), which draws the codes to the encoder. With "gradient" only.
    entropy: weight of the sample entropy minus the batch entropy, in nats, of softmax(-|z - c|^2 /
        entropy_temperature): each vector should be sure of its code, and all vectors together should use all codes.
        In training only; at 0 it is not computed.
    entropy_temperature: of that softmax, above 0.
    entropy_eps: the batch entropy is -sum a log(a + eps) over the mean shares a. The published 1e-5 is felt where it is
        not far below 1 / codebook_size; 0 is exact.
    decay: of the moving averages, between 0 and 1: codes with "ema", usage with the revivals "nearest" and "random".
    kmeans_start: the first training batch places the codes by k-means.
    revival: what becomes of codes that are not used.
        "restart": those that no vector chose for ``revive_after`` training steps move to random vectors of the batch.
        "nearest", "random" (CVQ, https://arxiv.org/abs/2307.15139; "nearest" is TA-TiTok's ``clustering_vq``): after
        each training step every code moves towards an anchor, the vector of the batch nearest to it or one at random,
        all the way if it is never used and hardly if it often is. With "gradient" only.
    revive_after: training steps, for "restart"; 0 is never.

    ids: b n 1; of equally near codes, the lowest.
    parts: commitment, codebook, sample_entropy, batch_entropy.

    beta in papers is one of two weights. LlamaGen, FQGAN, UniTok, TiTok and TA-TiTok: commitment 0.25 and
    codebook_weight 1, the defaults here. taming-transformers (VQGAN) with ``legacy=True``, its default, and MaskGIT's
    VQGAN as 1d-tokenizer has it: commitment 1 and codebook_weight 0.25.

    k-means and revival draw from torch's global random state. Under torch.distributed the statistics are summed over
    ranks, and new codes come from rank 0 ("nearest" looks at all ranks' vectors). The codebook stays in float32 when
    the model is cast. Raises ``ValueError`` for options out of range.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        update: Literal["gradient", "ema"] = "gradient",
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        entropy: float = 0.0,
        entropy_temperature: float = 0.01,
        entropy_eps: float = 1e-5,
        decay: float = 0.99,
        kmeans_start: bool = False,
        revival: Literal["restart", "nearest", "random"] = "restart",
        revive_after: int = 0,
    ) -> None:
        super().__init__()
        check_option(dim >= 1, "dim is 1 or more", dim)
        check_option(codebook_size >= 2, "codebook_size is 2 or more", codebook_size)
        check_option(distance in ("euclidean", "cosine"), "distance is 'euclidean' or 'cosine'", distance)
        check_option(update in ("gradient", "ema"), "update is 'gradient' or 'ema'", update)
        passes = ("straight_through", "rotation")
        check_option(gradient in passes, "gradient is 'straight_through' or 'rotation'", gradient)
        check_option(commitment >= 0, "commitment is 0 or more", commitment)
        check_option(codebook_weight >= 0, "codebook_weight is 0 or more", codebook_weight)
        check_option(entropy >= 0, "entropy is a weight, 0 or more", entropy)
        check_option(entropy_temperature > 0, "entropy_temperature is above 0", entropy_temperature)
        check_option(entropy_eps >= 0, "entropy_eps is 0 or more", entropy_eps)
        check_option(0 < decay < 1, "decay is between 0 and 1", decay)
        revivals = ("restart", "nearest", "random")
        check_option(revival in revivals, "revival is 'restart', 'nearest' or 'random'", revival)
        check_option(revive_after >= 0, "revive_after is a number of steps, or 0 for never", revive_after)
        if revival != "restart" and (revive_after or update == "ema"):
            raise ValueError(
                f"revival {revival!r} moves codes that learn by gradient, at every step; got update={update!r} and "
                f"revive_after={revive_after}; use revival='restart' with these"
            )
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.distance = distance
        self.update = update
        self.gradient = gradient
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.entropy = entropy
        self.entropy_temperature = entropy_temperature
        self.entropy_eps = entropy_eps
        self.decay = decay
        self.kmeans_start = kmeans_start
        self.revival = revival
        self.revive_after = revive_after
        # A list here collects what ``learn`` takes in place of learning from it: compose.learn_once, for codebooks read
        # often in one step.
        self.waiting: list[tuple[Tensor, Tensor]] | None = None

        codebook = torch.empty(codebook_size, dim, dtype=torch.float32).uniform_(-1 / codebook_size, 1 / codebook_size)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(codebook_size, dtype=torch.float32))
            self.register_buffer("sums", codebook.clone())
        if kmeans_start:
            self.register_buffer("started", torch.tensor(False))
        if revive_after:
            self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64))
        if revival != "restart":
            self.register_buffer("usage", torch.zeros(codebook_size, dtype=torch.float32))

    def forward(self, z: Tensor) -> Quantized:
        z = self.check_z(z)
        with torch.autocast(z.device.type, enabled=False):
            rows = rearrange(z.detach(), "b n d -> (b n) d")
            z = self._directed(z)
            if self.training and self.kmeans_start and not self.started:
                self._start(self._directed(rows))
            table = self.table()
            ids = nearest_code(rearrange(z.detach(), "b n d -> (b n) d"), table.detach(), metric=self.distance)
            codes = F.embedding(rearrange(ids, "(b n) -> b n", b=z.shape[0]), table)
            loss, parts = self._loss(z, codes, table)
            if self.training and self.waiting is not None:
                self.waiting.append((rows, ids))
            elif self.training:
                self.learn(rows, ids)
            codes = rotation_trick(codes, z) if self.gradient == "rotation" else straight_through(codes, z)
        return Quantized(codes, rearrange(ids, "(b n) -> b n 1", b=z.shape[0]), loss, parts)

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(self.check_ids(ids)[..., 0], self.table())

    def table(self) -> Tensor:
        """The codes as they come out: k d, float32."""
        return self._directed(self.codebook.clone() if self.training and self._held else self.codebook)

    @torch.no_grad()
    def learn(self, rows: Tensor, ids: Tensor) -> None:
        """Moves the codebook by what the vectors chose: revival and moving averages. Gradients are not its business.

        rows: n d, the vectors as they came in. ids: n, their choices among the codes as they are now.
        """
        if self.update == "gradient" and not self._revives:
            return
        (k,) = self.codebook_sizes
        directed = self._directed(rows)
        counts, sums = code_statistics(directed if self.update == "ema" else rows[:, :0], ids, k)
        over_ranks(counts)
        if self.revive_after:
            self._restart(directed, counts)
        if self.revival != "restart":
            self._pull(rows, counts)
        if self.update == "ema":
            self.counts.lerp_(counts, 1 - self.decay)
            self.sums.lerp_(over_ranks(sums), 1 - self.decay)
            self.codebook.copy_(smoothed_means(self.counts, self.sums))

    @property
    def _revives(self) -> bool:
        return self.revive_after > 0 or self.revival != "restart"

    @property
    def _held(self) -> bool:
        """Whether backward may read the codebook after ``learn`` has moved it, and so needs one of its own."""
        return self._revives if self.update == "gradient" else self.entropy > 0

    def _directed(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.distance == "cosine" else x

    def _loss(self, z: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = {"commitment": (self.commitment, F.mse_loss(z, codes.detach()))}
        if self.update == "gradient":
            losses["codebook"] = self.codebook_weight, F.mse_loss(codes, z.detach())
        if self.entropy and self.training:
            sample, batch = softmax_entropy(
                rearrange(z, "b n d -> (b n) d"), table, temperature=self.entropy_temperature, eps=self.entropy_eps
            )
            losses["sample_entropy"] = self.entropy, sample
            losses["batch_entropy"] = -self.entropy, batch
        return weighted(losses, z)

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        """Places all codes by k-means on this batch, once."""
        (k,) = self.codebook_sizes
        share = over_ranks(rows.new_tensor(len(rows) / k))
        self._replace(torch.arange(k, device=rows.device), kmeans(rows, k), share)
        self.started.fill_(True)

    def _restart(self, rows: Tensor, counts: Tensor) -> None:
        """Counts the idle steps of each code and moves the long idle ones to vectors of this batch.

        Those are codes that this batch did not choose, so its ids still name the codes they were found with.
        """
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        idle = (self.idle >= self.revive_after).nonzero()[:, 0]
        if len(idle):
            self._replace(idle, draw(rows, len(idle)), rows.new_tensor(1.0))
            self.idle[idle] = 0

    def _pull(self, rows: Tensor, counts: Tensor) -> None:
        """Moves each code towards its anchor, by as much as it is unused. The anchors are as long as z is."""
        self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
        towards = anchors(self.codebook, rows, self.revival, self.distance)
        self.codebook.lerp_(towards, pull(self.usage, self.decay)[:, None])

    def _replace(self, index: Tensor, vectors: Tensor, count: Tensor) -> None:
        """Puts codes at vectors; in the moving average each stands for ``count`` of them."""
        self.codebook[index] = from_first_rank(vectors)
        if self.update == "ema":
            self.counts[index] = count
            self.sums[index] = self.codebook[index] * count

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQ:
        return super()._apply(keep_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, distance={self.distance}, update={self.update}"
