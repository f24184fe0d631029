"""A whole training step of a quantizer, forward, backward and moving average, against vector-quantize-pytorch.

    python benchmarks/training_step.py [--out FILE] [--codes 8192 65536] [--dims 8 16 64 256]

Both are EMA codebooks with straight-through gradients on the same vectors and the same start. Each cell runs in its own
process. CPU ms: processor time over all threads, the median of the repetitions. Memory: what it took beyond
what it held after the first, smallest step. Ours runs twice: in plain torch, and with the C++ kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import track

METHODS = ("vector-quantize-pytorch", "ours, plain torch", "ours, C++ kernel")
ROWS = {
    8192: 8192,
    65536: 2048,
}  # vectors of a step: at 65,536 codes the library's matrix for 8,192 of them takes 12 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        method, codes, dim = args.cell
        print(json.dumps(measure(method, int(codes), int(dim), args.repeats, args.threads)))
        return
    cells = [(codes, dim) for codes in args.codes for dim in args.dims]
    results = {}
    for codes, dim, method in track([(*cell, method) for cell in cells for method in METHODS], "Measuring"):
        results[codes, dim, method] = in_a_process(method, codes, dim, args)
    text = table(cells, results, args.threads)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def in_a_process(method: str, codes: int, dim: int, args: argparse.Namespace) -> dict[str, float]:
    options = ["--repeats", str(args.repeats), "--threads", str(args.threads)]
    command = [sys.executable, __file__, *options, "--cell", method, str(codes), str(dim)]
    native = {"TOKENIZERS_VIS_NATIVE": "0"} if method == "ours, plain torch" else {}
    # Threads that wait for work would otherwise burn processor time that nobody uses.
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"} | native
    )
    if done.returncode:
        raise SystemExit(f"{method} at K = {codes}, d = {dim} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(method: str, codes: int, dim: int, repeats: int, threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    start = torch.randn(codes, dim)
    if method == METHODS[0]:
        from vector_quantize_pytorch import VectorQuantize

        module = VectorQuantize(dim=dim, codebook_size=codes, decay=0.99, rotation_trick=False, commitment_weight=0.25)
        book = module._codebook
        book.embed.data.copy_(start[None])
        book.embed_avg.data.copy_(start[None])
    else:
        from tokenizers_vis.quantizers.vq import VQ

        module = VQ(dim=dim, codebook_size=codes, update="ema")
        module.codebook.copy_(start)
        module.sums.copy_(start)
    module.train()

    def step(z: torch.Tensor) -> None:
        z.grad = None
        result = module(z)
        codes_out, loss = (result[0], result[2]) if method == METHODS[0] else (result.codes, result.loss)
        (codes_out.sum() + loss.sum()).backward()

    step(torch.randn(1, 4, dim, requires_grad=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    z = torch.randn(1, ROWS.get(codes, 8192), dim, requires_grad=True)
    step(z)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    cpu, wall = [], []
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        step(z)
        cpu.append(1000 * (time.process_time() - began_cpu))
        wall.append(1000 * (time.perf_counter() - began))
    unit = 1024 if sys.platform != "darwin" else 1024**2
    return {"cpu": statistics.median(cpu), "wall": statistics.median(wall), "memory": peak / unit}


def table(cells: list[tuple[int, int]], results: dict, threads: int) -> str:
    import torch

    heads = "".join(
        f" {method}: CPU ms | MB |" + (" times faster |" if method != METHODS[0] else "") for method in METHODS
    )
    lines = [f"| codes | width | vectors |{heads}", "|---:" * (3 + 2 * len(METHODS) + 2) + "|"]
    for codes, dim in cells:
        base = results[codes, dim, METHODS[0]]["cpu"]
        row = f"| {codes:,} | {dim} | {ROWS.get(codes, 8192):,} |"
        for method in METHODS:
            found = results[codes, dim, method]
            row += f" {found['cpu']:.1f} | {found['memory']:.0f} |"
            row += f" {base / found['cpu']:.1f} |" if method != METHODS[0] else ""
        lines.append(row)
    lines += ["", f"{platform.machine()}, {threads} threads, torch {torch.__version__}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
