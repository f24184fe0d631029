"""Finite scalar quantization."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import build
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.fsq import FSQ

FORMS = ["plain", "symmetric", "ifsq"]
ODD = (5, 3, 17, 9)


def with_gradient(codes: Tensor, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad((codes * weights).sum(), z)
    return codes.detach(), gradient


class TestLevels:
    def test_ids_and_codes_of_a_whole_codebook_are_one_to_one(self):
        levels = (4, 3, 2, 5)
        quantizer = FSQ(levels=levels).eval()
        ids = torch.arange(math.prod(levels))[None, :, None]
        codes = quantizer.lookup(ids)
        assert len(codes[0].unique(dim=0)) == ids.numel() and codes.min() == -1 and codes.max() == 1
        # Invert the tanh: these z are the middles of the cells.
        level, half = torch.tensor(levels).float(), (torch.tensor(levels) - 1) * 1.001 / 2
        offset = torch.where(torch.tensor(levels) % 2 == 0, 0.5, 0.0)
        inside = ((codes * (level // 2) + offset) / half).clamp(-0.99, 0.99)
        z = inside.atanh() - (offset / half).atanh()
        assert torch.equal(quantizer(z).ids, ids) and torch.equal(quantizer(z).codes, codes)

    def test_the_first_dimension_runs_fastest(self):
        quantizer = FSQ(levels=(3, 5))
        ids = torch.tensor([[[0], [1], [2], [3]]])
        assert quantizer.order == "lsb" and quantizer.digits(ids).tolist() == [[[0, 0], [1, 0], [2, 0], [0, 1]]]
        assert quantizer.lookup(ids).tolist() == [[[-1, -1], [0, -1], [1, -1], [-1, -0.5]]]

    def test_digits_are_the_ids(self):
        quantizer = FSQ(levels=(8,) * 9)
        ids = torch.randint(8**9, (2, 50, 1))
        digits = quantizer.digits(ids)
        assert digits.shape == (2, 50, 9) and torch.equal(quantizer.from_digits(digits), ids)
        assert torch.equal(quantizer.from_digits(digits.int()), ids)
        for wrong in (digits + 8, digits - 8, digits[..., :8], digits.float()):
            with pytest.raises(ValueError, match="ids"):
                quantizer.from_digits(wrong)

    @pytest.mark.parametrize("levels", [(8,) * 9, (1000,) * 6, (2,) * 62])
    def test_large_ids_are_exact(self, levels: tuple[int, ...]):
        """Sums of float32 are wrong past 2^24: for the first of these in about half of the ids."""
        quantizer = FSQ(levels=levels).eval()
        out = quantizer(3 * torch.randn(2, 500, len(levels)))
        width = [level // 2 for level in levels]
        for code, i in zip(out.codes[0, :50].tolist(), out.ids[0, :50, 0].tolist(), strict=True):
            digits = [round(c * w) + w for c, w in zip(code, width, strict=True)]
            assert i == sum(digit * math.prod(levels[:j]) for j, digit in enumerate(digits))
        assert torch.equal(quantizer.lookup(out.ids), out.codes)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("level", [2, 3, 4, 5, 256, 999, 1000])
    def test_the_outermost_levels_are_reached_and_not_passed(self, level: int, form: str):
        if form == "ifsq" and level % 2 == 0:
            pytest.skip("odd levels only")
        out = FSQ(levels=(level,), form=form).eval()(torch.tensor([-50.0, 50.0])[None, :, None])
        assert out.ids.flatten().tolist() == [0, level - 1]

    @pytest.mark.parametrize("levels", [[], [1, 3], [0], [-8], [8, 1001], [8] * 21, [8] * 43])
    def test_impossible_levels_are_refused(self, levels: list[int]):
        with pytest.raises(ValueError, match="level"):
            build(Quantizer, {"kind": "fsq", "levels": levels})

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"form": "round"}, "form"),
            ({"form": "ifsq", "levels": (5, 4)}, "odd levels"),
            ({"noise_dropout": 1.1}, "from 0 to 1"),
            ({"bypass": -0.1}, "from 0 to 1"),
        ],
    )
    def test_impossible_options_are_refused(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            FSQ(**{"levels": (5, 5)} | options)


class TestForms:
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("levels", [(5, 3, 7), (8, 4, 6), (8, 5, 4), (2, 9, 2)])
    def test_rounds_as_the_library_does(self, levels: tuple[int, ...], symmetric: bool):
        library = pytest.importorskip("vector_quantize_pytorch").FSQ
        if not symmetric and 2 in levels:
            pytest.skip("the library refuses 2 levels here")
        theirs = library(list(levels), preserve_symmetry=symmetric)
        ours = FSQ(levels=levels, form="symmetric" if symmetric else "plain")
        z, weights = (2 * torch.randn(2, 300, len(levels))).requires_grad_(), torch.randn(2, 300, len(levels))
        codes, ids = theirs(z)
        out = ours(z)
        assert torch.equal(out.ids[..., 0], ids.long())
        for a, b in zip(with_gradient(out.codes, z, weights), with_gradient(codes, z, weights), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7)

    @pytest.mark.parametrize("case", ["17x4", "17x4_two", "mixed"])
    def test_ifsq_is_the_official_one(self, recorded: Callable, case: str):
        tensors, metadata = recorded("ifsq")
        options = json.loads(metadata["options"])[case]
        z, weights, codes, ids, grad = (tensors[f"{case}.{name}"] for name in ("z", "w", "codes", "ids", "grad_z"))
        levels = options["levels"]
        quantizer, z = FSQ(levels=tuple(levels), form="ifsq"), z.requires_grad_()
        out = quantizer(z)
        ours, gradient = with_gradient(out.codes, z, weights)
        torch.testing.assert_close(ours, codes, rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, grad, rtol=2e-5, atol=2e-7)
        # One id for each group of dimensions: their joint id counts the first group fastest, as ours does.
        groups = options["factorized_bits"] or [len(levels)]
        sizes = [math.prod(levels[sum(groups[:i]) : sum(groups[: i + 1])]) for i in range(len(groups))]
        joint = sum(ids[..., i] * math.prod(sizes[:i]) for i in range(len(groups)))
        assert torch.equal(out.ids[..., 0], joint)

    def test_ifsq_uses_the_levels_of_normal_numbers_more_equally(self):
        z = torch.randn(1, 20000, 1)
        counts = {form: FSQ(levels=(9,), form=form)(z).ids.flatten().bincount(minlength=9) for form in FORMS}
        spread = {form: c[1:-1].max() / c[1:-1].min() for form, c in counts.items()}
        assert spread["ifsq"] < 1.2 < 1.3 < spread["plain"]  # the two at the ends are half as wide in each

    @pytest.mark.parametrize("levels", [(4, 8), (2, 5)])
    def test_symmetric_codes_are_symmetric(self, levels: tuple[int, ...]):
        quantizer = FSQ(levels=levels, form="symmetric").eval()
        codes = quantizer.lookup(torch.arange(math.prod(levels))[None, :, None])
        assert torch.equal(codes, -codes.flip(1)) and codes.max() == 1
        z = torch.randn(2, 50, 2)
        assert torch.equal(quantizer(z).codes, -quantizer(-z).codes)

    @pytest.mark.parametrize("form", FORMS)
    def test_the_gradient_is_that_of_the_bound(self, form: str):
        quantizer, z = FSQ(levels=ODD, form=form), torch.randn(2, 6, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(quantizer(z).codes.sum(), z)
        (expected,) = torch.autograd.grad((quantizer.bound(z) / (torch.tensor(ODD) // 2)).sum(), z)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("form, levels", [("plain", (8, 5, 4)), ("symmetric", (8, 5, 4)), ("ifsq", (9, 5, 3))])
class TestTraining:
    def made(self, form: str, levels: tuple[int, ...], **options: float) -> tuple[FSQ, Tensor, Tensor, Tensor]:
        """A quantizer, z, the codes of z without rounding, and the distance between two levels."""
        quantizer, z = FSQ(levels=levels, form=form, **options), torch.randn(40, 50, len(levels))
        step = torch.tensor([2 / (level - 1 if form == "symmetric" else level // 2 * 2) for level in levels])
        return quantizer, z, quantizer.bound(z) * step, step

    def test_noise_takes_the_place_of_rounding(self, form: str, levels: tuple[int, ...]):
        quantizer, z, soft, step = self.made(form, levels, noise_dropout=0.25)
        out, rounded = quantizer(z), quantizer.lookup(quantizer(z).ids)
        noisy = out.codes != rounded
        assert abs(noisy.float().mean() - 0.25) < 0.02
        assert (noisy.any(dim=-1) & ~noisy.all(dim=-1)).any(), "each number has its own draw"
        noise = ((out.codes - soft) / step)[noisy]
        assert noise.abs().max() <= 0.5 + 1e-5 and abs(noise.mean()) < 0.02 and abs(noise.var() - 1 / 12) < 0.01
        assert torch.equal(quantizer.eval()(z).codes, rounded) and torch.equal(quantizer(z).ids, out.ids)

    def test_bypass_takes_whole_images(self, form: str, levels: tuple[int, ...]):
        quantizer, z, soft, _ = self.made(form, levels, bypass=0.5)
        out, rounded = quantizer(z), quantizer.lookup(quantizer(z).ids)
        passed = ((out.codes - soft).abs() < 1e-6).all(dim=(1, 2))
        assert torch.equal(out.codes[~passed], rounded[~passed]) and 10 < passed.sum() < 30
        assert torch.equal(quantizer.eval()(z).codes, rounded) and torch.equal(quantizer(z).ids, out.ids)

    def test_neither_changes_the_gradient(self, form: str, levels: tuple[int, ...]):
        gradients = []
        for options in ({}, {"noise_dropout": 0.5, "bypass": 0.5}):
            quantizer, z, *_ = self.made(form, levels, **options)
            torch.manual_seed(0)
            z = torch.randn_like(z).requires_grad_()
            gradients.append(torch.autograd.grad(quantizer(z).codes.sum(), z)[0])
        assert torch.equal(*gradients)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_noise_is_drawn_for_each_number_as_in_the_library(share: float):
    """Its noise is another, and falls on half of the numbers whatever its option says; the ids are the same."""
    library = pytest.importorskip("vector_quantize_pytorch").FSQ
    levels, z = (8, 5, 4), torch.randn(8, 500, 3)
    theirs = library(list(levels), preserve_symmetry=True, noise_dropout=share)
    ours = FSQ(levels=levels, form="symmetric", noise_dropout=share)
    for quantizer in (theirs, ours):
        noisy, ids = quantizer.train()(z)[:2]
        codes, again = quantizer.eval()(z)[:2]
        changed = (noisy - codes).abs() > 1e-6
        assert torch.equal(ids, again) and (changed.any(dim=-1) & ~changed.all(dim=-1)).any()
    assert changed.float().mean().item() == pytest.approx(share, abs=0.02)
    assert torch.equal(ours(z).ids[..., 0], theirs(z)[1].long())
