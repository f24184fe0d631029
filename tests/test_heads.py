"""Heads for tokens of several ids: exact laws, causality over codebooks, draws that follow the law."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.heads import BinaryEmbedding, BinaryHead, FactorizedEmbedding, FactorizedHead, draw

SIZES = (4, 3, 2)
KINDS = ("independent", "causal", "binary")


def a_head(kind, sizes=None):
    """With weights that are not zero, as after some training."""
    if kind == "binary":
        head = BinaryHead(width=16, codebook_sizes=sizes or (4, 2, 2))
    else:
        head = FactorizedHead(width=16, codebook_sizes=sizes or SIZES, depth=2 * (kind == "causal"), heads=2)
    for p in head.out.parameters():
        torch.nn.init.normal_(p)
    return head.eval()


def ids_of(sizes, *shape):
    return torch.stack([torch.randint(size, shape) for size in sizes], dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probabilities_of_all_tokens_sum_to_one(kind):
    head = a_head(kind)
    every = torch.tensor(list(product(*map(range, head.codebook_sizes))))
    hidden = torch.randn(2, 1, 16).expand(2, len(every), 16)
    log_prob = head.log_prob(hidden, every.expand(2, -1, -1))
    torch.testing.assert_close(log_prob.exp().sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_law(kind):
    """Chi-square over all tokens, 20,000 draws; 0.1 % of true laws would fail."""
    head = a_head(kind)
    every = torch.tensor(list(product(*map(range, head.codebook_sizes))))
    hidden, draws = torch.randn(16), 20_000
    law = head.log_prob(hidden.expand(len(every), 16), every).exp()
    drawn = head.sample(hidden.expand(draws, 16), generator=torch.Generator().manual_seed(0))
    index = (drawn[:, None] == every).all(dim=-1).int().argmax(dim=1)
    counts = torch.bincount(index, minlength=len(every))
    rare = law * draws < 5  # pooled, or the test's own law would not hold
    expected = torch.cat([law[~rare], law[rare].sum()[None]]) * draws
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    chi_square = ((found - expected).square() / expected.clamp_min(1e-9))[expected > 1].sum().item()
    freedom = int((expected > 1).sum()) - 1
    assert chi_square < freedom + 3.3 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_and_zero_temperature_the_likeliest(kind):
    head, hidden = a_head(kind), torch.randn(3, 5, 16)
    first, second = (head.sample(hidden, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (3, 5, 3) and first.dtype == torch.int64
    assert torch.equal(head.sample(hidden, temperature=0), head.sample(hidden, temperature=0))
    if kind != "causal":  # of independent ids the likeliest token is that of the likeliest ids
        best = head.log_prob(hidden, head.sample(hidden, temperature=0))
        for _ in range(20):
            assert (best >= head.log_prob(hidden, head.sample(hidden)) - 1e-5).all()


def test_a_causal_head_sees_the_ids_before_and_no_others():
    head, hidden = a_head("causal"), torch.randn(2, 5, 16)
    ids = ids_of(SIZES, 2, 5)
    before = head.logits(hidden, ids)
    for j, size in enumerate(SIZES):
        changed = ids.clone()
        changed[..., j] = (ids[..., j] + 1) % size
        after = head.logits(hidden, changed)
        for i in range(len(SIZES)):
            same = torch.allclose(before[i], after[i], atol=1e-6)
            assert same == (i <= j), f"logits of codebook {i} and the id of codebook {j}"
    independent = a_head("independent")
    for one, other in zip(independent.logits(hidden, ids), independent.logits(hidden, (ids + 1) % 2), strict=True):
        assert torch.equal(one, other)


def test_a_causal_head_learns_what_an_independent_one_cannot():
    """Second id = first id, first id uniform: the entropy is ln 4 for the pair, and 2 ln 4 for independent ids."""
    first = torch.randint(4, (256, 1))
    ids, hidden = first.expand(-1, 2), torch.zeros(256, 16)
    losses = {}
    for depth in (0, 1):
        head = FactorizedHead(width=16, codebook_sizes=(4, 4), depth=depth)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        assert head.loss(hidden, ids).item() == pytest.approx(math.log(4))
        for _ in range(60):
            optimizer.zero_grad()
            head.loss(hidden, ids).backward()
            optimizer.step()
        losses[depth] = 2 * head.loss(hidden, ids).item()
    assert losses[1] < 1.1 * math.log(4) and losses[0] > 1.9 * math.log(4)


def test_the_losses_are_the_papers():
    """FQGAN's mean of the codebooks' cross-entropies, Instella's binary cross-entropy over bits."""
    hidden = torch.randn(2, 5, 16)
    head, ids = a_head("causal"), ids_of(SIZES, 2, 5)
    parts = [F.cross_entropy(x.flatten(0, 1), ids[..., j].flatten()) for j, x in enumerate(head.logits(hidden, ids))]
    torch.testing.assert_close(head.loss(hidden, ids), torch.stack(parts).mean())
    head = a_head("binary", (2,) * 64)
    bits = ids_of((2,) * 64, 2, 5)
    expected = F.binary_cross_entropy_with_logits(head.logits(hidden), bits.float())
    torch.testing.assert_close(head.loss(hidden, bits), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind):
    head, hidden = a_head(kind), torch.randn(2, 5, 16)
    ids = ids_of(head.codebook_sizes, 2, 5)
    ragged = ids.clone()
    ragged[1, 2:] = -1
    whole = torch.cat([hidden[0], hidden[1, :2]]), torch.cat([ids[0], ids[1, :2]])
    torch.testing.assert_close(head.loss(hidden, ragged), head.loss(*whole))
    with pytest.raises(ValueError, match="no token counts"):
        head.loss(hidden, torch.full_like(ids, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_guidance(kind):
    head, hidden, without = a_head(kind), torch.randn(64, 16), torch.randn(64, 16)
    seeded = [torch.Generator().manual_seed(1) for _ in range(4)]
    plain = head.sample(hidden, generator=seeded[0])
    assert torch.equal(head.sample(hidden, unconditional=without, generator=seeded[1]), plain)
    other = head.sample(without, generator=seeded[2])
    assert torch.equal(head.sample(hidden, unconditional=without, guidance=0.0, generator=seeded[3]), other)
    strong = head.sample(hidden, unconditional=without, guidance=5.0, temperature=0)
    assert not torch.equal(strong, head.sample(hidden, temperature=0))
    with pytest.raises(ValueError, match="needs unconditional"):
        head.sample(hidden, guidance=2.0)
    with pytest.raises(ValueError, match="unconditional states"):
        head.sample(hidden, unconditional=without[:1], guidance=2.0)


def test_the_bits_of_wide_ids_are_those_of_single_bits():
    """The order of bits is that of ``IdFormat``: eight ids of eight bits cost what 64 of one bit do."""
    wide, narrow = a_head("binary", (256,) * 8), a_head("binary", (2,) * 64)
    narrow.load_state_dict(wide.state_dict())
    hidden, ids = torch.randn(3, 16), ids_of((256,) * 8, 3)
    bits = wide.id_format.to_bits(ids).long()
    torch.testing.assert_close(wide.log_prob(hidden, ids), narrow.log_prob(hidden, bits))
    embeddings = [BinaryEmbedding(width=16, codebook_sizes=sizes) for sizes in ((256,) * 8, (2,) * 64)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    torch.testing.assert_close(embeddings[0](ids), embeddings[1](bits))


def test_an_embedding_of_several_ids_is_their_sum():
    embedding, ids = FactorizedEmbedding(width=16, codebook_sizes=SIZES), ids_of(SIZES, 2, 5)
    expected = sum(embedding.tables[j](ids[..., j]) for j in range(3))
    torch.testing.assert_close(embedding(ids), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_ids_and_states_are_refused(kind):
    head, hidden = a_head(kind), torch.randn(2, 5, 16)
    ids = ids_of(head.codebook_sizes, 2, 5)
    for wrong, message in (
        (ids + 10, "codebook 0 run from 0 to 3"),
        (ids[..., :2], r"ids are \(2, 5, 3\)"),
        (ids.float(), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            head.loss(hidden, wrong)
    with pytest.raises(ValueError, match="hidden states are ... 16"):
        head.sample(hidden[..., :3])
    with pytest.raises(ValueError, match="temperature"):
        head.sample(hidden, temperature=-1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FactorizedHead(width=16, codebook_sizes=()), "codebook_sizes"),
        (lambda: FactorizedHead(width=16, codebook_sizes=(1,)), "codebook_sizes"),
        (lambda: FactorizedHead(width=15, codebook_sizes=(4,), depth=1), "divisor of width"),
        (lambda: FactorizedHead(width=16, codebook_sizes=(4,), depth=-1), "depth"),
        (lambda: BinaryHead(width=16, codebook_sizes=(6,)), "powers of two"),
        (lambda: BinaryEmbedding(width=16, codebook_sizes=(6,)), "powers of two"),
    ],
)
def test_impossible_heads_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


class TestDraw:
    LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, float("-inf")])

    def drawn(self, **options):
        return set(draw(self.LOGITS.expand(2000, 5), **options).tolist())

    def test_what_is_cut_is_never_drawn(self):
        assert self.drawn() == {0, 1, 2, 3}
        assert self.drawn(top_k=2) == {1, 3}
        assert self.drawn(top_k=100) == {0, 1, 2, 3}
        assert self.drawn(temperature=0) == {1}

    def test_top_p_keeps_the_one_that_reaches_it(self):
        p = self.LOGITS.softmax(dim=0)
        assert self.drawn(top_p=p[1].item() - 1e-4) == {1}
        assert self.drawn(top_p=p[1].item() + 1e-4) == {1, 3}
        assert self.drawn(top_p=1e-9) == {1}

    @pytest.mark.parametrize("wrong", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -0.1}])
    def test_impossible_options_are_refused(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            draw(self.LOGITS, **wrong)
