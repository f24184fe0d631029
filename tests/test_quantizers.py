"""Every quantizer keeps the contract of quantizers/base.py; each keeps its own formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import build
from tokenizers_vis.quantizers import QUANTIZERS
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.library import Library

# A new quantizer is one line here.
TABLES = {
    "fsq odd": {"kind": "fsq", "levels": [5, 3, 7]},
    "fsq even": {"kind": "fsq", "levels": [2, 8, 4, 6]},
    "fsq large": {"kind": "fsq", "levels": [8] * 9},
    "lfq": {"kind": "lfq", "bits": 10},
    "lfq factorized": {"kind": "lfq", "bits": 18, "codebooks": [6, 12], "scale": 0.5},
    "lfq 31 bits": {"kind": "lfq", "bits": 31, "entropy": 0.0, "bit_order": "msb"},
    "lfq spherical": {"kind": "lfq", "bits": 10, "spherical": True, "gamma": 0.0, "commitment": 0.0},
    "gfq": {"kind": "gfq", "groups": 16},
    "gfq grouped": {"kind": "gfq", "groups": 3, "bits": 4, "batch_entropy": "grouped", "bit_order": "msb"},
    "bsq": {"kind": "bsq", "bits": 36},
    "bsq bitwise": {"kind": "bsq", "bits": 6, "group": 3, "batch_entropy": "bitwise"},
    "bernoulli": {"kind": "bernoulli", "dim": 6, "bits": 70},
    "bernoulli words": {"kind": "bernoulli", "dim": 6, "bits": 62, "bits_per_id": 31},
    "fsq symmetric": {"kind": "fsq", "levels": [2, 8, 4, 5], "form": "symmetric", "noise_dropout": 0.5},
    "ifsq": {"kind": "fsq", "levels": [17, 9, 5], "form": "ifsq", "bypass": 0.5},
    "token_bridge": {"kind": "token_bridge", "dim": 5, "bits": 6},
    "random_projection": {"kind": "random_projection", "dim": 6, "codebook_size": 32, "codebook_dim": 3},
    "random_projection codebooks": {
        "kind": "random_projection",
        "dim": 6,
        "codebook_size": 32,
        "codebook_dim": 4,
        "codebooks": 3,
        "norm": False,
    },
    "vq": {"kind": "vq", "dim": 4, "codebook_size": 32},
    "vq cosine": {"kind": "vq", "dim": 4, "codebook_size": 32, "distance": "cosine", "revive_after": 2},
    "vq ema": {"kind": "vq", "dim": 4, "codebook_size": 32, "update": "ema", "revive_after": 2},
    "vq ema cosine": {"kind": "vq", "dim": 4, "codebook_size": 32, "update": "ema", "distance": "cosine"},
    "vq entropy": {"kind": "vq", "dim": 4, "codebook_size": 32, "entropy": 0.1, "revival": "nearest"},
    "vq rotation": {"kind": "vq", "dim": 4, "codebook_size": 32, "gradient": "rotation", "revival": "random"},
    "sim_vq": {"kind": "sim_vq", "dim": 4, "codebook_size": 32},
    "vqgan_lc": {"kind": "vqgan_lc", "dim": 4, "codebook_size": 32, "table_dim": 6},
    "perturb": {
        "kind": "perturb",
        "quantizer": {"kind": "vq", "dim": 4, "codebook_size": 32, "distance": "cosine"},
        "share": 0.5,
        "neighbours": 4,
    },
    "ibq": {"kind": "ibq", "dim": 4, "codebook_size": 32, "entropy_temperature": 0.5},
    "opt_vq": {"kind": "opt_vq", "dim": 4, "codebook_size": 32, "heads": 2},
    "opt_vq plain": {"kind": "opt_vq", "dim": 4, "codebook_size": 32, "projection": False},
    "soft_vq": {"kind": "soft_vq", "dim": 4, "codebook_size": 32},
    "soft_vq dot": {"kind": "soft_vq", "dim": 4, "codebook_size": 32, "l2_norm": False},
    "vq kmeans": {"kind": "vq", "dim": 4, "codebook_size": 32, "kmeans_start": True, "revive_after": 1},
    "product": {
        "kind": "product",
        "parts": [{"kind": "vq", "dim": 3, "codebook_size": 16}, {"kind": "fsq", "levels": [5, 4]}],
        "reduction": "sum",
    },
    "product disentangled": {
        "kind": "product",
        "part": {"kind": "vq", "dim": 4, "codebook_size": 16, "distance": "cosine"},
        "count": 3,
        "disentangle": 0.1,
    },
    "product of residuals": {
        "kind": "product",
        "part": {"kind": "residual", "part": {"kind": "fsq", "levels": [5, 3]}, "depth": 2},
        "count": 2,
    },
    "residual": {
        "kind": "residual",
        "parts": [{"kind": "vq", "dim": 4, "codebook_size": k} for k in (32, 16, 8)],
        "reduction": "sum",
        "gradient": "levels",
    },
    "residual shared": {
        "kind": "residual",
        "part": {"kind": "vq", "dim": 4, "codebook_size": 32, "update": "ema", "revive_after": 2},
        "depth": 3,
        "shared": True,
    },
    "shared_index": {"kind": "shared_index", "dims": [4, 2], "codebook_size": 32, "entropy": 0.1},
    "shared_index weighted": {
        "kind": "shared_index",
        "dims": [3, 1, 2],
        "codebook_size": 32,
        "weights": [1.0, 2.0, 0.5],
        "distance": "euclidean",
    },
    "multi_scale": {
        "kind": "multi_scale",
        "part": {"kind": "vq", "dim": 4, "codebook_size": 32},
        "scales": [1, 2, 3, 5],
        "share": 2,
    },
    "multi_scale shared_index": {
        "kind": "multi_scale",
        "part": {"kind": "shared_index", "dims": [2, 2], "codebook_size": 32},
        "scales": [1, 2, 4],
        "ratio": 0.0,
        "loss": "scales",
    },
    "multi_scale ema": {
        "kind": "multi_scale",
        "part": {"kind": "vq", "dim": 4, "codebook_size": 32, "update": "ema"},
        "scales": [1, 1, 3],
        "share": 0,
        "dropout": 0.5,
    },
}
LIBRARY = {
    "VectorQuantize": (6, {"codebook_size": 16}),
    "VectorQuantize heads": (
        6,
        {
            "codebook_size": 16,
            "heads": 2,
            "separate_codebook_per_head": True,
            "codebook_dim": 3,
            "use_cosine_sim": True,
        },
    ),
    "ResidualVQ": (6, {"codebook_size": [16, 8, 4]}),
    "GroupedResidualVQ": (6, {"codebook_size": 16, "num_quantizers": 2, "groups": 3}),
    "FSQ": (6, {"levels": [5, 4, 3]}),
    "LFQ": (6, {"codebook_size": 8, "num_codebooks": 2}),
    "SimVQ": (6, {"codebook_size": 16}),
    "ResidualFSQ": (6, {"levels": [5, 4, 3], "num_quantizers": 2}),
    "GroupedResidualLFQ": (6, {"codebook_size": 8, "num_quantizers": 2, "groups": 2}),
    "ResidualSimVQ": (6, {"codebook_size": 16, "num_quantizers": 2}),
}
TABLES |= {
    f"library {name}": {"kind": "library", "name": name.split()[0], "dim": dim, "options": options}
    for name, (dim, options) in LIBRARY.items()
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(key: str) -> Quantizer:
    if TABLES[key]["kind"] == "library":
        pytest.importorskip("vector_quantize_pytorch")
    return build(Quantizer, TABLES[key])


def trained(key: str) -> tuple[Quantizer, Tensor]:
    """A quantizer that has seen three batches, in eval mode, and a z for it."""
    quantizer = make(key).train()
    for _ in range(3):
        quantizer(vectors(quantizer, 3, 8))
    return quantizer.eval(), vectors(quantizer, 3)


def vectors(quantizer: Quantizer, b: int, n: int = 5) -> Tensor:
    return torch.randn(b, quantizer.fixed_n or n, quantizer.in_dim)


def test_every_kind_is_under_test():
    # A Gaussian has no ids: test_latents.py.
    assert {table["kind"] for table in TABLES.values()} == set(QUANTIZERS) - {"gaussian"}


@pytest.mark.parametrize("key", TABLES)
class TestContract:
    def test_lookup_gives_the_codes_back(self, key: str):
        quantizer, z = trained(key)
        codes, ids, loss, _ = quantizer(z)
        assert codes.shape == (*z.shape[:2], quantizer.dim) and codes.dtype == torch.float32 and loss.shape == ()
        assert ids.shape == (len(z), quantizer.id_count(z.shape[1]), len(quantizer.codebook_sizes))
        if not quantizer.discrete:
            assert quantizer.lookup(ids).shape == codes.shape
        elif isinstance(quantizer, Library):  # sums of residual levels come in another order
            torch.testing.assert_close(quantizer.lookup(ids), codes, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(quantizer.lookup(ids), codes)
            assert torch.equal(quantizer.lookup(ids[1:].int()), codes[1:])

    def test_ids_are_whole_numbers_within_their_codebooks(self, key: str):
        quantizer, _ = trained(key)
        ids = quantizer(10 * vectors(quantizer, 4, 50)).ids
        assert ids.dtype == torch.int64 and ids.shape[0::2] == (4, len(quantizer.codebook_sizes))
        assert (ids >= 0).all() and (ids < torch.tensor(quantizer.codebook_sizes)).all()
        assert len(ids.unique()) > 1

    def test_ids_are_bits_and_words_and_ids_again(self, key: str):
        quantizer, z = trained(key)
        ids, form = quantizer(z).ids, quantizer.id_format
        assert torch.equal(form.unpack(form.pack(ids)), ids) and torch.equal(form.from_bits(form.to_bits(ids)), ids)
        if form.total < 2**63:
            assert torch.equal(form.split(form.join(ids)), ids)

    def test_the_gradient_reaches_z(self, key: str):
        quantizer = make(key).train()
        z = vectors(quantizer, 3).requires_grad_()
        out = quantizer(z)
        (out.codes * torch.randn_like(out.codes)).sum().backward()
        assert z.grad.isfinite().all() and (z.grad != 0).any(dim=-1).all()

    def test_the_loss_is_finite_and_its_parts_are_for_the_log(self, key: str):
        quantizer = make(key).train()
        out = quantizer(vectors(quantizer, 3).requires_grad_())
        assert out.loss.isfinite() and out.loss.dtype == torch.float32
        assert all(part.ndim == 0 and not part.requires_grad for part in out.parts.values())
        assert bool(out.parts) or out.loss == 0

    def test_every_parameter_has_a_finite_gradient(self, key: str):
        quantizer = make(key).train()
        z = vectors(quantizer, 3).requires_grad_()
        out = quantizer(z)
        if out.loss.requires_grad:
            (out.loss + (out.codes * torch.randn_like(out.codes)).sum()).backward()
        for name, parameter in quantizer.named_parameters():
            if parameter.requires_grad and not isinstance(quantizer, Library):
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    def test_low_precision_around_it_changes_nothing(self, key: str):
        quantizer, z = trained(key)
        z = z.bfloat16()
        expected = quantizer(z.float())
        with torch.autocast("cpu", torch.bfloat16):
            inside = quantizer(z)
        cast = copy.deepcopy(quantizer).bfloat16()
        for out in (quantizer(z), inside, cast(z)):
            assert out.codes.dtype == torch.float32 and out.loss.dtype == torch.float32
            assert torch.equal(out.ids, expected.ids) and torch.equal(out.codes, expected.codes)
        assert torch.equal(cast.lookup(expected.ids), quantizer.lookup(expected.ids))

    def test_a_saved_state_gives_the_same_ids(self, key: str):
        quantizer, z = trained(key)
        torch.manual_seed(1)
        other = make(key).eval()
        other.load_state_dict(quantizer.state_dict())
        assert torch.equal(other(z).ids, quantizer(z).ids)
        assert torch.equal(other.lookup(other(z).ids), quantizer.lookup(quantizer(z).ids))

    def test_the_same_seed_gives_the_same_training(self, key: str):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(trained(key)[0].state_dict())
        assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))

    def test_eval_neither_learns_nor_touches_its_input(self, key: str):
        quantizer, z = trained(key)
        state, before = copy.deepcopy(quantizer.state_dict()), z.clone()
        first, again = quantizer(z), quantizer(z)
        assert torch.equal(z, before) and torch.equal(first.ids, again.ids) and torch.equal(first.codes, again.codes)
        assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())
        quantizer.train()(z)
        assert torch.equal(z, before)

    def test_an_image_does_not_depend_on_its_batch(self, key: str):
        quantizer, z = trained(key)
        alone = torch.cat([quantizer(image[None]).ids for image in z])
        assert torch.equal(quantizer(z).ids, alone)

    def test_numbers_that_are_not_finite(self, key: str):
        quantizer, z = trained(key)
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = z.clone()
            bad[1, 2, 0] = value
            out = quantizer(bad)
            assert out.codes.isfinite().all() and torch.equal(out.ids, quantizer(bad).ids)
            assert (out.ids >= 0).all() and (out.ids < torch.tensor(quantizer.codebook_sizes)).all()
            if quantizer.fixed_n is None:
                assert torch.equal(out.ids[0], quantizer(z).ids[0])
            with pytest.raises(ValueError, match=r"not finite, the first .* at \[1, 2, 0\]"):
                quantizer.train()(bad)
            quantizer.eval()

    def test_wrong_input_is_refused(self, key: str):
        quantizer, z = trained(key)
        ids = quantizer(z).ids
        for wrong in (z[0], z[..., :-1], torch.cat([z, z], dim=-1)):
            with pytest.raises(ValueError, match="batch, tokens, width"):
                quantizer(wrong)
        for wrong in (z[:0], z[:, :0]):
            with pytest.raises(ValueError, match="nothing to quantize"):
                quantizer(wrong)
        for wrong in (ids.float(), ids[0], torch.cat([ids, ids], dim=-1), ids - ids - 1):
            with pytest.raises(ValueError, match="ids"):
                quantizer.lookup(wrong)
        with pytest.raises(ValueError, match="run from 0"):
            quantizer.lookup(torch.zeros_like(ids) + torch.tensor(quantizer.codebook_sizes))


COMPILED = [key for key in TABLES if TABLES[key]["kind"] != "library"]


@pytest.mark.parametrize("key", COMPILED)
def test_encoding_exports_with_a_free_batch(key: str):
    """And so it is one graph: torch.export refuses every break."""
    quantizer, z = trained(key)

    class Encode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = quantizer

        def forward(self, z: Tensor) -> Tensor:
            return self.quantizer(z).ids

    program = torch.export.export(Encode().eval(), (z,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},))
    more = vectors(quantizer, 7)
    assert torch.equal(program.module()(more), quantizer(more).ids)


@pytest.mark.parametrize("key", COMPILED)
def test_eval_compiles_without_graph_breaks(key: str):
    quantizer, z = trained(key)
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(quantizer, backend="eager", fullgraph=True)(z)
        expected = quantizer(z)
        codes = torch.compile(quantizer.lookup, backend="eager", fullgraph=True)(expected.ids)
    assert torch.equal(out.ids, expected.ids) and torch.equal(out.codes, expected.codes)
    assert torch.equal(codes, quantizer.lookup(expected.ids))
