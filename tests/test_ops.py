"""The ops: the reference against float64, every twin against the reference, and what the quantizers call."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.cuda import native, ops, reference
from tokenizers_vis.cuda.reference import nearest_code

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("euclidean", "cosine", "dot")
SIZES = [(1, 1, 1), (5, 7, 3), (101, 33, 8), (7, 1000, 17), (60, 1000, 256), (1030, 200, 1)]  # n, k, d
Lookup = Callable[[Tensor, Tensor, str], Tensor]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The C++ library is built once, into a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_VIS_CACHE", str(folder))
        native.reset()
        yield folder
    native.reset()


@pytest.fixture(params=["reference", "native"])
def lookup(request: pytest.FixtureRequest) -> Lookup:
    if request.param == "reference":
        return reference.nearest_code
    request.getfixturevalue("cache")
    if not native.available():
        pytest.skip(native.why_not())
    return native.nearest_code


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Environment variables that the search for the C++ library sees."""
    native.reset()
    yield monkeypatch
    monkeypatch.undo()
    native.reset()


def scores(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """n k in float64: the greater, the nearer."""
    z, codebook = z.double(), codebook.double()
    if metric == "euclidean":
        return -(z[:, None] - codebook).square().sum(dim=-1)
    return z @ (F.normalize(codebook, dim=-1) if metric == "cosine" else codebook).T


def is_best(ids: Tensor, z: Tensor, codebook: Tensor, metric: str, tolerance: float = 0.0) -> bool:
    """Whether no code scores better; ``tolerance`` as a share of the range of scores."""
    truth = scores(z, codebook, metric)
    best = truth.amax(dim=1)
    chosen = truth.gather(1, ids[:, None])[:, 0]
    return bool((best - chosen <= tolerance * (best - truth.amin(dim=1))).all())


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

    def test_tiles_of_codes_are_merged(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(reference, "MAX_CODES", 8 * 64)  # 64 codes a tile
        z, codebook = torch.randn(50, 8), torch.randn(333, 8)
        assert is_best(nearest_code(z, codebook), z, codebook, "euclidean")
        codebook = torch.cat([codebook, codebook.flip(0), codebook])
        assert int(nearest_code(z, codebook).max()) < 333
        five = reference.nearest_codes(z, codebook, 5)
        assert torch.equal(five, scores(z, codebook, "euclidean").argsort(dim=1, descending=True, stable=True)[:, :5])


class TestEveryLookup:
    """Of the reference and its C++ twin."""

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_is_the_best_in_float64(self, lookup: Lookup, size: tuple[int, int, int], metric: str):
        n, k, d = size
        z, codebook = torch.randn(n, d), torch.randn(k, d)
        assert is_best(lookup(z, codebook, metric), z, codebook, metric, 1e-6)
        small = codebook / (1000 * k)  # as a new codebook is
        assert is_best(lookup(z, small, metric), z, small, metric, 1e-6)

    @pytest.mark.parametrize("metric", METRICS)
    def test_codes_far_from_zero(self, lookup: Lookup, metric: str):
        """The textbook's |z|^2 - 2 z.c + |c|^2 has fewer than half of these right."""
        z, codebook = torch.randn(200, 8) + 1000, torch.randn(500, 8) + 1000
        assert is_best(lookup(z, codebook, metric), z, codebook, metric, 1e-5)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("d", [1, 8, 65])
    def test_the_lowest_of_equal_codes_wins(self, lookup: Lookup, metric: str, d: int):
        z, codes = torch.randn(70, d), torch.randn(150, d)
        codes[0] = 0.0  # cosine has no direction to normalise
        first = lookup(z, codes, metric)
        doubled = torch.cat([codes, codes[torch.randperm(150)], codes])
        assert torch.equal(lookup(z, doubled, metric), first)
        assert not lookup(z, codes[3].expand(700, d), metric).any()

    @pytest.mark.parametrize("metric", METRICS)
    def test_a_row_that_is_not_finite_has_id_0(self, lookup: Lookup, metric: str):
        z, codebook = torch.randn(9, 4), torch.randn(40, 4)
        sound = lookup(z, codebook, metric)
        z[2, 1], z[5, 3], z[8] = torch.nan, torch.inf, -torch.inf
        sound[[2, 5, 8]] = 0
        assert torch.equal(lookup(z, codebook, metric), sound)

    def test_huge_rows_have_their_code(self, lookup: Lookup):
        """In eval a quantizer puts 1e15 for infinity."""
        ids = lookup(torch.tensor([[1e15, 0.0], [0.0, -1e15]]), torch.eye(2).repeat(20, 1) * 2 - 1, "euclidean")
        assert ids.tolist() == [0, 0]

    @pytest.mark.parametrize("metric", METRICS)
    def test_a_code_that_is_not_finite_is_nobodys(self, lookup: Lookup, metric: str):
        z, codebook = torch.randn(60, 5), torch.randn(80, 5)
        sound = lookup(z, codebook[10:], metric) + 10
        codebook[:10] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, torch.nan]).repeat(2)[:, None]
        assert torch.equal(lookup(z, codebook, metric), sound)

    @pytest.mark.parametrize("metric", METRICS)
    def test_a_far_code_takes_nothing_from_the_others(self, lookup: Lookup, metric: str):
        z, codebook = torch.randn(60, 5), torch.randn(80, 5)
        sound = lookup(z, codebook, metric)
        codebook = torch.cat([codebook, torch.full((1, 5), -1e6)])
        inside = sound if metric == "euclidean" else scores(z, codebook, metric).argmax(dim=1)
        assert torch.equal(lookup(z, codebook, metric), inside)

    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_codes_of_few_numbers_lie_close_and_are_told_apart(self, lookup: Lookup, d: int):
        z, codebook = torch.randn(400, d), torch.randn(1000, d)
        assert torch.equal(lookup(z, codebook, "euclidean"), scores(z, codebook, "euclidean").argmax(dim=1))

    def test_directions_of_one_number_are_two(self, lookup: Lookup):
        codebook = torch.randn(300, 1)
        ids = lookup(torch.tensor([[3.0], [-0.1]]), codebook, "cosine")
        assert ids.tolist() == [(codebook > 0).int().argmax(), (codebook < 0).int().argmax()]

    @pytest.mark.parametrize("metric", METRICS)
    def test_groups_and_strides(self, lookup: Lookup, metric: str):
        z, codebook = torch.randn(3, 6, 50).transpose(1, 2), torch.randn(70, 3, 12).transpose(0, 1)[..., ::2]
        assert not z.is_contiguous() and not codebook.is_contiguous()
        one_by_one = [lookup(z[i].contiguous(), codebook[i].contiguous(), metric) for i in range(3)]
        assert torch.equal(lookup(z, codebook, metric), torch.stack(one_by_one))

    def test_no_rows(self, lookup: Lookup):
        assert lookup(torch.zeros(0, 3), torch.ones(5, 3), "euclidean").shape == (0,)
        assert lookup(torch.zeros(2, 0, 3), torch.ones(2, 5, 3), "euclidean").shape == (2, 0)

    def test_inputs_stay_as_they_are(self, lookup: Lookup):
        z, codebook = torch.randn(20, 3), torch.randn(30, 3)
        z[1, 1] = torch.nan
        before = z.clone(), codebook.clone()
        lookup(z, codebook, "euclidean")
        assert torch.equal(z.nan_to_num(7), before[0].nan_to_num(7)) and torch.equal(codebook, before[1])


class TestNative:
    @pytest.fixture(autouse=True)
    def built(self, cache: Path) -> None:
        if not native.available():
            pytest.skip(native.why_not())

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("size", [(2, 40_000, 16), (5000, 700, 8)], ids=["few rows", "many rows"])
    def test_any_number_of_threads(self, size: tuple[int, int, int], metric: str):
        """Threads share out rows or, where these are few, codes."""
        n, k, d = size
        z, codebook = torch.randn(2, n, d), torch.randn(2, k, d)
        codebook[:, k // 2 :] = codebook[:, : k - k // 2]
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 3, 8):
                torch.set_num_threads(threads)
                found.append(native.nearest_code(z, codebook, metric))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        assert torch.equal(found[0], reference.nearest_code(z, codebook, metric)) and int(found[0].max()) < k // 2

    @pytest.mark.parametrize("metric", METRICS)
    def test_the_matrix_units_change_nothing(self, metric: str, cache: Path, afresh: pytest.MonkeyPatch):
        """Their rounded scores only sort out; what they cannot sort out is scored as ever."""
        cases = []
        for n, k, d in ((200, 700, 64), (150, 300, 17), (300, 500, 32)):
            z, codes = torch.randn(n, d), torch.randn(k, d)
            z[3, 0], z[4, -1] = torch.nan, torch.inf
            twice = codes[torch.randint(0, 30, (k,))]
            near, heavy = codes[:1] + 1e-5 * codes, codes * torch.rand(k, 1) ** -3
            cases += [(z, codes), (z + 1000, codes + 1000), (z * 1e-20, codes * 1e-20), (z * 1e20, codes * 1e10)]
            cases += [(z, twice), (z, near), (z, heavy), (z, codes.sign()), (codes[:n] + 0.01 * z[: len(codes)], codes)]
        with_units = [native.nearest_code(*case, metric) for case in cases]
        native.reset()
        afresh.setenv("CXX", f"{native.compiler()[0]} -DWITHOUT_AMX")
        for case, ids in zip(cases, with_units, strict=True):
            assert torch.equal(native.nearest_code(*case, metric), ids)

    def test_other_dtypes_are_left_to_the_reference(self):
        assert native.nearest_code(torch.randn(4, 2).bfloat16(), torch.randn(3, 2)) is None

    def test_is_built_once(self, cache: Path, afresh: pytest.MonkeyPatch):
        before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
        assert before and native.available() and native.why_not() == ""
        assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


class TestWithoutNative:
    @pytest.mark.parametrize(
        ("variable", "value", "why"),
        [
            ("CXX", "/nonexistent", "CXX names is not there: /nonexistent"),
            ("CXX", "false", "returned non-zero exit status"),
            ("CXX", "echo", "No such file"),  # "compiles", but leaves nothing
            ("PATH", "", "no C.. compiler"),
            ("TOKENIZERS_VIS_CACHE", "/dev/null/cache", "Not a directory"),
            ("TOKENIZERS_VIS_NATIVE", "0", "TOKENIZERS_VIS_NATIVE is 0"),
        ],
    )
    def test_the_reference_steps_in(
        self, variable: str, value: str, why: str, afresh: pytest.MonkeyPatch, tmp_path: Path
    ):
        afresh.delenv("CXX", raising=False)
        afresh.setenv("TOKENIZERS_VIS_CACHE", str(tmp_path))
        afresh.setenv(variable, value)
        afresh.setattr(ops, "NATIVE_WORK", 0)
        z, codebook = torch.randn(30, 4), torch.randn(20, 4)
        assert torch.equal(ops.nearest_code(z, codebook), reference.nearest_code(z, codebook))
        assert native.nearest_code(z, codebook) is None and not native.available()
        assert re.search(why, native.why_not())


class TestNearestCodes:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize(("k", "m"), [(1, 1), (7, 7), (33, 5), (1000, 1), (1000, 40)])
    def test_best_first(self, k: int, m: int, metric: str):
        z, codebook = torch.randn(60, 9), torch.randn(k, 9)
        expected = scores(z, codebook, metric).argsort(dim=1, descending=True)[:, :m]
        assert torch.equal(reference.nearest_codes(z, codebook, m, metric), expected)

    def test_equal_codes_come_by_id(self):
        z, codes = torch.randn(20, 5), torch.randn(60, 5)
        ids = reference.nearest_codes(z, codes.repeat(3, 1), 7)
        best = reference.nearest_codes(z, codes, 3)
        expected = (best[..., None] + torch.tensor([0, 60, 120])).flatten(1)[:, :7]
        assert torch.equal(ids, expected)
        same = reference.nearest_codes(z, codes[:1].expand(90, 5), 90)
        assert torch.equal(same, torch.arange(90).expand(20, 90))

    def test_groups_and_rows_that_are_not_finite(self):
        z, codebook = torch.randn(2, 6, 3), torch.randn(2, 9, 3)
        z[1, 4, 0] = torch.nan
        ids = ops.nearest_codes(z, codebook, 4)
        assert torch.equal(ids[0], reference.nearest_codes(z[0], codebook[0], 4))
        assert ids.shape == (2, 6, 4) and ids[1, 4].tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("m", [0, 10])
    def test_m_is_at_most_k(self, m: int):
        with pytest.raises(ValueError, match=f"from 1 to the number of codes, 9, got {m}"):
            ops.nearest_codes(torch.zeros(2, 3), torch.zeros(9, 3), m)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(50, 4))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return ops.nearest_code(z, self.codebook), ops.nearest_codes(z, self.codebook, 3, "cosine")


class TestOps:
    def test_bad_input_says_what_is_allowed(self):
        good = torch.zeros(4, 2)
        for z, codebook, message in (
            (torch.zeros(4, 2), torch.zeros(2, 3, 2), "g n d and codebook g k d"),
            (torch.zeros(3, 4, 2), torch.zeros(2, 3, 2), r"got \(3, 4, 2\) and \(2, 3, 2\)"),
            (torch.zeros(4, 0), torch.zeros(3, 0), "d > 0"),
            (torch.zeros(4, 2).long(), torch.zeros(3, 2), "float32, float16, bfloat16 or float64, got torch.int64"),
            (torch.zeros(4, 2), torch.zeros(3, 2, device="meta"), "one device"),
        ):
            with pytest.raises(ValueError, match=message):
                ops.nearest_code(z, codebook)
        with pytest.raises(ValueError, match="'euclidean', 'cosine' or 'dot', got 'l1'"):
            ops.nearest_code(good, good, "l1")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_is_computed_in_float32(self, dtype: torch.dtype):
        z, codebook = torch.randn(300, 16).to(dtype), torch.randn(200, 16).to(dtype)
        assert torch.equal(ops.nearest_code(z, codebook), ops.nearest_code(z.float(), codebook.float()))

    @pytest.mark.parametrize("work", [0, 2**62], ids=["native", "reference"])
    def test_is_an_island_under_autocast(self, work: int, cache: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(ops, "NATIVE_WORK", work)
        z, codebook = torch.randn(200, 16), torch.randn(300, 16)
        plain = ops.nearest_code(z, codebook), ops.nearest_codes(z, codebook, 4)
        with torch.autocast("cpu", torch.bfloat16):
            inside = ops.nearest_code(z, codebook), ops.nearest_codes(z, codebook, 4)
        assert torch.equal(plain[0], inside[0]) and torch.equal(plain[1], inside[1])

    def test_the_operator_keeps_its_promises(self):
        args = (torch.randn(2, 6, 3), torch.randn(2, 9, 3), 2, "euclidean")
        torch.library.opcheck(torch.ops.tokenizers_vis.nearest_codes.default, args)

    def test_compiles_to_one_graph_and_exports_with_free_rows(self):
        encoder, z = Encoder(), torch.randn(10, 4, requires_grad=True)
        ids, three = encoder(z)
        assert not ids.requires_grad and ids.shape == (10,) and three.shape == (10, 3)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(encoder, (z.detach(),), dynamic_shapes={"z": {0: torch.export.Dim("n")}})
        targets = {str(node.target) for node in exported.graph.nodes}
        assert "tokenizers_vis.nearest_codes.default" in targets
        for rows in (z, torch.randn(23, 4)):
            for other in (compiled, exported.module()):
                for ours, theirs in zip(encoder(rows), other(rows), strict=True):
                    assert torch.equal(ours, theirs)

    @pytest.mark.slow
    @pytest.mark.parametrize("cxx", ["", "/nonexistent"], ids=["native", "reference"])
    @pytest.mark.parametrize(("k", "d"), [(262_144, 8), (65_536, 256)])
    def test_memory(self, cxx: str, k: int, d: int, cache: Path):
        """The matrix would be 2 GB, or 0.5 GB; what is allowed besides the inputs is 64 MB."""
        code = f"""
import os, resource
if not {cxx!r}: os.environ.pop("CXX", None)
else: os.environ["CXX"] = {cxx!r}
os.environ["TOKENIZERS_VIS_CACHE"] = {str(cache)!r}
import torch
from tokenizers_vis.cuda.ops import nearest_code
z, codebook = torch.randn(2048, {d}), torch.randn({k}, {d})
nearest_code(z[:128].clone(), codebook[:1024].clone())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_code(z, codebook)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kilobytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
        assert kilobytes < 64 * 1024

    def test_nearest_code_is_what_vector_quantize_pytorch_finds(self):
        library = pytest.importorskip("vector_quantize_pytorch")
        quantizer = library.VectorQuantize(dim=6, codebook_size=40).eval()
        z, codebook = torch.randn(100, 6), torch.randn(40, 6)
        quantizer._codebook.embed.data.copy_(codebook[None])
        assert torch.equal(quantizer(z[None])[1][0], ops.nearest_code(z, codebook))


class TestCodeStatistics:
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_counts_and_sums(self, deterministic: bool):
        z, ids = torch.randn(500, 7), torch.randint(0, 30, (500,))
        counts, sums = ops.code_statistics(z, ids, 40, deterministic)
        hot = F.one_hot(ids, 40).double()
        assert counts.dtype == sums.dtype == torch.float32
        assert torch.equal(counts, hot.sum(dim=0).float())
        torch.testing.assert_close(sums, (hot.T @ z.double()).float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_nothing_chosen_is_zero(self, deterministic: bool):
        counts, sums = ops.code_statistics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 5, deterministic)
        assert torch.equal(counts, torch.zeros(5)) and torch.equal(sums, torch.zeros(5, 3))

    def test_counts_of_bfloat16_are_exact(self):
        """In bfloat16 a count stops at 256."""
        z, ids = torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64)
        counts, sums = ops.code_statistics(z, ids, 2)
        assert counts.tolist() == [1000, 0] and sums.tolist() == [[1000], [0]]

    def test_the_deterministic_form_is_bitwise_the_same_with_any_threads(self):
        z, ids = torch.randn(20_000, 40), torch.randint(0, 3, (20_000,))
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 4):
                torch.set_num_threads(threads)
                found.append(ops.code_statistics(z, ids, 3, deterministic=True)[1])
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*found)

    @pytest.mark.parametrize(
        ("z", "ids", "k"),
        [((4, 2), torch.zeros(3).long(), 5), ((4,), torch.zeros(4).long(), 5), ((4, 2), torch.zeros(4), 5)],
    )
    def test_bad_input(self, z: tuple[int, ...], ids: Tensor, k: int):
        with pytest.raises(ValueError, match="z is n d of floats, ids n of int64"):
            ops.code_statistics(torch.zeros(z), ids, k)
