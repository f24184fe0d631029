"""Finite scalar quantization."""

from __future__ import annotations

import math

import pytest
import torch

from tokenizers_vis.config import build
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.fsq import FSQ


class TestFSQ:
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
        codes = FSQ(levels=(3, 5)).lookup(torch.tensor([[[0], [1], [2], [3]]]))
        assert codes.tolist() == [[[-1, -1], [0, -1], [1, -1], [-1, -0.5]]]

    @pytest.mark.parametrize("levels", [(8,) * 9, (1000,) * 6, (2,) * 62])
    def test_large_ids_are_exact(self, levels: tuple[int, ...]):
        quantizer = FSQ(levels=levels).eval()
        out = quantizer(3 * torch.randn(2, 500, len(levels)))
        width = [level // 2 for level in levels]
        for code, i in zip(out.codes[0, :50].tolist(), out.ids[0, :50, 0].tolist(), strict=True):
            digits = [round(c * w) + w for c, w in zip(code, width, strict=True)]
            assert i == sum(digit * math.prod(levels[:j]) for j, digit in enumerate(digits))
        assert torch.equal(quantizer.lookup(out.ids), out.codes)

    @pytest.mark.parametrize("level", [2, 3, 4, 5, 256, 999, 1000])
    def test_the_outermost_levels_are_reached_and_not_passed(self, level: int):
        out = FSQ(levels=(level,)).eval()(torch.tensor([-50.0, 50.0])[None, :, None])
        assert out.ids.flatten().tolist() == [0, level - 1]

    @pytest.mark.parametrize("levels", [(5, 3, 7), (8, 4, 6), (8, 5, 4)])
    def test_rounds_as_the_library_does(self, levels: tuple[int, ...]):
        library = pytest.importorskip("vector_quantize_pytorch").FSQ(list(levels)).eval()
        z = 2 * torch.randn(2, 300, len(levels))
        codes, ids = library(z)
        ours = FSQ(levels=levels).eval()(z)
        assert torch.equal(ours.codes, codes) and torch.equal(ours.ids[..., 0], ids.long())

    def test_the_gradient_is_that_of_the_bound(self):
        quantizer, z = FSQ(levels=(5, 4)), torch.randn(2, 6, 2, requires_grad=True)
        (grad,) = torch.autograd.grad(quantizer(z).codes.sum(), z)
        (expected,) = torch.autograd.grad((quantizer.bound(z) / 2).sum(), z)
        torch.testing.assert_close(grad, expected)

    @pytest.mark.parametrize("levels", [[], [1, 3], [8, 1001], [8] * 21])
    def test_impossible_levels_are_refused(self, levels: list[int]):
        with pytest.raises(ValueError, match="level"):
            build(Quantizer, {"kind": "fsq", "levels": levels})
