"""The command line. Heavy imports wait until a command runs, so that help and completion answer at once."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from tokenizers_vis.tokenizer import Tokenizer
    from tokenizers_vis.tokens import Tokens

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Images to discrete tokens and back, with any tokenizer by name. Errors are one line; --debug shows where.",
)

Inputs = Annotated[list[Path], typer.Argument(help="Files and folders.", show_default=False)]
Name = Annotated[str, typer.Option("--tokenizer", "-t", help="A preset, a checkpoint file or a run folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best at hand when not given.")]
Resize = Annotated[str | None, typer.Option(help="crop, pad or exact; the tokenizer's own when not given.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps of a flow decoder.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of a flow decoder; 1 is none.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Of a flow decoder's noise; one fixed noise when not given.")
]


class Failure(Exception):
    """Ends the program with a message and exit code 1."""


@app.command()
def encode(
    inputs: Inputs,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .tok file for one image, else a folder.")] = None,
    tokenizer: Name = "mini",
    n_tokens: Annotated[int | None, typer.Option(help="Tokens an image; all when not given.")] = None,
    resize: Resize = None,
    device: Device = None,
    batch_size: BatchSize = 32,
) -> None:
    """Encode images into .tok files, each beside its image or in --out."""
    from tokenizers_vis.images import ImageError, load_image

    images = _find(inputs, None)
    targets = _targets(images, out, ".tok", (".tok",))
    tok = _load(tokenizer, device)
    failed: list[str] = []
    batch: list[tuple[Any, Path]] = []

    def write() -> None:
        if batch:
            tokens = tok.encode([image for image, _ in batch], n_tokens, batch_size=batch_size)
            for one, (_, target) in zip(tokens, batch, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                one.save(target)
        batch.clear()

    with _progress() as progress:
        for (image, _), target in progress.track(list(zip(images, targets, strict=True)), description="encoding"):
            try:
                batch.append((tok.canvas.fit(load_image(image), resize), target))
            except ImageError as error:
                failed.append(str(error))
                progress.console.print(f"skipped: {error}", markup=False, highlight=False, soft_wrap=True)
            if len(batch) == batch_size:
                write()
        write()
    done = _count(len(images) - len(failed), "image")
    n = n_tokens or tok.max_tokens
    each = f"{_count(n, 'token')} = {_count(_size(tok, n), 'byte')} each"
    where = targets[0] if len(targets) == 1 else out or "their folders"
    _end(f"encoded {done} with {tok.name}, {each}, into {where}", failed)


@app.command()
def decode(
    inputs: Inputs,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A picture file for one .tok, else a folder.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="The one named in the file when not given.")
    ] = None,
    n_tokens: Annotated[int | None, typer.Option(help="Decode only so many leading tokens.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Decode .tok files into PNG pictures, each beside its file or in --out."""
    from tokenizers_vis.files import write_atomically
    from tokenizers_vis.images import SUFFIXES, to_pil
    from tokenizers_vis.presets import usable_device
    from tokenizers_vis.token_file import TokenFileError
    from tokenizers_vis.tokens import Tokens

    files = _find(inputs, ".tok")
    targets = _targets(files, out, ".png", SUFFIXES)
    failed: list[str] = []
    usable_device(device)  # before a file's tokenizer is blamed for it
    loaded: dict[str, Tokenizer] = {}
    work: list[tuple[Tokens, list[Path]]] = []
    # Every file is read and checked before the first picture is written.
    for (file, _), target in zip(files, targets, strict=True):
        try:
            tokens = Tokens.load(file)
        except TokenFileError as error:
            failed.append(str(error))
            typer.echo(f"skipped: {error}", err=True)
            continue
        name = tokenizer or tokens.tokenizer
        if name not in loaded:
            try:
                loaded[name] = _load(name, device)
            except ValueError as error:
                hint = "" if tokenizer else f"; {file} names it: if it lies elsewhere, say where with --tokenizer"
                raise Failure(f"{error}{hint}") from error
        tokens = tokens if n_tokens is None else _prefix(tokens, n_tokens)
        many = [target.with_stem(f"{target.stem}-{i}") for i in range(len(tokens))]
        work.append((tokens, [target] if len(tokens) == 1 else many))
    pictures_to = [path for _, paths in work for path in paths]
    _refuse_doubles(pictures_to)
    if out is None and (there := [path for path in pictures_to if path.exists()]):
        raise Failure(f"{there[0]} is there already, maybe the original: say with --out where the pictures go")
    with _progress() as progress:
        for tokens, paths in progress.track(work, description="decoding"):
            pictures = loaded[tokenizer or tokens.tokenizer].decode(tokens, **_sampling(steps, guidance, seed))
            for path, picture in zip(paths, to_pil(pictures), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, picture.save)
    where = targets[0] if len(targets) == 1 else out or "their folders"
    _end(f"decoded {_count(len(work), 'file')} into {where}", failed)


@app.command()
def reconstruct(
    inputs: Inputs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")] = Path("reconstruction.png"),
    tokenizer: Name = "mini",
    n_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens an image; give it several times for several columns.")
    ] = None,
    resize: Resize = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Encode and decode images, and draw originals and reconstructions side by side in one picture."""
    from tokenizers_vis.files import write_atomically
    from tokenizers_vis.images import SUFFIXES

    if out.suffix.lower() not in SUFFIXES or out.is_dir():
        raise Failure(f"--out is the picture to write, such as reconstruction.png; got {out}")
    images = [path for path, _ in _find(inputs, None)]
    tok = _load(tokenizer, device)
    lengths = n_tokens or [tok.max_tokens]
    sheet, scores = _sheet(tok, images, lengths, resize, steps, guidance, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, sheet.save)
    over = _count(len(images), "image")
    for n, score in zip(lengths, scores, strict=True):
        typer.echo(f"{_count(n, 'token')}, {_count(_size(tok, n), 'byte')}: PSNR {score:.2f} dB over {over}")
    typer.echo(f"wrote {out}")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A preset, a checkpoint, a run folder, or a .tok file.")] = "mini",
) -> None:
    """Show what a tokenizer or a .tok file is."""
    if Path(name).suffix == ".tok":
        from tokenizers_vis.tokens import Tokens

        tokens = Tokens.load(name)
        typer.echo(repr(tokens))
        for i, one in enumerate(tokens):
            flat = one.ids.flatten().tolist()
            typer.echo(f"image {i}: {one.n_tokens} tokens: {' '.join(map(str, flat[:16]))}{' ...' * (len(flat) > 16)}")
        return
    for key, value in {"name": (tok := _load(name, "cpu")).name, **tok.describe()}.items():
        typer.echo(f"{key:28} {value}")


@app.command(name="list")
def list_() -> None:
    """List the presets that can be loaded by name."""
    from rich.console import Console
    from rich.table import Table

    from tokenizers_vis.catalogue import list_presets, preset

    table = Table("name", "tokens", "codebook", "bytes", "px", "licence", "weights", box=None)
    for name in list_presets():
        row = preset(name)
        codebooks = " + ".join(f"{size:,}" for size in row["codebook_sizes"])
        tokens = f"1-{row['max_tokens']}" if row["nested"] else str(row["max_tokens"])
        size = -(-row["max_tokens"] * sum((k - 1).bit_length() for k in row["codebook_sizes"]) // 8)
        table.add_row(name, tokens, codebooks, str(size), str(row["image_size"]), row["licence"], row["source"])
    Console().print(table)


@app.command()
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
        raise Failure("a resumed run goes on with its own recipe and data: give --resume alone")
    if not (resume or recipe):
        raise Failure("give a recipe (see --list), or --resume RUN")
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
        raise Failure(f"training needs {error.name}: pip install 'tokenizers-vis[train]'") from error
    if outcome.finished:
        typer.echo(f"trained {outcome.step} steps; the tokenizer is {outcome.folder / 'tokenizer.safetensors'}")
    else:
        command = shlex.join(["tokenizers-vis", "train", "--resume", str(outcome.folder)])
        typer.echo(f"stopped after step {outcome.step}; go on with: {command}", err=True)
        raise typer.Exit(130)


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("demo")) -> None:
    """Encode the bundled photographs at 1, 2, 4 ... all tokens, and draw what they decode to."""
    from tokenizers_vis.encoders.base import powers_of_two
    from tokenizers_vis.files import write_atomically

    tok = _load("mini", None)
    photos = sorted((Path(__file__).parent / "photos").glob("*.jpg"))
    lengths = powers_of_two(tok.max_tokens)
    out.mkdir(parents=True, exist_ok=True)
    for photo, tokens in zip(photos, tok.encode(list(photos)), strict=True):
        for n in lengths:
            tokens[:, :n].save(out / f"{photo.stem}-{n}.tok")
    sheet, scores = _sheet(tok, photos, lengths)
    write_atomically(out / "demo.png", sheet.save)
    for n, score in zip(lengths, scores, strict=True):
        typer.echo(f"{n:3} tokens, {_size(tok, n):3} bytes: PSNR {score:.2f} dB")
    typer.echo(f"wrote {len(photos) * len(lengths)} .tok files and the picture {out / 'demo.png'}")


def main(arguments: list[str] | None = None) -> None:
    """The program. Exit codes: 0 done, 1 an error or an input that was skipped, 2 wrong usage, 130 interrupted."""
    import warnings

    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
    try:
        app(args=[word for word in given if word != "--debug"], prog_name="tokenizers-vis")
    except (Failure, ValueError, OSError) as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _load(name: str, device: str | None) -> Tokenizer:
    from tokenizers_vis.presets import load

    return load(name, device)


def _find(inputs: list[Path], suffix: str | None) -> list[tuple[Path, Path]]:
    """Each file with its path relative to the folder it was found in; images, or files with ``suffix``."""
    from tokenizers_vis.images import find_images

    found: list[tuple[Path, Path]] = []
    for path in inputs:
        if suffix is None:
            files = find_images(path)
        elif path.is_dir():
            files = sorted(path.rglob(f"*{suffix}"))
            if not files:
                raise Failure(f"the folder {path} holds no {suffix} files")
        else:
            files = [path]
        found += [(file, file.relative_to(path) if path.is_dir() else Path(file.name)) for file in files]
    return found


def _targets(
    found: list[tuple[Path, Path]], out: Path | None, suffix: str, file_suffixes: tuple[str, ...]
) -> list[Path]:
    """Where each result goes. ``out`` is a file when it ends in one of ``file_suffixes``, else a folder."""
    if out is not None and out.suffix.lower() in file_suffixes and not out.is_dir():
        if len(found) > 1:
            raise Failure(f"{out} is one file, but there are {len(found)} inputs: give a folder")
        return [out]
    targets = [(file if out is None else out / relative).with_suffix(suffix) for file, relative in found]
    _refuse_doubles(targets)
    return targets


def _refuse_doubles(targets: list[Path]) -> None:
    seen: set[Path] = set()
    for target in targets:
        if target in seen:
            raise Failure(f"two results would both be written to {target}: rename an input, or use two folders")
        seen.add(target)


def _prefix(tokens: Tokens, n: int) -> Tokens:
    if not 1 <= n <= tokens.n_tokens:
        raise Failure(f"--n-tokens is from 1 to {tokens.n_tokens} for this file, got {n}")
    return tokens[:, :n]


def _sampling(steps: int | None, guidance: float | None, seed: int | None) -> dict[str, Any]:
    import torch

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    options = {"steps": steps, "guidance": guidance, "generator": generator}
    return {key: value for key, value in options.items() if value is not None}


def _sheet(
    tok: Tokenizer,
    images: list[Path],
    lengths: list[int],
    resize: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
) -> tuple[Any, list[float]]:
    """A row per image, a column per length, the original last; and the mean PSNR of each length in dB."""
    import torch

    from tokenizers_vis.eval.metrics import psnr
    from tokenizers_vis.images import load_image
    from tokenizers_vis.pictures import contact_sheet

    originals = torch.stack([tok.canvas.fit(load_image(image), resize) for image in images])
    # The same noise for each length, so that columns differ by their tokens alone.
    columns = [tok.reconstruct(originals, n, **_sampling(steps, guidance, seed)).cpu() for n in lengths]
    scores = [psnr(column, originals) for column in columns]
    rows = [[*(column[i] for column in columns), originals[i]] for i in range(len(images))]
    captions = [
        [
            *(f"{_size(tok, n)} B  {s[i]:.1f} dB" for n, s in zip(lengths, scores, strict=True)),
            path.stem,
        ]
        for i, path in enumerate(images)
    ]
    heads = [*(_count(n, "token") for n in lengths), "original"]
    return contact_sheet(rows, columns=heads, captions=captions), [s.mean().item() for s in scores]


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _end(message: str, failed: list[str]) -> None:
    typer.echo(message)
    if failed:
        typer.echo(f"skipped {_count(len(failed), 'file')} that could not be read", err=True)
        raise typer.Exit(1)


def _size(tok: Tokenizer, n: int) -> int:
    """Bytes of n tokens."""
    return -(-n * tok.bits_per_token // 8)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


if __name__ == "__main__":
    main()
