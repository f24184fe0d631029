"""python benchmarks/quality.py TOKENIZER [TOKENIZER ...] --data VAL [--net NAME --net-weights FILE] [--out FOLDER]

How close reconstructions come to their originals at 1, 2, 4 ... all tokens, beside the baseline that every tokenizer
has to beat: a bicubic thumbnail of no fewer bytes. A TOKENIZER is a preset, a checkpoint file or a run folder; VAL is a
folder of images or .tar shards. Prints markdown tables; with --out also writes quality.json and quality.png there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.metrics import CodebookUsage, gradient_energy, psnr, ssim
from tokenizers_vis.eval.perceptual import Perceptual, perceptual
from tokenizers_vis.eval.thumbnail import thumbnail, thumbnail_size
from tokenizers_vis.files import write_atomically
from tokenizers_vis.pictures import contact_sheet
from tokenizers_vis.presets import usable_device
from tokenizers_vis.sources import ImageSource, open_source
from tokenizers_vis.train.data import val_batches

# Pictures b 3 h w in [0, 1] -> the versions of them that are to be judged, each under a key.
Versions = Callable[[Tensor], Iterable[tuple[Any, Tensor]]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="preset, checkpoint file or run folder")
    parser.add_argument("--data", required=True, metavar="VAL", help="folder of images, or .tar shards")
    parser.add_argument("--images", type=int, default=500, help="how many, evenly spaced over VAL (default: 500)")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens (default: 1, 2, 4 ... all)")
    parser.add_argument("--net", help="a perceptual distance: a timm model such as mobilenetv2_100, or lpips-vgg")
    parser.add_argument("--net-weights", default="", metavar="FILE", help="its weights; default: those of the library")
    parser.add_argument("--steps", type=int, help="sampling steps of flow decoders")
    parser.add_argument("--guidance", type=float, help="guidance scale of flow decoders; 1 is none")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where quality.json and quality.png go")
    parser.add_argument("--show", type=int, default=4, help="photographs in quality.png (default: 4)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", help="default: the best at hand")
    options = parser.parse_args(arguments)
    if options.net_weights and not options.net:
        parser.error("--net-weights needs --net, the name of the net that the file is of")
    if options.show < 1:
        parser.error(f"--show is at least 1, got {options.show}; without --out there is no picture")
    try:
        run(options)
    except ValueError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    # What may be missing comes first: it should not be found out after an hour.
    source = open_source(options.data)
    distance = perceptual(options.net, options.net_weights) if options.net else None
    loaded = [tv.load(name, "cpu") for name in options.tokenizers]
    for tok in loaded:
        if any(not 1 <= n <= tok.max_tokens for n in options.tokens or []):
            raise ValueError(f"{tok.name} has 1 to {tok.max_tokens} tokens, --tokens asks for {options.tokens}")
    sampling = {key: getattr(options, key) for key in ("steps", "guidance") if getattr(options, key) is not None}
    if sampling and all(tok.decoder.one_pass for tok in loaded):
        raise ValueError("--steps and --guidance are of flow decoders, and none of these tokenizers has one")
    names = [tok.name for tok in loaded]
    labels = names if len(set(names)) == len(names) else options.tokenizers
    device = usable_device(options.device)
    distance = distance and distance.to(device)
    rows: list[dict[str, Any]] = []
    usage: list[dict[str, Any]] = []
    blocks: list[list[Row]] = [[] for _ in range(min(options.show, len(source)))]
    thumbnails: dict[int, set[int]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def batches(size: int, what: str) -> Iterator[Tensor]:
            """Pictures b 3 h w in [0, 1], and how far one is with them."""
            count = min(options.images, len(source))
            task = progress.add_task(what, total=count)
            for batch in val_batches(source, size, count, options.batch_size):
                yield batch.float() / 255
                progress.advance(task, len(batch))
            progress.update(task, completed=count)

        for label, tok in zip(labels, loaded, strict=True):
            tok.to(device)
            lengths = options.tokens or (powers_of_two(tok.max_tokens) if tok.nested else [tok.max_tokens])
            own = {} if tok.decoder.one_pass else sampling
            used = CodebookUsage(tok.codebook_sizes)
            versions = reconstructions(tok, lengths, options.batch_size, own, used)
            scores = judge(batches(tok.image_size, label), versions, distance, device)
            for n in lengths:
                size = -(-n * tok.bits_per_token // 8)
                rows.append({"method": label, "tokens": n, "bytes": size, "image_size": tok.image_size, **scores[n]})
                thumbnails.setdefault(tok.image_size, set()).add(size)
            for k, book in enumerate(used.compute()):
                counts = {"tokens": book.tokens, "used": book.used, "entropy": book.entropy}
                usage.append({"method": label, "codebook": k, "size": tok.codebook_sizes[k], **counts})
            if options.out:
                for block, row in zip(blocks, sheet_rows(tok, label, lengths, source, len(blocks), own), strict=False):
                    block.append(row)
        for size, sizes in sorted(thumbnails.items()):
            # Several numbers of bytes may lead to one thumbnail; it is judged once.
            least = {thumbnail_size(size, size, n, no_fewer=True): n for n in sorted(sizes, reverse=True)}
            scores = judge(batches(size, "bicubic thumbnails"), small_pictures(least), distance, device)
            for (w, h), score in reversed(scores.items()):
                method = f"bicubic thumbnail, {w} x {h}"
                rows.append({"method": method, "tokens": None, "bytes": 3 * w * h, "image_size": size, **score})
    protocol = {
        "data": options.data,
        "fingerprint": source.fingerprint,
        "images": rows[0]["images"],
        "selection": "evenly spaced over the data",
        "preparation": "shorter side resized (bicubic, antialiased), centre cropped, 8 bit",
        "reconstructions": "rounded to 8 bit before they are judged",
        "psnr, ssim, distance": "mean over pictures; PSNR in dB, SSIM with a Gaussian window of 11",
        "gradient energy": "mean of the reconstructions' over mean of the originals': below 1 blurred, above 1 noisy",
        "bytes": "of the ids, packed, without a header; a thumbnail's: 3 a pixel, uncompressed, no fewer",
        "sampling": sampling or "the decoders' own",
        "torch": torch.__version__,
    }
    print(report(rows, usage, protocol, distance and distance.name))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        result = json.dumps({"protocol": protocol, "rows": rows, "codebooks": usage}, indent=1)
        write_atomically(options.out / "quality.json", result.encode())
        write_atomically(options.out / "quality.png", sheet(blocks).save)
        print(f"\nwrote {options.out / 'quality.json'} and {options.out / 'quality.png'}")


# What is judged


def reconstructions(
    tok: tv.Tokenizer, lengths: list[int], batch_size: int, sampling: dict[str, Any], used: CodebookUsage
) -> Versions:
    """Each length's reconstruction under its number of tokens; ``used`` counts the ids at full length."""

    def versions(images: Tensor) -> Iterator[tuple[int, Tensor]]:
        tokens = tok.encode(images, batch_size=batch_size)
        used.update(tokens.ids)
        for n in lengths:
            yield n, tok.decode(tokens if n == tok.max_tokens else tokens[:, :n], batch_size=batch_size, **sampling)

    return versions


def small_pictures(least: dict[tuple[int, int], int]) -> Versions:
    """Thumbnails under their (w, h)."""
    return lambda images: ((size, thumbnail(images, n, no_fewer=True).reconstruction) for size, n in least.items())


@torch.no_grad()
def judge(
    batches: Iterable[Tensor], versions: Versions, distance: Perceptual | None, device: torch.device
) -> dict[Any, dict[str, float]]:
    """The mean of every metric for every version, and the number of ``images``."""
    sums: dict[Any, dict[str, float]] = {}
    count, energy = 0, 0.0
    for batch in batches:
        originals = batch.to(device)
        count += len(originals)
        energy += gradient_energy(originals).sum().item()
        for key, pictures in versions(originals):
            pictures = as_saved(pictures)
            scores = {"psnr": psnr, "ssim": ssim, **({distance.name: distance} if distance else {})}
            found = {name: score(pictures, originals) for name, score in scores.items()}
            found["gradient_energy"] = gradient_energy(pictures)
            into = sums.setdefault(key, {})
            for name, values in found.items():
                into[name] = into.get(name, 0.0) + values.sum().item()
    for into in sums.values():
        # A flat original has next to no energy, so the quotient is that of the means, not the mean of quotients.
        gradient = into.pop("gradient_energy") / energy if energy else float("nan")
        into.update({name: value / count for name, value in into.items()}, gradient_energy=gradient, images=count)
    return sums


def as_saved(pictures: Tensor) -> Tensor:
    """What a file of 8 bits would hold."""
    return (pictures * 255).round() / 255


# What is shown

Row = tuple[str, dict[int, tuple[Tensor, str]], Tensor]  # label, tokens -> picture and caption, original


def sheet_rows(
    tok: tv.Tokenizer, label: str, lengths: list[int], source: ImageSource, count: int, sampling: dict[str, Any]
) -> list[Row]:
    """For each of ``count`` photographs what one tokenizer makes of it."""
    if not count:
        return []
    originals = torch.cat(list(val_batches(source, tok.image_size, count, count))).float() / 255
    rows: list[Row] = [(label, {}, original) for original in originals]
    for n, pictures in reconstructions(tok, lengths, count, sampling, CodebookUsage(tok.codebook_sizes))(originals):
        pictures = as_saved(pictures.cpu())
        for row, picture, score in zip(rows, pictures, psnr(pictures, originals).tolist(), strict=True):
            row[1][n] = picture, f"{-(-n * tok.bits_per_token // 8)} B  {score:.1f} dB"
    return rows


def sheet(blocks: list[list[Row]]) -> Any:
    """A block of rows for each photograph, a row for each tokenizer, a column for each length, originals last."""
    rows = [row for block in blocks for row in block]
    lengths = sorted({n for _, pictures, _ in rows for n in pictures})
    empty = (None, None)
    return contact_sheet(
        [[*(pictures.get(n, empty)[0] for n in lengths), original] for _, pictures, original in rows],
        columns=[*(f"{n} token{'s' * (n > 1)}" for n in lengths), "original"],
        captions=[[*(pictures.get(n, empty)[1] for n in lengths), None] for _, pictures, _ in rows],
        row_labels=[label for label, _, _ in rows],
    )


def report(
    rows: list[dict[str, Any]], usage: list[dict[str, Any]], protocol: dict[str, Any], distance: str | None
) -> str:
    """All of it as markdown."""
    metrics = ["psnr", "ssim", *([distance] if distance else []), "gradient_energy"]
    heads = ["tokenizer", "px", "tokens", "bytes", "PSNR", "SSIM", *metrics[2:-1], "gradient energy"]
    decimals = {"psnr": ".2f", "gradient_energy": ".2f"}
    body = [
        [row["method"], row["image_size"], row["tokens"] or "", row["bytes"]]
        + [format(row[metric], decimals.get(metric, ".4f")) for metric in metrics]
        for row in rows
    ]
    books = [
        [
            row["method"],
            row["codebook"],
            f"{row['size']:,}",
            f"{row['used']:.1%}",
            f"{row['entropy']:.2f}",
            row["tokens"],
        ]
        for row in usage
    ]
    used = table(["tokenizer", "codebook", "codes", "used", "entropy (bits)", "ids counted"], books)
    said = "\n".join(f"- {key}: {value}" for key, value in protocol.items())
    return f"{table(heads, body)}\n\nCodebooks, at full length:\n\n{used}\n\nHow it was measured:\n\n{said}"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; the first column is texts, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (heads, rule, *rows))


if __name__ == "__main__":
    main()
