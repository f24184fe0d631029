"""Speculative decoding against a Markov source of known law: exact where asked, within the bound where relaxed."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.generator import Generator
from tokenizers_vis.generators.base import Space
from tokenizers_vis.generators.codes import Codes, TableCodes
from tokenizers_vis.generators.sampling import Sampling, uniforms
from tokenizers_vis.generators.sequential import Sequential
from tokenizers_vis.generators.speculative import (
    DRAWS,
    EXACTLY,
    Drawn,
    Pooled,
    Relaxation,
    nearest_others,
    residual,
    speculate,
    stands,
)

V, LENGTH = 4, 3
NEAR = torch.tensor([[1, 2], [0, 2], [3, 1], [2, 1]])


class TableOfChances(TableCodes):
    """Hidden states are log probabilities already."""

    def logits(self, hidden: Tensor, places: Tensor) -> Tensor:
        return hidden


class Markov(Sequential):
    """The law of an id given the one before, as a table; the first follows from the label's own row."""

    def __init__(self, law: Tensor, first: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.space, self.length = Space((V,), LENGTH, len(first) - 1), LENGTH
        self.codes: Codes = TableOfChances(width=V, codebook_sizes=(V,))
        self.law, self.first = law.log(), first.log()
        self.places = torch.zeros(LENGTH, V)

    def prompt(self, labels: Tensor) -> Tensor:
        return self.first[labels][:, None]

    def read(self, stream: Tensor, start: int) -> Tensor:
        return self.law[stream[..., 0]]

    def loss(self, ids: Tensor, labels: Tensor, progress: float) -> Tensor:
        raise NotImplementedError

    def session(self, labels: Tensor, length: int | None = None) -> Any:
        return Reading(self, labels)


class Reading:
    """A session without a transformer: what came before the last id does not matter."""

    def __init__(self, model: Markov, labels: Tensor) -> None:
        self.model, self.rows, self.filled, self.hidden = model, len(labels), 0, model.prompt(labels)

    def advance(self, stream: Tensor) -> Tensor:
        self.filled += stream.shape[1]
        return self.model.read(stream.repeat(self.rows // len(stream), 1, 1), 0)

    def rewind(self, filled: int) -> None:
        self.filled = filled


@pytest.fixture(scope="module")
def source() -> tuple[Markov, Markov]:
    """A target, and a draft that is wrong about much."""
    random = np.random.default_rng(1)

    def chances(rows: int) -> Tensor:
        return torch.from_numpy(random.dirichlet(np.full(V, 2.0), rows)).clamp_min(0.08)

    def model() -> Markov:
        law, first = chances(V), chances(2)
        return Markov(law / law.sum(1, keepdim=True), first / first.sum(1, keepdim=True))

    return model(), model()


def drawn(source: tuple[Markov, Markov], b: int, lookahead: int = 2, relax: Relaxation = EXACTLY, **over: Any) -> Drawn:
    random = uniforms([over.pop("seed", 0)], (b, LENGTH, 1, DRAWS))[0]
    return speculate(*source, torch.zeros(b, dtype=torch.int64), LENGTH, Sampling(**over), random, lookahead, relax)


def exact_law(target: Markov, options: Sampling) -> Tensor:
    """V^LENGTH, of all sequences, in float64."""
    scale = options.scales(LENGTH)[0]
    first = (target.first[1] + scale * (target.first[0] - target.first[1])).softmax(dim=-1)
    step = target.law.softmax(dim=-1)  # the same with and without the class
    return torch.einsum("a,ab,bc->abc", first, step, step).flatten()


def p_value(counts: Tensor, law: Tensor) -> float:
    """Of Pearson's chi-square test."""
    expected = law * counts.sum()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    return 1 - torch.special.gammainc(torch.tensor((len(law) - 1) / 2).double(), statistic / 2).item()


def counted(ids: Tensor) -> Tensor:
    return torch.bincount((ids[..., 0] * torch.tensor([V * V, V, 1])).sum(dim=1), minlength=V**LENGTH).double()


@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_without_relaxation_the_law_is_the_target_s(source: Any, lookahead: int, guidance: float) -> None:
    options = Sampling(guidance=guidance)
    # Batches of one round each would hide what going back does; in one of this size rows fall at all places.
    ids = torch.cat([drawn(source, 1000, lookahead, guidance=guidance, seed=seed).ids for seed in range(30)])
    counts = counted(ids)
    assert counts.sum() == 30000
    assert p_value(counts, exact_law(source[0], options)) > 0.001
    assert p_value(counts, exact_law(source[1], options)) < 1e-6  # it would tell the draft's


def test_a_test_of_relaxed_draws_fails(source: Any) -> None:
    ids = drawn(source, 20000, relax=Relaxation((NEAR,), 0.2)).ids
    assert p_value(counted(ids), exact_law(source[0], Sampling())) < 1e-6


def test_relaxed_draws_go_farther_and_stay_within_delta(source: Any) -> None:
    """The first id, which has one law; the later ones' law is of what came before, too."""
    law, before = source[0].first[0].exp(), -1.0
    for delta in (0.0, 0.1, 0.3):
        done = drawn(source, 20000, LENGTH, Relaxation((NEAR,), delta))
        shares = torch.bincount(done.ids[:, 0, 0], minlength=V) / 20000
        assert (shares - law).abs().sum() / 2 < delta + 0.015
        accepted = done.stood[0].double().mean().item()
        assert accepted > before + 0.05
        before = accepted


def test_a_sample_depends_on_its_own_random_numbers_alone(source: Any) -> None:
    for relax in (EXACTLY, Relaxation((NEAR,), 0.3), Pooled((NEAR,), 0.3)):
        whole = drawn(source, 64, 2, relax)
        assert torch.equal(whole.ids, drawn(source, 64, 3, relax).ids)
        assert torch.equal(whole.ids[:5], drawn(source, 5, 1, relax).ids)


def test_a_draft_that_is_the_target_is_never_wrong(source: Any) -> None:
    done = drawn((source[0], source[0]), 50, LENGTH)
    assert done.target_passes == 2 and torch.cat(done.stood).eq(LENGTH).all()


def laws(count: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target and draft, and near codes on a line."""
    random = np.random.default_rng(0)
    p, q = (torch.from_numpy(random.dirichlet(np.full(v, 0.3), count)) for _ in range(2))
    return p, q, nearest_others(torch.arange(v)[:, None].float() ** 1.1, 4)


def resulting(relax: Relaxation, p: Tensor, q: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The law of what is drawn, by summing over all proposals, and how likely one stands."""
    v = p.shape[-1]
    out, stood = torch.zeros_like(p), torch.zeros(len(p), dtype=p.dtype)
    for x in range(v):
        verdict = relax.judge(p, q, torch.full((len(p),), x), near)
        out[:, x] += q[:, x] * verdict.stands
        out += (q[:, x] * (1 - verdict.stands))[:, None] * verdict.instead
        stood += q[:, x] * verdict.stands
    return out, stood


def test_total_variation_stays_within_delta_and_more_stands() -> None:
    p, q, near = laws(200, 12)
    before = torch.zeros(200)
    for delta in (0.0, 0.1, 0.3, 1.0):
        law, stood = resulting(Relaxation((near,), delta), p, q, near)
        variation = (law - p).abs().sum(dim=-1) / 2
        assert torch.allclose(law.sum(dim=-1), torch.ones(200).double())
        assert variation.max() <= delta + 1e-12
        # What is given up in truth is won in length, and nothing else is given up.
        assert torch.allclose(stood, 1 - (p - q).abs().sum(dim=-1) / 2 + variation, atol=1e-12)
        assert (stood >= before - 1e-12).all()
        before = stood
    assert before.mean() > resulting(EXACTLY, p, q, near)[1].mean() + 0.1


def test_probability_moves_to_near_codes_only() -> None:
    """By max-flow min-cut: what a set of codes gains, codes near to it have lost."""
    p, q, near = laws(100, 8)
    moved = Relaxation((near[:, :2],), 0.5).moved(p, q, near[:, :2])
    for chosen in range(1, 2**8):
        members = [x for x in range(8) if chosen >> x & 1]
        givers = sorted({int(z) for x in members for z in near[x, :2]} | set(members))
        gained = (moved - p)[:, members].clamp_min(0).sum(dim=-1)
        lost = (p - moved)[:, givers].clamp_min(0).sum(dim=-1)
        assert (gained <= lost + 1e-12).all()


def test_lantern_s_own_rule_can_go_farther_than_its_delta() -> None:
    p, q, near = laws(200, 12)
    law, stood = resulting(Pooled((near,), 0.1), p, q, near)
    assert ((law - p).abs().sum(dim=-1) / 2).max() > 0.2
    assert stood.mean() > resulting(EXACTLY, p, q, near)[1].mean()
    law, _ = resulting(Pooled((near,), 0.0), p, q, near)
    assert torch.allclose(law, p)


def test_lantern_s_rule_is_its_authors(recorded: Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]) -> None:
    tensors, metadata = recorded("lantern")
    options = json.loads(metadata["options"])
    assert torch.equal(nearest_others(tensors["codes"], options["lantern_k"]), tensors["near"])
    for i, delta in enumerate(options["lantern_delta"]):
        near = tensors["near"]
        verdict = Pooled((near,), delta).judge(tensors["p"], tensors["q"], tensors["proposed"], near)
        assert torch.allclose(verdict.stands, tensors["ratios"][i].clamp_max(1), atol=1e-6)
        assert torch.allclose(verdict.instead, tensors["instead"][i], atol=1e-6)


def test_proposals_stand_as_often_as_the_equation_says() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.6, 0.15])
    assert torch.allclose(stands(p.expand(3, -1), q.expand(3, -1), torch.arange(3)), torch.tensor([1.0, 0.5, 1.0]))
    assert torch.allclose(residual(p, q), torch.tensor([0.25, 0.0, 0.05]) / 0.3)
    assert torch.equal(residual(p, p), p)


def test_near_codes_are_others_even_where_codes_are_alike() -> None:
    codes = torch.tensor([[0.0], [0.0], [1.0], [3.0], [0.0]])
    near = nearest_others(codes, 3)
    assert all(i not in row for i, row in enumerate(near.tolist()))
    assert near[3].tolist()[0] == 2 and set(near[0, :2].tolist()) == {1, 4}


# With transformers

CODES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "table": ([16], {}),
    "table, two codebooks": ([8, 5], {}),
    "factorized, in turn": ([8, 5], {"kind": "factorized", "depth": 1, "heads": 2}),
    "bits": ([4, 8], {"kind": "bits"}),
}


@pytest.fixture(scope="module")
def generator() -> Callable[..., Generator]:
    def build(codes: str = "table", depth: int = 2, kind: str = "causal", **over: Any) -> Generator:
        torch.manual_seed(depth)
        sizes, how = CODES[codes]
        model = {"kind": kind, "backbone": {"width": 16, "depth": depth, "heads": 2}, "codes": how}
        table = {"name": f"tiny-{depth}", "tokenizer": "tiny", "hash": "0" * 16, "codebook_sizes": sizes,
                 "nested": True, "max_tokens": 8, "classes": 2, "class_names": [], "model": model}  # fmt: skip
        gen = Generator.from_config({**table, **over}).eval().requires_grad_(False)
        for parameter in gen.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter * 3 if parameter.abs().max() > 0 else torch.randn_like(parameter) / 4)
        return gen

    return build


def near_of(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(nearest_others(torch.arange(size)[:, None].float(), 2) for size in sizes)


@pytest.mark.parametrize("codes", CODES)
def test_generators_speculate(codes: str, generator: Callable[..., Generator]) -> None:
    target, draft = generator(codes), generator(codes, depth=1)
    one = target.speculate([0, 1, None], draft, guidance=1.5)
    assert one.tokens == target.speculate([0, 1, None], draft, guidance=1.5, lookahead=7, batch_size=3).tokens
    assert one.tokens[1:2] == target.speculate(1, draft, guidance=1.5, seed=1).tokens
    assert one.tokens[:, :3] == target.speculate([0, 1, None], draft, 3, guidance=1.5).tokens
    same = target.speculate([0, 1], target, lookahead=4)
    per_image = 8 * target.model.codes.per_token
    assert same.accepted == 4 * target.model.codes.per_token and same.target_passes == 2 * (1 + 2)
    assert same.draft_passes == 2 * per_image
    # The likeliest ids are the same, whoever proposes.
    assert target.speculate([0, 1], draft, temperature=0.0).tokens == target.sample([0, 1], temperature=0.0)
    if codes != "bits":
        relax = Relaxation(near_of(target.codebook_sizes), 0.5)
        relaxed = target.speculate([0, 1] * 8, draft, relax=relax, batch_size=8)
        assert relaxed.accepted > target.speculate([0, 1] * 8, draft, batch_size=8).accepted


def test_relaxation_from_a_tokenizer_s_codebook(tiny: Callable[..., dict[str, Any]]) -> None:
    tok = tv.Tokenizer.from_config(tiny("flextok", "fsq"))
    relax = Relaxation.of(tok, neighbours=3, delta=0.1)
    codes = tok.quantizer.lookup(torch.arange(200)[:, None, None])[:, 0]
    distances = torch.cdist(codes, codes).fill_diagonal_(np.inf)
    assert torch.allclose(distances.gather(1, relax.near[0]), distances.sort(dim=1).values[:, :3], atol=1e-5)
    with pytest.raises(ValueError, match="codebooks of at most"):
        Relaxation.of(SimpleNamespace(name="t", codebook_sizes=(2**62,), continuous=False), neighbours=2, delta=0.1)
    with pytest.raises(ValueError, match="has none"):
        Relaxation.of(SimpleNamespace(name="t", codebook_sizes=(), continuous=True), neighbours=2, delta=0.1)
    with pytest.raises(ValueError, match="1 to 199"):
        Relaxation.of(tok, neighbours=200, delta=0.1)
    both = Relaxation.of(tv.Tokenizer.from_config(tiny("flextok", "library")), neighbours=2, delta=0.1)
    assert [near.shape for near in both.near] == [(16, 2), (8, 2)]


def test_what_does_not_go_together_is_refused(generator: Callable[..., Generator]) -> None:
    target, draft = generator(), generator(depth=1)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="delta is a total variation"):
            Relaxation((), wrong)
    with pytest.raises(ValueError, match="another hash"):
        target.speculate(0, generator(depth=1, hash="1" * 16))
    with pytest.raises(ValueError, match="another codebook_sizes"):
        target.speculate(0, generator("bits", depth=1))
    with pytest.raises(ValueError, match="FactorizedCodes"):
        generator("table, two codebooks").speculate(0, generator("factorized, in turn", depth=1))
    with pytest.raises(ValueError, match="token by token"):
        target.speculate(0, generator(kind="masked"))
    with pytest.raises(ValueError, match="lookahead"):
        target.speculate(0, draft, lookahead=0)
    with pytest.raises(ValueError, match="near codes for codebooks of"):
        target.speculate(0, draft, relax=Relaxation(near_of((8,)), 0.1))
    with pytest.raises(ValueError, match="no near codes"):
        bits = generator("bits")
        bits.speculate(0, bits, relax=Relaxation(near_of(bits.codebook_sizes), 0.1))
    with pytest.raises(ValueError, match="training mode"):
        target.speculate(0, generator(depth=1).train())
