"""python benchmarks/lookup.py [--device cpu] [--out TABLES.md]

The nearest of K codes of width d for each of N vectors: our lookups beside vector-quantize-pytorch in eval, cdist +
argmin and matmul + argmax, all in one run. Prints markdown tables: on the CPU processor time over all threads, wall
time and peak memory besides the inputs; on a GPU time, the share of the card's limit and peak memory.

Those that build the N x K matrix get fewer rows where it would take more than 4 GB. Their numbers are scaled up to N
rows and marked with a star. On the CPU, 2 cores: about half an hour, of which ours are a tenth.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib
import inspect
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    Lookup = Callable[[Tensor], Tensor]

MATRIX_BYTES = 4e9
STATUS = Path("/proc/self/status")


class Method(NamedTuple):
    """prepare: codebook -> the lookup of rows. matrix: bytes it needs per row and code."""

    name: str
    prepare: Callable[[Tensor], Lookup]
    matrix: int = 0


class Measured(NamedTuple):
    """Seconds of processor and wall, bytes. ``scaled`` is true when fewer rows were measured."""

    processor: float
    wall: float
    memory: float | None
    scaled: bool


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: cpu)")
    parser.add_argument("--rows", type=int, help="N (default: 8192, on a GPU 65536)")
    parser.add_argument("--codes", type=int, nargs="+", help="K (default: 1k 8k 65k 262k, on a GPU 16k 65k 262k)")
    parser.add_argument("--dims", type=int, nargs="+", help="d (default: 8 16 64 256, on a GPU 8 64 256)")
    parser.add_argument("--runs", type=int, default=3, help="calls to take the median of (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    # The limit that a GPU's times are compared with; the defaults are an H200's.
    parser.add_argument("--tflops", type=float, default=788, help="bf16 matmul, TFLOP/s (default: 788)")
    parser.add_argument("--tips", type=float, default=33.5, help="instructions of all lanes, 10^12/s (default: 33.5)")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="memory, TB/s (default: 4.3)")
    options = parser.parse_args(arguments)
    gpu = options.device != "cpu"
    rows = options.rows or (65536 if gpu else 8192)
    codes = options.codes or ([16384, 65536, 262144] if gpu else [1024, 8192, 65536, 262144])
    dims = options.dims or ([8, 64, 256] if gpu else [8, 16, 64, 256])
    if min(rows, *codes, *dims, options.runs, options.threads) < 1:
        parser.error("--rows, --codes, --dims, --runs and --threads are at least 1")

    # Threads that wait for work by spinning would count as processor time. Before torch is there.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    methods = list(gpu_methods() if gpu else cpu_methods())
    cells = [(k, d) for k in codes for d in dims]
    results: dict[tuple[int, int], list[Measured]] = {}
    with torch.no_grad():
        for k, d in track(cells, "looking up", console=Console(stderr=True)):
            z, codebook = torch.randn(rows, d, device=options.device), torch.randn(k, d, device=options.device)
            results[k, d] = [measure(method, z, codebook, options.runs) for method in methods]
    text = "\n".join(report(options, rows, [method.name for method in methods], results, gpu))
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def cpu_methods() -> Iterator[Method]:
    from tokenizers_vis.cuda import native, reference

    yield from baselines()
    yield Method("ours, torch", lambda c: lambda z: reference.nearest_code(z, c))
    if native.available():
        yield Method("ours, C++", lambda c: lambda z: native.nearest_code(z, c))
    else:
        Console(stderr=True).print(f"without our C++ kernel: {native.why_not()}")


def gpu_methods() -> Iterator[Method]:
    from tokenizers_vis.cuda import ops, reference

    yield from baselines()
    if (flash := flash_kmeans()) is not None:
        yield flash
    yield Method("ours, torch", lambda c: lambda z: reference.nearest_code(z, c))
    yield Method("ours", lambda c: lambda z: ops.nearest_code(z, c))


def baselines() -> Iterator[Method]:
    import torch

    try:
        yield Method("vector-quantize-pytorch", vector_quantize_pytorch(), matrix=16)
    except ImportError as error:
        Console(stderr=True).print(f"without vector-quantize-pytorch: {error}")
    yield Method("cdist + argmin", lambda c: lambda z: torch.cdist(z, c).argmin(dim=1), matrix=4)

    def matmul(codebook: Tensor) -> Lookup:
        half = codebook.square().sum(dim=1) / 2
        return lambda z: torch.addmm(half, z, codebook.T, beta=-1).argmax(dim=1)

    yield Method("matmul + argmax", matmul, matrix=4)


def vector_quantize_pytorch() -> Callable[[Tensor], Lookup]:
    quantizers = importlib.import_module("vector_quantize_pytorch")

    def prepare(codebook: Tensor) -> Lookup:
        k, d = codebook.shape
        quantizer = quantizers.VectorQuantize(dim=d, codebook_size=k).to(codebook.device).eval()
        quantizer._codebook.embed.data.copy_(codebook[None])
        return lambda z: quantizer(z[None])[1][0]

    return prepare


def flash_kmeans() -> Method | None:
    try:
        assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    except ImportError:
        return None

    def prepare(codebook: Tensor) -> Lookup:
        if "x_sq" in inspect.signature(assign).parameters:
            return lambda z: assign(z[None], codebook[None], z.square().sum(dim=1)[None])[0]
        return lambda z: assign(z[None], codebook[None])[0]

    return Method("flash-kmeans", prepare)


def measure(method: Method, z: Tensor, codebook: Tensor, runs: int) -> Measured:
    n, k = len(z), len(codebook)
    share = z
    if method.matrix and n * k * method.matrix > MATRIX_BYTES:
        share = z[: max(1, int(MATRIX_BYTES / (k * method.matrix)))]
    scale = n / len(share)
    lookup = method.prepare(codebook)
    lookup(share[: max(1, len(share) // 16)])  # caches, builds, tuning
    if z.is_cuda:
        seconds, memory = on_gpu(functools.partial(lookup, share), max(10, runs))
        return Measured(seconds * scale, seconds * scale, memory * scale, scale > 1)
    times = []
    memory = None
    for _ in range(runs):
        gc.collect()
        before = peak_reset()
        processor, wall = time.process_time(), time.perf_counter()
        lookup(share)
        times.append((time.process_time() - processor, time.perf_counter() - wall))
        if before is not None:
            memory = max(memory or 0, resident("VmHWM") - before)
    processor, wall = (statistics.median(column) for column in zip(*times, strict=True))
    return Measured(processor * scale, wall * scale, memory and memory * scale, scale > 1)


def on_gpu(call: Callable[[], object], runs: int) -> tuple[float, int]:
    """Median seconds, and peak bytes beyond those held before."""
    import torch

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times), torch.cuda.max_memory_allocated() - held


def peak_reset() -> int | None:
    """Lets the process's peak memory start again, and returns what it holds now, in bytes. Linux with glibc only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed, but the process still holds, would hide the peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return resident("VmRSS")


def resident(field: str) -> int:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def report(
    options: argparse.Namespace,
    rows: int,
    names: list[str],
    results: dict[tuple[int, int], list[Measured]],
    gpu: bool,
) -> Iterator[str]:
    import torch

    device = torch.cuda.get_device_name() if gpu else f"{cpu()}, threads: {options.threads}"
    runs = max(10, options.runs) if gpu else options.runs
    yield f"N = {rows}, {device}, torch {torch.__version__}, median of {runs}."
    yield "In brackets: how many times faster than the first column. *: measured with fewer rows, scaled up.\n"

    def compared(read: Callable[[Measured], float]) -> Iterator[list[str]]:
        for (k, d), cells in results.items():
            first = read(cells[0])
            yield [str(k), str(d)] + [
                f"{number(1000 * read(cell))}{'*' if cell.scaled else ''}"
                + (f" ({number(first / read(cell))}x)" if i else "")
                for i, cell in enumerate(cells)
            ]

    if gpu:
        yield table("Milliseconds", names, compared(lambda cell: cell.wall))
        limits = {(k, d): limit(options, rows, k, d) for k, d in results}
        shares = [
            [str(k), str(d), f"{number(1000 * limits[k, d])} ms"]
            + [f"{limits[k, d] / cell.wall:.1%}" for cell in cells]
            for (k, d), cells in results.items()
        ]
        yield table("Share of the limit", ["limit", *names], shares)
        yield (
            f"The limit is the longest of: the matmul in bf16 at {options.tflops:g} TFLOP/s, with d filled up to a "
            f"multiple of 16; 1.5 instructions per pair at {options.tips:g} T/s; reading both once at "
            f"{options.bandwidth:g} TB/s.\n"
        )
    else:
        yield table("Processor time of all threads, milliseconds", names, compared(lambda cell: cell.processor))
        yield table("Wall time, milliseconds", names, compared(lambda cell: cell.wall))
    memory = [
        [str(k), str(d)]
        + ["-" if cell.memory is None else f"{cell.memory / 2**20:.0f}{'*' * cell.scaled}" for cell in cells]
        for (k, d), cells in results.items()
    ]
    yield table("Peak memory besides the inputs, MiB", names, memory)


def limit(options: argparse.Namespace, n: int, k: int, d: int) -> float:
    """Seconds below which no kernel of this kind can get."""
    flops = 2 * n * k * (-(-d // 16) * 16) / (options.tflops * 1e12)
    return max(flops, 1.5 * n * k / (options.tips * 1e12), 4 * (n + k) * d / (options.bandwidth * 1e12))


def table(title: str, names: list[str], rows: Sequence[list[str]] | Iterator[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [["K", "d", *names], ["---:"] * (2 + len(names)), *rows]]
    return f"{title}:\n\n" + "\n".join(lines) + "\n"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
