"""Heads of an autoregressive model for tokens of several ids: a softmax for each codebook, or a sigmoid for each bit.

A softmax per codebook, with a small causal transformer over the codebooks: the factorized head of FQGAN
(https://arxiv.org/abs/2411.16681). A sigmoid per bit: Instella-T2I (https://arxiv.org/abs/2506.21022).

Letters: d width of a hidden state, k codebooks, v size of one, t bits of a token. What stands before these (batch,
tokens) is "...", of any rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.transformer import Transformer
from tokenizers_vis.quantizers.base import check_ids, check_option
from tokenizers_vis.quantizers.integers import IdFormat, Order


class Head(nn.Module, ABC):
    """Abstract. From a hidden state to the law of a token's k ids, all of them, and to a draw from it."""

    width: int
    codebook_sizes: tuple[int, ...]

    @abstractmethod
    def log_prob(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """hidden: ... d, ids: ... k -> ..., float32, the natural logarithm of the whole token's probability."""

    @abstractmethod
    def sample(
        self,
        hidden: Tensor,
        *,
        temperature: float = 1.0,
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """hidden: ... d -> ids: ... k, int64.

        temperature: divides the logits; 0 takes the likeliest.
        unconditional: ... d, the hidden state without the condition, for guidance: u + guidance (c - u) in the logits,
            codebook by codebook, so that 1 is none. (FQGAN's scale is this; Instella's is one less.)
        generator: of the draws; torch's global one when None.
        """

    def loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of an id in nats, over codebooks (or bits) and tokens; a scalar, float32.

        hidden: ... d. ids: ... k; a token of -1, the padding of a ragged batch, does not count.
        Raises ``ValueError`` for an id outside its codebook, or where no token counts.
        """
        real = (ids != -1).any(dim=-1)
        if not real.any():
            raise ValueError(f"no token counts: all {real.numel()} are -1, which is padding")
        log_prob = self.log_prob(hidden, ids.masked_fill(~real[..., None], 0))
        return -(log_prob * real).sum() / (real.sum() * self.targets)

    @property
    @abstractmethod
    def targets(self) -> int:
        """Independent guesses that one token is: its codebooks, or its bits."""

    def _check(self, hidden: Tensor, ids: Tensor | None = None) -> None:
        if hidden.ndim == 0 or hidden.shape[-1] != self.width:
            raise ValueError(f"hidden states are ... {self.width}, got {tuple(hidden.shape)}")
        if ids is None:
            return
        if ids.shape != (*hidden.shape[:-1], len(self.codebook_sizes)):
            raise ValueError(
                f"ids are {(*hidden.shape[:-1], len(self.codebook_sizes))} for hidden states {tuple(hidden.shape)}, "
                f"got {tuple(ids.shape)}"
            )
        check_ids(ids.reshape(1, -1, len(self.codebook_sizes)), self.codebook_sizes)


class FactorizedHead(Head):
    """A softmax for each codebook.

    width: d of the hidden states.
    codebook_sizes: k sizes.
    depth: blocks of a small transformer that runs over the codebooks, so that id j knows those before it (FQGAN's
        models have 3 or 4). 0 takes the ids of one token as independent of each other, given the hidden state.
    heads: of that transformer's attention; a divisor of width.
    """

    def __init__(self, *, width: int, codebook_sizes: tuple[int, ...], depth: int = 0, heads: int = 4) -> None:
        super().__init__()
        check_option(width >= 1, "width is 1 or more", width)
        sizes = _check_sizes(codebook_sizes)
        check_option(depth >= 0, "depth is 0 or more", depth)
        check_option(depth == 0 or (heads >= 1 and width % heads == 0), f"heads is a divisor of width, {width}", heads)
        self.width, self.codebook_sizes = width, sizes
        self.blocks = Transformer(width, depth, heads, affine=True) if depth else None
        earlier = sizes[:-1] if depth else ()
        self.earlier = nn.ModuleList(nn.Embedding(size, width) for size in earlier)
        self.norm = nn.LayerNorm(width)
        self.out = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)
        for table in self.earlier:
            nn.init.normal_(table.weight, std=0.02)
        # All logits zero at first: the loss starts at the mean ln v, as in FQGAN.
        for layer in self.out:
            nn.init.zeros_(layer.weight)

    @property
    def targets(self) -> int:
        return len(self.codebook_sizes)

    def logits(self, hidden: Tensor, ids: Tensor) -> list[Tensor]:
        """hidden: ... d, ids: ... k -> for each codebook ... v; those of codebook j follow from the ids before j."""
        self._check(hidden, ids)
        if self.blocks is None:
            h = self.norm(hidden)
            return [layer(h) for layer in self.out]
        context = [hidden, *(table(ids[..., j]) for j, table in enumerate(self.earlier))]
        h = self._mix(torch.stack(context, dim=-2))
        return [layer(h[..., j, :]) for j, layer in enumerate(self.out)]

    def log_prob(self, hidden: Tensor, ids: Tensor) -> Tensor:
        chosen = [
            logits.float().log_softmax(dim=-1).gather(-1, ids[..., j, None].long()).squeeze(-1)
            for j, logits in enumerate(self.logits(hidden, ids))
        ]
        return torch.stack(chosen).sum(dim=0)

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As ``Head.sample``; top_k and top_p cut the tail of each codebook's law, as in ``draw``."""
        self._check(hidden)
        states = _both(hidden, unconditional, guidance)
        context, ids = [states], []
        for j, layer in enumerate(self.out):
            h = self.norm(states) if self.blocks is None else self._mix(torch.stack(context, dim=-2))[..., -1, :]
            logits = _guide(layer(h).float(), unconditional is not None, guidance)
            ids.append(draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
            if j < len(self.earlier):
                embedded = self.earlier[j](ids[-1])
                context.append(torch.stack([embedded] * len(states)) if unconditional is not None else embedded)
        return torch.stack(ids, dim=-1)

    def _mix(self, context: Tensor) -> Tensor:
        """context: ... j d, the hidden state and the ids before codebook j - 1 -> ... j d."""
        j = context.shape[-2]
        mask = torch.ones(j, j, dtype=torch.bool, device=context.device).tril()
        mixed = self.blocks(rearrange(context, "... j d -> (...) j d"), mask)
        return self.norm(mixed).reshape(context.shape)


class BinaryHead(Head):
    """A sigmoid for each bit, the bits of a token independent of each other given the hidden state.

    width: d of the hidden states.
    codebook_sizes: powers of two; t bits are in a token of them all. (2,) * 64 is Instella's token.
    order: of the bits in the ids, the quantizer's own; it only decides which output is which bit.
    """

    def __init__(self, *, width: int, codebook_sizes: tuple[int, ...], order: Order = "msb") -> None:
        super().__init__()
        check_option(width >= 1, "width is 1 or more", width)
        self.width, self.codebook_sizes = width, _check_powers(codebook_sizes)
        self.id_format = IdFormat(self.codebook_sizes, order)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, self.id_format.bits)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    @property
    def targets(self) -> int:
        return self.id_format.bits

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: ... d -> ... t, the log-odds that a bit is 1."""
        self._check(hidden)
        return self.out(self.norm(hidden))

    def log_prob(self, hidden: Tensor, ids: Tensor) -> Tensor:
        self._check(hidden, ids)
        signs = 2.0 * self.id_format.to_bits(ids).float() - 1
        return F.logsigmoid(signs * self.logits(hidden).float()).sum(dim=-1)

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        *,
        temperature: float = 1.0,
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        check_option(temperature >= 0, "temperature is 0 or more", temperature)
        states = _both(hidden, unconditional, guidance)
        logits = _guide(self.logits(states).float(), unconditional is not None, guidance)
        if temperature == 0:
            return self.id_format.from_bits(logits > 0)
        uniform = _noise(logits, generator).uniform_(generator=generator).to(logits.device)
        return self.id_format.from_bits(uniform < (logits / temperature).sigmoid())


class FactorizedEmbedding(nn.Module):
    """A token of k ids as one vector: the sum of an embedding of each. ids: ... k -> ... d."""

    def __init__(self, *, width: int, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.codebook_sizes = _check_sizes(codebook_sizes)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in self.codebook_sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02 * len(self.tables) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids[..., j]) for j, table in enumerate(self.tables)]).sum(dim=0)


class BinaryEmbedding(nn.Module):
    """A token of bits as one vector: a linear map of the bits as -1 and 1. ids: ... k -> ... d."""

    def __init__(self, *, width: int, codebook_sizes: tuple[int, ...], order: Order = "msb") -> None:
        super().__init__()
        self.codebook_sizes = _check_powers(codebook_sizes)
        self.id_format = IdFormat(self.codebook_sizes, order)
        self.map = nn.Linear(self.id_format.bits, width)
        nn.init.normal_(self.map.weight, std=0.02 * self.id_format.bits**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.map(2 * self.id_format.to_bits(ids).to(self.map.weight.dtype) - 1)


def draw(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One draw from each softmax. logits: ... v, of which -inf is never drawn -> ..., int64.

    temperature: divides the logits; 0 takes the likeliest.
    top_k: of the likeliest so many remain, and what ties with the last; 0 is all.
    top_p: the likeliest remain until they hold this much probability, after top_k; the one that reaches it included.

    Raises ``ValueError`` for options out of range.
    """
    check_option(temperature >= 0, "temperature is 0 or more", temperature)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = truncate(logits.float() / temperature, top_k=top_k, top_p=top_p)
    # A race of exponential clocks, as in torch.multinomial, which stops at 2^24 ids.
    clocks = _noise(logits, generator).exponential_(generator=generator).to(logits.device)
    return (logits.softmax(dim=-1) / clocks).argmax(dim=-1)


def truncate(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits ... v with -inf where the tail is cut; top_k and top_p as in ``draw``, which see."""
    check_option(top_k >= 0, "top_k is 0 (all) or more", top_k)
    check_option(0 < top_p <= 1, "top_p is above 0, at most 1", top_p)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    if top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        past = p.cumsum(dim=-1) - p >= top_p
        logits = logits.masked_fill(past.scatter(-1, places, past), float("-inf"))
    return logits


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Room for random numbers, where the generator is."""
    return torch.empty(like.shape, device=like.device if generator is None else generator.device)


def _both(hidden: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    """Both states stacked in front, or the one."""
    if unconditional is None:
        check_option(guidance == 1, "guidance other than 1 needs unconditional states", guidance)
        return hidden
    if unconditional.shape != hidden.shape:
        raise ValueError(f"unconditional states are {tuple(hidden.shape)}, got {tuple(unconditional.shape)}")
    return torch.stack([hidden, unconditional])


def _guide(logits: Tensor, both: bool, guidance: float) -> Tensor:
    if not both:
        return logits
    conditional, unconditional = logits
    return unconditional + guidance * (conditional - unconditional)


def _check_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    sizes = tuple(sizes)
    check_option(bool(sizes) and min(sizes) >= 2, "codebook_sizes are one or more sizes of 2 or more", sizes)
    return sizes


def _check_powers(sizes: tuple[int, ...]) -> tuple[int, ...]:
    sizes = _check_sizes(sizes)
    powers = all(size & (size - 1) == 0 for size in sizes)
    check_option(powers, "bits need codebook_sizes that are powers of two", sizes)
    return sizes
