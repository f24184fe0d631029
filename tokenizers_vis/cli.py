"""The command line. Heavy imports wait until a command runs, so that help and completion answer at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenizers_vis import cli_eval, cli_generate, cli_train

if TYPE_CHECKING:
    from rich.progress import Progress

    from tokenizers_vis.latents import Latents
    from tokenizers_vis.tokenizer import Tokenizer
    from tokenizers_vis.tokens import Tokens

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Images to discrete tokens and back, with any tokenizer by name. Errors are one line; --debug shows where.",
)

Inputs = Annotated[list[Path], typer.Argument(help="Files and folders.", show_default=False)]
Name = Annotated[str, typer.Option("--tokenizer", "-t", help="A preset, a checkpoint file or a folder of one.")]
Weights = Annotated[
    Path | None, typer.Option(help="For a preset: its authors' file, or the folder it is in, in place of a download.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best at hand when not given.")]
Resize = Annotated[str | None, typer.Option(help="crop, pad or exact; the tokenizer's own when not given.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps of a flow decoder.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of a flow decoder; 1 is none.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Of a flow decoder's noise; one fixed noise when not given.")
]
Prior = Annotated[
    str | None,
    typer.Option(help="A generator by name, file or folder, whose probabilities make (or made) the files shorter."),
]

PHOTOS = Path(__file__).parent / "photos"
CODES = (".tok", ".safetensors")  # files of ids, and of continuous tokens


class Failure(Exception):
    """Ends the program with a message and exit code 1."""


@app.command()
def encode(
    inputs: Inputs,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .tok file for one image, else a folder.")] = None,
    tokenizer: Name = "mini",
    weights: Weights = None,
    n_tokens: Annotated[int | None, typer.Option(help="Tokens an image; all when not given.")] = None,
    prior: Prior = None,
    resize: Resize = None,
    device: Device = None,
    batch_size: BatchSize = 32,
) -> None:
    """Encode images into .tok files, each beside its image or in --out; continuous tokens into .safetensors."""
    from tokenizers_vis.images import ImageError, load_image
    from tokenizers_vis.paths import find_files, place_results

    images = find_files(inputs, None)
    targets = place_results(images, out, ".tok", CODES)
    tok = _load(tokenizer, device, weights)
    suffix = CODES[tok.continuous]
    if out not in targets:
        targets = [target.with_suffix(suffix) for target in targets]
    elif out.suffix.lower() != suffix:
        raise Failure(f"the tokens of {tok.name} go into a {suffix} file, got --out {out}")
    law = _prior(prior)
    if law and tok.continuous:
        raise Failure(f"--prior is for ids; the tokens of {tok.name} are vectors")
    if law:
        law.generator.check(tok)
    failed: list[str] = []
    batch: list[tuple[Any, Path]] = []
    written: list[int] = []

    def write() -> None:
        if batch:
            tokens = tok.encode([image for image, _ in batch], n_tokens, batch_size=batch_size)
            for one, (_, target) in zip(tokens, batch, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                one.save(target, law) if law else one.save(target)
                written.append(target.stat().st_size)
        batch.clear()

    with _progress() as progress:
        for (image, _), target in progress.track(list(zip(images, targets, strict=True)), description="encoding"):
            try:
                batch.append((tok.canvas.see(load_image(image), resize), target))
            except ImageError as error:
                failed.append(str(error))
                progress.console.print(f"skipped: {error}", markup=False, highlight=False, soft_wrap=True)
            if len(batch) == batch_size:
                write()
        write()
    done = _count(len(images) - len(failed), "image")
    n = n_tokens or tok.max_tokens
    size = f"of {tok.quantizer.dim} numbers" if tok.continuous else f"= {_count(_size(tok, n), 'byte')}"
    each = f"{_count(n, 'token')} {size} each"
    where = targets[0] if len(targets) == 1 else out or "their folders"
    files = f", {_count(sum(written), 'byte')} of files" if law else ""
    _end(f"encoded {done} with {tok.name}, {each}{files}, into {where}", failed)


@app.command()
def decode(
    inputs: Inputs,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A picture file for one file, else a folder.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="The one named in the file when not given.")
    ] = None,
    weights: Weights = None,
    n_tokens: Annotated[int | None, typer.Option(help="Decode only so many leading tokens.")] = None,
    prior: Prior = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Decode .tok files (or .safetensors of continuous tokens) into PNG, each beside its file or in --out."""
    from tokenizers_vis.files import write_atomically
    from tokenizers_vis.images import SUFFIXES, to_pil
    from tokenizers_vis.latents import Latents
    from tokenizers_vis.paths import find_files, place_results, refuse_doubles
    from tokenizers_vis.presets import usable_device
    from tokenizers_vis.tokens import Tokens

    files = find_files(inputs, CODES)
    targets = place_results(files, out, ".png", SUFFIXES)
    failed: list[str] = []
    usable_device(device)  # before a file's tokenizer is blamed for it
    law = _prior(prior)
    loaded: dict[str, Tokenizer] = {}
    work: list[tuple[Tokens | Latents, list[Path]]] = []
    # Every file is read and checked before the first picture is written.
    for (file, _), target in zip(files, targets, strict=True):
        try:
            tokens = Latents.load(file) if file.suffix == ".safetensors" else Tokens.load(file, law)
        except ValueError as error:
            failed.append(str(error))
            typer.echo(f"skipped: {error}", err=True)
            continue
        name = tokenizer or tokens.tokenizer
        if name not in loaded:
            try:
                loaded[name] = _load(name, device, weights)
            except ValueError as error:
                hint = "" if tokenizer else f"; {file} names it: if it lies elsewhere, say where with --tokenizer"
                raise Failure(f"{error}{hint}") from error
        tokens = tokens if n_tokens is None else _prefix(tokens, n_tokens)
        many = [target.with_stem(f"{target.stem}-{i}") for i in range(len(tokens))]
        work.append((tokens, [target] if len(tokens) == 1 else many))
    pictures_to = [path for _, paths in work for path in paths]
    refuse_doubles(pictures_to)
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
    weights: Weights = None,
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
    from tokenizers_vis.paths import find_files

    if out.suffix.lower() not in SUFFIXES or out.is_dir():
        raise Failure(f"--out is the picture to write, such as reconstruction.png; got {out}")
    images = [path for path, _ in find_files(inputs, None)]
    tok = _load(tokenizer, device, weights)
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
    name: Annotated[str, typer.Argument(help="A preset, a checkpoint, a folder of one, or a file of tokens.")] = "mini",
    weights: Weights = None,
    prior: Prior = None,
) -> None:
    """Show what a tokenizer or a file of tokens is. Nothing is downloaded."""
    from tokenizers_vis.catalogue import downloaded, facts, list_presets, preset

    if prior is not None and Path(name).suffix != ".tok":
        raise Failure(f"--prior is for .tok files, got {name}")
    released = preset(name) if name in list_presets() and not Path(name).exists() else {}
    terms = {key: released[key] for key in ("hub", "file", "licence", "paper") if key in released}
    if released and weights is None and not downloaded(name):
        _tell(facts(name, released) | terms)
        typer.echo(f"not downloaded yet: encode or load({name!r}) does it, or give its file with --weights")
    elif (tokens := _read_tokens(Path(name), prior)) is None:
        _tell({"name": (tok := _load(name, "cpu", weights)).name, **tok.describe(), **terms})
    else:
        typer.echo(repr(tokens))
        for i, one in enumerate(tokens):
            flat = (one.values if hasattr(one, "values") else one.ids).flatten().tolist()
            start = " ".join(f"{number:.3g}" if isinstance(number, float) else str(number) for number in flat[:16])
            typer.echo(f"image {i}: {one.n_tokens} tokens: {start}{' ...' * (len(flat) > 16)}")


@app.command(name="list")
def list_(
    commercial_ok: Annotated[
        bool, typer.Option("--commercial-ok", help="Only those whose weights may be used commercially.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known of them, for programs.")] = False,
) -> None:
    """List the presets that can be loaded by name: rFID as published, bits of one image."""
    import shutil

    from tokenizers_vis.catalogue import columns, facts, list_presets, preset

    tables = {name: preset(name) for name in list_presets()}
    tables = {name: table for name, table in tables.items() if table["commercial"] or not commercial_ok}
    if as_json:
        rows = [
            {"name": name} | {key: value for key, value in table.items() if key != "official"}
            for name, table in tables.items()
        ]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif tables:
        room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo(columns([facts(name, table) for name, table in tables.items()], room))
    else:
        typer.echo("there is no such preset", err=True)


@app.command()
def doctor(
    tokenizer: Annotated[str, typer.Argument(help="A preset, a checkpoint file or a folder of one.")] = "mini",
    data: Annotated[
        list[Path] | None, typer.Option(help="Images or folders of them, given once or often; bundled photographs.")
    ] = None,
    weights: Weights = None,
    limit: Annotated[int, typer.Option(min=1, help="Look at so many images at most.")] = 256,
    resize: Resize = None,
    device: Device = None,
    batch_size: BatchSize = 32,
    report: Annotated[Path | None, typer.Option("--json", help="Write all numbers into this file.")] = None,
) -> None:
    """Say how near a tokenizer's ids are to being others, and how it uses its codebook.

    Exit code 1 where ids depend on the batch, the order of images or the number of threads.
    """
    from tokenizers_vis.eval.doctor import examine
    from tokenizers_vis.files import write_atomically
    from tokenizers_vis.paths import find_files

    images = [path for path, _ in find_files(data or [PHOTOS], None)][:limit]
    found = examine(_load(tokenizer, device, weights), images, resize=resize, batch_size=batch_size)
    typer.echo(str(found))
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(report, json.dumps(found.to_dict(), indent=2).encode())
    if not found.sound:
        raise Failure("ids depend on what they should not: see the first lines of the table")


app.command(name="eval")(cli_eval.evaluate)
app.command()(cli_eval.compare)
app.command()(cli_eval.landmarks)
app.command()(cli_train.train)
app.command()(cli_train.distill)
app.command()(cli_train.tokenize)
app.command()(cli_train.train_generator)
app.command()(cli_generate.generate)
app.command()(cli_generate.explore)


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("demo")) -> None:
    """Encode the bundled photographs at 1, 2, 4 ... all tokens, and draw what they decode to."""
    from tokenizers_vis.encoders.base import powers_of_two
    from tokenizers_vis.files import write_atomically

    tok = _load("mini", None)
    photos = sorted(PHOTOS.glob("*.jpg"))
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


def _load(name: str, device: str | None, weights: Path | None = None) -> Tokenizer:
    from tokenizers_vis.presets import load

    return load(name, device, weights=weights)


def _prior(name: str | None) -> Any:
    """What files are coded with; None where none is named."""
    if name is None:
        return None
    from tokenizers_vis import generator
    from tokenizers_vis.generators import prior

    return prior.Prior(generator.load_generator(name, "cpu"))


def _read_tokens(path: Path, prior: str | None) -> Tokens | Latents | None:
    """What a file of tokens holds; None where it is none."""
    from tokenizers_vis.latents import Latents
    from tokenizers_vis.tokens import Tokens
    from tokenizers_vis.weights import read_safetensors

    if path.suffix == ".tok":
        return Tokens.load(path, _prior(prior))
    if path.suffix == ".safetensors" and read_safetensors(path)[1].get("format") == "tokenizers_vis.latents":
        return Latents.load(path)
    return None


def _tell(pairs: dict[str, str]) -> None:
    for key, value in pairs.items():
        typer.echo(f"{key:28} {value}")


def _prefix(tokens: Tokens | Latents, n: int) -> Tokens | Latents:
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

    views = [(tok.canvas.fit(image, resize), tok.canvas.see(image, resize)) for image in map(load_image, images)]
    originals, seen = map(torch.stack, zip(*views, strict=True))
    # The same noise for each length, so that columns differ by their tokens alone.
    columns = [tok.reconstruct(seen, n, **_sampling(steps, guidance, seed)).cpu() for n in lengths]
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
