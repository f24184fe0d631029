"""The entropy loss of binary codes, forward and backward, against vector-quantize-pytorch.

    python benchmarks/entropy.py [--out FILE] [--bits 14 14 18 18 24] [--rows 256 8192 256 8192 2048]

LFQ in training, with its defaults, on z so near to zero that the bits' log-odds are standard normal. Each cell runs in
a process of its own. CPU ms: processor time over all threads, the median of the repetitions. Memory: what the process
took beyond what it held after a first, tiny step. Errors are those of the batch entropy (nats) and of its gradient
(share of the largest derivative) against a float64 table of all codes, where rows x codes are at most --exact. The
library is left out where its tables would not fit into the memory that is free. For Linux.
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
from typing import Any

from rich.progress import track

METHODS = ("vector-quantize-pytorch", "ours")
TEMPERATURE = 0.01
LIBRARY_BYTES = 28  # per row and code: seven float32 tables at its peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[14, 14, 18, 18, 24], help="of a code, one per measurement"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 8192, 256, 8192, 2048], help="as many as --bits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--exact", type=int, default=2**26, help="the largest table that errors are measured by")
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.bits) != len(args.rows) or min(*args.bits, *args.rows, args.repeats, args.threads) < 1:
        parser.error("--bits and --rows are as many as each other; they, --repeats and --threads are 1 or more")
    if args.cell:
        method, bits, rows = args.cell
        print(json.dumps(measure(method, int(bits), int(rows), args)))
        return
    cells = [(bits, rows, method) for bits, rows in zip(args.bits, args.rows, strict=True) for method in METHODS]
    lines = [(*cell, in_a_process(*cell, args)) for cell in track(cells, "Measuring")]
    text = table(lines, args.threads)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def in_a_process(bits: int, rows: int, method: str, args: argparse.Namespace) -> dict[str, Any]:
    needed = LIBRARY_BYTES * rows << bits
    if method == METHODS[0] and needed > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return {"refused": f"would take {needed / 2**30:,.0f} GB"}
    options = ["--repeats", str(args.repeats), "--threads", str(args.threads), "--exact", str(args.exact)]
    command = [sys.executable, __file__, *options, "--cell", method, str(bits), str(rows)]
    # Threads that wait for work would otherwise burn processor time that nobody uses.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode:
        raise SystemExit(f"{method} with {bits} bits and {rows} rows failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(method: str, bits: int, rows: int, args: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step(make(method, 2), torch.randn(1, 8, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    z = TEMPERATURE / 4 * torch.randn(1, rows, bits)
    module = make(method, bits)
    times = []
    for _ in range(args.repeats):
        start = time.process_time()
        step(module, z)
        times.append(time.process_time() - start)
    result = {
        "milliseconds": 1000 * statistics.median(times),
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }
    if rows << bits <= args.exact:
        entropy, gradient = by_table(z[0].double())
        ours, slope = batch_entropy(method, module, z)
        result["entropy"] = abs(ours - entropy)
        result["gradient"] = ((slope[0].double() - gradient).abs().max() / gradient.abs().max()).item()
    return result


def make(method: str, bits: int) -> Any:
    if method == METHODS[0]:
        from vector_quantize_pytorch import LFQ

        return LFQ(dim=bits, codebook_size=2**bits).train()
    from tokenizers_vis.quantizers.lfq import LFQ

    return LFQ(bits=bits, commitment=0.0).train()


def step(module: Any, z: Any) -> None:
    """One training step: both give the codes, the ids and the loss, in this order."""
    z = z.clone().requires_grad_()
    codes, _, loss, *_ = module(z)
    (codes.sum() + loss).backward()


def batch_entropy(method: str, module: Any, z: Any) -> tuple[float, Any]:
    """The batch entropy and its gradient by z."""
    import torch

    z = z.clone().requires_grad_()
    if method == METHODS[0]:
        value = module(z, return_loss_breakdown=True)[1].batch_entropy
    else:
        from tokenizers_vis.cuda.binary import batch_entropy as of_logits

        value = of_logits(4 / TEMPERATURE * z[0])
    return value.item(), torch.autograd.grad(value, z)[0]


def by_table(z: Any) -> tuple[float, Any]:
    """The batch entropy of z, n d, over a table of all codes, some rows at a time; and its gradient."""
    import torch

    n, d = z.shape
    codes = 2.0 * (torch.arange(2**d)[:, None] >> torch.arange(d) & 1) - 1
    codes = codes.to(z.dtype)
    blocks = z.split(max(1, 2**22 >> d))
    average = sum((2 / TEMPERATURE * block @ codes.T).softmax(dim=1).sum(dim=0) for block in blocks) / n
    slope = -average.log()
    gradients = []
    for block in blocks:
        block = block.clone().requires_grad_()
        probabilities = (2 / TEMPERATURE * block @ codes.T).softmax(dim=1)
        gradients.append(torch.autograd.grad((probabilities @ slope).sum() / n, block)[0])
    return -(average * average.log()).sum().item(), torch.cat(gradients)


def table(lines: list[tuple[int, int, str, dict[str, Any]]], threads: int) -> str:
    import torch

    head = ["codes", "rows", "", "CPU ms", "memory", "error of the entropy", "of its gradient"]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for bits, rows, method, result in lines:
        cells = [f"2^{bits}", f"{rows:,}", method]
        if "refused" in result:
            cells += ["-", result["refused"], "-", "-"]
        else:
            cells += [f"{result['milliseconds']:,.1f}", f"{result['megabytes']:,.0f} MB"]
            cells += [f"{result[name]:.1e}" if name in result else "-" for name in ("entropy", "gradient")]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{platform.machine()}, threads: {threads}, torch {torch.__version__}", "", *text])


if __name__ == "__main__":
    main()
