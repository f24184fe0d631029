"""The commands that learn: train. ``cli`` puts them beside its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe that ships with the library, or a .toml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, as many as you like.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training images: a folder, or tar shards ('train-{0..3}.tar').")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder; runs/NAME when not given.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes that ship with the library.")] = False,
) -> None:
    """Train a tokenizer from a recipe. Ctrl-C writes a checkpoint and stops; --resume goes on exactly."""
    from tokenizers_vis.config import override
    from tokenizers_vis.train import loop

    if list_recipes:
        typer.echo("\n".join(loop.list_recipes()))
        return
    if resume and (recipe or overrides or data or out):
        raise ValueError("a resumed run goes on with its own recipe and data: give --resume alone")
    if not (resume or recipe):
        raise ValueError("give a recipe (see --list), or --resume RUN")
    try:
        if resume:
            outcome = loop.resume(resume)
        else:
            table = override(loop.read_recipe(recipe), overrides or [])
            if data:
                # A JSON text is a TOML text, whatever quotes and backslashes are in it.
                table = override(table, [f"data.train={json.dumps(data, ensure_ascii=False)}"])
            outcome = loop.fit(table, out or Path("runs") / str(table.get("name", "run")))
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'tokenizers-vis[train]'") from error
    if outcome.finished:
        typer.echo(f"trained {outcome.step} steps; the tokenizer is {outcome.folder / 'tokenizer.safetensors'}")
    else:
        command = shlex.join(["tokenizers-vis", "train", "--resume", str(outcome.folder)])
        typer.echo(f"stopped after step {outcome.step}; go on with: {command}", err=True)
        raise typer.Exit(130)
