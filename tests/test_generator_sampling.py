"""Sampling maths of generators against the originals' numbers, and against plain references."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizers_vis.generators.guidance import Constant, Interval, Linear, PowerCosine
from tokenizers_vis.generators.masked import masked_count, still_masked
from tokenizers_vis.generators.ngram import CONTEXTS, NGram
from tokenizers_vis.generators.random_order import ordered_inputs
from tokenizers_vis.generators.sampling import Pair, Sampling, choose, uniforms
from tokenizers_vis.heads import truncate

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]


# Against the originals


def test_llamagen_s_temperature_top_k_and_top_p(recorded: Recorded) -> None:
    tensors, metadata = recorded("llamagen_sampling")
    for (temperature, top_k, top_p), expected in zip(
        json.loads(metadata["options"])["combinations"], tensors["probs"], strict=True
    ):
        if temperature == 0:
            drawn = choose(tensors["logits"], torch.zeros(3), Sampling(temperature=0.0))
            assert torch.equal(drawn.ids, expected.argmax(dim=-1))
        else:
            kept = truncate(tensors["logits"] / temperature, top_k=top_k, top_p=top_p)
            assert torch.allclose(kept.softmax(dim=-1), expected, atol=1e-6)


def test_llamagen_s_interval_of_guidance(recorded: Recorded) -> None:
    tensors, metadata = recorded("llamagen_sampling")
    options = json.loads(metadata["options"])
    # Its steps are counted from the second token on.
    guidance = Interval(options["cfg_scale"], stop=options["cfg_interval"] + 2)
    for step, expected in enumerate(tensors["guided_probs"]):
        conditional, unconditional = tensors["pairs"][:, step]
        logits = Pair(conditional, unconditional, guidance.at(step + 1, 6)).guided()
        assert torch.allclose(logits.softmax(dim=-1), expected, atol=1e-5)


def test_rar_s_shuffled_inputs_with_the_positions_they_predict(recorded: Recorded) -> None:
    tensors, metadata = recorded("rar")
    options = json.loads(metadata["options"])
    table, orders = tensors["embeddings"], tensors["orders"]
    shuffled = tensors["ids"].gather(1, orders)
    assert torch.equal(shuffled, tensors["targets_shuffled"])
    classes = table[tensors["labels"] + options["codebook_size"] + 1]
    # RAR has two positions before the tokens: a learned one that says nothing, and the class, with a place of its own.
    ours = ordered_inputs(table[shuffled], classes, tensors["places"][2:], tensors["targets"][2:], orders)
    theirs = tensors["inputs"][:, 1:-1].clone()
    theirs[:, 0] -= tensors["places"][1]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_rar_s_power_cosine_guidance_and_temperature(recorded: Recorded) -> None:
    tensors, metadata = recorded("rar")
    options = json.loads(metadata["options"])
    guidance = PowerCosine(options["guidance_scale"], options["guidance_scale_pow"])
    steps = len(tensors["sampling_logits"])
    for step, rows in enumerate(tensors["sampling_logits"]):
        logits = Pair.of(rows, 2, guidance.at(step, steps)).guided() / options["randomize_temperature"]
        assert torch.allclose(logits.softmax(dim=-1), tensors["sampling_probs"][step], atol=1e-5)


def test_maskgit_s_rounds(recorded: Recorded) -> None:
    """Which tokens stay masked after each round, given the original's logits and noise."""
    tensors, metadata = recorded("maskgit")
    options = json.loads(metadata["options"])
    steps, size = options["num_sample_steps"], options["codebook_size"]
    guidance = PowerCosine(options["guidance_scale"], options["guidance_scale_pow"])

    def gumbel(u: Tensor) -> Tensor:
        return -torch.log((-torch.log(u.clamp_min(1e-20))).clamp_min(1e-20))

    left = length = tensors["ids"].shape[-1]
    for step in range(steps):
        ids = tensors["ids"][step]
        masked = ids == size
        assert (masked.sum(dim=1) == left).all()
        logits = Pair(tensors["conditional"][step], tensors["unconditional"][step], guidance.at(step, steps)).guided()
        warmth = options["randomize_temperature"] * (1 - (step + 1) / steps)
        drawn = (logits + warmth * gumbel(tensors["draw_uniform"][step])).argmax(dim=-1)
        confidence = logits.gather(-1, drawn[..., None]).squeeze(-1)
        confidence = confidence + warmth * gumbel(tensors["choice_uniform"][step])
        left = masked_count(step, steps, length, left)
        ids = torch.where(masked, drawn, ids).masked_fill(still_masked(confidence, masked, left), size)
        assert torch.equal(ids, tensors["ids"][step + 1])
    assert left == 0


# Against plain references


def plain(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities after both cuts, id by id."""
    p = logits.double().softmax(dim=-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: top_k or None]
    total, chosen = sum(p[i] for i in kept), []
    for i in kept:
        if sum(p[j] for j in chosen) / total >= top_p:
            break
        chosen.append(i)
    result = torch.zeros(len(p), dtype=torch.float64)
    result[chosen] = torch.tensor([p[i] for i in chosen], dtype=torch.float64)
    return result / result.sum()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.3), (0, 0.9), (7, 0.6), (99, 0.99)])
def test_top_k_and_top_p_keep_what_a_plain_loop_keeps(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(20, 23)
    kept = truncate(logits, top_k=top_k, top_p=top_p).softmax(dim=-1)
    for row, expected in zip(kept, (plain(one, top_k, top_p) for one in logits), strict=True):
        assert torch.allclose(row.double(), expected, atol=1e-6)


def test_a_draw_is_the_id_whose_share_of_the_line_holds_the_number() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-12], dtype=torch.float64)
    drawn = choose(p.log().expand(6, -1), u, Sampling())
    assert drawn.ids.tolist() == [1, 1, 3, 3, 4, 4]
    assert torch.allclose(drawn.log_prob.exp(), p[drawn.ids])
    warm = choose(p.log().expand(1, -1), u[2:3], Sampling(temperature=1e-3))
    assert warm.ids.item() == 3 and warm.log_prob.exp().item() == pytest.approx(0.5)


def test_draws_follow_the_law() -> None:
    logits = torch.randn(9)
    u = uniforms([3], (20000,))[0]
    found = torch.bincount(choose(logits.expand(20000, -1), u, Sampling(top_k=6)).ids, minlength=9) / 20000
    assert (found - truncate(logits, top_k=6).softmax(dim=-1)).abs().max() < 0.015


def test_random_numbers_are_each_seed_s_own() -> None:
    both = uniforms([1, 2], (3, 4))
    assert torch.equal(both[1], uniforms([2], (3, 4))[0]) and not torch.equal(both[0], both[1])
    assert 0 <= both.min() and both.max() < 1


def test_guidance_schedules_at_their_ends() -> None:
    assert [Constant(3.0).at(step, 4) for step in range(4)] == [3] * 4
    assert [Linear(3.0).at(step, 4) for step in range(4)] == [1, 1.5, 2, 2.5]
    rising = [PowerCosine(5.0, 2.0).at(step, 8) for step in range(8)]
    assert rising[0] == 1 and rising == sorted(rising)
    assert rising[4] == pytest.approx(1 + 4 * (1 - math.cos(math.pi / 4)) / 2)
    for wrong in (lambda: Constant(-1.0), lambda: PowerCosine(2.0, -1.0), lambda: Interval(2.0, 3, 3)):
        with pytest.raises(ValueError, match="0"):
            wrong()


def test_guided_logits_are_those_of_the_equation() -> None:
    c, u = torch.randn(2, 5, dtype=torch.float32).unbind(0)
    assert torch.allclose(Pair(c, u, 2.5).guided(), u + 2.5 * (c - u))
    assert torch.equal(Pair(c).guided(), c)
    ruled_out = torch.tensor([0.0, -math.inf])
    assert Pair(ruled_out, ruled_out, 3.0).guided().tolist() == [0, -math.inf]


@pytest.mark.parametrize(("steps", "length"), [(1, 9), (4, 9), (9, 9), (12, 64), (30, 9)])
def test_every_round_unmasks_some_and_the_last_all(steps: int, length: int) -> None:
    left, counts = length, []
    for step in range(steps):
        left = masked_count(step, steps, length, left)
        counts.append(left)
    assert counts[-1] == 0
    before = [length, *counts]
    assert all(now < then or then == 0 for then, now in zip(before, counts, strict=False))


# Counting


@pytest.fixture(scope="module")
def markov() -> tuple[np.ndarray, np.ndarray, float]:
    """Sequences of a first-order source to learn from, others to judge by, and the bits of one of its steps."""
    random = np.random.default_rng(0)
    law = random.dirichlet(np.full(6, 0.4), 6)

    def draw(b: int) -> np.ndarray:
        ids = np.zeros((b, 12), dtype=np.int64)
        for place in range(1, 12):
            ids[:, place] = (random.random(b)[:, None] > law[ids[:, place - 1]].cumsum(axis=1)).sum(axis=1)
        return ids.clip(max=5)

    entropy = -np.log2(law, where=law > 0, out=np.zeros_like(law))
    train, val = draw(1500), draw(400)
    return train, val, float((law * entropy).sum(axis=1)[val[:, :-1]].mean())


@pytest.mark.parametrize("kind", CONTEXTS)
def test_counted_chances_add_up_to_one(kind: str, markov: tuple[np.ndarray, np.ndarray, float]) -> None:
    train, val, _ = markov
    model = NGram(train[:20], 8, kind)  # few enough that most contexts are new; 6 and 7 never came
    for place in (0, 1, 7):
        rows = np.repeat(val[:30], 8, axis=0)
        rows[:, place] = np.tile(np.arange(8), 30)
        assert np.allclose(np.exp(model.log_prob(rows)[:, place]).reshape(30, 8).sum(axis=1), 1)


def test_a_bigram_finds_the_law_of_a_markov_source(markov: tuple[np.ndarray, np.ndarray, float]) -> None:
    train, val, entropy = markov
    bigram = NGram(train, 6, "bigram")
    bits = -bigram.log_prob(val)[:, 1:].mean() / math.log(2)
    assert bits == pytest.approx(entropy, abs=0.05)
    assert bigram.bits(val) < NGram(train, 6, "zero_order").bits(val) - 0.3


@pytest.mark.parametrize("kind", CONTEXTS)
def test_counted_samples_cost_what_they_should(kind: str, markov: tuple[np.ndarray, np.ndarray, float]) -> None:
    """Samples of a law cost its entropy under it: what its own data cost, but for smoothing."""
    train, _, _ = markov
    model = NGram(train, 6, kind)
    samples = model.sample(1500, seed=1)
    assert np.array_equal(samples, model.sample(1500, seed=1))
    assert model.bits(samples) == pytest.approx(model.bits(train), abs=0.05)


def test_ids_that_cannot_be_counted_are_refused() -> None:
    for wrong in (np.zeros((0, 3), dtype=np.int64), np.zeros(3, dtype=np.int64), np.full((1, 2), 8)):
        with pytest.raises(ValueError, match="from 0 to 7"):
            NGram(wrong, 8, "bigram")
