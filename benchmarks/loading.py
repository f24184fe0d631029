"""How many training images a second are read, decoded and cropped: ours, torchvision's ImageFolder, webdataset. Linux.

    python benchmarks/loading.py --data 'photos/train-{0..2}.tar' [--size 64] [--out FILE]

All three crop at random (0.6 to 1 of the area, aspect 3/4 to 4/3, bicubic) and mirror half of the images; batches are
uint8. ImageFolder reads the same files unpacked. Each cell runs in its own process, the repetitions of all cells by
turns. Where others use the machine too, images a second by the clock say little; those by processor time, over all
processes of the cell, say what one core does that has nothing else to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import track

METHODS = ("ours", "ImageFolder", "webdataset")
CROP = (0.6, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images, as tokenizers-vis train takes them")
    parser.add_argument("--size", type=int, default=64, help="side of a training image")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--batches", type=int, default=60, help="of one measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        method, workers, folder = args.cell
        print(json.dumps(measure(method, int(workers), folder, args)))
        return
    methods = [method for method in METHODS if method != "webdataset" or (find_spec(method) and ".tar" in args.data)]
    cells = [(method, workers) for method in methods for workers in args.workers]
    found: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.data, Path(folder) / "images")
        for method, workers in track(cells * args.repeats, "Measuring"):
            found[method, workers].append(in_a_process(method, workers, folder, args))
    text = table(found, args)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def unpack(data: str, folder: Path) -> None:
    from tokenizers_vis.sources import open_source

    source = open_source(data)
    folder.mkdir(parents=True)
    for i in range(len(source)):
        (folder / f"{i:07d}{Path(source.names[i]).suffix}").write_bytes(source.read(i))


def in_a_process(method: str, workers: int, folder: str, args: argparse.Namespace) -> dict[str, float]:
    options = [f"--{key}={getattr(args, key.replace('-', '_'))}" for key in ("data", "size", "batch-size", "batches")]
    command = [sys.executable, __file__, *options, "--cell", method, str(workers), folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{method} with {workers} workers failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(method: str, workers: int, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Images a second, from the fourth batch on, by the clock and by processor time."""
    import torch

    torch.set_num_threads(1)
    start = {"ours": ours, "ImageFolder": image_folder, "webdataset": web_dataset}[method]
    batches, close = start(args, workers, folder)
    for _ in range(3):
        next(batches)
    began, before = time.perf_counter(), processor_time()
    for images in itertools.islice(batches, args.batches):
        assert tuple(images.shape) == (args.batch_size, 3, args.size, args.size) and images.dtype == torch.uint8
    clock, busy = time.perf_counter() - began, processor_time() - before
    close()
    images = args.batches * args.batch_size
    return {"clock": images / clock, "processor": images / busy}


def processor_time() -> float:
    """Seconds that this process and its children, the workers, have computed for; of the children to 1/100 s."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    # After the program's name, which is in brackets, fields 14 and 15 of the line count ticks in user and system mode.
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children]
    ticks = sum(int(one[11]) + int(one[12]) for one in fields)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


Start = tuple[Iterator[Any], Callable[[], None]]


def ours(args: argparse.Namespace, workers: int, _: str) -> Start:
    from tokenizers_vis.sources import open_source
    from tokenizers_vis.train.data import TrainBatches

    source = open_source(args.data)
    size = {"image_size": args.size, "batch_size": args.batch_size}
    batches = TrainBatches(source, **size, seed=0, crop=CROP, flip=0.5, workers=workers)
    return (batch[0] for batch in batches), batches.close


def transform(size: int) -> Callable[[Any], Any]:
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(size, CROP, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def image_folder(args: argparse.Namespace, workers: int, folder: str) -> Start:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(folder, transform(args.size))
    ahead = {"prefetch_factor": 4} if workers else {}
    loader = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=workers, drop_last=True, **ahead)
    return endless(loader)


def web_dataset(args: argparse.Namespace, workers: int, _: str) -> Start:
    import torch
    import webdataset

    change = transform(args.size)
    dataset = webdataset.WebDataset(args.data, shardshuffle=100, nodesplitter=None, empty_check=False)
    dataset = dataset.shuffle(1000).decode("pil").to_tuple("jpg;jpeg;png;webp").map(lambda sample: change(sample[0]))
    batched = dataset.batched(args.batch_size, partial=False, collation_fn=torch.stack)
    ahead = {"prefetch_factor": 4} if workers else {}
    return endless(torch.utils.data.DataLoader(batched, batch_size=None, num_workers=workers, **ahead))


def endless(loader: Any) -> Start:
    running: list[Any] = [iter(loader)]

    def batches() -> Iterator[Any]:
        while True:
            for batch in running[0]:
                yield batch if not isinstance(batch, list) else batch[0]
            running[0] = iter(loader)

    def close() -> None:
        stop = getattr(running[0], "_shutdown_workers", None)
        if stop:
            stop()

    return batches(), close


def table(found: dict[tuple[str, int], list[dict[str, float]]], args: argparse.Namespace) -> str:
    lines = [
        f"{args.size} px, batches of {args.batch_size}; medians of {args.repeats} x {args.batches} batches",
        "",
        "| | workers | images/s by the clock | images/s of processor time |",
        "|---|---:|---:|---:|",
    ]
    for (method, workers), runs in found.items():
        clock, processor = (statistics.median(run[key] for run in runs) for key in ("clock", "processor"))
        lines.append(f"| {method} | {workers} | {clock:,.0f} | {processor:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
