"""The commands that learn: train, distill, tokenize, train-generator. ``cli`` puts them beside its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tokenizers_vis.train.loop import Outcome


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe that ships with the library, or a .toml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, as many as you like.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training images: a folder, or tar shards ('train-{0..3}.tar').")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder; runs/NAME when not given.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Fine-tune this tokenizer: a preset, a checkpoint or a run folder.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="For --from PRESET: its authors' file, or the folder it is in.")
    ] = None,
    decoder_only: Annotated[
        bool,
        typer.Option("--decoder-only", help="With --from: encoder and codebook, and so all ids, stay as they are."),
    ] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes that ship with the library.")] = False,
) -> None:
    """Train a tokenizer from a recipe, or fine-tune one. Ctrl-C writes a checkpoint; --resume goes on exactly.

    On several GPUs or machines: torchrun or accelerate launch, with -m tokenizers_vis.cli train ...
    """
    from tokenizers_vis.config import override
    from tokenizers_vis.train import loop

    if list_recipes:
        from tokenizers_vis.train.recipe_list import describe

        names = loop.list_recipes()
        room = max(map(len, names))
        typer.echo("\n".join(f"{name:{room}}  {describe(name)}".rstrip() for name in names))
        return
    if resume and (overrides or data or out or start):
        raise ValueError(
            f"a resumed run goes on with its own recipe and data: give --resume alone; what may change (optim.lr, "
            f"optim.steps, log, data.workers ...) is changed in {resume / 'recipe.toml'}"
        )
    if not (resume or recipe or start):
        raise ValueError("give a recipe (see --list), --from TOKENIZER, or --resume RUN")
    if (weights or decoder_only) and not start:
        raise ValueError("--weights and --decoder-only say more of --from: name a tokenizer with it")
    try:
        if resume:
            outcome = loop.resume(resume, None if recipe is None else loop.read_recipe(recipe))
        else:
            if start and recipe and "=" in recipe:
                overrides, recipe = [recipe, *(overrides or [])], None
            table = loop.read_recipe(recipe or "finetune")
            # A JSON text is a TOML text, whatever quotes and backslashes are in it.
            given = {"init.tokenizer": start, "init.weights": str(weights) if weights else None, "data.train": data}
            if start:
                given["init.parts"] = ["encoder", "quantizer", "decoder"]
            if decoder_only:
                given["init.freeze"] = ["encoder", "quantizer"]
            settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value]
            table = override(table, [*settings, *(overrides or [])])
            outcome = loop.fit(table, out or Path("runs") / str(table.get("name", "run")))
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'tokenizers-vis[train]'") from error
    _tell(outcome, "tokenizer", "train")


def tokenize(
    data: Annotated[
        str,
        typer.Argument(help="Images: a folder, tar shards ('train-{0..3}.tar'), hf:NAME:SPLIT.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the shards of ids.", show_default=False)],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", help="A preset, a checkpoint file or a folder of one.")
    ] = "mini",
    weights: Annotated[
        Path | None, typer.Option(help="For a preset: its authors' file, or the folder it is in.")
    ] = None,
    n_tokens: Annotated[int | None, typer.Option(help="Tokens an image; all when not given.")] = None,
    crops: Annotated[
        str, typer.Option(help="center, center-flip, ten-crop, or random-K: K random crops of each image.")
    ] = "center",
    enlarge: Annotated[float, typer.Option(help="ten-crop: how much larger than the crops the image is.")] = 1.1,
    area: Annotated[float, typer.Option(help="random-K: the least share of the image's area in a crop.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="random-K: of the draws.")] = 0,
    resize: Annotated[str | None, typer.Option(help="crop, pad or exact; the tokenizer's own when not given.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of classes in the order of their numbers: JSON list, or one a line.")
    ] = None,
    part_size: Annotated[int, typer.Option(min=1, help="Images a shard of ids, where the data are no tars.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Crops at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode images.")] = 2,
    shard: Annotated[
        str | None, typer.Option(help="I/N: only every N-th shard, from the I-th, counted from 0; RANK/WORLD_SIZE.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best at hand.")] = None,
) -> None:
    """Turn shards of images into shards of ids, for training a generator. Stopped, the same command goes on."""
    import os
    import time

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tokenizers_vis.presets import load
    from tokenizers_vis.train.tokenize import Crops, read_classes
    from tokenizers_vis.train.tokenize import tokenize as run

    # accelerate and torchrun say by these which of their processes this one is.
    index, slash, count = (shard or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}").partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard is I/N, such as 0/4 for the first of four, got {shard!r}")
    cut_out = Crops(kind=crops, enlarge=enlarge, area=area, seed=seed)
    names = read_classes(classes) if classes else ()
    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    tok = load(tokenizer, device, weights=weights)
    if tok.device.type != "cpu":
        torch.set_num_threads(1)  # else each of the reading threads would start as many again to resize images
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=120) as progress:
        task = progress.add_task("reading", total=None)
        began, said = None, 0.0

        def show(name: str, done: int, total: int) -> None:
            nonlocal began, said
            progress.update(task, description=name or "reading", completed=done, total=total)
            now = time.monotonic()
            began = began or (now, done)
            # Into a file: a line every half a minute.
            if progress.disable and done > began[1] and (now - said > 30 or done == total):
                said = now
                speed = (done - began[1]) / (now - began[0])
                left = f"{speed:.0f} images/s, {(total - done) / speed / 60:.0f} min left"
                typer.echo(f"{name}: {done}/{total} images, {left}", err=True)

        try:
            done = run(
                data,
                out,
                tok,
                n_tokens=n_tokens,
                crops=cut_out,
                resize=resize,
                classes=names,
                batch_size=batch_size,
                part_size=part_size,
                workers=workers,
                shard=(int(index), int(count)),
                tick=show,
            )
        except KeyboardInterrupt:
            typer.echo("stopped; whole shards are kept, the same command goes on", err=True)
            raise typer.Exit(130) from None
    for name, reason in done.skipped.items():
        typer.echo(f"skipped: {name}: {reason}", err=True)
    there = f", {done.before} were there" if done.before else ""
    left_out = f", {len(done.skipped)} that could not be read left out" if done.skipped else ""
    shards = f"{done.shards} shard{'s' * (done.shards != 1)}"
    typer.echo(f"tokenized {done.images} images{left_out} into {shards}{there}: {out}")


def distill(
    teacher: Annotated[
        str | None,
        typer.Argument(help="A preset, checkpoint or run folder with a decoder that starts from noise."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, as many as you like.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the student; 1 when not given.")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the walks it learns from.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training images: a folder, or tar shards ('train-{0..3}.tar').")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder; runs/NAME when not given.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="For a preset: its authors' file, or the folder it is in.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Another recipe of distillation: a name, or a .toml file.")] = "distill",
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
) -> None:
    """Teach a decoder to draw in one step or few what it draws in many. Its ids stay: .tok files decode with either.

    Ctrl-C writes a checkpoint and stops; --resume goes on exactly, and needs no teacher.
    """
    from tokenizers_vis.config import override
    from tokenizers_vis.train import loop

    if resume and (teacher or overrides or steps or teacher_steps or data or out or weights):
        raise ValueError("a resumed run goes on with its own recipe, teacher and data: give --resume alone")
    if not (resume or teacher):
        raise ValueError("name the TEACHER: a preset, a checkpoint or a run folder; or give --resume RUN")
    try:
        if resume:
            outcome = loop.resume(resume)
        else:
            table = loop.read_recipe(recipe)
            if table.get("task") != "distill":
                raise ValueError(f'{recipe} is no recipe of distillation (task = "distill"): tokenizers-vis train')
            given = {
                "teacher.tokenizer": teacher,
                "teacher.weights": str(weights) if weights else None,
                "teacher.steps": teacher_steps,
                "student.steps": steps,
                "data.train": data,
            }
            settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value]
            table = override(table, [*settings, *(overrides or [])])
            outcome = loop.fit(table, out or Path("runs") / str(table.get("name", "run")))
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'tokenizers-vis[train]'") from error
    _tell(outcome, "tokenizer", "distill")


def train_generator(
    recipe: Annotated[str | None, typer.Argument(help="A recipe that ships with the library, or a .toml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, as many as you like.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="The folder of training ids, as tokenizers-vis tokenize writes it.")
    ] = None,
    val: Annotated[Path | None, typer.Option(help="The folder of ids to validate on.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="Decodes samples to look at, where it is no preset.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder; runs/NAME when not given.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
) -> None:
    """Train a generator on the ids of a tokenizer. Ctrl-C writes a checkpoint and stops; --resume goes on exactly."""
    from tokenizers_vis.config import override
    from tokenizers_vis.train import loop

    if resume and (recipe or overrides or tokens or val or tokenizer or out):
        raise ValueError("a resumed run goes on with its own recipe and data: give --resume alone")
    if not (resume or recipe):
        raise ValueError("give a recipe, such as generator-mini, or --resume RUN")
    try:
        if resume:
            outcome = loop.resume(resume)
        else:
            table = override(loop.read_recipe(recipe), overrides or [])
            if table.get("task") != "generator":
                raise ValueError(f'{recipe} is no recipe of a generator (task = "generator"): tokenizers-vis train')
            places = {"data.train": tokens, "data.val": val, "data.tokenizer": tokenizer}
            given = [f"{key}={json.dumps(str(path))}" for key, path in places.items() if path is not None]
            table = override(table, given)
            outcome = loop.fit(table, out or Path("runs") / str(table.get("name", "run")))
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'tokenizers-vis[train,generate]'") from error
    _tell(outcome, "generator", "train-generator")


def _tell(outcome: Outcome, what: str, command: str) -> None:
    """How a run ended. what: it made. A stopped one ends the process with 130, as Ctrl-C does."""
    if outcome.finished:
        typer.echo(f"trained {outcome.step} steps; the {what} is {outcome.folder / f'{what}.safetensors'}")
        return
    words = shlex.join(["tokenizers-vis", command, "--resume", str(outcome.folder)])
    typer.echo(f"stopped after step {outcome.step}; go on with: {words}", err=True)
    raise typer.Exit(130)
