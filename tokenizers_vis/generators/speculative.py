"""Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with relaxed acceptance (LANTERN, Jang et al. 2024, https://arxiv.org/abs/2410.03355).

A small model, the draft, proposes some tokens; the large one, the target, reads them in one pass and says which stand.
With p of the target and q of the draft, a proposal x stands with probability min(1, p(x) / q(x)), and one that falls is
replaced by a draw from (p - q)+: what comes out follows p exactly.

Image tokens have near twins, so that p is spread over many and few proposals stand. LANTERN therefore adds to p(x) the
probability of x's nearest codes, nearest first, while that sum is at most delta. ``Pooled`` is that rule. Its delta
bounds the law of each proposal apart; what comes out can be farther from p, since every proposal has its own delta.
``Relaxation`` keeps the promise for what comes out: it moves at most delta of the target's probability, in all, from
codes that the draft proposes too seldom to near ones that it proposes too often, and draws from the result exactly.

Every position has its own random numbers. So a sample depends neither on how many tokens are proposed at a time nor on
the other samples of a batch. That costs one more pass of the draft: the token that other implementations draw from the
target after a round in which all stand is a proposal here as well.

Letters: b batch, m positions at hand, v ids to choose from, n near codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenizers_vis.cuda.ops import nearest_codes
from tokenizers_vis.generators.base import with_unconditional
from tokenizers_vis.generators.codes import BinaryCodes
from tokenizers_vis.generators.sampling import Sampling
from tokenizers_vis.generators.sequential import Sequential, Session
from tokenizers_vis.heads import truncate
from tokenizers_vis.quantizers.base import check_option
from tokenizers_vis.tokens import Tokens

if TYPE_CHECKING:
    from tokenizers_vis.tokenizer import Tokenizer

_MOST = 2**20  # codes of a codebook, each compared with each
DRAWS = 3  # random numbers of a choice: the proposal, whether it stands, and what comes in its place


class Verdict(NamedTuple):
    """stands: ..., the probability that a proposal stands. instead: ... v, the law of what replaces it if not."""

    stands: Tensor
    instead: Tensor


@dataclass(frozen=True, eq=False)
class Relaxation:
    """near: for each codebook v n, int64, the n nearest other codes of each code, nearest first; ``of`` finds them.
    delta: from 0 to 1; the total variation between what is drawn and the target's law is at most this, at each choice.

    At least with probability 1 - delta an id is the one that the target would have drawn, else a near one of it.
    """

    near: tuple[Tensor, ...] = field(repr=False)
    delta: float

    def __post_init__(self) -> None:
        check_option(0 <= self.delta <= 1, "delta is a total variation, from 0 (exact) to 1", self.delta)

    @classmethod
    def of(cls, tok: Tokenizer, *, neighbours: int, delta: float) -> Relaxation:
        """With the nearest codes of a tokenizer's codebooks.

        Raises ``ValueError`` for more neighbours than there are, for a tokenizer of vectors, and for codebooks that are
        too large for a table.
        """
        sizes = tok.codebook_sizes
        if tok.continuous or max(sizes) > _MOST:
            raise ValueError(
                f"near codes are those of codebooks of at most {_MOST} codes; {tok.name} has {sizes or 'none'}"
            )
        check_option(
            1 <= neighbours < min(sizes), f"neighbours are 1 to {min(sizes) - 1}, the other codes there are", neighbours
        )
        near = []
        for j, size in enumerate(sizes):
            # The codes of one codebook while the others stand still: all that differs is its own.
            ids = torch.zeros(size, 1, len(sizes), dtype=torch.int64, device=tok.device)
            ids[:, 0, j] = torch.arange(size, device=tok.device)
            with torch.no_grad():
                codes = tok.quantizer.lookup(ids)[:, 0].float()
            near.append(nearest_others(codes, neighbours).cpu())
        return cls(tuple(near), delta)

    def judge(self, p: Tensor, q: Tensor, proposed: Tensor, near: Tensor) -> Verdict:
        """p, q: ... v, laws of target and draft. proposed: ..., int64. near: v n."""
        p = self.moved(p, q, near)
        return Verdict(stands(p, q, proposed), residual(p, q))

    def moved(self, p: Tensor, q: Tensor, near: Tensor) -> Tensor:
        """... v, the law that is drawn from: total variation delta from p at most, and no farther from q."""
        if self.delta == 0:
            return p
        wanted, spare = (q - p).clamp_min(0), (p - q).clamp_min(0)
        left = torch.full_like(p[..., :1], self.delta)
        for codes in near.to(p.device).unbind(dim=1):  # the nearest code of each, the second nearest ...
            asked = torch.minimum(wanted, spare[..., codes])
            all_asked = torch.zeros_like(p).index_add_(-1, codes, asked)
            # Several may ask the same code: it gives to each its part.
            given = asked * (spare / all_asked.clamp_min(1e-300)).clamp_max(1)[..., codes]
            given = given * (left / given.sum(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_max(1)
            wanted = (wanted - given).clamp_min(0)
            spare = (spare - torch.zeros_like(p).index_add_(-1, codes, given)).clamp_min(0)
            left = (left - given.sum(dim=-1, keepdim=True)).clamp_min(0)
            # What is left by rounding alone counts as nothing, so that a row ends alike in every batch.
            left = left.masked_fill(left < 1e-12, 0.0)
            if not left.any():
                break
        return torch.where(q > p, q - wanted, q + spare)


@dataclass(frozen=True, eq=False)
class Pooled(Relaxation):
    """LANTERN's own rule, whose delta bounds each proposal's pooled law, and not the law of what is drawn.

    Its code ends a list of near codes where their sum passes delta, and spares them in what replaces a fallen proposal.
    """

    def judge(self, p: Tensor, q: Tensor, proposed: Tensor, near: Tensor) -> Verdict:
        if self.delta == 0:
            return super().judge(p, q, proposed, near)
        here = near.to(p.device)[proposed]
        sums = p.gather(-1, here).cumsum(dim=-1)
        pooled = (sums * (sums <= self.delta)).amax(dim=-1)
        others = torch.where(sums[..., :1] <= self.delta, q.scatter(-1, here, 0.0), q)
        at = proposed[..., None]
        return Verdict(stands(p.scatter_add(-1, at, pooled[..., None]), q, proposed), residual(p, others))


class Speculated(NamedTuple):
    """accepted: mean number of proposals that stood in a row, of a round. target_passes, draft_passes: of all batches.

    In a batch, a round goes as far as the image whose proposals fell first.
    """

    tokens: Tokens
    accepted: float
    target_passes: int
    draft_passes: int


class Drawn(NamedTuple):
    """ids: b n k. stood: of each round, b, how many proposals stood in a row."""

    ids: Tensor
    stood: list[Tensor]
    target_passes: int
    draft_passes: int


def speculate(
    target: Sequential,
    draft: Sequential,
    labels: Tensor,
    n: int,
    options: Sampling,
    uniform: Tensor,
    lookahead: int,
    relax: Relaxation,
) -> Drawn:
    """labels: b. uniform: b p draws 3, float64 in [0, 1). n: tokens to draw. lookahead: tokens to propose at a time."""
    codes, b = target.codes, len(labels)
    length = n * codes.per_token
    scales = torch.tensor(options.scales(target.length)[:length], dtype=torch.float64, device=labels.device)
    rows = with_unconditional(labels, scales.tolist(), target.space.classes)
    reader, proposer = _Reader(target, rows, length), _Reader(draft, rows.to(draft.places.device), length)
    near = _near(target, relax)
    stream, done, stood = None, 0, []

    def laws(model: Sequential, hidden: Tensor, choices: Tensor, start: int, j: int) -> Tensor:
        """b m v, float64."""
        at = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        repeats = len(hidden) // b
        logits = model.codes.choice_logits(hidden, choices.to(hidden.device).repeat(repeats, 1, 1), at, j)
        return _law(logits.to(labels.device), b, scales[start : start + hidden.shape[1], None], options)

    while done < length:
        count = min(lookahead * codes.per_token, length - done)
        random = uniform[:, done : done + count].to(labels.device)
        proposed, guessed = stream, []
        for i in range(count):
            guessed.append(proposer.last(proposed))
            choices = labels.new_zeros(b, 1, codes.draws)
            for j in range(codes.draws):
                q = laws(draft, guessed[-1], choices, done + i, j)
                choices[..., j] = draw(q, random[:, i, None, j, 0])
            new = codes.from_choices(choices)
            proposed = new if proposed is None else torch.cat([proposed, new], dim=1)
        known = reader.all(proposed[:, :-1], count)
        offered = codes.to_choices(proposed[:, done:])
        guesses, choices = torch.cat(guessed, dim=1), torch.zeros_like(offered)
        for j in range(codes.draws):
            p, q = laws(target, known, choices, done, j), laws(draft, guesses, choices, done, j)
            choices[..., j] = _settle(p, q, random[:, :, j], relax, near, done, j)
        # A position counts while all before it are as proposed: its own laws followed from these.
        same = (choices == offered).all(dim=-1).long().cumprod(dim=1).sum(dim=1)
        stood.append(same)
        kept = min(int(same.min()) + 1, count)
        stream = torch.cat([proposed[:, :done], codes.from_choices(choices)[:, :kept]], dim=1)
        done += kept
        reader.forget(done - 1), proposer.forget(done - 1)
    return Drawn(codes.from_stream(stream), stood, reader.passes, proposer.passes)


class _Reader:
    """A session that is brought up to date with a stream, and counts its passes."""

    def __init__(self, model: Sequential, labels: Tensor, length: int) -> None:
        self.session: Session = model.session(labels, length)
        self.device, self.passes = labels.device, 1
        self.first = self.session.hidden

    def all(self, stream: Tensor | None, count: int) -> Tensor:
        """stream: b m s, all so far -> rows count d, what the position after it and the ``count - 1`` before that are
        guessed from.
        """
        m = 0 if stream is None else stream.shape[1]
        if m == self.session.filled:  # nothing is new: only before the first position
            return self.first
        # The first position is guessed from the class alone.
        start = [self.first] if count > m - self.session.filled else []
        self.passes += 1
        return torch.cat([*start, self.session.advance(stream[:, self.session.filled :].to(self.device))], dim=1)

    def last(self, stream: Tensor | None) -> Tensor:
        return self.all(stream, 1)[:, -1:]

    def forget(self, filled: int) -> None:
        self.session.rewind(min(filled, self.session.filled))


def _settle(
    p: Tensor, q: Tensor, random: Tensor, relax: Relaxation, near: list[tuple[Tensor, ...]], start: int, j: int
) -> Tensor:
    """p, q: b m v, random: b m 3 -> b m, the choices that come out."""
    proposed = draw(q, random[..., 0])
    if len(near) == 1:
        verdict = relax.judge(p, q, proposed, near[0][j])
    else:  # positions of several codebooks, each with codes of its own
        each = [
            relax.judge(p[:, i], q[:, i], proposed[:, i], near[(start + i) % len(near)][j]) for i in range(p.shape[1])
        ]
        verdict = Verdict(*(torch.stack(parts, dim=1) for parts in zip(*each, strict=True)))
    return torch.where(random[..., 1] < verdict.stands, proposed, draw(verdict.instead, random[..., 2]))


def stands(p: Tensor, q: Tensor, proposed: Tensor) -> Tensor:
    """min(1, p(x) / q(x)): ..."""
    chosen, offered = (law.gather(-1, proposed[..., None]).squeeze(-1) for law in (p, q))
    return (chosen / offered.clamp_min(1e-300)).clamp_max(1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(p - q)+ as a law; p where nothing is left, which happens to proposals that all stand: ... v."""
    rest = (p - q).clamp_min(0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp_min(1e-300), p)


def draw(law: Tensor, uniform: Tensor) -> Tensor:
    """law: ... v, uniform: ... -> ..., the id whose share of the line holds the number."""
    total = law.cumsum(dim=-1)
    return torch.searchsorted(total, uniform[..., None] * total[..., -1:], right=True).squeeze(-1)


def nearest_others(codes: Tensor, n: int) -> Tensor:
    """codes: v d -> v n, the n nearest other codes of each, nearest first."""
    found = nearest_codes(codes, codes, n + 1)
    own = torch.arange(len(codes), device=codes.device)[:, None]
    # Where codes are alike, a code may not be its own nearest, or not among them: then the farthest goes.
    return found.gather(1, (found == own).long().argsort(dim=1, stable=True))[:, :n]


def _law(logits: Tensor, b: int, scales: Tensor, options: Sampling) -> Tensor:
    """logits: of b conditional rows, and maybe as many unconditional ones; scales: m 1 -> b m v, float64."""
    logits = logits.double()
    if len(logits) > b:
        c, u = logits[:b], logits[b:]
        logits = torch.where(c.isneginf(), c, u + scales * (c - u))
    if options.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return truncate(logits / options.temperature, top_k=options.top_k, top_p=options.top_p).softmax(dim=-1)


def _near(model: Sequential, relax: Relaxation) -> list[tuple[Tensor, ...]]:
    """Near codes as indices of logits, v n: of each choice, for each position of a token or one for all."""
    codes = model.codes
    if relax.delta == 0:
        return [(torch.zeros(0, 0, dtype=torch.int64),) * codes.draws]
    if codes.per_token == 1:
        return [relax.near]
    tables = []
    for book, near in enumerate(relax.near):
        # One table for all codebooks, of which the others' codes keep to themselves.
        table = torch.arange(sum(codes.codebook_sizes))[:, None].repeat(1, near.shape[1])
        legal = codes.choice_range(book, 0)
        table[legal.start : legal.stop] = near + legal.start
        tables.append((table,))
    return tables


EXACTLY = Relaxation((), 0.0)


def check_draft(target: Sequential, draft: Sequential, lookahead: int, relax: Relaxation) -> None:
    """Raises ``ValueError`` where these do not go together."""
    for name, model in (("target", target), ("draft", draft)):
        check_option(isinstance(model, Sequential), f"the {name} goes token by token", type(model).__name__)
    check_option(type(lookahead) is int and lookahead >= 1, "lookahead is a number of tokens from 1", lookahead)
    if type(target.codes) is not type(draft.codes):
        raise ValueError(
            f"target and draft choose alike: one has {type(target.codes).__name__}, one {type(draft.codes).__name__}"
        )
    if relax.delta and isinstance(target.codes, BinaryCodes):
        raise ValueError("bits have no near codes: relax is for generators that choose among whole codes")
    sizes = tuple(len(near) for near in relax.near)
    if relax.delta and sizes != target.space.codebook_sizes:
        raise ValueError(f"relax has near codes for codebooks of {sizes}, target has {target.space.codebook_sizes}")
