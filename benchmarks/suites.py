"""python benchmarks/suites.py --text FOLDER --faces FOLDER [--method mini] [--out FOLDER]

How long the suites of text and faces take on the CPU, and how much memory beyond their models: reconstruct, read or
recognise every word and face, make the tables. FOLDERs are what ``tokenizers-vis eval`` takes as --text and --faces.
The models are loaded before the clock starts. Give a quiet machine, or read the processor's time in place of the
clock's; on one that is not Linux no memory is measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenizers_vis.eval.benchmark import Shard, Task, run, total
from tokenizers_vis.eval.face import FaceFidelity, freeze, open_faces
from tokenizers_vis.eval.face_recognisers import face_recogniser
from tokenizers_vis.eval.judges import BoxJudge
from tokenizers_vis.eval.memory import peak_memory
from tokenizers_vis.eval.method import Method
from tokenizers_vis.eval.methods import parse_methods
from tokenizers_vis.eval.suites import Boxed
from tokenizers_vis.eval.summary import summarise
from tokenizers_vis.eval.tables import summary
from tokenizers_vis.eval.text import TextFidelity, open_text
from tokenizers_vis.eval.text_recognisers import text_recogniser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="pictures with annotated words")
    parser.add_argument("--faces", type=Path, metavar="FOLDER", help="pictures with annotated faces")
    parser.add_argument("--method", default="mini", help="what reconstructs (default: mini)")
    parser.add_argument("--size", type=int, default=256, help="side of the square (default: 256)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1); the recognisers have one each")
    parser.add_argument("--out", type=Path, help="where the rows are kept (default: nowhere)")
    options = parser.parse_args(arguments)
    if options.text is None and options.faces is None:
        parser.error("there is nothing to time: give --text, --faces or both")
    torch.set_num_threads(options.threads)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            measure(options, options.out or Path(scratch))
    except ValueError as error:
        parser.error(str(error))


def measure(options: argparse.Namespace, out: Path) -> None:
    methods = parse_methods([options.method], device="cpu")
    tasks = [
        loaded(kind, folder, options.size, methods)
        for kind, folder in (("text", options.text), ("faces", options.faces))
        if folder
    ]
    found = [timed(methods, task, out) for task in tasks]
    rows = [one.row for one in found]
    rows.append(("together", *(sum(row[k] for row in rows) for k in (1, 2, 3)), max(row[4] for row in rows)))
    print("| suite | instances | seconds | processor seconds | peak MB beyond the models |\n|---|---:|---:|---:|---:|")
    for name, instances, wall, cpu, peak in rows:
        print(f"| {name} | {instances} | {wall:.1f} | {cpu:.1f} | {'not measured' if peak < 0 else f'{peak:.0f}'} |")
    print(f"\n{options.method}, torch {torch.__version__}, threads: {options.threads}\n")
    print("\n\n".join(summary(one.results) for one in found))


def loaded(kind: str, folder: Path, size: int, methods: Sequence[Method]) -> Task:
    """A suite, its models in memory: each has seen the first picture."""
    if kind == "text":
        suite, judge = Boxed(open_text(folder), size), BoxJudge(TextFidelity(text_recogniser()))
    else:
        suite, judge = Boxed(freeze(open_faces(folder)), size), BoxJudge(FaceFidelity(face_recogniser()))
    item = suite.load(next(i for i in range(len(suite)) if suite.boxes(i)))
    view, _ = suite.shown(item.pixels)
    for method in methods:
        method.prepare(suite.names)
        method.reconstruct([view], [item.name])
    judge.judge([item], [255 - item.pixels], {})
    return Task(suite, judge)


class Timed(NamedTuple):
    """row: name, instances, seconds by the clock and of the processor, the peak in MB, -1 where it is not measured."""

    row: tuple[str, int, float, float, float]
    results: dict[str, Any]


def timed(methods: Sequence[Method], task: Task, out: Path) -> Timed:
    """The whole of a suite: every picture, every instance, the tables."""
    boxes = sum(len(task.suite.boxes(i)) for i in range(len(task.suite)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(task.suite.name, total=total(len(methods), [task], Shard()))

        def tick(what: str, n: int) -> Any:
            progress.update(bar, advance=n, description=what)

        with peak_memory(torch.device("cpu")) as peak:
            start, cpu = time.perf_counter(), time.process_time()
            run(methods, [task], out / task.suite.kind, tick=tick)
            results = summarise([method.describe() for method in methods], [task], out / task.suite.kind)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Timed((task.suite.name, boxes, wall, cpu, -1.0 if peak.bytes is None else peak.bytes / 1e6), results)


if __name__ == "__main__":
    main()
