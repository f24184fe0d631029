"""How a model reads ids and says what the next ones are: one table, a head per codebook, or bits.

A model sees a stream of positions. A token is one position, with all of its ids (``FactorizedCodes``, ``BinaryCodes``),
or one position for each id (``TableCodes``), as in ``Tokens.to_sequence``.

Letters: b batch, n tokens, k codebooks, p positions of all tokens, m positions at hand, s ids at one position, d width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.generators.sampling import Drawn, Pair, Sampling, choose
from tokenizers_vis.heads import BinaryEmbedding, BinaryHead, FactorizedEmbedding, FactorizedHead
from tokenizers_vis.quantizers.base import check_option
from tokenizers_vis.quantizers.integers import Order


class Codes(nn.Module, ABC):
    """Abstract.

    per_token: positions of one token. draws: random numbers that one position takes.
    """

    codebook_sizes: tuple[int, ...]
    per_token: int = 1
    draws: int = 1

    @classmethod
    def kinds(cls) -> Mapping[str, type[Codes]]:
        """The ways that a config may name by ``kind``."""
        return {"table": TableCodes, "factorized": FactorizedCodes, "bits": BinaryCodes}

    def to_stream(self, ids: Tensor) -> Tensor:
        """b n k -> b p s."""
        return ids

    def from_stream(self, stream: Tensor) -> Tensor:
        """b p s -> b n k."""
        return stream

    @abstractmethod
    def embed(self, stream: Tensor) -> Tensor:
        """b m s -> b m d."""

    @abstractmethod
    def log_prob(self, hidden: Tensor, stream: Tensor, places: Tensor) -> Tensor:
        """hidden: b m d, stream: b m s -> b m, float32, in nats. places: m or b m, which positions these are."""

    @abstractmethod
    def draw(self, hidden: Pair, places: Tensor, uniform: Tensor, options: Sampling) -> Drawn:
        """hidden: b m d each, places: m or b m, uniform: b m draws -> ids b m s and the log probability b m of each."""

    # The same as single choices, one after the other: what codes and checks a position needs.

    def to_choices(self, stream: Tensor) -> Tensor:
        """b m s -> b m draws: the choices that make a position, in their order."""
        return stream

    def from_choices(self, choices: Tensor) -> Tensor:
        """b m draws -> b m s."""
        return choices

    @abstractmethod
    def choice_logits(self, hidden: Tensor, choices: Tensor, places: Tensor, j: int) -> Tensor:
        """hidden: b m d -> b m v, of choice j, given the choices before j of ``choices``, b m draws."""

    def choice_range(self, place: int, j: int) -> range:
        """What choice j of a position can be: the indices of its logits that are not ruled out."""
        return range(self.codebook_sizes[j])


class TableCodes(Codes):
    """A table of vectors, one for each id, that ids are read by and guessed by (tied weights).

    With several codebooks each id is a position of its own, and only ids of its codebook can stand there.

    factors: an id as digits, the first one fastest, as those of FSQ's levels: a vector is then the id's own plus one
        for each digit, so that ids that share a level share what is learned of it. One codebook only.
    """

    def __init__(self, *, width: int, codebook_sizes: tuple[int, ...], factors: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.codebook_sizes, self.per_token = tuple(codebook_sizes), len(codebook_sizes)
        if factors and (len(codebook_sizes) > 1 or math.prod(factors) != codebook_sizes[0]):
            raise ValueError(f"factors multiply to the size of the one codebook, {codebook_sizes}; got {factors}")
        self.factors = tuple(factors)
        size = sum(codebook_sizes)
        self.table = nn.Embedding(size, width)
        self.digits = nn.ModuleList(nn.Embedding(levels, width) for levels in factors)
        self.bias = nn.Parameter(torch.zeros(size))
        for table in (self.table, *self.digits):
            nn.init.normal_(table.weight, std=0.02 * (1 + len(factors)) ** -0.5)
        ends = torch.tensor(self.codebook_sizes).cumsum(0)
        starts = ends - torch.tensor(self.codebook_sizes)
        self.register_buffer("starts", starts, persistent=False)
        book = torch.arange(self.per_token)[:, None]
        each = torch.arange(size)
        self.register_buffer("legal", (each >= starts[book]) & (each < ends[book]), persistent=False)  # k v

    def to_stream(self, ids: Tensor) -> Tensor:
        return rearrange(ids + self.starts, "b n k -> b (n k) 1")

    def from_stream(self, stream: Tensor) -> Tensor:
        return rearrange(stream, "b (n k) 1 -> b n k", k=self.per_token) - self.starts

    def embed(self, stream: Tensor) -> Tensor:
        ids = stream.squeeze(-1)
        x, rest = self.table(ids), ids
        for digit, levels in zip(self.digits, self.factors, strict=True):
            x = x + digit(rest % levels)
            rest = rest // levels
        return x

    def logits(self, hidden: Tensor, places: Tensor) -> Tensor:
        """hidden: b m d -> b m v over all codebooks, -inf where another codebook's ids are."""
        out = nn.functional.linear(hidden, self.table.weight, self.bias)
        if self.digits:
            # The sum over digits, built up from the slowest one: id = digit 0 + levels 0 (digit 1 + ...).
            shared = nn.functional.linear(hidden, self.digits[-1].weight)
            for digit in reversed(self.digits[:-1]):
                faster = nn.functional.linear(hidden, digit.weight)
                shared = rearrange(shared[..., :, None] + faster[..., None, :], "... s f -> ... (s f)")
            out = out + shared
        if self.per_token > 1:
            out = out.masked_fill(~self.legal[places % self.per_token], float("-inf"))
        return out

    def log_prob(self, hidden: Tensor, stream: Tensor, places: Tensor) -> Tensor:
        logits = self.logits(hidden, places).float()
        ids = stream.squeeze(-1)
        return -nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)

    def draw(self, hidden: Pair, places: Tensor, uniform: Tensor, options: Sampling) -> Drawn:
        logits = hidden.map(lambda h: self.logits(h, places)).guided()
        ids, log_prob = choose(logits, uniform[..., 0], options)
        return Drawn(ids[..., None], log_prob)

    def choice_logits(self, hidden: Tensor, choices: Tensor, places: Tensor, j: int) -> Tensor:
        return self.logits(hidden, places)

    def choice_range(self, place: int, j: int) -> range:
        book = place % self.per_token
        start = sum(self.codebook_sizes[:book])
        return range(start, start + self.codebook_sizes[book])


class FactorizedCodes(Codes):
    """All ids of a token at one position: read as the sum of their vectors, guessed by ``heads.FactorizedHead``.

    depth: blocks of the small transformer over the codebooks; 0 guesses each id apart from the others.
    """

    def __init__(self, *, width: int, codebook_sizes: tuple[int, ...], depth: int = 0, heads: int = 4) -> None:
        super().__init__()
        self.codebook_sizes, self.draws = tuple(codebook_sizes), len(codebook_sizes)
        self.reader = FactorizedEmbedding(width=width, codebook_sizes=codebook_sizes)
        self.head = FactorizedHead(width=width, codebook_sizes=codebook_sizes, depth=depth, heads=heads)

    def embed(self, stream: Tensor) -> Tensor:
        return self.reader(stream)

    def log_prob(self, hidden: Tensor, stream: Tensor, places: Tensor) -> Tensor:
        return self.head.log_prob(hidden, stream)

    def draw(self, hidden: Pair, places: Tensor, uniform: Tensor, options: Sampling) -> Drawn:
        ids = torch.zeros(*uniform.shape[:-1], self.draws, dtype=torch.int64, device=hidden.conditional.device)
        log_prob = torch.zeros_like(hidden.conditional[..., 0], dtype=torch.float32)
        for j in range(self.draws):
            # Logits of codebook j follow from the ids before it alone, so that those not drawn yet may be anything.
            logits = hidden.map(lambda h, j=j: self.head.logits(h, ids)[j]).guided()
            ids[..., j], one = choose(logits, uniform[..., j], options)
            log_prob = log_prob + one
        return Drawn(ids, log_prob)

    def choice_logits(self, hidden: Tensor, choices: Tensor, places: Tensor, j: int) -> Tensor:
        return self.head.logits(hidden, choices)[j]


class BinaryCodes(Codes):
    """All bits of a token at one position, guessed apart from each other: ``heads.BinaryHead``."""

    def __init__(self, *, width: int, codebook_sizes: tuple[int, ...], order: Order = "msb") -> None:
        super().__init__()
        self.codebook_sizes = tuple(codebook_sizes)
        self.reader = BinaryEmbedding(width=width, codebook_sizes=codebook_sizes, order=order)
        self.head = BinaryHead(width=width, codebook_sizes=codebook_sizes, order=order)
        self.draws = self.head.targets

    def embed(self, stream: Tensor) -> Tensor:
        return self.reader(stream)

    def log_prob(self, hidden: Tensor, stream: Tensor, places: Tensor) -> Tensor:
        return self.head.log_prob(hidden, stream)

    def draw(self, hidden: Pair, places: Tensor, uniform: Tensor, options: Sampling) -> Drawn:
        check_option(options.top_k == 0 and options.top_p == 1, "a model of bits has no top_k and no top_p", options)
        odds = hidden.map(self.head.logits).guided()
        if options.temperature == 0:
            bits = odds > 0
        else:
            bits = uniform.to(odds.device, torch.float32) < (odds / options.temperature).sigmoid()
        log_prob = nn.functional.logsigmoid(torch.where(bits, odds, -odds)).sum(dim=-1)
        return Drawn(self.head.id_format.from_bits(bits), log_prob)

    def to_choices(self, stream: Tensor) -> Tensor:
        return self.head.id_format.to_bits(stream).long()

    def from_choices(self, choices: Tensor) -> Tensor:
        return self.head.id_format.from_bits(choices)

    def choice_logits(self, hidden: Tensor, choices: Tensor, places: Tensor, j: int) -> Tensor:
        odds = self.head.logits(hidden)[..., j]
        return torch.stack([torch.zeros_like(odds), odds], dim=-1)

    def choice_range(self, place: int, j: int) -> range:
        return range(2)
