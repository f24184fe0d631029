"""python benchmarks/speed.py [--threads N] [--tokenizer TOKENIZER] [--device cpu]

What a user waits for and what it takes: importing, the command line's help, encoding and decoding one photograph, and
the peak memory of encoding folders of 10, 100 and 1,000 photographs, which must not grow with their number. Prints
markdown tables. For Linux and macOS.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

# Nothing here imports torch before the memory is measured: a process's peak starts at that of the one it came from.
import tokenizers_vis as tv

PHOTOS = sorted((Path(tv.__file__).parent / "photos").glob("*.jpg"))

# The command line in a fresh process; the last line says its peak memory, in kilobytes on Linux and bytes on macOS.
ENCODE = """
import resource, sys
from tokenizers_vis.cli import main
try:
    main(["encode", *sys.argv[1:]])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="mini", help="preset, checkpoint file or run folder (default: mini)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--device", default="cpu", help="where to encode and decode (default: cpu)")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000], help="photographs in the folders")
    parser.add_argument("--starts", type=int, default=5, help="fresh processes to take the median of (default: 5)")
    parser.add_argument("--calls", type=int, default=20, help="calls to take the median of (default: 20)")
    options = parser.parse_args(arguments)
    if min(options.threads, options.starts, options.calls, *options.counts) < 1:
        parser.error("--threads, --counts, --starts and --calls are at least 1")
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}

    commands = {
        "`python -c pass`": ["-c", "pass"],
        "`import tokenizers_vis`": ["-c", "import tokenizers_vis"],
        "`import tokenizers_vis as tv; tv.load`": ["-c", "import tokenizers_vis as tv; tv.load"],
        "`tokenizers-vis --help`": ["-m", "tokenizers_vis.cli", "--help"],
    }
    times = [
        (what, median(options.starts, lambda command=command: python(command, environment)))
        for what, command in shown(commands.items(), "starting", len(commands))
    ]
    memory = list(folders(options, environment))
    times += one_photo(options)

    import torch

    print(f"{cpu()}, threads: {options.threads}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print(table(["", "time"], [(what, f"{1000 * seconds:.1f} ms") for what, seconds in times]))
    print(f"\nThe first four: fresh processes, median of {options.starts}. The others: median of {options.calls} calls")
    print(f"with {options.tokenizer} on {options.device}, from a JPEG file of 256 x 256 and back to pixels.\n")
    rows = [(count, f"{peak / 2**20:.0f} MiB", f"{seconds:.1f} s") for count, peak, seconds in memory]
    print(table(["`tokenizers-vis encode`, photographs of 640 x 480", "peak memory", "time, start included"], rows))


def folders(options: argparse.Namespace, environment: dict[str, str]) -> Iterator[tuple[int, int, float]]:
    """For each count: the photographs, the peak memory in bytes and the seconds of encoding a folder of them."""
    settings = ["--tokenizer", options.tokenizer, "--device", options.device]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photographs"
        folder.mkdir()
        done = 0
        for count in sorted(options.counts):
            for i in shown(range(done, count), f"making {count} photographs", count - done):
                photograph(i).save(folder / f"{i:06d}.jpg", quality=90)
            done = count
            out = Path(scratch) / f"tokens-{count}"
            start = time.perf_counter()
            printed = python(["-c", ENCODE, str(folder), "--out", str(out), *settings], environment)
            seconds = time.perf_counter() - start
            yield count, int(printed.split()[-1]) * (1 if sys.platform == "darwin" else 1024), seconds


def photograph(i: int) -> Image.Image:
    """640 x 480: a part of a bundled photograph, every one another."""
    choice = random.Random(i)
    with Image.open(PHOTOS[i % len(PHOTOS)]) as photo:
        width = choice.uniform(0.5, 1) * photo.width
        height = width * 3 / 4
        left, top = choice.uniform(0, photo.width - width), choice.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        return photo.resize((640, 480), Image.Resampling.BICUBIC, box=box)


def one_photo(options: argparse.Namespace) -> list[tuple[str, float]]:
    """The seconds of encoding and of decoding one photograph, all tokens."""
    import torch

    torch.set_num_threads(options.threads)
    tok = tv.load(options.tokenizer, options.device)
    tokens = tok.encode(PHOTOS[0])
    # .cpu() waits until the device is done.
    return [
        (f"encode one photograph, {tok.max_tokens} tokens", median(options.calls, lambda: tok.encode(PHOTOS[0]).cpu())),
        (f"decode one photograph, {tok.max_tokens} tokens", median(options.calls, lambda: tok.decode(tokens).cpu())),
    ]


def python(arguments: list[str], environment: dict[str, str]) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def median(count: int, call: Callable[[], object]) -> float:
    """Seconds. The first call, which fills caches, does not count."""
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def shown(items: Any, what: str, total: int) -> Iterator[Any]:
    yield from track(items, what, total=total, console=Console(stderr=True))


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; the first column is texts, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (heads, rule, *rows))


if __name__ == "__main__":
    main()
