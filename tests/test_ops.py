"""The ops: the reference against float64, every twin against the reference."""

from __future__ import annotations

import pytest
import torch

from tokenizers_vis.cuda import reference
from tokenizers_vis.cuda.reference import nearest_code


class TestNearestCode:
    @pytest.mark.parametrize("rows_at_once", [1, 7, 10_000])
    def test_is_the_nearest_in_float64(self, rows_at_once: int, monkeypatch: pytest.MonkeyPatch):
        z, codebook = torch.randn(101, 5), torch.randn(33, 5)
        monkeypatch.setattr(reference, "MAX_SCORES", rows_at_once * 33)
        assert torch.equal(nearest_code(z, codebook), torch.cdist(z.double(), codebook.double()).argmin(dim=1))

    def test_the_lowest_index_wins_a_tie(self):
        codebook = torch.tensor([[4.0, 0.0], [0.0, 2.0], [0.0, -2.0], [0.0, 2.0]])
        assert nearest_code(torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]]), codebook).tolist() == [1, 1, 2]

    def test_sizes(self):
        assert nearest_code(torch.zeros(0, 2), torch.zeros(3, 2)).shape == (0,)
        for z, codebook in (((4, 2), (3, 3)), ((4,), (3, 4)), ((4, 2), (0, 2))):
            with pytest.raises(ValueError, match="k d"):
                nearest_code(torch.zeros(z), torch.zeros(codebook))
