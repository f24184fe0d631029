"""The length policy: each kind draws by its law, ``full`` lifts the share of full length, and prefixes are legal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.encoders.base import Encoder, LengthPolicy, powers_of_two
from tokenizers_vis.tokenizer import Tokenizer

RESTOK = {"kind": "levels", "levels": (4, 8, 16, 32, 64), "weights": (1.0, 2.0, 4.0, 8.0, 16.0), "full": 0.8}
POLICIES: dict[str, dict[str, Any]] = {
    "uniform": {"kind": "uniform"},
    "uniform, a fifth shortened": {"kind": "uniform", "full": 0.8},
    "pow2": {"kind": "pow2"},
    "pow2, half full": {"kind": "pow2", "full": 0.5},
    "uniform_pow2": {"kind": "uniform_pow2"},
    "levels": {"kind": "levels", "levels": (1, 2, 4, 8, 16, 32, 64, 128), "full": 0.1},
    "ResTok": RESTOK,
    "mixture": {"kind": "mixture", "mixture": {"uniform": 1.0, "pow2": 3.0, "full": 2.0}, "full": 0.2},
    "mixture with levels": {"kind": "mixture", "levels": (3, 5), "mixture": {"levels": 1.0, "uniform_pow2": 1.0}},
}


def law(policy: LengthPolicy, n: int, kind: str | None = None) -> torch.Tensor:
    """The probability of each length from 0 to n, worked out length by length."""
    p, kind = torch.zeros(n + 1, dtype=torch.float64), kind or policy.kind
    if kind == "mixture":
        total = sum(policy.mixture.values())
        p = sum(weight / total * law(policy, n, each) for each, weight in policy.mixture.items())
    elif kind == "full":
        p[n] = 1
    elif kind == "uniform":
        p[1:] = 1 / n
    elif kind == "uniform_pow2":
        for length in range(1, n + 1):
            p[min(n, 2 ** math.ceil(math.log2(length)))] += 1 / n
    else:
        lengths = policy.levels if kind == "levels" else sorted({1, *(2**i for i in range(20) if 2**i < n), n})
        weights = policy.weights if kind == "levels" and policy.weights else [1] * len(lengths)
        for length, weight in zip(lengths, weights, strict=True):
            p[length] += weight / sum(weights)
    if kind == policy.kind:  # not inside a mixture
        p = p * (1 - policy.full)
        p[n] += policy.full
    return p


def chi_square(lengths: torch.Tensor, p: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic is above what draws from p give; inf for what p never gives."""
    counts, possible = lengths.bincount(minlength=len(p)).double(), p > 0
    if counts[~possible].any():
        return math.inf
    expected = p[possible] * len(lengths)
    free = int(possible.sum()) - 1
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    return (statistic - free) / math.sqrt(2 * max(free, 1))


@pytest.mark.parametrize("n", [128, 130, 200])
@pytest.mark.parametrize("name", POLICIES)
def test_lengths_follow_their_law(name: str, n: int) -> None:
    policy = LengthPolicy(**POLICIES[name])
    lengths = policy.sample(40_000, n)
    assert lengths.shape == (40_000,) and lengths.dtype == torch.int64 and lengths.is_contiguous()
    assert lengths.min() >= 1 and lengths.max() <= n
    assert law(policy, n).sum().item() == pytest.approx(1)
    assert chi_square(lengths, law(policy, n)) < 4


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_tells_policies_apart(name: str) -> None:
    lengths = LengthPolicy(**POLICIES[name]).sample(40_000, 128)
    for other, options in POLICIES.items():
        assert other == name or chi_square(lengths, law(LengthPolicy(**options), 128)) > 20


@pytest.mark.parametrize("name", POLICIES)
def test_one_length_for_a_batch_follows_the_same_law(name: str) -> None:
    policy = LengthPolicy(**POLICIES[name], per="batch")
    batches = torch.stack([policy.sample(3, 128) for _ in range(3000)])
    assert (batches == batches[:, :1]).all()
    # In steps of 16, so that each class has enough draws.
    p = law(policy, 128)
    coarse = torch.zeros(9, dtype=torch.float64).index_add_(0, torch.arange(129) // 16, p)
    assert chi_square(batches[:, 0] // 16, coarse) < 4
    batches[0, 0] = 0  # its own memory for every image
    assert (policy.sample(3, 128) > 0).all() and (batches[0, 1:] > 0).all()


@pytest.mark.parametrize("name", POLICIES)
def test_full_is_the_probability_of_full_length(name: str) -> None:
    options = {**POLICIES[name], "full": 0.6}
    chance = law(LengthPolicy(**options), 160)[160].item()
    assert chance >= 0.6
    share = (LengthPolicy(**options).sample(20_000, 160) == 160).float().mean().item()
    assert share == pytest.approx(chance, abs=0.015)
    assert (LengthPolicy(**{**options, "full": 1.0}).sample(50, 160) == 160).all()


def test_restok_keeps_all_at_four_of_five() -> None:
    lengths = LengthPolicy(**RESTOK).sample(20_000, 128)
    assert (lengths == 128).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert set(lengths.tolist()) == {4, 8, 16, 32, 64, 128}


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_powers_of_two(n: int, expected: list[int]) -> None:
    assert powers_of_two(n) == expected
    assert LengthPolicy("pow2").sample(4000, n).unique().tolist() == expected


def test_keeping_all_draws_nothing() -> None:
    state = torch.get_rng_state()
    assert LengthPolicy().sample(5, 6) is None
    assert torch.equal(state, torch.get_rng_state())


@given(data=st.data(), n=st.integers(1, 300), b=st.integers(1, 9), per=st.sampled_from(["image", "batch"]))
def test_every_length_is_one_that_can_be_decoded(data: st.DataObject, n: int, b: int, per: str) -> None:
    levels = tuple(sorted(data.draw(st.sets(st.integers(1, n), min_size=1, max_size=5))))
    kinds = ["full", "uniform", "pow2", "uniform_pow2", "levels"]
    mixture = data.draw(st.dictionaries(st.sampled_from(kinds), st.floats(0.1, 10), min_size=1))
    options = {"kind": "mixture", "mixture": mixture, "full": data.draw(st.floats(0, 1)), "per": per}
    policy = LengthPolicy(**options, levels=levels if "levels" in mixture else ())
    lengths = policy.sample(b, n)
    possible = {int(i) for i in law(policy, n).nonzero()}
    assert len(lengths) == b and set(lengths.tolist()) <= possible and min(possible) >= 1 and max(possible) <= n


@pytest.mark.parametrize("name", POLICIES)
def test_the_global_seed_decides(name: str) -> None:
    policy = LengthPolicy(**{**POLICIES[name], "full": 0.1})

    def ten(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return [policy.sample(8, 128).tolist() for _ in range(10)]

    assert ten(3) == ten(3) != ten(4)


# In a tokenizer


@pytest.mark.parametrize("kind", ["titok", "flextok"])
@pytest.mark.parametrize(
    "lengths",
    [
        {"kind": "levels", "levels": [2, 3]},
        {"kind": "mixture", "mixture": {"uniform": 1, "pow2": 1.0}, "full": 0.25, "per": "batch"},
    ],
    ids=["levels", "mixture"],
)
def test_training_with_a_policy(kind: str, lengths: dict[str, Any], tiny: Callable[..., dict[str, Any]]) -> None:
    table = tiny(kind, "vq", "titok" if kind == "titok" else "vit")
    table["encoder"]["lengths"] = lengths
    tok = Tokenizer.from_config(table).train()
    assert tok.nested
    seen = []
    tok.decoder.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[1], inputs[1])))
    for _ in range(10):
        done = tok.training_pass(torch.rand(4, 3, 16, 16))
        longest, ragged = seen.pop()
        assert longest == done.lengths.max()
        assert (ragged is None) == bool((done.lengths == longest).all())
        # Only registers that see no later one can be left out before they are quantized.
        assert done.quantized.ids.shape[1] == (longest if tok.encoder.causal else 6)
        done.decoded.loss.backward()


def test_what_is_not_told_to_the_decoder_is_still_quantized(tiny: Callable[..., dict[str, Any]]) -> None:
    """One-D-Piece's commitment is that of all tokens, at every length."""
    table = tiny("titok", "vq", "titok")
    whole = Tokenizer.from_config(table).train()
    table["encoder"]["lengths"] = {"kind": "levels", "levels": [1]}
    short = Tokenizer.from_config(table).train()
    short.load_state_dict(whole.state_dict())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(short.training_pass(images).quantized.loss, whole.training_pass(images).quantized.loss)


def test_a_policy_is_saved_with_its_tokenizer(tiny: Callable[..., dict[str, Any]], tmp_path: Any) -> None:
    table = tiny("flextok")
    table["encoder"]["lengths"] = {"kind": "mixture", "mixture": {"levels": 2, "full": 1}, "levels": [2, 5]}
    Tokenizer.from_config(table).save(tmp_path / "a.safetensors")
    again = Tokenizer.from_file(tmp_path / "a.safetensors")
    assert again.encoder.lengths == LengthPolicy("mixture", levels=(2, 5), mixture={"levels": 2.0, "full": 1.0})


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"kind": "pow3"}, "lengths.kind is one of 'full', 'uniform', 'pow2'"),
        ({"kind": "pow2", "full": 1.5}, "lengths: full is a probability from 0 to 1, got 1.5"),
        ({"full": "all"}, "lengths.full is a number"),
        ({"per": "pixel"}, "lengths.per is one of 'image', 'batch'"),
        ("pow2", "lengths is a table of options"),
        ({"kind": "levels"}, "kind 'levels' alone comes with levels, its lengths; got 'levels'"),
        ({"kind": "uniform", "levels": [2]}, "kind 'levels' alone comes with levels, its lengths; got 'uniform'"),
        ({"kind": "levels", "levels": [4, 2]}, r"levels are lengths from 1 that rise, got \(4, 2\)"),
        ({"kind": "levels", "levels": [0, 2]}, r"levels are lengths from 1 that rise, got \(0, 2\)"),
        ({"kind": "levels", "levels": [2, 7]}, r"lengths.levels go up to max_tokens, 6; got \(2, 7\)"),
        ({"kind": "levels", "levels": [2, 4], "weights": [1.0]}, "weights are one for each level"),
        ({"kind": "levels", "levels": [2], "weights": [0.0]}, "weights: how often each is drawn is 0 or more, of one"),
        ({"kind": "mixture"}, "kind 'mixture' alone comes with a mixture"),
        ({"kind": "full", "mixture": {"pow2": 1.0}}, "kind 'mixture' alone comes with a mixture"),
        ({"kind": "mixture", "mixture": {"pow3": 1.0}}, "a mixture is of full, uniform, pow2, .*; got pow3"),
        ({"kind": "mixture", "mixture": {"pow2": -1.0}}, "mixture: how often each is drawn is 0 or more"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["titok", "flextok"])
def test_a_policy_that_makes_no_sense(kind: str, lengths: Any, message: str) -> None:
    part = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
    with pytest.raises(ConfigError, match=message):
        build(Encoder, {"kind": kind, **part, "lengths": lengths}, "encoder")


@pytest.mark.parametrize("wrong", [{"kind": "pow3"}, {"per": "pixel"}, {"full": -0.1}], ids=str)
def test_a_policy_checks_itself(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(*wrong.values())):
        LengthPolicy(**wrong)
