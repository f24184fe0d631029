"""python benchmarks/bits.py --tokens VAL --generator GEN [--train TRAIN] [--n 2000]

Bits of a picture's tokens: as they are packed, by gzip and xz, under laws that are counted (zero order, by the place,
by the id before), and under a generator, by theory and as true bytes of files.

VAL and TRAIN are folders of token shards. Laws are counted on TRAIN; without it on VAL itself, whose bits are then the
entropy of these very pictures and too few for others. Prints a markdown table. All files are read back and compared.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import platform
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tokenizers_vis as tv
from tokenizers_vis.generator import Generator, load_generator
from tokenizers_vis.generators.ngram import NGram
from tokenizers_vis.generators.prior import Prior, read_header
from tokenizers_vis.token_file import CODED_VERSION
from tokenizers_vis.token_shards import TokenShards

BATCH, ALONE = 100, 20
COUNTED = {
    "zero order": "zero_order",
    "by the place": "position",
    "bigram": "bigram",
    "bigram by the place": "position_bigram",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", required=True, metavar="VAL", help="token shards of held-out pictures")
    parser.add_argument("--generator", required=True, metavar="GEN", help="name, file or run folder")
    parser.add_argument("--train", metavar="TRAIN", help="token shards to count on")
    parser.add_argument("--n", type=int, default=2000, help="pictures (default: 2000; at most as many as there are)")
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error("--n is at least 1")
    try:
        run(options)
    except ValueError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    gen = load_generator(options.generator, "cpu")
    shards = TokenShards(options.tokens)
    train = shards if options.train is None else TokenShards(options.train)
    for one in (shards, train):
        if (one.tokenizer, one.hash) != (gen.tokenizer, gen.hash):
            raise ValueError(f"{one.path} holds ids of {one.tokenizer!r} ({one.hash}), {gen.name} knows {gen.hash}")
    tokens, labels = pictures(shards, gen, min(options.n, len(shards)))
    packed = sum(tokens.nbytes) * 8 / len(tokens)
    print(
        f"{gen!r}\n{len(tokens)} pictures of {tokens.n_tokens} tokens; torch {torch.__version__}, {platform.machine()}"
    )
    rows = plain(tokens) + counted(tokens, all_of(train, gen), gen) + coded(tokens, labels, gen)
    if train is shards:
        print("counted on the pictures themselves")
    print("\n| code | bits a picture | bytes a picture | of packed |\n| --- | --- | --- | --- |")
    for name, bits in rows:
        print(f"| {name} | {bits:.1f} | {bits / 8:.1f} | {bits / packed:.1%} |")


def pictures(shards: TokenShards, gen: Generator, n: int) -> tuple[tv.Tokens, list[int | None]]:
    """n of them, evenly from all, and their classes."""
    chosen = np.linspace(0, len(shards) - 1, n).round().astype(int)
    ids = shards.gather(chosen, np.zeros_like(chosen))
    labels = [None if label < 0 else int(label) for label in shards.labels[chosen]]
    return tv.Tokens(ids, shards.codebook_sizes, gen.tokenizer, nested=shards.nested), labels


def all_of(shards: TokenShards, gen: Generator) -> np.ndarray:
    """b l, the sequences of all crops."""
    images, crops = np.tile(np.arange(len(shards)), shards.crops), np.repeat(np.arange(shards.crops), len(shards))
    return tv.Tokens(shards.gather(images, crops), shards.codebook_sizes, gen.tokenizer).to_sequence().numpy()


def plain(tokens: tv.Tokens) -> list[tuple[str, float]]:
    """Packed, and what general compressors make of all pictures together, which needs no header for each."""
    packed = sum(tokens.nbytes) * 8 / len(tokens)
    files = sum(len(one.to_bytes()) for one in tokens) * 8 / len(tokens)
    stream = tokens.to_sequence().numpy()
    stream = stream.astype(np.min_scalar_type(tokens.vocab_size - 1)).tobytes()
    return [
        ("packed", packed),
        ("packed, a .tok file each", files),
        ("gzip -9 of all pictures together", len(gzip.compress(stream, 9)) * 8 / len(tokens)),
        ("xz -9 of all pictures together", len(lzma.compress(stream, preset=9)) * 8 / len(tokens)),
    ]


def counted(tokens: tv.Tokens, train: np.ndarray, gen: Generator) -> list[tuple[str, float]]:
    val = tokens.to_sequence().numpy()
    models = ((name, NGram(train, sum(gen.codebook_sizes), kind)) for name, kind in COUNTED.items())
    return [(f"counted: {name}", model.bits(val) * val.shape[1]) for name, model in models]


def coded(tokens: tv.Tokens, labels: list[int | None], gen: Generator) -> list[tuple[str, float]]:
    """Under the generator: by theory, as the bytes of the pictures in one file, and as a file for each."""
    prior, b = Prior(gen), len(tokens)
    rows: list[tuple[str, float]] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for name, classes in (("no class", [None] * b), ("class given", labels)):
        if name == "class given" and all(label is None for label in labels):
            continue
        theory = body = together = seconds = 0.0
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(name, total=b)
            for start in range(0, b, BATCH):
                part, known = tokens[start : start + BATCH], classes[start : start + BATCH]
                theory += gen.bits(part, known).double().sum().item()
                began = time.perf_counter()
                file = prior.to_bytes(part, known)
                seconds += time.perf_counter() - began
                if tv.Tokens.from_bytes(file, prior) != part:
                    raise ValueError(f"the pictures from {start} on do not come back")
                together += len(file) * 8
                if file[4] != CODED_VERSION:
                    raise ValueError(f"under {gen.name} these pictures take more than when packed; train it longer")
                body += sum(map(len, read_header(file).images)) * 8
                progress.advance(task, len(part))
        rows.append((f"{gen.name}, {name}: cross-entropy", theory / b))
        rows.append((f"{gen.name}, {name}: range coded, headers apart", body / b))
        rows.append((f"{gen.name}, {name}: files of {BATCH} pictures", together / b))
        alone = [prior.to_bytes(tokens[i], classes[i]) for i in range(min(ALONE, b))]
        share = sum(file[4] == CODED_VERSION for file in alone) / len(alone)
        what = f"a .tok file each, of the first {len(alone)} ({share:.0%} coded, others plain)"
        rows.append((f"{gen.name}, {name}: {what}", sum(map(len, alone)) * 8 / len(alone)))
        print(f"{name}: {1000 * seconds / b:.0f} ms a picture to write, which reads it back once")
    return rows


if __name__ == "__main__":
    main()
