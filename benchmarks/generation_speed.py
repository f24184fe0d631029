"""python benchmarks/generation_speed.py [--original LlamaGen] [--batches 1 16] [--threads N] [--device cpu]

Tokens a second of class-conditional sampling with guidance (conditional and unconditional rows together), of an
untrained model of a given size: with the cache, without it (the whole prefix again for each token), level by level,
and, with --original, LlamaGen's own sampling code on its own model of the same width, depth, heads and MLP:

    git clone https://github.com/FoundationVision/LlamaGen

Each round calls every variant once, so that a busy machine is busy for all of them; numbers are medians over the
rounds, of the time on the clock and, on a CPU, of processor time. Temperature 1, no top_k or top_p, guidance 4 for all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tokenizers_vis.generator import Generator
from tokenizers_vis.presets import usable_device

CLASSES, GUIDANCE = 1000, 4.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="a checkout of FoundationVision/LlamaGen")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images at a time (default: 1 16)")
    parser.add_argument(
        "--tokens", type=int, default=64, help="of an image, a power of 4 where the original runs too (default: 64)"
    )
    parser.add_argument("--ids", type=int, default=4096, help="size of the codebook (default: 4096)")
    parser.add_argument("--width", type=int, default=256, help="default: 256")
    parser.add_argument("--depth", type=int, default=6, help="default: 6")
    parser.add_argument("--heads", type=int, default=4, help="default: 4")
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--device", help="default: the best at hand")
    options = parser.parse_args(arguments)
    numbers = (options.tokens, options.ids, options.rounds, options.threads, *options.batches)
    if min(numbers) < 1 or options.tokens & (options.tokens - 1):
        parser.error("all numbers are at least 1, and --tokens is a power of two")
    torch.set_num_threads(options.threads)
    device = usable_device(options.device)
    variants = {
        "with the cache": cached(options, device),
        "without a cache": uncached(options, device),
        "levels 1, 1, 2, 4 ...": levels(options, device),
    }
    if options.original:
        variants["LlamaGen's code"] = llamagen(options, device)
    print(f"{platform.machine()}, {device}, threads: {options.threads}, torch {torch.__version__}; width "
          f"{options.width}, depth {options.depth}, {options.tokens} tokens of {options.ids} ids\n")  # fmt: skip
    print("| batch | | tokens/s | s | CPU s |\n| --- | --- | --- | --- | --- |")
    for batch in options.batches:
        labels = torch.arange(batch, device=device) % CLASSES
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for variant in variants.values():
            variant(labels)  # the first call fills caches
        for _ in track(range(options.rounds), f"batch {batch}", console=Console(stderr=True)):
            for name, variant in variants.items():
                times[name].append(timed(partial(variant, labels), device))
        for name, pairs in times.items():
            wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"| {batch} | {name} | {batch * options.tokens / wall:.0f} | {wall:.3f} | {cpu:.3f} |")


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds on the clock, and of all processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def build(options: argparse.Namespace, device: torch.device, **model: object) -> Generator:
    # LlamaGen rounds the hidden width of its MLP, 8/3 of the width, up to a multiple of 256.
    hidden = -(-int(options.width * 8 / 3) // 256) * 256
    backbone = {"width": options.width, "depth": options.depth, "heads": options.heads}
    config = {
        "name": "untrained",
        "tokenizer": "",
        "hash": "",
        "codebook_sizes": [options.ids],
        "nested": True,
        "max_tokens": options.tokens,
        "classes": CLASSES,
        "class_names": [],
        "model": {"backbone": {**backbone, "mlp_ratio": hidden / options.width}, **model},
    }
    torch.manual_seed(0)
    return Generator.from_config(config).eval().requires_grad_(False).to(device)


def cached(options: argparse.Namespace, device: torch.device) -> Callable[[Tensor], object]:
    gen = build(options, device, kind="causal")
    return lambda labels: gen.sample(labels, guidance=GUIDANCE, batch_size=len(labels))


def levels(options: argparse.Namespace, device: torch.device) -> Callable[[Tensor], object]:
    sizes = [1, *(2**i for i in range(options.tokens.bit_length() - 1))]
    gen = build(options, device, kind="levels", levels=sizes)
    return lambda labels: gen.sample(labels, guidance=GUIDANCE, batch_size=len(labels))


def uncached(options: argparse.Namespace, device: torch.device) -> Callable[[Tensor], object]:
    """The model of ``cached``, over the whole prefix for each token."""
    model = build(options, device, kind="causal").model

    @torch.no_grad()
    def sample(labels: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, CLASSES)])
        stream = torch.zeros(len(labels), 0, 1, dtype=torch.int64, device=device)
        for place in range(options.tokens):
            x = torch.cat([model.prompt(both), model.read(stream.repeat(2, 1, 1), 0)], dim=1)
            hidden = model.backbone(x, torch.arange(place + 1, device=device))[:, -1:]
            at = torch.tensor([place], device=device)
            conditional, unconditional = model.codes.logits(hidden, at).float().chunk(2)
            logits = unconditional + GUIDANCE * (conditional - unconditional)
            drawn = torch.multinomial(logits[:, 0].softmax(dim=-1), 1)
            stream = torch.cat([stream, drawn[:, None]], dim=1)
        return stream

    return sample


def llamagen(options: argparse.Namespace, device: torch.device) -> Callable[[Tensor], object]:
    """Its own generate on its own model, untrained."""
    sys.path.insert(0, str(options.original))
    try:
        from autoregressive.models.generate import generate
        from autoregressive.models.gpt import ModelArgs, Transformer
    except ImportError as error:
        raise SystemExit(f"{options.original} is no checkout of FoundationVision/LlamaGen: {error}") from error
    if not hasattr(torch.backends.cuda, "sdp_kernel"):
        # Gone from torch since; it chose how attention is computed on a GPU.
        torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()
    args = ModelArgs(
        dim=options.width,
        n_layer=options.depth,
        n_head=options.heads,
        vocab_size=options.ids,
        num_classes=CLASSES,
        block_size=options.tokens,
        cls_token_num=1,
    )
    torch.manual_seed(0)
    model = Transformer(args).to(device).eval()
    return lambda labels: generate(
        model, labels, options.tokens, cfg_scale=GUIDANCE, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0
    )


if __name__ == "__main__":
    main()
