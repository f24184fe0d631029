"""What nested dropout, disentanglement, alignment and latent perturbation are worth: paired small trainings.

    python benchmarks/learning.py all --data 'photos/train-{0..2}.tar' --val photos/val.tar --out runs/learning \\
        --classes 'tiny-imagenet/train-{0..3}.tar' --classes-val tiny-imagenet/val.tar --teacher-weights FILE

Each run is a tokenizer of half a million weights on photographs of 16 px, a minute or so on one CPU core. The arms of a
study have one seed's start, pictures, crops and order in common and differ in the part that is studied alone. Losses,
optimiser, schedule and average are those of ``tokenizers-vis train``; pictures are decoded once and kept in memory.
Without --classes there is no alignment among "all".

A finished run is kept in OUT/runs as JSON and not done again unless its recipe has changed: kill it, start it anew, or
run studies beside each other. A run that does not come 3 dB above each picture's mean colour has not learned, and
nothing is concluded from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.metrics import psnr
from tokenizers_vis.eval.perturbation import perturbed_tokens
from tokenizers_vis.eval.probes import Split, linear_probe, token_features
from tokenizers_vis.files import write_atomically
from tokenizers_vis.quantizers.compose import cosine_squared
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.data import val_batches
from tokenizers_vis.train.loop import set_rate
from tokenizers_vis.train.optim import Average, adamw, learning_rate
from tokenizers_vis.train.task import read_config
from tokenizers_vis.train.tokenizer_task import TokenizerTask

LEAST = 3.0  # dB above the mean colour, from which on a tokenizer has learned
WRONG = 0.1  # share of ids that are swapped
NEAR = 16  # codes among which a near wrong id is drawn
CLASSES = 50  # of Tiny ImageNet, evenly spaced
VQ = {"kind": "vq", "update": "ema", "kmeans_start": True, "revive_after": 100}


class Arm(NamedTuple):
    """What one side of a study trains. share: of the images that are shortened. depth: of the decoder."""

    quantizer: dict[str, Any]
    dim: int
    share: float = 0.0
    loss: dict[str, Any] = {}  # noqa: RUF012 (read only)
    depth: int = 1


class Claim(NamedTuple):
    """what: in words. values: one for each seed. wanted: the target in words, "" where the number is only told."""

    what: str
    values: list[float]
    wanted: str = ""
    holds: bool | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--data", required=True, help="photographs to learn from, as tokenizers-vis train takes them")
    parser.add_argument("--val", required=True, help="photographs to judge by")
    parser.add_argument("--classes", default="", help="pictures with classes, for alignment's probe to learn from")
    parser.add_argument("--classes-val", default="", help="others of the same classes, to try the probe on")
    parser.add_argument("--teacher", default="mobilenetv2_100", help="a timm model (default: mobilenetv2_100)")
    parser.add_argument("--teacher-weights", default="", metavar="FILE", help="default: those of timm")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="default: runs/learning")
    parser.add_argument("--steps", type=int, default=700, help="of each run (default: 700)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=96, help="of encoder and decoder (default: 96)")
    parser.add_argument("--tokens", type=int, default=16, help="at full length (default: 16)")
    parser.add_argument("--size", type=int, default=16, help="side of a picture, a multiple of 4 (default: 16)")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.steps, options.batch_size) < 1:
        parser.error("--seeds, --steps and --batch-size are at least 1")
    studies = [options.study] if options.study != "all" else list(STUDIES)
    if "alignment" in studies and not (options.classes and options.classes_val):
        if options.study == "alignment":
            parser.error("alignment is judged by a probe of classes: give --classes and --classes-val")
        studies.remove("alignment")
    try:
        runs = {study: run_study(study, options) for study in studies}
        said = {study: STUDIES[study].claims(runs[study]) for study in studies}
        print("\n\n".join(report(study, runs[study], said[study]) for study in studies))
    except ValueError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    name = "learning" if options.study == "all" else options.study
    result = {"runs": runs, "claims": {study: [claim._asdict() for claim in said[study]] for study in studies}}
    write_atomically(options.out / f"{name}.json", json.dumps(result, indent=1).encode())
    if "nested" in studies:
        plot(runs["nested"], options.out / "learning.png")


# The studies: arms, what is measured of each, and what follows


def nested_arms(options: argparse.Namespace) -> dict[str, Arm]:
    fsq = {"kind": "fsq", "levels": [8, 8, 8, 8]}
    return {f"{share:.0%}": Arm(fsq, 4, share) for share in (0.0, 0.2, 0.5, 1.0)}


def nested_measures(tok: Tokenizer, val: Tensor, options: argparse.Namespace) -> dict[str, float]:
    tokens = tok.encode(val)
    return {f"psnr@{n}": mean_psnr(tok, tokens[:, :n], val) for n in powers_of_two(tok.max_tokens)}


def nested_claims(runs: Runs) -> list[Claim]:
    *prefixes, full = [key for key in runs["0%"][0] if key.startswith("psnr@")]
    claims = []
    for arm in list(runs)[1:]:
        gain = paired(runs, arm, "0%", lambda run: statistics.fmean(run[key] for key in prefixes))
        claims.append(
            Claim(f"{arm} of the images shortened: prefixes gain, dB (mean of {len(prefixes)} lengths)", gain)
        )
        cost = paired(runs, "0%", arm, lambda run: run[full])
        claims.append(Claim(f"{arm} of the images shortened: full length loses, dB", cost))
    return claims


def disentangle_arms(options: argparse.Namespace) -> dict[str, Arm]:
    product = {"kind": "product", "part": VQ | {"dim": 4, "codebook_size": 64}, "count": 2, "reduction": "sum"}
    return {"off": Arm(product, 8), "on": Arm(product | {"disentangle": 0.1}, 8)}


def disentangle_measures(tok: Tokenizer, val: Tensor, options: argparse.Namespace) -> dict[str, float]:
    tokens = tok.encode(val)
    pair = tok.quantizer.lookup(tokens.ids).chunk(2, dim=-1)
    return {"psnr": mean_psnr(tok, tokens, val), "cosine_squared": cosine_squared(*pair).item()}


def disentangle_claims(runs: Runs) -> list[Claim]:
    pairs = zip(runs["off"], runs["on"], strict=True)
    left = [on["cosine_squared"] / off["cosine_squared"] for off, on in pairs]
    return [
        Claim("mean squared cosine, on / off", left, "at most 0.5", statistics.fmean(left) <= 0.5),
        Claim("PSNR lost, dB", paired(runs, "off", "on", lambda run: run["psnr"])),
    ]


def alignment_arms(options: argparse.Namespace) -> dict[str, Arm]:
    vq = VQ | {"dim": 16, "codebook_size": 512}  # wide codes: their mean has to hold what the teacher knows
    teacher = {"teacher": options.teacher, "weights": options.teacher_weights, "size": 6 * options.size}
    term = {"at": "codes", "match": "mean", "head": "mlp", "hidden": 256, "weight": 1.0}
    return {"off": Arm(vq, 16), "on": Arm(vq, 16, loss={"align": [teacher | term]})}


def alignment_measures(tok: Tokenizer, val: Tensor, options: argparse.Namespace) -> dict[str, float]:
    train, test = (class_pictures(path, options.size) for path in (options.classes, options.classes_val))
    images, labels = (torch.cat(both) for both in zip(train, test, strict=True))
    split = Split(torch.arange(len(train[0])), torch.arange(len(train[0]), len(images)))
    found = linear_probe(token_features(tok, tok.encode(images)), labels, images, split)
    return {
        "psnr": mean_psnr(tok, tok.encode(val), val),
        "probe": 100 * found.accuracy,
        "pixels": 100 * found.pixels,
        "chance": 100 / found.classes,
    }


def alignment_claims(runs: Runs) -> list[Claim]:
    rise = paired(runs, "on", "off", lambda run: run["probe"])
    return [
        Claim("linear probe of the codes, points gained", rise, "above 0 for every seed", min(rise) > 0),
        Claim("PSNR lost, dB", paired(runs, "off", "on", lambda run: run["psnr"])),
    ]


def perturbation_arms(options: argparse.Namespace) -> dict[str, Arm]:
    vq = VQ | {"dim": 16, "codebook_size": 512}
    perturbed = {"kind": "perturb", "quantizer": vq, "rate": 0.1, "share": 0.4, "neighbours": 512}
    # A decoder of one block cannot tell a wrong code by the others; one of three can.
    return {"off": Arm(vq, 16, depth=3), "on": Arm(perturbed, 16, depth=3)}


def perturbation_measures(tok: Tokenizer, val: Tensor, options: argparse.Namespace) -> dict[str, float]:
    tokens = tok.encode(val)
    (codes,) = tok.codebook_sizes
    wrong = {"any": codes, "near": NEAR}
    return {"psnr": mean_psnr(tok, tokens, val)} | {
        f"{name}_wrong": mean_psnr(tok, perturbed_tokens(tok, tokens, WRONG, 1.0, strength), val)
        for name, strength in wrong.items()
    }


def perturbation_claims(runs: Runs) -> list[Claim]:
    cost = paired(runs, "off", "on", lambda run: run["psnr"])
    claims = [Claim("PSNR lost without wrong ids, dB", cost, "at most 0.3", statistics.fmean(cost) <= 0.3)]
    for kind, ids in (("any", "any of the codebook"), ("near", f"among the {NEAR} nearest")):
        lost = {arm: [run["psnr"] - run[f"{kind}_wrong"] for run in runs[arm]] for arm in runs}
        less = [100 * (1 - on / off) for off, on in zip(lost["off"], lost["on"], strict=True)]
        target = ("at least 30", statistics.fmean(less) >= 30) if kind == "any" else ()
        claims.append(Claim(f"less PSNR lost to {WRONG:.0%} wrong ids, {ids}, %", less, *target))
    return claims


class Study(NamedTuple):
    arms: Callable[[argparse.Namespace], dict[str, Arm]]
    measures: Callable[[Tokenizer, Tensor, argparse.Namespace], dict[str, float]]
    claims: Callable[[Runs], list[Claim]]


Runs = dict[str, list[dict[str, float]]]  # arm -> what was measured, one for each seed
STUDIES = {
    "nested": Study(nested_arms, nested_measures, nested_claims),
    "disentangle": Study(disentangle_arms, disentangle_measures, disentangle_claims),
    "alignment": Study(alignment_arms, alignment_measures, alignment_claims),
    "perturbation": Study(perturbation_arms, perturbation_measures, perturbation_claims),
}


# A run


def run_study(study: str, options: argparse.Namespace) -> Runs:
    """Trains and measures what is not in OUT/runs yet. Raises ``ValueError`` where an arm has not learned."""
    folder = options.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    planned = [
        (name, seed, folder / f"{study}-{name.strip('%')}-{seed}.json", recipe(arm, seed, options))
        for seed in range(options.seeds)  # a pair is whole before the next begins
        for name, arm in STUDIES[study].arms(options).items()
    ]
    missing = [run for run in planned if not is_done(run[2], run[3])]
    if missing:
        photos = pictures(options.data, options.size + options.size // 4)
        val = pictures(options.val, options.size).float() / 255
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(study, total=len(missing) * options.steps)
        for name, seed, path, table in missing:
            progress.update(bar, description=f"{study}, {name}, seed {seed}")
            tok = trained(table, photos, lambda: progress.advance(bar))
            found = STUDIES[study].measures(tok, val, options)
            result = {"recipe": table, "found": found | {"mean_colour": mean_colour(val)}}
            write_atomically(path, json.dumps(result, indent=1).encode())
    runs: Runs = {}
    for name, _, path, _ in planned:
        runs.setdefault(name, []).append(json.loads(path.read_text())["found"])
    check_learned(study, runs)
    return runs


def is_done(path: Path, table: dict[str, Any]) -> bool:
    return path.is_file() and json.loads(path.read_text())["recipe"] == json.loads(json.dumps(table))


def recipe(arm: Arm, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """A recipe as ``tokenizers-vis train`` takes it."""
    part = {"dim": arm.dim, "max_tokens": options.tokens, "size": options.size, "patch": options.size // 4}
    part |= {"width": options.width, "depth": 1, "heads": 4, "mlp_ratio": 3.0}
    lengths = {"kind": "uniform", "full": 1 - arm.share, "per": "image"}
    return {
        "name": "learning",
        "seed": seed,
        "precision": "fp32",
        "device": "cpu",
        "tokenizer": {
            "canvas": {"kind": "pixels", "size": options.size},
            "encoder": {"kind": "flextok", "standardize": True, "lengths": lengths, **part},
            "quantizer": arm.quantizer,
            "decoder": {"kind": "vit", **part, "depth": arm.depth},
        },
        "optim": {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "lr": 1.5e-3,
            "warmup": min(50, options.steps),
            "ema": 0.98,
        },
        "loss": arm.loss,
        "data": {"train": options.data},
    }


def trained(table: dict[str, Any], photos: Tensor, tick: Callable[[], None]) -> Tokenizer:
    """The averaged weights after the steps of the recipe. photos: m 3 s s, uint8, larger than what is trained on."""
    config = read_config(table)
    torch.manual_seed(config.seed)
    task = TokenizerTask(config, torch.device("cpu"))
    optimizer, average = adamw(task, config.optim), Average(task.model, config.optim.ema)
    task.set_modes()
    # Of its own, so that every arm sees the same crops in the same order whatever else it draws.
    draw = torch.Generator().manual_seed(config.seed)
    for task.step in range(config.optim.steps):
        set_rate(optimizer, learning_rate(config.optim, task.step))
        losses = task(views(photos, config.optim.batch_size, task.model.image_size, draw))
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        nn.utils.clip_grad_norm_(task.parameters(), config.optim.clip)
        optimizer.step()
        average.update(task.model, task.step)
        tick()
    return average.model


def views(photos: Tensor, count: int, size: int, draw: torch.Generator) -> Tensor:
    """Random crops of random photographs, half of them mirrored: count 3 size size, uint8."""
    spare = photos.shape[-1] - size
    rows = torch.randint(len(photos), (count,), generator=draw).tolist()
    places = torch.randint(spare + 1, (count, 2), generator=draw).tolist()
    mirrored = (torch.rand(count, 1, 1, 1, generator=draw) < 0.5).expand(-1, 3, size, size)
    cut = torch.stack([photos[i, :, y : y + size, x : x + size] for i, (y, x) in zip(rows, places, strict=True)])
    return torch.where(mirrored, cut.flip(-1), cut)


def pictures(path: str, size: int) -> Tensor:
    """All of them, m 3 size size, uint8."""
    source = open_source(path)
    return torch.cat(list(val_batches(source, size, len(source), 256)))


def class_pictures(path: str, size: int) -> tuple[Tensor, Tensor]:
    """Pictures of ``CLASSES`` classes, m 3 size size in [0, 1], and their labels."""
    source = open_source(path)
    labels = source.labels(0, len(source))
    if None in labels:
        raise ValueError(f"{path} has pictures without a class; a probe needs one for each")
    names = sorted(set(labels))
    chosen = names[:: max(1, len(names) // CLASSES)][:CLASSES]
    # val_batches takes evenly spaced ones; all of them in order, that is one for each label.
    every = pictures(path, size)
    kept = [i for i, label in enumerate(labels) if label in chosen]
    return every[kept].float() / 255, torch.tensor([chosen.index(labels[i]) for i in kept])


def mean_psnr(tok: Tokenizer, tokens: Any, images: Tensor) -> float:
    return psnr(tok.decode(tokens, batch_size=128), images).mean().item()


def mean_colour(images: Tensor) -> float:
    """PSNR of each picture's own mean colour, dB, the mean over pictures."""
    return psnr(reduce(images, "b c h w -> b c 1 1", "mean").expand_as(images), images).mean().item()


# What is said of the runs


def check_learned(study: str, runs: Runs) -> None:
    for arm, found in runs.items():
        for seed, run in enumerate(found):
            above = full_psnr(run) - run["mean_colour"]
            if above < LEAST:
                raise ValueError(
                    f"{study}, {arm}, seed {seed}: {above:.2f} dB above the mean colour, {LEAST:g} are wanted: it has "
                    "not learned, so nothing follows from it; train for more --steps"
                )


def full_psnr(run: dict[str, float]) -> float:
    """The last of the PSNRs is that at full length."""
    return [value for key, value in run.items() if key.startswith("psnr")][-1]


def paired(runs: Runs, one: str, other: str, value: Callable[[dict[str, float]], float]) -> list[float]:
    """value of ``one`` less that of ``other``, for each seed."""
    return [value(a) - value(b) for a, b in zip(runs[one], runs[other], strict=True)]


def spread(values: list[float]) -> str:
    """Mean and sample deviation."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def report(study: str, runs: Runs, claims: list[Claim]) -> str:
    """Markdown: what each arm came to, then what follows, both as mean and deviation over the seeds."""
    keys = [key for key in next(iter(runs.values()))[0] if key != "mean_colour"]
    above = {arm: [full_psnr(run) - run["mean_colour"] for run in found] for arm, found in runs.items()}
    rows = [
        [f"{study}, {arm}", *(spread([run[key] for run in found]) for key in keys), spread(above[arm])]
        for arm, found in runs.items()
    ]
    told = [[c.what, spread(c.values), c.wanted, {None: "", True: "met", False: "missed"}[c.holds]] for c in claims]
    seeds = len(claims[0].values)
    return "\n\n".join(
        [table(["", *keys, "dB above mean colour"], rows), table([f"{seeds} seeds", "found", "target", ""], told)]
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def plot(runs: Runs, path: Path) -> None:
    """PSNR against tokens, an arm a line. Nothing where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib, so no plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = [key for key in runs["0%"][0] if key.startswith("psnr@")]
    lengths = [int(key.removeprefix("psnr@")) for key in keys]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (arm, found), colour in zip(runs.items(), ("0.45", "#009E73", "#0072B2", "#D55E00"), strict=True):
        columns = [[run[key] for run in found] for key in keys]
        axes.plot(lengths, list(map(statistics.fmean, columns)), "o-", color=colour, label=arm)
        axes.fill_between(lengths, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.2, lw=0)
    axes.axhline(runs["0%"][0]["mean_colour"], color="0.7", ls=":", label="mean colour")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set(xlabel="tokens decoded", ylabel="PSNR, dB")
    axes.legend(title="images shortened", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda target: figure.savefig(target, dpi=130, format="png"))
    pyplot.close(figure)


if __name__ == "__main__":
    main()
