"""The commands that judge: eval, compare, landmarks. ``cli`` puts them beside its own."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Methods = Annotated[
    list[str],
    typer.Argument(
        help="mini, flextok-d18-d28@1,16,256, a checkpoint, jpeg@q5,q10, jpeg@64:q5, webp, avif, resize@64, identity, "
        "folder:PATH; as many as you like.",
        show_default=False,
    ),
]
Weights = Annotated[
    list[str] | None, typer.Option(help="Their files of weights, in the same order; the cache when not given.")
]


def evaluate(
    methods: Methods,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the report.")] = Path("report"),
    data: Annotated[str | None, typer.Option(help="Photographs: a folder, or tar shards.")] = None,
    text: Annotated[str | None, typer.Option(help="Pictures with annotated words: a folder or its file.")] = None,
    faces: Annotated[str | None, typer.Option(help="Pictures with annotated faces: a folder or its file.")] = None,
    size: Annotated[int, typer.Option(min=0, help="Of photographs, resized and cropped; 0 is as they are.")] = 256,
    text_size: Annotated[
        list[int] | None, typer.Option(min=0, help="Side of the square that text is fitted into; once or often. [256]")
    ] = None,
    face_size: Annotated[list[int] | None, typer.Option(min=0, help="The same for faces. [256]")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Photographs, evenly spaced over all; 0 is all.")] = 0,
    net: Annotated[
        list[str] | None, typer.Option(help="For set distances: inception (FID), dinov2, mobilenetv2, any timm model.")
    ] = None,
    net_weights: Weights = None,
    distance: Annotated[
        list[str] | None,
        typer.Option(help="A perceptual distance: lpips-vgg, lpips-alex, dists, dreamsim, any timm model."),
    ] = None,
    distance_weights: Weights = None,
    recogniser: Annotated[str, typer.Option(help="Of words: pp-ocr, parseq, tesseract.")] = "pp-ocr",
    recogniser_weights: Annotated[
        Path | None, typer.Option(help="The file of parseq; where docTR keeps it when not given.")
    ] = None,
    face_recogniser: Annotated[str, typer.Option(help="Of faces: dlib, antelopev2, facenet.")] = "dlib",
    face_recogniser_weights: Annotated[
        Path | None,
        typer.Option(help="The file of antelopev2 or facenet; where their packages keep it when not given."),
    ] = None,
    refine: Annotated[bool, typer.Option("--refine", help="Only words that are read rightly on the original.")] = False,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Also what ids of tokenizers say: statistics, a pFID (with --net), probes where --data has classes.",
        ),
    ] = False,
    perturb: Annotated[
        str,
        typer.Option(
            help="Of the pFID: rates/shares/strengths, of which every combination is measured; none for none."
        ),
    ] = "0.5,1/0.5,1/10,100",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of flow decoders.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of flow decoders; 1 is none.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps ...; the best at hand when not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    shard: Annotated[
        str | None, typer.Option(help="I/N: only every N-th picture, from the I-th, counted from 0.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Worst and best pictures to show of each method.")] = 2,
    bootstrap: Annotated[int, typer.Option(min=0, help="Samples for intervals of set distances; 0 is none.")] = 100,
) -> None:
    """Measure reconstructions and write a report. Stopped, the same command goes on; what is done is not done again."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from tokenizers_vis.eval.evaluate import evaluate as run

    sampling = {key: value for key, value in (("steps", steps), ("guidance", guidance)) if value is not None}
    nets = _with_weights("--net", net, net_weights)
    console = Console(stderr=True)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one shows its progress
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not (first and console.is_terminal)
    ) as progress:

        def start(total: int) -> Callable[[str, int], None]:
            task = progress.add_task("reading", total=total)

            def tick(what: str, n: int) -> None:
                before = progress.tasks[task]
                if first and not console.is_terminal and what != before.description:  # a log has a line for each part
                    typer.echo(f"{what} ({before.completed:.0f} of {total} done)", err=True)
                progress.update(task, advance=n, description=what)

            return tick

        try:
            done = run(
                methods,
                out,
                data=data,
                text=text,
                faces=faces,
                size=size,
                text_sizes=text_size or [256],
                face_sizes=face_size or [256],
                limit=limit,
                nets=nets,
                distances=_with_weights("--distance", distance, distance_weights),
                recogniser=recogniser,
                recogniser_weights=recogniser_weights,
                face_recogniser=face_recogniser,
                face_recogniser_weights=face_recogniser_weights,
                refine=refine,
                tokens=tokens,
                perturb=_grid(perturb) if tokens else None,
                sampling=sampling,
                device=device,
                batch_size=batch_size,
                examples=examples,
                samples=bootstrap,
                shard=_shard(shard) if shard else None,
                command=shlex.join(["tokenizers-vis", *sys.argv[1:]]),
                start=start,
            )
        except KeyboardInterrupt:
            typer.echo("stopped; what is done is kept, the same command goes on", err=True)
            raise typer.Exit(130) from None
    if done.results is None:
        typer.echo(f"this part is done; {sum(done.left.values())} reconstructions are left for other shards")
        return
    if data and not nets:
        also = ", and so does a pFID" if tokens else ""
        typer.echo(f"no set distances: they need a net, such as --net inception or --net dinov2{also}", err=True)
    from tokenizers_vis.eval.tables import notes, summary

    for suite in done.results["suites"]:
        for note in notes(suite):
            typer.echo(f"{suite['name']}: {note}", err=True)
    typer.echo(summary(done.results))
    typer.echo(f"wrote {out / 'index.html'}")
    skipped = [(suite["name"], *one) for suite in done.results["suites"] for one in suite["skipped"].items()]
    for suite, picture, reason in skipped:
        typer.echo(f"left out of {suite}: {picture}: {reason}", err=True)
    if skipped:
        raise typer.Exit(1)


def compare(
    first: Annotated[Path, typer.Argument(help="A folder that eval wrote, or its results.json.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Say what differs between two reports. Numbers that were measured in different ways are refused: exit code 1."""
    from tokenizers_vis.eval.compare import compare as put_beside

    found = put_beside(first, second)
    typer.echo(str(found))
    for line in found.refused:
        typer.echo(f"not comparable: {line}", err=True)
    if found.refused:
        raise typer.Exit(1)


def landmarks(
    folder: Annotated[Path, typer.Argument(help="Pictures of faces, with annotations or without.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="landmarks.jsonl in the folder when not given.")
    ] = None,
) -> None:
    """Write the landmarks of all faces in a folder, once: faces are cut out by the same ones ever after."""
    from tokenizers_vis.eval.face import landmarks as write

    typer.echo(f"wrote {write(folder, out)}")


def _with_weights(option: str, names: list[str] | None, weights: list[str] | None) -> dict[str, str]:
    """Name -> file, "" for none."""
    names, weights = names or [], weights or []
    if len(weights) > len(names):
        raise ValueError(f"{option}-weights are files for the nets of {option}: got {len(weights)} for {len(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{option} names a net twice: {', '.join(names)}")
    return dict(zip(names, weights + [""] * (len(names) - len(weights)), strict=True))


def _grid(text: str) -> object:
    """ "0.5,1/1/10,100" as rates, shares and strengths."""
    from tokenizers_vis.eval.perturbation import Grid

    if text == "none":
        return None
    try:
        rates, shares, strengths = (part.split(",") for part in text.split("/"))
        return Grid(tuple(map(float, rates)), tuple(map(float, shares)), tuple(map(int, strengths)))
    except ValueError as error:
        raise ValueError(
            "--perturb is rates/shares/strengths, such as 0.5,1/0.5,1/10,100: shares of the ids and of the pictures, "
            f"from 0 to 1, and numbers of nearest codes, from 1; got {text!r}"
        ) from error


def _shard(text: str) -> object:
    from tokenizers_vis.eval.benchmark import Shard

    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard is I/N, such as 0/4 for the first of four, got {text!r}")
    return Shard(int(index), int(count))
