"""Perturbed tokens: which codes are near, how many ids change, and that nothing hangs on the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenizers_vis as tv
from tokenizers_vis.config import build
from tokenizers_vis.eval.perturbation import Grid, Setting, _Digits, _neighbourhoods, perturbed_score, perturbed_tokens
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens

SEED = 3


@pytest.fixture(scope="module")
def tok(tiny: Callable[..., dict[str, Any]]) -> Tokenizer:
    """FSQ of 8, 5, 5 levels, nested, 6 tokens."""
    torch.manual_seed(0)
    return Tokenizer.from_config(tiny()).eval()


def with_quantizer(tok: Tokenizer, quantizer: dict[str, Any]) -> Tokenizer:
    """A tokenizer that has the quantizer, and an encoder and decoder of its widths."""
    torch.manual_seed(0)
    dims = build(Quantizer, quantizer)
    config = tok.config | {"quantizer": quantizer}
    config["encoder"] = config["encoder"] | {"dim": dims.in_dim}
    config["decoder"] = config["decoder"] | {"dim": dims.dim}
    return Tokenizer.from_config(config).eval()


def random_tokens(tok: Tokenizer, b: int, n: int = 6) -> Tokens:
    torch.manual_seed(1)
    ids = torch.stack([torch.randint(min(size, 2**62), (b, n)) for size in tok.codebook_sizes], dim=-1)
    return Tokens(ids, codebook_sizes=tok.codebook_sizes, tokenizer=tok.codes, nested=tok.nested)


class TestDigits:
    @pytest.mark.parametrize("levels", [(3, 2, 4), (5,), (2, 2, 2, 2), (8, 2)])
    def test_each_place_is_that_of_a_sorted_list(self, levels: tuple[int, ...]):
        """From every id, over all places and an even grid of choices, every id comes equally often."""
        digits = np.array([d[::-1] for d in itertools.product(*(range(level) for level in levels[::-1]))])
        k = len(digits)
        distances = np.abs(digits[:, None] - digits).sum(axis=-1)
        near, grid = _Digits(levels, ""), 840  # a multiple of most shells' sizes
        for strength in {1, 2, k // 2, k}:
            for id_ in range(k):
                place = np.repeat(np.arange(strength), grid)
                within = np.tile((np.arange(grid) + 0.5) / grid, strength)
                picked = near.pick(np.full(len(place), id_), place, within, strength)
                assert (distances[id_, picked] == np.sort(distances[id_])[place]).all()
                if strength == k:
                    counts = np.bincount(picked, minlength=k)
                    assert np.abs(counts / grid - 1).max() < 0.03

    def test_a_shell_that_is_not_all_among_the_nearest_is_drawn_from_evenly(self):
        picked = _Digits((2,) * 6, "").pick(np.zeros(60, int), np.full(60, 3), (np.arange(60) + 0.5) / 60, 4)
        assert sorted(picked.tolist()) == sorted([1 << i for i in range(6)] * 10)

    def test_codebooks_far_too_large_for_a_table(self):
        """62 bits, and 2^60 codes of digits: distances are right, whatever the id."""
        rng = np.random.default_rng(0)
        for levels in ((2,) * 62, (1000,) * 6, (32,) * 12):
            near, m, strength = _Digits(levels, ""), 300, 500
            ids = sum(rng.integers(level, size=m) * int(base) for level, base in zip(levels, near.basis, strict=True))
            place = rng.integers(strength, size=m)
            other = near.pick(ids, place, rng.random(m), strength)
            places = near.basis, np.array(levels)
            far = np.abs(ids[:, None] // places[0] % places[1] - other[:, None] // places[0] % places[1]).sum(axis=1)
            assert ((far == 0) == (place == 0)).all() and (other >= 0).all()
            if levels == (2,) * 62:  # 1 + 62 + 1891
                assert ((far == 1) == ((place > 0) & (place < 63))).all() and far.max() == 2


class TestNeighbourhoods:
    @pytest.mark.parametrize(
        ("quantizer", "names"),
        [
            ({"kind": "fsq", "levels": [8, 8]}, ["L1"]),
            ({"kind": "lfq", "bits": 18, "codebooks": [6, 12]}, ["Hamming"] * 2),
            ({"kind": "gfq", "groups": 3, "bits": 4}, ["Hamming"] * 3),
            ({"kind": "bsq", "bits": 18, "group": 9}, ["Hamming"] * 2),
            ({"kind": "bernoulli", "dim": 4, "bits": 8, "bits_per_id": 8}, ["Hamming"]),
            ({"kind": "vq", "dim": 4, "codebook_size": 300, "distance": "cosine"}, ["Euclidean"]),
            ({"kind": "sim_vq", "dim": 4, "codebook_size": 30}, ["Euclidean"]),
            ({"kind": "ibq", "dim": 4, "codebook_size": 30}, ["Euclidean"]),
            ({"kind": "opt_vq", "dim": 4, "codebook_size": 30, "heads": 2}, ["Euclidean"] * 2),
            ({"kind": "shared_index", "dims": [2, 3], "codebook_size": 30}, ["Euclidean"]),
            ({"kind": "token_bridge", "dim": 3, "bits": 4}, ["Euclidean"] * 3),
            (
                {"kind": "product", "parts": [{"kind": "fsq", "levels": [8, 8]}, {"kind": "lfq", "bits": 4}]},
                ["L1", "Hamming"],
            ),
            ({"kind": "residual", "part": {"kind": "vq", "dim": 4, "codebook_size": 30}, "depth": 2}, ["Euclid"] * 2),
            ({"kind": "perturb", "quantizer": {"kind": "vq", "dim": 4, "codebook_size": 300}}, ["Euclidean"]),
        ],
    )
    def test_near_codes_are_near(self, tok: Tokenizer, quantizer: dict[str, Any], names: list[str]):
        """Ids move, stay in their codebooks, and a small strength moves the codes less than a large one does."""
        tok = with_quantizer(tok, quantizer)
        found = [near.name for near in _neighbourhoods(tok.quantizer)]
        assert all(name in one for name, one in zip(names, found, strict=True))
        tokens = random_tokens(tok, 20)
        codes, smallest = tok.quantizer.lookup(tokens.ids), min(tok.codebook_sizes)
        moved = []
        for strength in (1, 3, smallest):
            near = perturbed_tokens(tok, tokens, 1.0, 1.0, strength, SEED)
            share = (near.ids != tokens.ids).float().mean().item()
            assert abs(share - (1 - 1 / strength)) < 0.12
            moved.append((tok.quantizer.lookup(near.ids) - codes).norm(dim=-1).mean().item())
        assert moved[0] == 0 < moved[1] < moved[2]

    def test_a_table_is_searched_by_the_distance_of_its_codes(self, tok: Tokenizer):
        tok = with_quantizer(tok, {"kind": "vq", "dim": 3, "codebook_size": 300})
        tokens, table = random_tokens(tok, 30), tok.quantizer.table().detach().double()
        near = perturbed_tokens(tok, tokens, 1.0, 1.0, 5, SEED)
        order = torch.cdist(table, table).argsort(dim=-1)
        place = (order[tokens.ids] == near.ids[..., None]).long().argmax(dim=-1)
        assert place.unique().tolist() == [0, 1, 2, 3, 4]

    def test_a_codebook_too_large_for_a_search_is_refused(self, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch):
        from tokenizers_vis.eval import perturbation

        monkeypatch.setattr(perturbation, "MAX_TABLE", 16)
        tok = with_quantizer(tok, {"kind": "vq", "dim": 3, "codebook_size": 32})
        with pytest.raises(ValueError, match="32 codes is too large"):
            perturbed_tokens(tok, random_tokens(tok, 2), 1.0, 1.0, 4)


class TestAmounts:
    def changed(self, tok: Tokenizer, tokens: Tokens, *setting: Any, **options: Any) -> torch.Tensor:
        return (perturbed_tokens(tok, tokens, *setting, SEED, **options).ids != tokens.ids).squeeze(-1)

    def test_none_is_the_identity(self, tok: Tokenizer):
        tokens = random_tokens(tok, 9)
        for setting in ((0.0, 1.0, 50), (1.0, 0.0, 50), (1.0, 1.0, 1)):
            assert perturbed_tokens(tok, tokens, *setting, SEED) == tokens

    def test_rate_and_strength(self, tok: Tokenizer):
        tokens = random_tokens(tok, 500)
        for rate, strength in ((1.0, 200), (0.25, 200), (1.0, 2)):
            share = self.changed(tok, tokens, rate, 1.0, strength).double().mean().item()
            assert abs(share - rate * (1 - 1 / strength)) < 0.03

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
    def test_share_is_met_in_every_run_of_images(self, tok: Tokenizer, share: float):
        tokens = random_tokens(tok, 400)
        touched = self.changed(tok, tokens, 1.0, share, 200).any(dim=1)
        for start, stop in ((0, 400), (0, 50), (123, 323)):
            assert abs(int(touched[start:stop].sum()) - share * (stop - start)) < 2

    def test_more_perturbs_all_that_less_does(self, tok: Tokenizer):
        tokens = random_tokens(tok, 200)
        whole = perturbed_tokens(tok, tokens, 1.0, 1.0, 200, SEED).ids
        for setting in ((0.3, 1.0, 200), (1.0, 0.3, 200), (0.3, 0.3, 200)):
            some = perturbed_tokens(tok, tokens, *setting, SEED).ids
            assert ((some == whole) | (some == tokens.ids)).all() and not torch.equal(some, whole)


class TestDeterminism:
    @pytest.mark.parametrize(
        "quantizer", [{"kind": "fsq", "levels": [8, 5]}, {"kind": "vq", "dim": 4, "codebook_size": 600}]
    )
    def test_batches_order_and_prefixes_do_not_count(self, tok: Tokenizer, quantizer: dict[str, Any]):
        tok = with_quantizer(tok, quantizer)
        tokens = random_tokens(tok, 40)
        whole = perturbed_tokens(tok, tokens, 0.7, 0.6, 9, SEED)
        assert perturbed_tokens(tok, tokens, 0.7, 0.6, 9, SEED) == whole
        for rows in ([17], list(range(8, 31)), list(range(39, -1, -1))):
            assert perturbed_tokens(tok, tokens[rows], 0.7, 0.6, 9, SEED, indices=rows) == whole[rows]
        assert perturbed_tokens(tok, tokens[:, :2], 0.7, 0.6, 9, SEED) == whole[:, :2]

    def test_seeds_differ_and_nothing_else_is_touched(self, tok: Tokenizer):
        tokens = random_tokens(tok, 40)
        ids, state = tokens.ids.clone(), torch.get_rng_state()
        a, b = (perturbed_tokens(tok, tokens, 1.0, 0.5, 50, seed) for seed in (0, 1))
        assert a != b and not torch.equal((a.ids != ids).any(dim=1), (b.ids != ids).any(dim=1))
        assert torch.equal(tokens.ids, ids) and torch.equal(torch.get_rng_state(), state)

    def test_padding_stays(self, tok: Tokenizer):
        ids, lengths = random_tokens(tok, 3).ids, torch.tensor([6, 1, 3])
        ids[torch.arange(6) >= lengths[:, None]] = -1
        tokens = Tokens(ids, tok.codebook_sizes, tok.codes, lengths, True)
        near = perturbed_tokens(tok, tokens, 1.0, 1.0, 200, SEED)
        assert torch.equal(near.ids == -1, ids == -1) and torch.equal(near.lengths, lengths)
        assert near[1][:, :1] == perturbed_tokens(tok, tokens[1][:, :1], 1.0, 1.0, 200, SEED, indices=[1])


class TestScore:
    def test_every_setting_is_measured_and_the_grid_is_told(self, tok: Tokenizer):
        tokens = random_tokens(tok, 50)
        grid = Grid(rates=(0.0, 1.0), shares=(1.0,), strengths=(2, 200))
        score = perturbed_score(tok, tokens, lambda t: (t.ids != tokens.ids).double().mean().item(), grid, SEED)
        assert [value.setting for value in score.values] == [
            Setting(rate, 1.0, strength) for rate in (0.0, 1.0) for strength in (2, 200)
        ]
        values = [value.value for value in score.values]
        assert values[:2] == [0, 0] and 0.4 < values[2] < 0.6 and values[3] > 0.98
        assert score.mean == pytest.approx(sum(values) / 4)
        assert (score.grid, score.seed, score.images) == (grid, SEED, 50)
        assert score.neighbourhoods == ("L1 distance of digits",)

    def test_the_bundled_tokenizer_bears_small_errors_better_than_large_ones(self, photos: list[Path]):
        mini = tv.load(device="cpu")
        tokens = mini.encode(photos)
        plain = mini.decode(tokens)
        errors = [
            (mini.decode(perturbed_tokens(mini, tokens, *setting, SEED)) - plain).square().mean().item()
            for setting in ((0.5, 1.0, 10), (1.0, 1.0, 10), (1.0, 1.0, 1000))
        ]
        assert 0 < errors[0] < errors[1] < errors[2]

    def test_all_settings_are_checked_first(self, tok: Tokenizer):
        measured: list[Tokens] = []
        with pytest.raises(ValueError, match="strength is a number of codes, from 1 to 200"):
            perturbed_score(tok, random_tokens(tok, 2), measured.append, Grid(strengths=(10, 201)))
        assert not measured


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ((1.5, 1.0, 5), "rate is a share"),
            ((1.0, -0.1, 5), "share is a share"),
            ((1.0, 1.0, 0), "from 1 to 200"),
            ((1.0, 1.0, 201), "from 1 to 200"),
            ((1.0, 1.0, 5, -1), "seed"),
        ],
    )
    def test_numbers_out_of_range(self, tok: Tokenizer, setting: tuple, message: str):
        with pytest.raises(ValueError, match=message):
            perturbed_tokens(tok, random_tokens(tok, 2), *setting)

    def test_tokens_of_another_tokenizer_and_indices_of_other_images(self, tok: Tokenizer):
        tokens = random_tokens(tok, 2)
        with pytest.raises(ValueError, match="its own tokens"):
            perturbed_tokens(tok, Tokens(tokens.ids, tok.codebook_sizes, "other"), 1.0, 1.0, 5)
        for indices in ([1], [0, -1]):
            with pytest.raises(ValueError, match="for each of 2 images"):
                perturbed_tokens(tok, tokens, 1.0, 1.0, 5, indices=indices)
        with pytest.raises(ValueError, match="a rate, a share and a strength"):
            Grid(rates=())

    def test_a_tokenizer_without_ids(self, tok: Tokenizer):
        soft = with_quantizer(tok, {"kind": "soft_vq", "dim": 4, "codebook_size": 32})
        with pytest.raises(ValueError, match="vectors in place of ids"):
            perturbed_tokens(soft, random_tokens(tok, 2), 1.0, 1.0, 5)
