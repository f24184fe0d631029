"""The Triton kernels: what the reference gives, on a GPU and in Triton's interpreter; and what they compile to.

The tests of ``TestLookup`` and ``TestEntropy`` run on a GPU with ``-m gpu``. Without one, a second pytest runs them on
the CPU with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed here")

from tokenizers_vis.cuda import entropy_kernels, kernels, reference
from tokenizers_vis.cuda.entropy import SoftmaxEntropy

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = kernels.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
METRICS = ("euclidean", "cosine", "dot")


def on_a_gpu(test: Any) -> Any:
    """A test of twins: on a GPU, or anywhere in the interpreter."""
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    return pytest.mark.gpu(missing(test))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or -7 where it is for integers, so that what a kernel leaves out is seen."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            return fresh.fill_(torch.nan if fresh.is_floating_point() else -7)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def scores(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """In float64, n k; the greatest is the nearest."""
    z, codebook = z.double(), codebook.double()
    if metric == "cosine":
        codebook = F.normalize(codebook, dim=-1)
    if metric == "euclidean":
        return -torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    return z @ codebook.mT


def assert_nearest(z: Tensor, codebook: Tensor, metric: str, ids: Tensor) -> None:
    """The ids are those of the reference, or code for code as near, up to float32."""
    assert ids.dtype == torch.int64
    z, codebook, ids = z.cpu(), codebook.cpu(), ids.cpu()
    if torch.equal(ids, reference.nearest_code(z, codebook, metric)):
        return
    exact = scores(z, codebook, metric)
    spread = codebook - codebook.mean(dim=-2, keepdim=True)
    size = (z.norm(dim=-1) + codebook.norm(dim=-1).max()) * spread.norm(dim=-1).max()
    short = exact.amax(dim=-1) - exact.gather(-1, ids[..., None])[..., 0]
    assert (short <= 2e-6 * size).all()
    assert (short > 0).sum() <= 2 + 0.01 * short.numel()


@on_a_gpu
@pytest.mark.usefixtures("poisoned")
class TestLookup:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize(
        ("n", "k", "d"),
        [
            (1, 1, 3),
            (33, 7, 8),
            (257, 1000, 17),
            (1, 4099, 64),
            (129, 4099, 3),
            (33, 257, 13),
            (5, 300, 14),
            (9, 300, 130),
        ],
    )
    def test_the_reference_gives_the_same(self, n: int, k: int, d: int, metric: str):
        z, codebook = torch.randn(n, d, device=DEVICE), torch.randn(k, d, device=DEVICE)
        assert_nearest(z, codebook, metric, kernels.nearest_code(z, codebook, metric))

    @pytest.mark.parametrize("metric", METRICS)
    def test_groups(self, metric: str):
        z, codebook = torch.randn(3, 33, 8, device=DEVICE), torch.randn(3, 300, 8, device=DEVICE)
        ids = kernels.nearest_code(z, codebook, metric)
        alone = [kernels.nearest_code(*pair, metric) for pair in zip(z, codebook, strict=True)]
        assert torch.equal(ids, torch.stack(alone))

    def test_many_parts_of_rows_and_of_codes(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(kernels, "MAX_KEPT", 1)  # one program's rows at once
        monkeypatch.setattr(kernels, "PROGRAMS", 3)
        monkeypatch.setattr(kernels, "SEEN", 4)
        z, codebook = torch.randn(2, 300, 4, device=DEVICE), torch.randn(2, 1500, 4, device=DEVICE)
        assert_nearest(z, codebook, "euclidean", kernels.nearest_code(z, codebook))

    @pytest.mark.parametrize("metric", METRICS)
    def test_of_equal_codes_the_lowest_wins(self, metric: str):
        codes = torch.randn(40, 5, device=DEVICE)
        codebook = codes[torch.randint(40, (900,))].contiguous()
        z = torch.cat([codes + 0.01 * torch.randn_like(codes), torch.zeros(1, 5, device=DEVICE)])
        ids = kernels.nearest_code(z, codebook, metric)
        equal = (codebook[ids][:, None] == codebook).all(dim=-1)
        assert torch.equal(ids, equal.int().argmax(dim=1))
        assert_nearest(z, codebook, metric, ids)
        assert kernels.nearest_code(z, torch.ones(700, 5, device=DEVICE), metric).tolist() == [0] * 41

    def test_ties_between_codes(self):
        codebook = torch.tensor([[4.0, 0.0], [0.0, 2.0], [0.0, -2.0], [0.0, 2.0], [-4.0, 0.0]], device=DEVICE)
        z = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, -1.0], [9.0, 0.0]], device=DEVICE)
        assert kernels.nearest_code(z, codebook).tolist() == [1, 1, 2, 0]

    @pytest.mark.parametrize("offset", [100.0, -3000.0])
    def test_data_far_from_zero(self, offset: float):
        z, codebook = offset + torch.randn(65, 8, device=DEVICE), offset + torch.randn(500, 8, device=DEVICE)
        assert_nearest(z, codebook, "euclidean", kernels.nearest_code(z, codebook))

    @pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
    def test_any_scale(self, scale: float):
        z, codebook = scale * torch.randn(65, 8, device=DEVICE), scale * torch.randn(500, 8, device=DEVICE)
        assert_nearest(z, codebook, "euclidean", kernels.nearest_code(z, codebook))

    def test_rows_and_codes_of_unlike_size(self):
        """A fresh codebook is tiny beside the data: |z - c|^2 hardly differs."""
        z, codebook = torch.randn(65, 8, device=DEVICE), (torch.rand(1000, 8, device=DEVICE) - 0.5) / 500
        assert_nearest(z, codebook, "euclidean", kernels.nearest_code(z, codebook))
        assert_nearest(codebook[:65], z, "euclidean", kernels.nearest_code(codebook[:65].contiguous(), z))

    @pytest.mark.parametrize("metric", METRICS)
    def test_codes_closer_than_tf32_tells(self, metric: str):
        """Sixty copies of each code that differ in the fourth digit, in all groups: rounding to TF32 gives others."""
        codes = torch.randn(20, 16, device=DEVICE).repeat(60, 1)
        codebook = codes + 1e-3 * torch.randn_like(codes)
        z = codes[:40] + 1e-1 * torch.randn(40, 16, device=DEVICE)
        assert_nearest(z, codebook, metric, kernels.nearest_code(z, codebook, metric))
        rounded = [((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) for x in (z, codebook)]
        wrong = scores(*rounded, metric).argmax(dim=1) != scores(z, codebook, metric).argmax(dim=1)
        assert wrong.sum() > 4

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype):
        if INTERPRETED and dtype == torch.bfloat16:
            pytest.skip("the interpreter keeps bfloat16 as integers")
        z, codebook = torch.randn(33, 8, device=DEVICE).to(dtype), torch.randn(300, 8, device=DEVICE).to(dtype)
        expected = kernels.nearest_code(z.float(), codebook.float())
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(kernels.nearest_code(z, codebook), expected)

    def test_rows_that_are_not_finite_have_id_0(self):
        z, codebook = torch.randn(9, 4, device=DEVICE), torch.randn(70, 4, device=DEVICE)
        expected = kernels.nearest_code(z, codebook)
        z[2, 1], z[5, 0], z[7, 3] = torch.nan, torch.inf, -torch.inf
        ids = kernels.nearest_code(z, codebook)
        expected[[2, 5, 7]] = 0
        assert torch.equal(ids, expected)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, for what overflows
    @pytest.mark.parametrize("value", [1e15, 1e25, 3e38])
    def test_huge_rows_end(self, value: float):
        """Squares that overflow leave nothing to certify: all codes are scored."""
        codebook = torch.randn(400, 4, device=DEVICE)
        ids = kernels.nearest_code(torch.full((3, 4), value, device=DEVICE), codebook)
        assert ((ids >= 0) & (ids < 400)).all()
        if value < 1e38:
            assert_nearest(torch.full((3, 4), value), codebook, "dot", ids)

    def test_no_rows_and_views(self):
        assert kernels.nearest_code(torch.zeros(0, 2, device=DEVICE), torch.zeros(3, 2, device=DEVICE)).shape == (0,)
        z, codebook = torch.randn(8, 33, device=DEVICE).T, torch.randn(90, 16, device=DEVICE)[:, ::2]
        expected = kernels.nearest_code(z.contiguous(), codebook.contiguous())
        assert torch.equal(kernels.nearest_code(z, codebook), expected)

    def test_inputs_stay(self):
        z, codebook = torch.randn(33, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
        copies = z.clone(), codebook.clone()
        for metric in METRICS:
            kernels.nearest_code(z, codebook, metric)
        assert torch.equal(z, copies[0]) and torch.equal(codebook, copies[1])

    def test_wrong_shapes_are_refused(self):
        with pytest.raises(ValueError, match="same d"):
            kernels.nearest_code(torch.zeros(4, 2, device=DEVICE), torch.zeros(3, 3, device=DEVICE))


def dense(z: Tensor, codebook: Tensor, temperature: float, metric: str, eps: float) -> SoftmaxEntropy:
    log_p = (scores(z, codebook, metric) * (2 if metric == "euclidean" else 1) / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    mean = p.mean(dim=-2)
    batch = -(mean * (mean + eps).clamp_min(1e-300).log()).sum(dim=-1)
    return SoftmaxEntropy(-(p * log_p).sum(dim=-1).mean(dim=-1), batch)


def with_gradients(function: Callable, z: Tensor, codebook: Tensor, *options: Any) -> list[Tensor]:
    z, codebook = z.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()
    result = function(z, codebook, *options)
    (0.7 * result.sample - 1.3 * result.batch).sum().backward()
    return [part.double().cpu() for part in (result.sample.detach(), result.batch.detach(), z.grad, codebook.grad)]


@on_a_gpu
@pytest.mark.usefixtures("poisoned")
class TestEntropy:
    @pytest.mark.parametrize("metric", ["euclidean", "dot"])
    @pytest.mark.parametrize(
        ("n", "k", "d"), [(1, 1, 3), (1, 7, 8), (33, 17, 5), (257, 1000, 8), (300, 259, 17), (70, 300, 64)]
    )
    def test_dense_float64_gives_the_same(self, n: int, k: int, d: int, metric: str):
        z, codebook = torch.randn(n, d), torch.randn(k, d)
        rounding = 1 if d <= 32 or INTERPRETED else 10  # three products in TF32 are a little less than one in float32
        for temperature, eps, tolerance in ((1.0, 0.0, 1e-4), (0.01, 1e-5, 2e-3), (0.05, 0.0, 5e-4)):
            options = (temperature, metric, eps)
            got = with_gradients(entropy_kernels.softmax_entropy, z.to(DEVICE), codebook.to(DEVICE), *options)
            for ours, theirs in zip(got, with_gradients(dense, z.double(), codebook.double(), *options), strict=True):
                assert (ours - theirs).abs().max() <= rounding * tolerance * max(1e-2, theirs.abs().max().item())

    def test_logits_of_thousands(self):
        z, codebook = 3 * torch.randn(65, 16, device=DEVICE), 3 * torch.randn(50, 16, device=DEVICE)
        sample, batch, *gradients = with_gradients(entropy_kernels.softmax_entropy, z, codebook, 0.01)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert 0 <= sample < 0.1 and 0 < batch <= torch.tensor(50.0).log()

    def test_groups_and_half_precision(self):
        z, codebook = torch.randn(2, 33, 4, device=DEVICE).half(), torch.randn(2, 70, 4, device=DEVICE).half()

        def under_autocast(*inputs: Any) -> SoftmaxEntropy:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return entropy_kernels.softmax_entropy(*inputs)

        got = with_gradients(under_autocast, z, codebook, 0.5)
        alone = [with_gradients(entropy_kernels.softmax_entropy, *pair, 0.5) for pair in zip(z, codebook, strict=True)]
        for together, apart in zip(got, zip(*alone, strict=True), strict=True):
            assert torch.equal(together, torch.stack(apart))

    def test_what_it_does_not_take_is_left_to_torch(self):
        narrow, wide = torch.zeros(2, 64, device=DEVICE), torch.zeros(2, 65, device=DEVICE)
        assert entropy_kernels.takes_entropy(narrow, narrow) and not entropy_kernels.takes_entropy(wide, wide)
        assert not entropy_kernels.takes_entropy(narrow.double(), narrow.double())
        with pytest.raises(ValueError, match="at most 64"):
            entropy_kernels.softmax_entropy(wide, wide)


@on_a_gpu
@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
@pytest.mark.parametrize(("n", "k", "d"), [(5001, 70001, 8), (4097, 16411, 64), (3001, 9001, 256)])
def test_large_lookups(n: int, k: int, d: int):
    z, codebook = torch.randn(n, d, device="cuda"), torch.randn(k, d, device="cuda")
    for metric in METRICS:
        assert_nearest(z, codebook, metric, kernels.nearest_code(z, codebook, metric))


@on_a_gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's memory is no measure")
def test_memory_does_not_grow_with_the_codes():
    z, codebook = torch.randn(16384, 8, device="cuda"), torch.randn(262144, 8, device="cuda")
    kernels.nearest_code(z, codebook)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kernels.nearest_code(z, codebook)
    # 64 MB of group maxima, the packed rows and codes, the ids.
    assert torch.cuda.max_memory_allocated() - before < (64 + 32) * 2**20


@pytest.mark.skipif(INTERPRETED, reason="this is the second pytest")
def test_in_the_interpreter():
    """All tests of twins, on the CPU."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    which = ["-p", "no:cacheprovider", "-k", "TestLookup or TestEntropy", __file__]
    command = [sys.executable, "-m", "pytest", "-q", *which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_kernels", ROOT / "benchmarks" / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if problem := module.missing_tools():
        pytest.skip(problem)
    return module


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
class TestCompiled:
    """For compute capability 9.0 (H100, H200), without a GPU."""

    @pytest.mark.parametrize(("d", "pairs"), [(8, 1.3), (16, 1.6), pytest.param(64, 2.1, marks=pytest.mark.slow)])
    def test_instructions_of_the_lookup(self, benchmark: ModuleType, d: int, pairs: float):
        figures = benchmark.lookup_figures("_group_maxima", d)
        assert figures.registers <= 255 and figures.spilled == 0 and figures.shared <= benchmark.SHARED
        assert 0.5 < figures.pairs <= pairs

    @pytest.mark.parametrize("name", ["_exact", "_pack_codes", "_pack_rows"])
    def test_nothing_spills_in_the_rest_of_the_lookup(self, benchmark: ModuleType, name: str):
        assert benchmark.lookup_figures(name, 8).spilled == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["_group_maxima", "_exact", "_pack_codes", "_pack_rows"])
    @pytest.mark.parametrize("d", [32, 256])
    @pytest.mark.parametrize(("capability", "shared"), [(90, 227 * 1024), (80, 163 * 1024), (89, 99 * 1024)])
    def test_nothing_spills_on_other_gpus(self, benchmark: ModuleType, name: str, d: int, capability: int, shared: int):
        figures = benchmark.lookup_figures(name, d, capability, shared)
        assert figures.spilled == 0 and figures.shared <= shared

    @pytest.mark.parametrize(
        "d", [8, pytest.param(32, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
    )
    def test_nothing_spills_in_the_entropy(self, benchmark: ModuleType, d: int):
        for name in ("_row_entropy", "_mean_p", "_row_slopes", "_row_gradients", "_code_gradients"):
            figures = benchmark.entropy_figures(name, d)
            assert figures.spilled == 0 and figures.shared <= 99 * 1024, name


def test_importing_the_ops_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import tokenizers_vis.cuda.ops as ops, torch; "
    code += "assert ops.softmax_entropy(torch.ones(2, 2), torch.ones(3, 2)).sample > 1"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
