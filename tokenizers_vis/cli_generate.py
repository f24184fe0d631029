"""The commands that draw and show: generate, explore. ``cli`` puts them beside its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    generator: Annotated[
        str, typer.Argument(help="A generator that comes with the library, its file, or the folder of its run.")
    ] = "mini-tiny-imagenet",
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="A class's number or name, given once or often; none.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images of each class.")] = 16,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("generated"),
    n_tokens: Annotated[int | None, typer.Option(help="Tokens an image; all when not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 is none; the generator's own.")] = None,
    schedule: Annotated[
        str, typer.Option(help="How guidance goes along an image: constant, linear or power_cosine.")
    ] = "constant",
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest ids.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest ids; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest ids of this probability.")] = None,
    steps: Annotated[int | None, typer.Option(help="Rounds of a masked generator.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i of all is drawn with seed + i.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="Where its tokenizer is, when that is no preset.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best at hand.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
) -> None:
    """Draw images: a grid of them, grid.png, and the tokens of each, CLASS-SEED.tok."""
    import re

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tokenizers_vis.files import write_atomically
    from tokenizers_vis.generator import load_generator
    from tokenizers_vis.pictures import contact_sheet

    gen = load_generator(generator, device)
    tok = gen.load_tokenizer(tokenizer)
    if guidance is None and schedule != "constant":
        raise ValueError(f"--schedule {schedule} needs --guidance, the scale it goes up to")
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "steps": steps}
    options["guidance"] = guidance if schedule == "constant" else {"kind": schedule, "scale": guidance}
    options = {key: value for key, value in options.items() if value is not None}
    chosen = [int(word) if word.isdecimal() else word for word in classes or []] or [None]
    labels = [label for label in chosen for _ in range(n)]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began, tokens, pictures = time.monotonic(), [], []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing", total=len(labels))
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            tokens.append(gen.sample(part, n_tokens, seed=seed + start, batch_size=batch_size, **options))
            pictures += tok.decode(tokens[-1], batch_size=batch_size).cpu()
            progress.advance(task, len(part))
    seconds = time.monotonic() - began
    out.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(one for batch in tokens for one in batch):
        name = "none" if labels[i] is None else re.sub(r"[^\w-]+", "-", str(labels[i]))
        one.cpu().save(out / f"{name}-{seed + i}.tok")
    across = min(n, 8)
    rows = [pictures[i * n + j : i * n + min(j + across, n)] for i in range(len(chosen)) for j in range(0, n, across)]
    names = [_named(gen, label) if j == 0 else None for label in chosen for j in range(0, n, across)]
    write_atomically(out / "grid.png", contact_sheet(rows, row_labels=names).save)
    count = f"{len(labels)} image{'s' * (len(labels) > 1)}"
    typer.echo(f"drew {count} in {seconds:.1f} s: {out / 'grid.png'}, and a .tok file each")


def explore(
    tokenizers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Presets, checkpoints or folders; when none is given, the presets that are on this machine."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best at hand.")] = None,
) -> None:
    """Look at tokenizers in a browser: drop a photo, move the token slider, compare two. Local; Ctrl-C ends it."""
    from importlib.util import find_spec

    from tokenizers_vis.catalogue import downloaded, list_presets

    if find_spec("gradio") is None:
        raise ValueError("explore needs gradio: pip install 'tokenizers-vis[explore]'")
    from tokenizers_vis.explore import Explorer, launch, wait

    # The bundled one first: it needs nothing and is quick.
    at_hand = sorted(filter(downloaded, list_presets()), key=lambda name: (name != "mini", name))
    # What happens to be at hand may be large: only what was named is loaded without being chosen.
    explorer = Explorer(tokenizers, device) if tokenizers else Explorer(at_hand, device, second=at_hand[0])
    blocks, address = launch(explorer, port=port, open_browser=open_browser)
    typer.echo(f"exploring at {address}; Ctrl-C ends it")
    wait(blocks)


def _named(gen: Any, label: int | str | None) -> str:
    if label is None:
        return "any class"
    return gen.class_names[label] if isinstance(label, int) and gen.class_names else str(label)
