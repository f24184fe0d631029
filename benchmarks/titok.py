"""TiTok-S-128 at 256 px against its authors' code: the same random weights, encode and decode, in one process.

    git clone https://github.com/bytedance/1d-tokenizer
    python benchmarks/titok.py --original 1d-tokenizer [--threads N] [--rounds 9] [--batches 1 8]

The authors' code needs omegaconf and accelerate. Ours runs in float32 and in bfloat16 (the lookup of codes stays in
float32). Each round calls every variant once, so that a busy machine is busy for all of them; numbers are medians over
the rounds, of the time on the clock and of the processor time over all threads. The ids that bfloat16 changes are
counted on the photographs of this package; the authors' ids and pictures are compared with ours in float32.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import tokenizers_vis as tv
from tokenizers_vis.catalogue import preset
from tokenizers_vis.convert import convert
from tokenizers_vis.images import load_images
from tokenizers_vis.tokenizer import Tokenizer

NAME = "titok-s-128"
PHOTOS = sorted((Path(tv.__file__).parent / "photos").glob("*.jpg"))
VARIANTS = ("original", "ours float32", "ours bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="a checkout of bytedance/1d-tokenizer")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--rounds", type=int, default=9, help="to take the median of (default: 9)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    options = parser.parse_args()
    if min(options.threads, options.rounds, *options.batches) < 1:
        parser.error("--threads, --rounds and --batches are at least 1")
    torch.set_num_threads(options.threads)
    official = preset(NAME)["official"]
    original = the_original(options.original, official)
    exact = ours(original, official)
    rough = copy.deepcopy(exact)
    for part in (rough.canvas, rough.encoder, rough.decoder):
        part.to(torch.bfloat16)

    rows = []
    for batch in options.batches:
        images = photographs(batch)
        ids, tokens = original.encode(images)[1]["min_encoding_indices"], exact.encode(images)
        tasks = {
            "encode": [partial(model.encode, images) for model in (original, exact, rough)],
            "decode": [
                partial(original.decode_tokens, ids),
                partial(exact.decode, tokens),
                partial(rough.decode, tokens),
            ],
        }
        for task, calls in tasks.items():
            times = interleaved(calls, options.rounds, f"{task}, batch {batch}")
            for clock, medians in zip(("wall", "processor"), times, strict=True):
                first, *others = medians
                found = [f"{1000 * median:.0f} ms ({first / median:.2f}x)" for median in others]
                rows.append((f"{task}, batch {batch}, {clock} time", f"{1000 * first:.0f} ms", *found))
    print(f"{platform.processor() or platform.machine()}, threads: {options.threads}, torch {torch.__version__}\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in (("", *VARIANTS), ("---", *["---:"] * 3), *rows)))
    print(f"\n{agreement(original, exact, rough)}")


def the_original(checkout: Path, official: dict[str, Any]) -> Any:
    """Their model at full size; every weight random, also those that start at zero or one."""
    sys.path.insert(0, str(checkout))
    try:
        from modeling.titok import TiTok
    except ImportError as error:
        raise SystemExit(
            f"{checkout} cannot be imported ({error}); --original is a checkout of "
            f"https://github.com/bytedance/1d-tokenizer, and needs omegaconf and accelerate"
        ) from error
    torch.manual_seed(0)
    model = TiTok(official).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
        elif "quantize" in name or "token" in name or name.endswith("embedding"):
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def ours(original: Any, official: dict[str, Any]) -> Tokenizer:
    converted = convert("titok", official, original.state_dict())
    return Tokenizer.from_state({"name": NAME, **converted.config}, converted.state, "the original").eval()


def photographs(count: int) -> torch.Tensor:
    """count 3 256 256, in [0, 1]: the bundled photographs, turned over where there are more."""
    photos = torch.stack(load_images(PHOTOS)).float() / 255
    turned = torch.cat([photos, photos.flip(-1), photos.flip(-2), photos.flip(-1, -2)])
    return turned[torch.arange(count) % len(turned)].contiguous()


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int, what: str) -> tuple[list[float], list[float]]:
    """Seconds on the clock and of the processor, each a median for each call; a first round warms up."""
    wall: list[list[float]] = [[] for _ in calls]
    processor: list[list[float]] = [[] for _ in calls]
    for turn in track(range(rounds + 1), what, disable=not sys.stderr.isatty()):
        for i, call in enumerate(calls):
            clock, spent = time.perf_counter(), time.process_time()
            call()
            if turn:
                wall[i].append(time.perf_counter() - clock)
                processor[i].append(time.process_time() - spent)
    return [statistics.median(times) for times in wall], [statistics.median(times) for times in processor]


def agreement(original: Any, exact: Tokenizer, rough: Tokenizer) -> str:
    images = photographs(4 * len(PHOTOS))
    theirs = torch.cat([original.encode(image[None])[1]["min_encoding_indices"] for image in images])[:, 0]
    found, rounded = exact.encode(images), rough.encode(images)
    few = found[:2]
    changed = (found.ids != rounded.ids).float().mean().item()
    picture = (exact.decode(few) - original.decode_tokens(few.ids[:, None, :, 0]).clamp(0, 1)).abs().max().item()
    return (
        f"Of {theirs.numel()} ids, ours in float32 and the original's differ in "
        f"{int((found.ids[..., 0] != theirs).sum())}; bfloat16 changes {changed:.1%}. "
        f"Pictures in float32 differ by at most {picture:.1e}."
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
