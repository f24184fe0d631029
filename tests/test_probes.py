"""Probes: closed forms, chance and baseline, fixed splits, features of tokens."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenizers_vis as tv
from tokenizers_vis.eval import probes
from tokenizers_vis.eval.probes import (
    PENALTIES,
    Split,
    fixed_split,
    knn_probe,
    linear_probe,
    pixel_features,
    token_features,
)
from tokenizers_vis.tokenizer import Tokenizer

PROBES = {"linear": linear_probe, "knn": knn_probe}


def classes(b: int, c: int, apart: float, f: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian classes around c random centres, features b f and labels b, not from 0 and with holes."""
    labels = torch.arange(b) % c
    return apart * torch.randn(c, f)[labels] + torch.randn(b, f), 5 + 3 * labels


@pytest.mark.parametrize("kind", PROBES)
class TestEachProbe:
    def test_classes_that_are_apart_are_told_apart_and_pixels_of_noise_are_not(self, kind: str):
        features, labels = classes(600, 6, 3.0)
        result = PROBES[kind](features, labels, torch.rand(600, 3, 8, 8), fixed_split(labels))
        assert result.accuracy > 0.98 and result.pixels < 0.35 and result.chance == pytest.approx(1 / 6)
        assert (result.probe, result.dim, result.pixel_dim, result.classes) == (kind, 12, 12, 6)
        assert (result.train, result.test) == (450, 150)

    def test_noise_is_chance_and_pixels_that_say_the_class_are_found(self, kind: str):
        _, labels = classes(800, 2, 0.0)
        images = torch.rand(800, 3, 8, 8)
        images[labels == 5] *= 0.5
        result = PROBES[kind](torch.randn(800, 30), labels, images, fixed_split(labels))
        assert abs(result.accuracy - 0.5) < 0.12 and result.pixels > 0.95

    def test_chance_is_that_of_the_most_frequent_class(self, kind: str):
        labels = torch.tensor([0] * 80 + [1] * 20)
        result = PROBES[kind](torch.randn(100, 3), labels, torch.rand(100, 3, 4, 4), fixed_split(labels))
        assert result.chance == 0.8

    def test_the_scale_of_features_does_not_count_and_constant_ones_do_no_harm(self, kind: str):
        features, labels = classes(300, 3, 1.0)
        images, split = torch.rand(300, 3, 8, 8), fixed_split(labels)
        scaled = torch.cat([features * torch.logspace(-6, 6, 12) + 4, torch.full((300, 2), 7.0)], dim=1).double()
        expected = PROBES[kind](features, labels, images, split)
        assert PROBES[kind](scaled, labels, images, split).accuracy == pytest.approx(expected.accuracy, abs=0.02)

    def test_bad_input_is_refused(self, kind: str):
        features, labels = classes(40, 2, 1.0)
        images, split = torch.rand(40, 3, 4, 4), fixed_split(labels)
        nan = features.clone()
        nan[7, 3] = torch.nan
        at = torch.arange(40)
        for bad, message in (
            ((features[:39], labels, images, split), "features are 40 f"),
            ((features.long(), labels, images, split), "floats"),
            ((nan, labels, images, split), "of image 7 are not"),
            ((features, labels, images[:39], split), "images are 40 3 h w"),
            ((features, labels.double(), images, split), "labels are integers"),
            ((features, labels * 0, images, split), "two or more"),
            ((features, labels, images, Split(at[:30], at[29:])), "some of 40 images"),
            ((features, labels, images, Split(at[labels == 5], at[labels == 8])), "class 8 is in the test"),
        ):
            with pytest.raises(ValueError, match=message):
                PROBES[kind](*bad)


def test_the_ridge_and_its_left_out_errors_are_those_by_definition(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(2)
    for b, f in ((40, 7), (15, 60)):  # more rows than columns, and fewer
        x, test = torch.randn(b, f).double(), torch.randn(9, f).double()
        x = x - x.mean(dim=0)
        y = torch.nn.functional.one_hot(torch.arange(b) % 3).double()

        def ridge(x, y, test, penalty):
            mean, centre = y.mean(dim=0), x.mean(dim=0)
            square = (x - centre).T @ (x - centre) + penalty * torch.eye(x.shape[1]).double()
            return (test - centre) @ torch.linalg.solve(square, (x - centre).T @ (y - mean)) + mean

        errors = {}
        for penalty in PENALTIES:
            left_out = [torch.arange(b) != i for i in range(b)]
            fits = torch.cat([ridge(x[keep], y[keep], x[~keep], penalty) for keep in left_out])
            errors[penalty] = (y - fits).square().mean().item()
        outputs, penalty = probes._linear(x, y, test)
        assert penalty == min(errors, key=errors.get)
        torch.testing.assert_close(outputs, ridge(x, y, test, penalty))


def test_neighbours_vote_as_written_in_full():
    x, test = torch.randn(50, 4).double(), torch.randn(8, 4).double()
    y = torch.nn.functional.one_hot(torch.arange(50) % 3).double()
    votes = probes._neighbours(x, y, test, 7)
    cosine = torch.nn.functional.cosine_similarity(test[:, None], x[None], dim=-1)
    for row, near in zip(votes, cosine, strict=True):
        best = near.argsort(descending=True)[:7]
        torch.testing.assert_close(row, sum((near[i] / 0.07).exp() * y[i] for i in best))
    with pytest.raises(ValueError, match="k is from 1 to the 3 training"):
        knn_probe(x[:5], [0, 1] * 2 + [0], torch.rand(5, 3, 4, 4), Split(torch.arange(3), torch.arange(3, 5)), k=4)


class TestSplits:
    def test_they_are_fixed_and_even_in_every_class(self):
        labels = torch.arange(100).remainder(4)[torch.randperm(100)]
        a, b = fixed_split(labels), fixed_split(labels.tolist())
        assert torch.equal(a.train, b.train) and torch.equal(a.test, b.test)
        assert sorted(torch.cat(a).tolist()) == list(range(100))
        assert labels[a.test].bincount().tolist() == [6] * 4  # 25 / 4, rounded
        assert not torch.equal(fixed_split(labels, seed=1).test, a.test)
        assert fixed_split([0, 0, 1, 1], test=0.99).train.shape == (2,)

    def test_classes_of_one_image_and_one_class_are_refused(self):
        with pytest.raises(ValueError, match="class 3 has one image"):
            fixed_split([1, 1, 3])
        with pytest.raises(ValueError, match="two or more"):
            fixed_split([1, 1, 1])
        with pytest.raises(ValueError, match="between 0 and 1"):
            fixed_split([1, 1, 2, 2], test=1.0)


def test_pixel_components_are_those_of_the_training_images():
    images = torch.rand(40, 3, 32, 32)
    split = Split(torch.arange(30), torch.arange(30, 40))
    found = pixel_features(images, split, 1000)
    assert found.shape == (40, 29)  # thirty images less their mean
    x = images.double().flatten(1)
    x = x - x[:30].mean(dim=0)
    torch.testing.assert_close(found[:30] @ found[:30].T, x[:30] @ x[:30].T)
    variance = found[:30].var(dim=0)
    assert (variance.diff() <= 0).all()
    changed = images.clone()
    changed[30:] = 0
    torch.testing.assert_close(pixel_features(changed, split, 5)[:30], found[:30, :5])


@pytest.fixture
def tok(tiny: Callable[..., dict[str, Any]]) -> Tokenizer:
    return Tokenizer.from_config(tiny()).eval()


class TestFeatures:
    def test_they_are_the_codes(self, tok: Tokenizer):
        tokens = tok.encode(torch.rand(5, 3, 16, 16))
        codes = tok.quantizer.lookup(tokens.ids)
        assert torch.equal(token_features(tok, tokens), codes.flatten(1))
        torch.testing.assert_close(token_features(tok, tokens, "mean", batch_size=2), codes.mean(dim=1))

    def test_padding_is_nothing(self, tok: Tokenizer):
        images = torch.rand(3, 3, 16, 16)
        ragged, whole = tok.encode(images, n_tokens=[6, 1, 3]), tok.encode(images)
        codes = tok.quantizer.lookup(whole.ids)
        concat, mean = (token_features(tok, ragged, pool) for pool in ("concat", "mean"))
        for i, n in enumerate((6, 1, 3)):
            torch.testing.assert_close(mean[i], codes[i, :n].mean(dim=0))
            assert torch.equal(concat[i, : 3 * n], codes[i, :n].flatten()) and not concat[i, 3 * n :].any()

    def test_wrong_tokens_are_refused(self, tok: Tokenizer):
        other = tv.Tokens(torch.zeros(1, 6, 1, dtype=torch.int64), tok.codebook_sizes, "other")
        with pytest.raises(ValueError, match="its own tokens"):
            token_features(tok, other)
        with pytest.raises(ValueError, match="'concat' or 'mean'"):
            token_features(tok, tok.encode(torch.rand(1, 3, 16, 16)), "max")


def test_the_bundled_tokenizer_knows_more_than_chance(shared: Path):
    """Every 25th class of Tiny ImageNet, its 50 validation pictures each; by more than three standard deviations."""
    from tokenizers_vis.images import load_image

    with tarfile.open(shared / "data" / "tiny-imagenet" / "val.tar") as archive:
        read = {name: archive.extractfile(name) for name in sorted(archive.getnames())}
        found = {name[:-4]: int(file.read()) for name, file in read.items() if name.endswith(".cls")}
        labels = {key: label for key, label in found.items() if label % 25 == 0}
        images = torch.stack([load_image(Image.open(read[f"{key}.jpg"])) for key in labels])
    labels = list(labels.values())
    mini = tv.load(device="cpu")
    features, split = token_features(mini, mini.encode(images, n_tokens=32)), fixed_split(labels)
    for probe in PROBES.values():
        result = probe(features, labels, images.float() / 255, split)
        assert (result.classes, result.test, result.dim) == (8, 96, 128) and result.chance == 1 / 8
        assert result.accuracy > 1 / 8 + 3 * (1 / 8 * 7 / 8 / result.test) ** 0.5
