"""Classes of vector-quantize-pytorch behind our contract."""

from __future__ import annotations

import sys

import pytest
import torch

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.library import Library


def make(name: str, **options: object) -> Quantizer:
    return build(Quantizer, {"kind": "library", "name": name, "dim": 6, "options": options})


class TestLibrary:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("vector_quantize_pytorch")

    def test_codebook_sizes(self):
        heads = make(
            "VectorQuantize",
            codebook_size=16,
            heads=2,
            separate_codebook_per_head=True,
            codebook_dim=3,
            use_cosine_sim=True,
        )
        assert heads.codebook_sizes == (16, 16)
        assert make("ResidualVQ", codebook_size=[16, 8, 4]).codebook_sizes == (16, 8, 4)
        assert make("GroupedResidualVQ", codebook_size=16, num_quantizers=2, groups=3).codebook_sizes == (16,) * 6
        assert make("FSQ", levels=[5, 4, 3]).codebook_sizes == (60,)
        assert make("LFQ", codebook_size=8, num_codebooks=2).codebook_sizes == (8, 8)

    def test_groups_come_one_after_the_other(self):
        quantizer = make("GroupedResidualVQ", codebook_size=16, num_quantizers=2, groups=3).eval()
        z = torch.randn(3, 5, 6)
        out = quantizer(z)
        ids = out.ids.clone()
        ids[..., 2:4] = (ids[..., 2:4] + 1) % 16  # the second of three groups: its two levels, its two dimensions
        changed = (quantizer.lookup(ids) != out.codes).any(dim=0).any(dim=0)
        assert changed.tolist() == [False, False, True, True, False, False]

    def test_building_one_draws_as_much_as_building_theirs(self):
        from vector_quantize_pytorch import VectorQuantize

        states = []
        for make_one in (
            lambda: Library(name="VectorQuantize", dim=4, options={"codebook_size": 8, "kmeans_init": True}),
            lambda: VectorQuantize(dim=4, codebook_size=8, kmeans_init=True),
        ):
            torch.manual_seed(0)
            made = make_one()
            states.append(torch.get_rng_state())
            module = made.module if isinstance(made, Library) else made
            assert not module._codebook.initted
        assert torch.equal(*states)

    @pytest.mark.parametrize(
        "name, options, message",
        [
            ("VectorQuantise", {"codebook_size": 8}, "Did you mean 'VectorQuantize'"),
            ("BinaryMapper", {}, "one-hot"),
            ("Sequential", {}, "no quantizer"),
            ("VectorQuantize", {"codebok_size": 8}, "codebok_size"),
            ("VectorQuantize", {"codebook_size": 8, "dim": 4}, "beside options"),
            ("VectorQuantize", {"codebook_size": 8, "accept_image_fmap": True}, "layout"),
            ("VectorQuantize", {"codebook_size": 8, "heads": 2, "codebook_dim": 2}, "looking its ids up"),
            ("LFQ", {"codebook_size": 9}, "power of 2"),
            ("FSQ", {"levels": [8] * 9}, "kind 'fsq'"),
        ],
    )
    def test_what_cannot_be_served_says_why(self, name: str, options: dict[str, object], message: str):
        with pytest.raises(ConfigError, match=message):
            build(Quantizer, {"kind": "library", "name": name, "dim": 4, "options": options})

    def test_a_missing_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
        with pytest.raises(ValueError, match="pip install vector-quantize-pytorch"):
            Library(name="LFQ", dim=4, options={})
