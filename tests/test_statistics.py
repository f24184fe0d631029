"""Token statistics: closed forms of known sources, definitions written out, and what is refused or flagged."""

from __future__ import annotations

import gzip
import itertools
import json
import math

import numpy as np
import pytest
import torch

from tokenizers_vis.eval.counts import corrected_entropy, entropy, fit_zipf, huffman_bits
from tokenizers_vis.eval.metrics import CodebookUsage
from tokenizers_vis.eval.statistics import CodebookStatistics, TooFewTokens, token_statistics
from tokenizers_vis.tokens import Tokens


def draw(shares: np.ndarray, b: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).choice(len(shares), p=shares / shares.sum(), size=(b, n))


def tokens_of(ids: np.ndarray, *sizes: int) -> Tokens:
    ids = torch.as_tensor(np.asarray(ids))
    return Tokens(ids if ids.ndim == 3 else ids[..., None], sizes, "some-16")


def statistics(ids: np.ndarray, size: int, **options) -> CodebookStatistics:
    return token_statistics(tokens_of(ids, size), **options).codebooks[0]


class TestKnownSources:
    def test_uniform(self):
        """Every entropy is that of independent even choices; nothing is saved, and no exponent is found."""
        book = statistics(draw(np.ones(16), 40_000, 10), 16)
        for gram in book.ngrams:  # 65536 runs of four, from 280,000: too few for the correction to be all
            assert gram.corrected == pytest.approx(4 * gram.n, abs=2e-3 if gram.enough else 0.05)
            assert gram.entropy < gram.corrected
        assert [gram.enough for gram in book.ngrams] == [True, True, True, False]
        assert book.conditional_corrected == pytest.approx(4, abs=2e-3)
        assert book.perplexity == pytest.approx(16, abs=0.01) and 3.999 < book.effective_bits <= 4
        assert (book.types, book.dead, book.used, book.fixed_bits) == (16, 0, 1.0, 4)
        assert book.huffman_bits == 4 and book.huffman_saving == 0
        assert book.positions.information == pytest.approx(book.positions.by_chance, abs=1e-4)
        assert book.zipf.exponent < 0.01 and abs(book.zipf.held_out) < 0.01 and book.zipf.ks < 0.005
        assert "*" not in token_statistics(tokens_of(draw(np.ones(16), 4000, 2), 16)).table()

    def test_geometric(self):
        """Halves: H = 2 bits, and a Huffman code reaches it."""
        shares = 0.5 ** np.arange(1, 25)
        book = statistics(draw(shares, 4000, 50), 24)
        assert book.corrected == pytest.approx(2, abs=0.01)
        assert book.huffman_bits == pytest.approx(book.entropy, abs=0.01)
        assert book.huffman_saving == pytest.approx(1 - 2 / 5, abs=0.01)
        other = statistics(draw(0.8 ** np.arange(60), 4000, 50), 60)  # -log2(.2) - .8/.2 log2(.8)
        assert other.corrected == pytest.approx(-math.log2(0.2) - 4 * math.log2(0.8), abs=0.01)

    @pytest.mark.parametrize("exponent", [0.5, 1.0, 1.6])
    def test_zipf(self, exponent: float):
        shares = np.arange(1, 501.0) ** -exponent
        ids = np.random.default_rng(1).permutation(500)[draw(shares, 4000, 50)]
        zipf = statistics(ids, 500).zipf
        assert (zipf.first, zipf.last) == (1, 500)
        assert zipf.exponent == pytest.approx(exponent, abs=0.01) == zipf.held_out and zipf.ks < 0.005
        bits = -np.log2(shares / shares.sum())
        expected = np.sum(shares * bits) / shares.sum()
        deviation = (np.sum(shares * bits**2) / shares.sum() - expected**2) ** 0.5 / len(ids.ravel()) ** 0.5
        assert statistics(ids, 500).corrected == pytest.approx(expected, abs=4 * deviation)

    def test_markov_chain(self):
        """Stays with probability 3/4, else goes to one of seven others: H2|1 = H(1/4) + log2(7) / 4."""
        rng = np.random.default_rng(0)
        moves = np.where(rng.random((20_000, 16)) < 0.75, 0, rng.integers(1, 8, size=(20_000, 16)))
        moves[:, 0] = rng.integers(8, size=20_000)
        book = statistics(moves.cumsum(axis=1) % 8, 8)
        rate = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25) + math.log2(7) / 4
        # Four standard deviations of the mean of -log2 p over the 300,000 steps.
        error = 4 * (0.75 * 0.25 * math.log2(0.75 * 28) ** 2 / 300_000) ** 0.5
        assert error < 0.015
        assert book.entropy == pytest.approx(3, abs=2e-3)
        assert book.conditional == pytest.approx(rate, abs=error) == book.conditional_corrected
        for gram in book.ngrams[1:]:
            assert gram.corrected == pytest.approx(3 + (gram.n - 1) * rate, abs=(gram.n - 1) * error)


class TestByDefinition:
    def test_miller_and_madow_take_most_of_the_bias_away(self):
        rng = np.random.default_rng(0)
        counts = [np.bincount(rng.integers(100, size=1000)) for _ in range(200)]
        plain, corrected = ([f(c[c > 0]) - math.log2(100) for c in counts] for f in (entropy, corrected_entropy))
        assert np.mean(plain) == pytest.approx(-99 / 2000 / math.log(2), abs=4e-3)
        assert abs(np.mean(corrected)) < 4e-3

    def test_n_grams_stay_inside_an_image_and_leave_padding_out(self):
        ids = torch.tensor([[0, 1, 0, 1], [2, 2, -1, -1], [1, -1, -1, -1], [2, 2, 2, -1]])[..., None]
        tokens = Tokens(ids, (3,), "some-4", torch.tensor([4, 2, 1, 3]))
        book = token_statistics(tokens, too_few="flag").codebooks[0]
        rows = [row[row >= 0].tolist() for row in ids[..., 0]]
        for gram in book.ngrams:
            runs = [tuple(row[i : i + gram.n]) for row in rows for i in range(len(row) - gram.n + 1)]
            counts = [runs.count(run) for run in set(runs)]
            assert (gram.count, gram.types) == (len(runs), len(counts))
            assert gram.entropy == pytest.approx(-sum(c / len(runs) * math.log2(c / len(runs)) for c in counts))
            assert gram.coverage == pytest.approx(1 - counts.count(1) / len(runs))
        # 01 10 01 22 22 22: after 0 comes 1, after 1 comes 0, after 2 comes 2.
        assert book.conditional == pytest.approx(0)
        assert (book.tokens, book.images, book.positions.counts) == (10, 4, (4, 3, 2, 1))

    def test_usage_is_that_of_the_counter(self):
        ids = np.stack([draw(np.arange(1, 33.0), 300, 9), draw(np.ones(20), 300, 9)], axis=-1)
        tokens = tokens_of(ids, 40, 20)
        usage = CodebookUsage((40, 20))
        usage.update(tokens.ids)
        for book, other in zip(token_statistics(tokens).codebooks, usage.compute(), strict=True):
            assert (book.tokens, book.used, book.dead) == (other.tokens, other.used, other.dead)
            assert (book.entropy, book.perplexity) == pytest.approx((other.entropy, other.perplexity))
            assert book.positions.entropy == pytest.approx(other.position_entropy.tolist())

    def test_ids_of_any_size_are_counted_exactly(self):
        ids = draw(np.arange(1, 9.0), 200, 10)
        small, large = statistics(ids, 8), statistics(2**62 - 1 - ids, 2**62, too_few="flag")
        assert (large.types, large.dead, large.fixed_bits) == (8, 2**62 - 8, 62)
        assert large.ngrams[1].types == small.ngrams[1].types
        assert large.corrected == pytest.approx(small.corrected) and large.huffman_bits == small.huffman_bits
        assert large.zipf.exponent == pytest.approx(small.zipf.exponent)

    def test_innovation_is_the_mean_over_all_choices_of_images(self):
        ids = np.array([[0, 1], [1, 1], [2, 0], [3, 4], [1, 2], [5, 5]])
        innovation = statistics(ids, 6, too_few="flag").innovation
        by_size = {
            m: np.mean([len(np.unique(ids[list(rows)])) for rows in itertools.combinations(range(6), m)])
            for m in range(1, 7)
        }
        assert dict(innovation.curve) == pytest.approx(by_size)
        assert innovation.images_90 == min(m for m, codes in by_size.items() if codes >= 0.9 * 6)
        slope = np.polyfit(np.log(list(by_size)), np.log(list(by_size.values())), 1)[0]
        assert innovation.heaps == pytest.approx(slope)

    def test_every_image_with_codes_of_its_own_is_an_exponent_of_one(self):
        innovation = statistics(np.arange(300 * 4).reshape(300, 4), 1200, too_few="flag").innovation
        assert innovation.heaps == pytest.approx(1) and innovation.images_90 == 270
        assert statistics(np.tile(np.arange(8), (100, 1)), 8).innovation.heaps == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize(
        ("counts", "bits"),
        [([4, 2, 1, 1], 1.75), ([1] * 6, 16 / 6), ([5], 0.0), ([9, 1], 1.0), ([3, 3, 2, 2, 2], 28 / 12)],
    )
    def test_huffman(self, counts: list[int], bits: float):
        assert huffman_bits(counts) == pytest.approx(bits)
        assert entropy(np.array(counts)) <= huffman_bits(counts) + 1e-12 < entropy(np.array(counts)) + 1

    def test_gzip_is_of_whole_bytes(self):
        ids = draw(np.ones(300), 100, 50)
        book = statistics(ids, 300)
        assert book.gzip_bits == 8 * len(gzip.compress(ids.astype("<u2").tobytes(), 9, mtime=0)) / 5000
        assert book.gzip_saving == pytest.approx(1 - book.gzip_bits / 9) and book.gzip_saving < 0.05
        assert statistics(np.tile(np.arange(50), (100, 1)), 256, too_few="flag").gzip_saving > 0.9

    def test_position_that_says_all_or_half(self):
        ids = np.tile(np.arange(16), (400, 1))
        positions = statistics(ids, 16).positions
        assert positions.information == pytest.approx(4) and positions.by_chance < 0.05
        assert positions.entropy == (0.0,) * 16 and positions.enough
        half = statistics((ids // 8) * 8 + draw(np.ones(8), 400, 16), 16).positions  # which half: one bit
        assert half.information - half.by_chance == pytest.approx(1, abs=0.02)
        assert half.corrected == pytest.approx([3] * 16, abs=0.05)

    def test_too_few_ids_at_a_position_make_information_that_is_chance(self):
        positions = statistics(draw(np.ones(256), 50, 60), 256).positions
        assert positions.information > 1.5 and not positions.enough
        assert positions.information == pytest.approx(positions.by_chance, abs=0.02)


class TestZipf:
    def test_the_likelihood_is_greatest_at_the_exponent(self):
        counts = np.array([90, 41, 22, 19, 11, 9, 3])
        log_rank = np.log(np.arange(1, 8))

        def likelihood(s: float) -> float:
            return -s * np.sum(counts * log_rank) - counts.sum() * np.log(np.sum(np.exp(-s * log_rank)))

        fitted = fit_zipf(counts).exponent
        assert likelihood(fitted) > max(likelihood(fitted - 1e-4), likelihood(fitted + 1e-4))

    def test_ranks_may_be_chosen(self):
        counts = np.round(1e6 * np.concatenate([np.ones(10), np.arange(11, 101.0) ** -2.0 * 100])).astype(int)
        tail = fit_zipf(counts, 11, 100)
        assert tail.exponent == pytest.approx(2, abs=1e-3) and tail.ks < 1e-3 and (tail.first, tail.last) == (11, 100)
        assert fit_zipf(counts).ks > 0.05
        with pytest.raises(ValueError, match="ranks run from 1 to 100"):
            fit_zipf(counts, 1, 101)

    def test_one_code_has_no_exponent(self):
        zipf = fit_zipf([0, 7, 0])
        assert (zipf.exponent, zipf.ks, zipf.held_out, zipf.last) == (None, None, None, 1)

    def test_ranks_of_the_same_counts_mislead_where_counts_are_small(self):
        counts = np.bincount(draw(np.ones(1000), 10, 500).ravel())
        assert fit_zipf(counts).exponent > 0.2 and abs(fit_zipf(counts).held_out) < 0.03


class TestFewAndBad:
    def test_too_few_are_refused_by_n_and_k_or_flagged(self):
        ids = draw(np.ones(64), 63, 10)
        with pytest.raises(
            TooFewTokens, match="N = 630 ids are too few for K = 64 .* 10 K = 640 .*codebook 0 of some-16"
        ):
            statistics(ids, 64)
        assert any(warning.startswith("N = 630") for warning in statistics(ids, 64, too_few="flag").warnings)
        enough = statistics(draw(np.ones(64), 64, 10), 64)
        assert enough.ngrams[0].enough and not any(warning.startswith("N =") for warning in enough.warnings)
        with pytest.raises(TooFewTokens, match="codebook 1"):
            token_statistics(tokens_of(np.stack([ids % 8, ids], axis=-1), 8, 64))
        with pytest.raises(ValueError, match="'refuse' or 'flag'"):
            statistics(ids, 64, too_few="ignore")

    def test_few_n_grams_and_positions_are_flagged_though_ids_are_enough(self):
        tokens = tokens_of(draw(np.ones(64), 100, 10), 64)
        (book,) = token_statistics(tokens).codebooks
        assert book.conditional < 4  # of 6 bits, as pairs are too few: the star says so
        assert len(book.warnings) == 2 and "n-grams of 2, 3, 4" in book.warnings[0] and "100 ids" in book.warnings[1]
        starred = [line for line in token_statistics(tokens).table().splitlines() if line.endswith("* |")]
        assert len(starred) == 6 and starred[0].startswith("| conditional")

    def test_one_token_an_image_has_no_pairs(self):
        result = token_statistics(tokens_of(draw(np.ones(4), 100, 1), 4))
        (book,) = result.codebooks
        assert book.conditional is book.conditional_corrected is None and len(book.ngrams) == 1
        assert book.positions.information == 0 and "conditional" not in result.table()

    def test_one_code_only(self):
        book = statistics(np.zeros((40, 5), dtype=int), 2)
        assert (book.entropy, book.perplexity, book.effective_bits, book.conditional) == (0, 1, 0, 0)
        assert book.zipf.exponent is None and book.huffman_bits == 0


def test_the_order_of_images_does_not_count():
    ids = draw(np.arange(1, 40.0), 300, 8)
    a, b = (token_statistics(tokens_of(rows, 39)).to_dict()["codebooks"][0] for rows in (ids, ids[::-1].copy()))
    for book in (a, b):
        del book["gzip_bits"], book["gzip_saving"]
    assert a == b


def test_the_table_and_the_plain_values():
    result = token_statistics(tokens_of(np.stack([draw(np.ones(4), 50, 9), draw(np.ones(9), 50, 9)], axis=-1), 4, 9))
    lines = result.table().splitlines()
    assert lines[0] == "| some-16 | codebook 0 | codebook 1 |" and lines[1] == "|---|---:|---:|"
    assert "| codes used | 4 of 4 (100.0%), 0 dead | 9 of 9 (100.0%), 0 dead |" in lines
    rows = [line.replace("\\|", "").count("|") for line in lines if line.startswith("|")]
    assert set(rows) == {4} and len(rows) > 15
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["tokenizer"] == "some-16" and plain["codebooks"][1]["ngrams"][0]["types"] == 9
