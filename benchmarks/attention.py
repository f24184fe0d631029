"""Attention in training on a CPU in bfloat16: written out as matrix products against PyTorch's fused kernel.

    python benchmarks/attention.py [--threads 1]

Forward and backward, milliseconds, the least of the repetitions, which alternate; one row for each batch and sequence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.decoders.transformer import attend
from tokenizers_vis.encoders.flextok import causal_last

SHAPES = [(48, 80, 4), (48, 128, 4), (48, 192, 4), (16, 256, 6)]  # batch, places, heads of 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| batch | places | mask | fused ms | written out ms | ratio |\n|---|---|---|---|---|---|")
    for b, n, heads in SHAPES:
        q, k, v = (torch.randn(b, heads, n, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        for name, mask in (("none", None), ("causal registers", causal_last(n // 2, n - n // 2))):
            fused, ours = least(args.repeats, F.scaled_dot_product_attention, attend, (q, k, v, mask))
            print(f"| {b} | {n} | {name} | {fused:.0f} | {ours:.0f} | {fused / ours:.2f} |")


def least(repeats: int, fused: Callable[..., Tensor], ours: Callable[..., Tensor], given: tuple) -> tuple[float, float]:
    """Milliseconds of both, forward and backward."""
    calls = (lambda: fused(*given), lambda: ours(*given, None))
    found: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for times, call in zip(found, calls, strict=True):
            start = time.perf_counter()
            call().sum().backward()
            if turn:  # the first one warms up
                times.append(1e3 * (time.perf_counter() - start))
    return min(found[0]), min(found[1])


if __name__ == "__main__":
    main()
