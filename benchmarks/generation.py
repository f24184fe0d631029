"""python benchmarks/generation.py [GENERATOR] --tokens TRAIN --data VAL --net mobilenetv2 --net-weights FILE [--n 2000]

How near samples come to held-out pictures as a set, beside what counting alone gives: sequences of ids drawn one by one
(zero order), by the place, by the id before (bigram), and by both, counted on the ids that the generator learned from.
The reconstructions of the held-out pictures themselves are what no generator over these tokens can be better than.

TRAIN is a folder of token shards, VAL a folder of pictures or tar shards. Labels are drawn as often as they are in
TRAIN. Prints a markdown table of the Frechet and the kernel distance in the features of a named net; with --out also
writes the rows and a sheet of samples there. Distances of so few pictures depend on how many they are: compare only
rows of the same n.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.eval.distances import frechet_distance, kernel_distance, small_sample
from tokenizers_vis.eval.features import FeatureNet, feature_net
from tokenizers_vis.files import write_atomically
from tokenizers_vis.generator import Generator
from tokenizers_vis.generators.ngram import CONTEXTS, NGram
from tokenizers_vis.pictures import contact_sheet
from tokenizers_vis.sources import open_source
from tokenizers_vis.token_shards import TokenShards
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.train.data import val_batches

BATCH = 100
SHOWN = 8


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", nargs="?", default="mini-tiny-imagenet", help="name, file or run folder")
    parser.add_argument("--tokens", required=True, metavar="TRAIN", help="token shards that it was trained on")
    parser.add_argument("--data", required=True, metavar="VAL", help="held-out pictures: a folder, or .tar shards")
    parser.add_argument("--tokenizer", help="where its tokenizer is, when that is no preset")
    parser.add_argument("--net", default="mobilenetv2", help="a feature net (default: mobilenetv2)")
    parser.add_argument("--net-weights", default="", metavar="FILE", help="its weights; default: those of the library")
    parser.add_argument("--n", type=int, default=2000, help="pictures in each set (default: 2000)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="default: 1 2 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the best at hand")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where generation.json and generation.png go")
    options = parser.parse_args(arguments)
    if options.n < 2 or options.seed < 0:
        parser.error("--n is at least 2, --seed at least 0")
    try:
        run(options)
    except ValueError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    gen = tv.load_generator(options.generator, options.device)
    tok = gen.load_tokenizer(options.tokenizer)
    shards = TokenShards(options.tokens)
    shards.check(tok)
    net = feature_net(options.net, options.net_weights).to(tok.device)
    source = open_source(options.data)
    if len(source) < options.n:
        raise ValueError(f"--n {options.n} is more than the {len(source)} pictures in {options.data}")
    rows: list[dict[str, Any]] = []
    sheet: list[list[Tensor]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    sets = 2 + len(CONTEXTS) + len(options.guidance)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("features", total=sets * options.n)

        def features(name: str, pictures: Iterator[Tensor]) -> Tensor:
            """n d of all pictures; the first few are kept to look at."""
            progress.update(task, description=name)
            found, shown = [], []
            for batch in pictures:
                found.append(net(batch.to(tok.device)).cpu())
                shown += batch[: SHOWN - len(shown)].cpu()
                progress.advance(task, len(batch))
            sheet.append(shown)
            return torch.cat(found)

        def judge(name: str, pictures: Iterator[Tensor], bits: float | None = None) -> None:
            began = time.perf_counter()
            other = features(name, pictures)
            fd, kd = frechet_distance(real, other), kernel_distance(real, other)
            rows.append({"set": name, "n": len(other), net.metric("fd"): fd, net.metric("kd"): kd,
                         "bits_per_image": bits, "seconds": time.perf_counter() - began})  # fmt: skip

        real = features("held-out pictures", held_out(source, tok, options.n))
        judge("their reconstructions", reconstructions(gen, tok, source, options.n))
        train, val, labels = counted(shards, gen, source, tok, options)
        for kind in CONTEXTS:
            model = NGram(train, sum(gen.codebook_sizes), kind)
            judge(kind.replace("_", " "), counted_samples(model, tok, options), model.bits(val) * val.shape[1])
        bits = own_bits(gen, tok, source, options.n)
        for scale in options.guidance:
            judge(
                f"{gen.name}, guidance {scale:g}",
                samples(gen, tok, labels, scale, options),
                bits if scale == 1 else None,
            )
    print(described(options, gen, tok, net))
    print(table(rows))
    if warning := small_sample(options.n, real.shape[1]):
        print(f"\n{warning}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "generation.json", json.dumps(rows, indent=2).encode())
        names = ["held-out pictures", *(row["set"] for row in rows)]
        write_atomically(options.out / "generation.png", contact_sheet(sheet, row_labels=names).save)


# Sets of pictures, batch by batch: b 3 h w in [0, 1]


def held_out(source: Any, tok: Tokenizer, n: int) -> Iterator[Tensor]:
    return (batch.float() / 255 for batch in val_batches(source, tok.image_size, n, BATCH))


def reconstructions(gen: Generator, tok: Tokenizer, source: Any, n: int) -> Iterator[Tensor]:
    return (tok.reconstruct(batch, gen.max_tokens) for batch in held_out(source, tok, n))


def samples(
    gen: Generator, tok: Tokenizer, labels: list[int | None], scale: float, options: argparse.Namespace
) -> Iterator[Tensor]:
    for start in range(0, options.n, BATCH):
        yield tok.decode(gen.sample(labels[start : start + BATCH], guidance=scale, seed=options.seed + start))


def counted_samples(model: NGram, tok: Tokenizer, options: argparse.Namespace) -> Iterator[Tensor]:
    ids = torch.from_numpy(model.sample(options.n, options.seed))
    for start in range(0, options.n, BATCH):
        yield tok.decode(tok.tokens_from_sequence(ids[start : start + BATCH]))


# What is counted


def counted(
    shards: TokenShards, gen: Generator, source: Any, tok: Tokenizer, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, list[int | None]]:
    """Training sequences b l of all crops, those of the held-out pictures, and labels to draw."""
    every = np.tile(np.arange(len(shards)), shards.crops), np.repeat(np.arange(shards.crops), len(shards))
    train = sequences(shards.gather(*every), gen)
    val = torch.cat([tok.encode(batch, gen.max_tokens).ids.cpu() for batch in held_out(source, tok, options.n)])
    drawn = np.random.default_rng(options.seed).choice(shards.labels, options.n)
    return train, sequences(val, gen), [int(label) if label >= 0 else None for label in drawn]


def sequences(ids: Tensor, gen: Generator) -> np.ndarray:
    """b n k -> b (n k)."""
    return Tokens(ids, codebook_sizes=gen.codebook_sizes, tokenizer=gen.tokenizer).to_sequence().numpy()


def own_bits(gen: Generator, tok: Tokenizer, source: Any, n: int) -> float:
    """Of a held-out picture without its class, which a folder does not tell."""
    bits = [gen.bits(tok.encode(batch, gen.max_tokens)).sum(dim=1).cpu() for batch in held_out(source, tok, n)]
    return torch.cat(bits).mean().item()


# What is said


def described(options: argparse.Namespace, gen: Generator, tok: Tokenizer, net: FeatureNet) -> str:
    return (
        f"{gen!r}\n{options.n} pictures a set, {tok.image_size} px; features of {net.name} (sha256 "
        f"{net.sha256[:16]}), {net.resize}; torch {torch.__version__}, {platform.machine()}\n"
    )


def table(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    digits: dict[str, Callable[[Any], str]] = {
        "n": str,
        "set": str,
        "bits_per_image": lambda x: "" if x is None else f"{x:.1f}",
        "seconds": lambda x: f"{x:.0f}",
    }
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        cells = [digits.get(key, lambda x: f"{x:.4g}")(value) for key, value in row.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
