"""python benchmarks/kernels.py [--device cuda] [--rows N] [--codes K ...] [--widths D ...] [--calls N]

The Triton kernels of cuda/. On a GPU: nearest_code against a matmul with arg-max, vector-quantize-pytorch
and flash-kmeans, where these are installed and their matrix fits, in milliseconds, peak memory and share of what the
GPU could do; softmax_entropy, forward and backward, against dense torch. Without a GPU (--device cpu): the same kernels
compiled ahead of time for an H100, with registers, spilled bytes and instructions for each pair of row and code.
Prints markdown tables.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import math
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

# What the roofline takes an H200 to do in a second; the GPU at hand is compared with the same figures.
TF32 = 395e12  # floating-point operations of tensor cores, half of what was measured for bfloat16
ISSUE = 33.5e12  # instructions of a lane: 132 multiprocessors x 128 lanes x 1.98 GHz
PAIR_INSTRUCTIONS = 1.5
SHARED = 227 * 1024  # bytes that a program of an H100 may have
INTEGERS = {"g", "n", "k", "padded", "width", "tiles", "span", "start", "count"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda, or cpu: ahead of time (default: cuda if there is one)")
    parser.add_argument("--rows", type=int, default=65536, help="(default: 65536)")
    parser.add_argument("--codes", type=int, nargs="+", default=[16384, 65536, 262144], help="codebook sizes")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 64, 256], help="of a code")
    parser.add_argument("--calls", type=int, default=20, help="calls to take the median of (default: 20)")
    options = parser.parse_args(arguments)
    if min(options.rows, options.calls, *options.codes, *options.widths) < 1:
        parser.error("--rows, --calls, --codes and --widths are at least 1")
    if torch.device(options.device).type == "cpu":
        ahead_of_time()
    else:
        on_gpu(options)


# ---- on a GPU ----


def on_gpu(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {options.rows} rows, float32\n")
    heads = ["codes", "width", "method", "ms", "speed-up", "peak MB", "share of roofline", "ids as ours"]
    rows = [row for k in options.codes for d in options.widths for row in lookups(options, k, d)]
    print(table(heads, rows))
    print("\nThe speed-up is over matmul and arg-max, taken in parts of rows where the matrix does not fit.")
    print(f"Roofline: the longer of {TF32 / 1e12:.0f} TFLOP/s of TF32 and {PAIR_INSTRUCTIONS} instructions a pair at")
    print(f"{ISSUE / 1e12:.1f} T/s. Peak memory is beyond rows and codes.\n")
    heads = ["codes", "width", "softmax entropy, forward and backward", "ms", "speed-up", "peak MB"]
    print(table(heads, [row for k in options.codes for d in options.widths for row in entropies(options, k, d)]))


def lookups(options: argparse.Namespace, k: int, d: int) -> Iterator[tuple[Any, ...]]:
    from tokenizers_vis.cuda.ops import nearest_code

    z, codebook = torch.randn(options.rows, d, device=options.device), torch.randn(k, d, device=options.device)
    half = codebook.square().sum(dim=1) / 2
    roof = max(2 * options.rows * k * (d + 3) / TF32, PAIR_INSTRUCTIONS * options.rows * k / ISSUE)
    parts = max(1, math.ceil(options.rows * k * 8 / (torch.cuda.mem_get_info(options.device)[0] / 2)))

    def matmul() -> torch.Tensor:
        return torch.cat([torch.addmm(-half, part, codebook.T).argmax(dim=1) for part in z.chunk(parts)])

    methods: dict[str, Callable[[], torch.Tensor]] = {"matmul, argmax": matmul}
    methods["ours"] = lambda: nearest_code(z, codebook)
    methods |= others(z, codebook)
    ours, base = nearest_code(z, codebook), 0.0
    for name, call in methods.items():
        try:
            seconds, peak = timed(call, options.calls)
        except torch.cuda.OutOfMemoryError:
            yield k, d, name, "out of memory", "", "", "", ""
            continue
        base = base or seconds
        same = (call().flatten() == ours).float().mean().item()
        yield (
            *(k, d, name, f"{1000 * seconds:.3f}", f"{base / seconds:.1f}x", f"{peak / 1e6:.0f}"),
            *(f"{roof / seconds:.0%}", f"{same:.3%}"),
        )


def others(z: torch.Tensor, codebook: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """The other libraries that are installed."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    if importlib.util.find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        k, d = codebook.shape
        vq = VectorQuantize(dim=d, codebook_size=k).to(z.device).eval()
        vq._codebook.embed.data.copy_(codebook[None])
        found["vector-quantize-pytorch"] = torch.no_grad()(lambda: vq(z[None])[1][0])
    if importlib.util.find_spec("flash_kmeans"):
        assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
        # Releases differ in whether they ask for |z|^2.
        asked = {"x_sq": z.square().sum(dim=1)[None]} if "x_sq" in inspect.signature(assign).parameters else {}
        found["flash-kmeans"] = lambda: assign(z[None], codebook[None], **asked)[0].long()
    return found


def entropies(options: argparse.Namespace, k: int, d: int) -> Iterator[tuple[Any, ...]]:
    from tokenizers_vis.cuda.ops import softmax_entropy

    z = torch.randn(options.rows, d, device=options.device, requires_grad=True)
    codebook = torch.randn(k, d, device=options.device, requires_grad=True)

    def dense() -> None:
        log_p = F.log_softmax((z @ codebook.T - codebook.square().sum(dim=1) / 2) * 2, dim=1)
        p = log_p.exp()
        mean = p.mean(dim=0)
        (-(p * log_p).sum(dim=1).mean() + (mean * (mean + 1e-5).log()).sum()).backward()

    def ours() -> None:
        entropy = softmax_entropy(z, codebook, 1.0, eps=1e-5)
        (entropy.sample - entropy.batch).backward()

    F, base = torch.nn.functional, 0.0
    for name, call in (("dense torch", dense), ("ours", ours)):
        try:
            seconds, peak = timed(call, max(1, options.calls // 4))
        except torch.cuda.OutOfMemoryError:
            yield k, d, name, "out of memory", "", ""
            continue
        base = base or (seconds if call is dense else 0.0)
        yield k, d, name, f"{1000 * seconds:.2f}", f"{base / seconds:.1f}x" if base else "", f"{peak / 1e6:.0f}"


def timed(call: Callable[[], object], calls: int) -> tuple[float, int]:
    """Median seconds by the GPU's own clock, and the peak of bytes beyond what was there. The first calls compile."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    seconds = []
    for _ in range(calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds), peak


# ---- without a GPU: compiled ahead of time ----


class Figures(NamedTuple):
    """Of a compiled kernel. pairs: instructions for each pair of row and code in the loop over tiles."""

    registers: int
    spilled: int
    shared: int
    pairs: float


def ahead_of_time() -> None:
    problem = missing_tools()
    if problem:
        raise SystemExit(f"nothing to measure: {problem}")
    import triton

    print(f"Triton {triton.__version__}, compiled for compute capability 9.0\n")
    rows = []
    for name, d in [("_group_maxima", d) for d in (8, 16, 32, 64, 256)] + [("_exact", 8), ("_exact", 64)]:
        rows.append((name, d, *lookup_figures(name, d)))
    for name in ("_row_entropy", "_mean_p", "_row_slopes", "_row_gradients", "_code_gradients"):
        rows += [(name, d, *entropy_figures(name, d)) for d in (8, 32, 64)]
    heads = ["kernel", "width", "registers", "spilled bytes", "shared bytes", "instructions a pair"]
    print(table(heads, [(*row[:-1], f"{row[-1]:.2f}" if row[-1] else "") for row in rows]))


def missing_tools() -> str:
    """Why kernels cannot be compiled and read here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not all(tool(name).is_file() for name in ("cuobjdump", "nvdisasm", "ptxas")):
        return "Triton's NVIDIA tools are not installed"
    from tokenizers_vis.cuda import kernels

    return "TRITON_INTERPRET is set" if kernels.INTERPRETED else ""


def tool(name: str) -> Path:
    return Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name


def lookup_figures(name: str, d: int, capability: int = 90, shared: int = SHARED) -> Figures:
    """A kernel of nearest_code, as it runs for codes of width d."""
    from tokenizers_vis.cuda import kernels

    width, main, tail = kernels.packed_width(d)
    tile = kernels.tile_for(width, shared)
    powers = {"D": 2 ** (d - 1).bit_length(), "W": 2 ** (width - 1).bit_length()}
    packing = {"d": d, "EUCLIDEAN": True, "R": kernels.PACKED, **powers}
    exact = {"Q": kernels.SEEN, "R": kernels.EXACT, "C": kernels.COLUMNS}
    constants = {
        "_pack_codes": packing | {"N": tile["N"]},
        "_pack_rows": packing,
        "_group_maxima": {"D": main, "TAIL": tail, "C": kernels.CHUNK, "M": tile["M"], "N": tile["N"]},
        "_exact": {"d": d, "EUCLIDEAN": True, "G": tile["N"] // 4, **exact},
    }[name]
    options = {
        "_group_maxima": {key: value for key, value in tile.items() if key.startswith("num_")},
        "_exact": {"num_warps": 1},
    }.get(name, {})
    chunks = 1 if main else width // kernels.CHUNK
    return compiled(name, constants, options, chunks if name == "_group_maxima" else 0, capability)


def entropy_figures(name: str, d: int, capability: int = 90) -> Figures:
    """A kernel of softmax_entropy, as it runs for codes of width d."""
    from tokenizers_vis.cuda import entropy_kernels

    shape = entropy_kernels.entropy_shape(d)
    constants = {key: value for key, value in shape.items() if not key.startswith(("num_", "enable_"))}
    options = {key: value for key, value in shape.items() if key.startswith("num_")}
    return compiled(name, constants, options, 1, capability)


def compiled(name: str, constants: dict[str, Any], options: dict[str, int], chunks: int, capability: int) -> Figures:
    """chunks: how often the innermost loop runs for a tile; 0 to count nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenizers_vis.cuda import entropy_kernels, kernels

    function = getattr(kernels, name, None) or getattr(entropy_kernels, name)
    kinds = {"ids": "*i64"} | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "*fp32") for argument in function.arg_names}
    aligned = [i for i, (key, kind) in enumerate(signature.items()) if kind.startswith("*") or key == "width"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | kernels.OPTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        binary = Path(scratch) / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        usage, listing = (
            subprocess.run([tool(program), flag, binary], capture_output=True, text=True, check=True).stdout
            for program, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    spilled = stack + local + len(re.findall(r"\b(?:STL|LDL)\b", listing))
    per_thread = constants.get("M", 0) * constants.get("N", 0) / (32 * options.get("num_warps", 4))
    pairs = loop_instructions(listing, chunks) / per_thread if chunks and per_thread else 0.0
    return Figures(registers, spilled, result.metadata.shared, pairs)


def loop_instructions(listing: str, chunks: int) -> int:
    """Instructions that one turn of the longest loop takes, its inner loop counted ``chunks`` times."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", instruction)
        if target and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end + 1))
    if not loops:
        return 0
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = [b - a for a, b in loops if start <= a and b <= end and (a, b) != (start, end)]
    return end - start + (chunks - 1) * max(inner, default=0)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; numbers stand right."""
    rule = ["---:"] * len(heads)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (heads, rule, *rows))


if __name__ == "__main__":
    main()
