"""Every quantizer keeps the contract of quantizers/base.py; each keeps its own formula."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.cuda import reference
from tokenizers_vis.cuda.reference import nearest_code
from tokenizers_vis.quantizers import QUANTIZERS
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.library import Library
from tokenizers_vis.quantizers.vq import VQ, kmeans

# A new quantizer is one line here.
TABLES = {
    "fsq odd": {"kind": "fsq", "levels": [5, 3, 7]},
    "fsq even": {"kind": "fsq", "levels": [2, 8, 4, 6]},
    "fsq large": {"kind": "fsq", "levels": [8] * 9},
    "vq": {"kind": "vq", "dim": 4, "codebook_size": 32},
    "vq cosine": {"kind": "vq", "dim": 4, "codebook_size": 32, "distance": "cosine", "revive_after": 2},
    "vq ema": {"kind": "vq", "dim": 4, "codebook_size": 32, "update": "ema", "revive_after": 2},
    "vq ema cosine": {"kind": "vq", "dim": 4, "codebook_size": 32, "update": "ema", "distance": "cosine"},
    "vq kmeans": {"kind": "vq", "dim": 4, "codebook_size": 32, "kmeans_start": True, "revive_after": 1},
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
        quantizer(torch.randn(3, 8, quantizer.dim))
    return quantizer.eval(), torch.randn(3, 5, quantizer.dim)


def vq(**options: object) -> VQ:
    return build(Quantizer, {"kind": "vq", "dim": 3, "codebook_size": 8} | options)


def test_every_kind_is_under_test():
    assert {table["kind"] for table in TABLES.values()} == set(QUANTIZERS)


@pytest.mark.parametrize("key", TABLES)
class TestContract:
    def test_lookup_gives_the_codes_back(self, key: str):
        quantizer, z = trained(key)
        codes, ids, loss, _ = quantizer(z)
        assert codes.shape == z.shape and codes.dtype == torch.float32 and loss.shape == ()
        if isinstance(quantizer, Library):  # sums of residual levels come in another order
            torch.testing.assert_close(quantizer.lookup(ids), codes, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(quantizer.lookup(ids), codes)
            assert torch.equal(quantizer.lookup(ids[1:, :2].int()), codes[1:, :2])

    def test_ids_are_whole_numbers_within_their_codebooks(self, key: str):
        quantizer, _ = trained(key)
        ids = quantizer(10 * torch.randn(4, 50, quantizer.dim)).ids
        assert ids.dtype == torch.int64 and ids.shape == (4, 50, len(quantizer.codebook_sizes))
        assert (ids >= 0).all() and (ids < torch.tensor(quantizer.codebook_sizes)).all()
        assert len(ids.unique()) > 1

    def test_the_gradient_reaches_z(self, key: str):
        quantizer = make(key).train()
        z = torch.randn(3, 5, quantizer.dim, requires_grad=True)
        out = quantizer(z)
        (out.codes * torch.randn_like(out.codes)).sum().backward()
        assert z.grad.isfinite().all() and (z.grad != 0).any(dim=-1).all()

    def test_the_loss_is_finite_and_its_parts_are_for_the_log(self, key: str):
        quantizer = make(key).train()
        out = quantizer(torch.randn(3, 5, quantizer.dim, requires_grad=True))
        assert out.loss.isfinite() and out.loss.dtype == torch.float32
        assert all(part.ndim == 0 and not part.requires_grad for part in out.parts.values())
        assert bool(out.parts) or out.loss == 0

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

    def test_wrong_input_is_refused(self, key: str):
        quantizer, z = trained(key)
        ids = quantizer(z).ids
        for wrong in (z[0], z[..., :-1], torch.cat([z, z], dim=-1)):
            with pytest.raises(ValueError, match="batch, tokens, width"):
                quantizer(wrong)
        for wrong in (ids.float(), ids[0], torch.cat([ids, ids], dim=-1), ids - ids - 1):
            with pytest.raises(ValueError, match="ids"):
                quantizer.lookup(wrong)
        with pytest.raises(ValueError, match="run from 0"):
            quantizer.lookup(torch.zeros_like(ids) + torch.tensor(quantizer.codebook_sizes))


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


class TestVQ:
    @pytest.mark.parametrize("offset, scale", [(0, 1), (0, 1e-4), (1000, 1)])
    def test_euclidean_codes_are_the_nearest(self, offset: float, scale: float):
        quantizer = vq(codebook_size=64, dim=8).eval()
        nn.init.normal_(quantizer.codebook, mean=offset, std=scale)
        z = torch.randn(1, 500, 8) + offset
        expected = torch.cdist(z.double(), quantizer.codebook.detach().double()[None]).argmin(dim=-1)
        assert torch.equal(quantizer(z).ids[..., 0], expected)

    def test_cosine_codes_have_length_one_and_the_smallest_angle(self):
        quantizer = vq(distance="cosine").eval()
        z = 7 * torch.randn(2, 50, 3)
        out = quantizer(z)
        torch.testing.assert_close(out.codes.norm(dim=-1), torch.ones(2, 50))
        expected = F.cosine_similarity(z[:, :, None].double(), quantizer.codebook.detach().double(), dim=-1).argmax(-1)
        assert torch.equal(out.ids[..., 0], expected)

    def test_the_loss_is_the_formula(self):
        quantizer = vq(dim=1, codebook_size=2, commitment=0.5, codebook_weight=2.0)
        quantizer.codebook.data = torch.tensor([[0.0], [10.0]])
        z = torch.tensor([[[1.0], [7.0]]], requires_grad=True)
        out = quantizer(z)
        assert out.parts["commitment"] == out.parts["codebook"] == 5.0  # (1 + 9) / 2
        assert out.loss == 12.5
        out.loss.backward()
        assert z.grad.flatten().tolist() == [0.5, -1.5]  # commitment * (z - c), as 2 / 2 of the mean of two
        assert quantizer.codebook.grad.flatten().tolist() == [-2.0, 6.0]  # codebook_weight * (c - z)

    def test_the_straight_through_gradient_is_the_identity(self):
        z = torch.randn(2, 5, 3, requires_grad=True)
        weight = torch.randn(2, 5, 3)
        (grad,) = torch.autograd.grad((vq()(z).codes * weight).sum(), z)
        assert torch.equal(grad, weight)

    def test_ema_of_a_constant_reaches_it_even_after_a_cast(self):
        quantizer = vq(dim=1, update="ema", decay=0.9).bfloat16()
        z = torch.full((2, 32, 1), 256.0)
        for _ in range(300):
            ids = quantizer(z).ids
        torch.testing.assert_close(quantizer.lookup(ids), z, rtol=1e-5, atol=0)
        assert all(b.dtype == torch.float32 for b in quantizer.buffers())

    def test_ema_codes_converge_to_cluster_means(self):
        centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0]])
        z = (centres[:, None] + 0.3 * torch.randn(3, 40, 2)).reshape(1, 120, 2)
        quantizer = vq(dim=2, codebook_size=3, update="ema", decay=0.5, kmeans_start=True)
        for _ in range(40):
            quantizer(z)
        found = quantizer.codebook[quantizer(z).ids.view(3, 40)[:, 0]]
        torch.testing.assert_close(found, z.view(3, 40, 2).mean(dim=1), rtol=1e-4, atol=1e-4)

    def test_gradient_descent_lowers_the_loss(self):
        quantizer, z = vq(), torch.randn(2, 64, 3)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=5.0)
        losses = []
        for _ in range(20):
            loss = quantizer(z).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]

    @pytest.mark.parametrize("update", ["gradient", "ema"])
    def test_kmeans_start_uses_the_first_training_batch_once(self, update: str):
        z = 3 + torch.randn(2, 64, 3)
        quantizer = vq(update=update, kmeans_start=True, codebook_weight=0.0)
        quantizer.eval()(z)
        assert not quantizer.started
        quantizer.train()(z)
        assert quantizer.started and len(quantizer.eval()(z).ids.unique()) == 8
        other = vq(update=update, kmeans_start=True)
        other.load_state_dict(quantizer.state_dict())
        before = other.codebook.clone()
        other.train()(-z)
        moved = (other.codebook - before).norm() / before.norm()
        assert moved < 0.1  # a second start would have put every code to the other side

    def test_kmeans_finds_well_separated_clusters(self):
        centres = 20 * torch.eye(4)
        rows = centres.repeat(10, 1) + 0.01 * torch.randn(40, 4)
        found = kmeans(rows, 12)  # more than clusters, so that random starts cannot miss one
        assert (torch.cdist(centres, found).amin(dim=1) < 0.5).all()

    def test_kmeans_with_fewer_vectors_than_codes_uses_each_vector(self):
        rows = torch.randn(5, 3)
        found = kmeans(rows, 16)
        assert len(found.unique(dim=0)) == 16
        assert (torch.cdist(rows, found).amin(dim=1) < 1e-6).all()
        assert (torch.cdist(found, rows).amin(dim=1) < 0.2).all()

    @pytest.mark.parametrize("update", ["gradient", "ema"])
    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_dead_codes_revive(self, update: str, distance: str):
        z = torch.randn(2, 100, 3)
        used = {}
        for revive_after in (0, 3):
            torch.manual_seed(1)
            quantizer = vq(codebook_size=16, update=update, distance=distance, revive_after=revive_after)
            with torch.no_grad():  # all but two stand behind one another, where only the first can be chosen
                quantizer.codebook[2:] = torch.tensor([100.0, 0.0, 0.0])
                if update == "ema":
                    quantizer.sums.copy_(quantizer.codebook)
            for _ in range(20):
                quantizer(z).loss.backward() if update == "gradient" else quantizer(z)
            used[revive_after] = len(quantizer.eval()(z).ids.unique())
        assert used[0] < 6 < 12 < used[3]

    def test_a_code_revives_after_exactly_so_many_steps(self):
        quantizer = vq(dim=1, codebook_size=2, revive_after=3)
        quantizer.codebook.data = torch.tensor([[0.0], [50.0]])
        z = torch.tensor([[[1.0], [2.0]]])
        for step in range(1, 4):
            assert quantizer.codebook[1] == 50
            assert quantizer(z).ids.flatten().tolist() == [0, 0]
            assert quantizer.idle.tolist() == [0, step % 3]
        assert quantizer.codebook[1] in z

    @pytest.mark.parametrize(
        "wrong",
        [
            {"dim": 0},
            {"codebook_size": 1},
            {"distance": "manhattan"},
            {"update": "none"},
            {"commitment": -1.0},
            {"decay": 1.0},
            {"revive_after": -1},
        ],
    )
    def test_options_out_of_range_are_refused(self, wrong: dict[str, object]):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            vq(**wrong)

    @pytest.mark.slow
    def test_ranks_learn_the_same_codebook(self, tmp_path):
        """Two processes with different data end with one codebook, which has seen both halves."""
        script = """
import sys, torch
from torch import distributed
from tokenizers_vis.quantizers.vq import VQ
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
quantizer = VQ(dim=2, codebook_size=6, update="ema", decay=0.5, kmeans_start=True, revive_after=2)
torch.manual_seed(rank)
for _ in range(30):
    quantizer(torch.randn(1, 50, 2) + (8 * rank))
torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""
        ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)]) for rank in range(2)]
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert (first["codebook"][:, 0] > 5).any() and (first["codebook"][:, 0] < 3).any()


class TestLibrary:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("vector_quantize_pytorch")

    def test_codebook_sizes(self):
        sizes = {name: make(f"library {name}").codebook_sizes for name in LIBRARY}
        assert sizes["VectorQuantize heads"] == (16, 16) and sizes["ResidualVQ"] == (16, 8, 4)
        assert sizes["GroupedResidualVQ"] == (16,) * 6 and sizes["FSQ"] == (60,) and sizes["LFQ"] == (8, 8)

    def test_groups_come_one_after_the_other(self):
        quantizer, z = trained("library GroupedResidualVQ")
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
