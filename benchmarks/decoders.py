"""What decoders make of the same ids: by tokens, by steps, from coarse to fine, and against codecs of equal bytes.

    python benchmarks/decoders.py tokens mini TEACHER:steps=25 TEACHER:steps=4 STUDENT --data photos/val.tar
    python benchmarks/decoders.py steps TEACHER --data photos/val.tar --kept 8 64
    python benchmarks/decoders.py scales TEACHER --data photos/val.tar
    python benchmarks/decoders.py rate mini STUDENT --data photos/val.tar --size 128

A decoder is a preset, checkpoint or run folder, with sampling options behind a colon where it takes several passes:
runs/flow:steps=4,guidance=1.5,solver=heun; steps=6/2 is from coarse to fine. --net is a timm model in whose features
the distance and KD are measured. Pictures of smaller decoders are enlarged to the largest one's. Times are processor
time with --threads threads, the least of three calls. Prints markdown; --out FOLDER keeps it as STUDY.json, and a
picture beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from rich.progress import track
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.decoders.scales import cost
from tokenizers_vis.decoders.solvers import SOLVERS, evaluations
from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.codecs import CODECS, through_codec
from tokenizers_vis.eval.distances import kernel_distance
from tokenizers_vis.eval.features import feature_net
from tokenizers_vis.eval.metrics import psnr, ssim
from tokenizers_vis.eval.perceptual import perceptual
from tokenizers_vis.files import write_atomically
from tokenizers_vis.pictures import contact_sheet
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.train.data import val_batches

BATCH = 32
SHOWN = 5  # photographs in a picture
EVALUATIONS = (1, 2, 4, 6, 8, 12, 16, 25)
SIDES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 96)  # that codecs are tried at, beside the picture's own
QUALITIES = (1, 5, 10, 20, 30, 40, 50, 65, 80)


class Spec(NamedTuple):
    label: str
    tok: Tokenizer
    sampling: dict[str, Any]

    @property
    def passes(self) -> float:
        """Evaluations for one picture, weighted by pixels."""
        if self.tok.decoder.one_pass:
            return 1
        options = {"guidance": 1, "solver": "euler"} | self.tok.decoder.defaults | self.sampling
        return cost(options["steps"], options["solver"], guided=options["guidance"] != 1)

    def decode(self, tokens: Tokens, size: int) -> Tensor:
        """What a file of 8 bits would hold, b 3 size size in [0, 1]; another size is brought to it, bicubic."""
        made = self.tok.decode(tokens, batch_size=BATCH, **self.sampling)
        if made.shape[-1] != size:
            made = F.interpolate(made, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return (made * 255).round() / 255


class Judge:
    """Mean scores of reconstructions x of originals y, both n 3 h w in [0, 1]."""

    def __init__(self, net: str, weights: str) -> None:
        self.distance, self.features = perceptual(net, weights), feature_net(net, weights)
        self._real: dict[int, Tensor] = {}

    @torch.no_grad()
    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.distance(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)])

    @torch.no_grad()
    def kd(self, x: Tensor, y: Tensor) -> float:
        if id(y) not in self._real:
            self._real[id(y)] = self._features(y)
        return kernel_distance(self._real[id(y)], self._features(x), paired=True)

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.features(part) for part in x.split(BATCH)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("decoders", nargs="+", metavar="DECODER")
    parser.add_argument("--data", required=True, help="photographs to judge by: a folder, or .tar shards")
    parser.add_argument("--images", type=int, default=256, help="of them, evenly spaced (default: 256)")
    parser.add_argument("--net", default="mobilenetv2_100", help="a timm model (default: mobilenetv2_100)")
    parser.add_argument("--net-weights", default="", metavar="FILE", help="default: those of timm")
    parser.add_argument(
        "--kept", type=int, nargs="+", help="tokens (default: 1, 2, 4 ... all; of steps and scales: all)"
    )
    parser.add_argument("--size", type=int, default=128, help="rate: side of the photographs (default: 128)")
    parser.add_argument("--bytes", type=int, nargs="+", default=[50, 100, 200], help="rate: budgets of a picture")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where STUDY.json and a picture go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        decoders = [read(text) for text in options.decoders]
        judge = Judge(options.net, options.net_weights)
        rows, picture = STUDIES[options.study](decoders, judge, options)
    except ValueError as error:
        parser.error(str(error))
    print(table(rows))
    print(
        f"\n{options.images} pictures of {options.data}; distance and KD in the features of {judge.features.name} "
        f"(sha256 {judge.features.sha256[:16]}); torch {torch.__version__}, threads: {options.threads}"
    )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / f"{options.study}.json", json.dumps(rows, indent=1).encode())
        if picture is not None:
            path = options.out / f"{options.study}.png"
            write_atomically(path, lambda target: picture.save(target, format="png"))


def read(text: str) -> Spec:
    """Raises ``ValueError`` for what is no decoder, and options of one that has none."""
    # A path may hold a colon of its own.
    name, options = (text, "") if Path(text).exists() else (text.split(":", 1) + [""])[:2]
    tok = tv.load(name, "cpu")
    sampling: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        key, _, value = part.partition("=")
        sampling[key] = tuple(map(int, value.split("/"))) if "/" in value else number(value)
    if sampling and tok.decoder.one_pass:
        raise ValueError(f"{text}: {tok.name} decodes in one pass and has no {', '.join(sampling)}")
    return Spec(tok.name + (f" {options}" if options else ""), tok, sampling)


def number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# The studies: decoders -> rows of a table, and a picture


def by_tokens(decoders: list[Spec], judge: Judge, options: argparse.Namespace) -> tuple[list[dict], Any]:
    """Every decoder at every number of tokens."""
    size = max(spec.tok.image_size for spec in decoders)
    photos = pictures(options, size)
    codes = encoded(decoders, photos)
    lengths = lengths_of(decoders[0], options) if options.kept else powers_of_two(decoders[0].tok.max_tokens)
    rows, shown = [], {}
    for spec, n in track([(spec, n) for spec in decoders for n in lengths], "decoding"):
        tokens = codes[:, :n]
        made = spec.decode(tokens, size)
        shown[spec.label, n] = made[:SHOWN]
        rows.append(
            {
                "decoder": spec.label,
                "tokens": n,
                "passes": spec.passes,
                "PSNR": psnr(made, photos).mean().item(),
                "SSIM": ssim(made, photos).mean().item(),
                "distance": judge.distances(made, photos).mean().item(),
                "KD": judge.kd(made, photos),
                "ms a picture": 1000 * seconds(lambda spec=spec, part=tokens[:BATCH]: spec.decode(part, size)),
            }
        )
    kept = lengths[-4:]
    sheet = contact_sheet(
        [[*(shown[spec.label, n][i] for n in kept), photos[i]] for i in range(shown_of(photos)) for spec in decoders],
        columns=[*(f"{n} tokens" for n in kept), "original"],
        row_labels=[spec.label for _ in range(shown_of(photos)) for spec in decoders],
    )
    return rows, sheet


def by_steps(decoders: list[Spec], judge: Judge, options: argparse.Namespace) -> tuple[list[dict], Any]:
    """Every solver at growing numbers of evaluations, all at full size."""
    size = max(spec.tok.image_size for spec in decoders)
    photos = pictures(options, size)
    codes = encoded(decoders, photos)
    rows = []
    tried = [
        (spec, n, solver, steps)
        for spec in decoders
        for n in lengths_of(spec, options)
        for solver in SOLVERS
        for steps in sorted({max(1, count // (2 if solver == "heun" else 1)) for count in EVALUATIONS})
    ]
    for spec, n, solver, steps in track(tried, "solving"):
        made = spec._replace(sampling=spec.sampling | {"steps": steps, "solver": solver})
        drawn = made.decode(codes[:, :n], size)
        count = {"steps": steps, "evaluations": evaluations(steps, solver)}
        row = {"decoder": spec.label, "tokens": n, "solver": solver, **count, "PSNR": psnr(drawn, photos).mean().item()}
        rows.append(row | {"distance": judge.distances(drawn, photos).mean().item(), "KD": judge.kd(drawn, photos)})
    lines = {
        f"{row['solver']}, {row['tokens']} tokens": [r for r in rows if (r["solver"], r["tokens"]) == key]
        for row in rows
        for key in [(row["solver"], row["tokens"])]
    }
    return rows, plot(lines, "evaluations", "distance", "evaluations (as many again for guidance)")


def by_scales(decoders: list[Spec], judge: Judge, options: argparse.Namespace) -> tuple[list[dict], Any]:
    """Walks from coarse to fine against the cheapest walk at full size that comes as near."""
    size = max(spec.tok.image_size for spec in decoders)
    photos = pictures(options, size)
    codes = encoded(decoders, photos)
    rows = []
    for spec in decoders:
        scales = getattr(spec.tok.decoder, "sizes", ())
        if len(scales) < 2:
            raise ValueError(f"{spec.label} has one scale; train a flow decoder with scales = [32, 64]")
        full = [(steps,) for steps in EVALUATIONS]
        fine = [(coarse, *last) for coarse in (1, 2, 4, 8, 16, 24) for last in finer(len(scales) - 1)]
        for n in lengths_of(spec, options):
            found = []
            for steps in track([*full, *fine], f"{spec.label}, {n} tokens"):
                walk = steps if len(steps) > 1 else steps[0]
                made = spec._replace(sampling=spec.sampling | {"steps": walk})
                distance = judge.distances(made.decode(codes[:, :n], size), photos).mean().item()
                head = {"decoder": spec.label, "tokens": n, "steps": "/".join(map(str, steps))}
                found.append(head | {"evaluations": made.passes, "distance": distance})
            whole = found[: len(full)]
            for row in found:
                equal = [r["evaluations"] for r in whole if r["distance"] <= row["distance"]]
                rows.append(row | {"times fewer": min(equal) / row["evaluations"] if equal else None})
    return rows, None


def finer(count: int) -> Iterable[tuple[int, ...]]:
    return [(1,) * count, (2,) * count, (4,) * count]


def by_rate(decoders: list[Spec], judge: Judge, options: argparse.Namespace) -> tuple[list[dict], Any]:
    """The best that fits into a budget of bytes, headers counted: of each picture, of every codec and size.

    A codec's quality and size are chosen for each picture by the distance itself, which no encoder knows: the codecs
    are better here than in use. Tokens are as many as fit into a .tok file, decoded and enlarged by bicubic
    interpolation.
    """
    photos = pictures(options, options.size)
    rows: list[dict] = []
    shown: list[tuple[str, dict[int, Tensor]]] = []

    def tell(name: str, budget: int, sizes: list[int], made: Tensor, of: Tensor) -> None:
        scores = {"PSNR": psnr(made, of).mean().item(), "SSIM": ssim(made, of).mean().item()}
        head = {"method": name, "at most, bytes": budget, "bytes": sum(sizes) / len(sizes), "pictures": len(sizes)}
        rows.append(head | scores | {"distance": judge.distances(made, of).mean().item()})

    for spec in decoders:
        codes = spec.tok.encode(photos)
        fits: dict[int, Tensor] = {}
        for budget in options.bytes:
            files = [largest(codes[i : i + 1], budget) for i in range(len(codes))]
            made = torch.cat([spec.decode(tokens, options.size) for tokens, _ in files])
            tell(spec.label, budget, [size for _, size in files], made, photos)
            fits[budget] = made[:SHOWN]
        shown.append((spec.label, fits))
    for codec in CODECS:
        fits = {}
        for budget, files in smallest(codec, photos, judge, options).items():
            if files:
                made = torch.stack([picture for _, _, picture in files])
                tell(codec, budget, [size for _, size, _ in files], made, photos[[i for i, _, _ in files]])
                first = {i: picture for i, _, picture in files}
                fits[budget] = [first.get(i) for i in range(SHOWN)]
            else:
                rows.append({"method": codec, "at most, bytes": budget, "pictures": 0})
        if fits:
            shown.append((codec, fits))
    empty = [None] * SHOWN
    sheet = contact_sheet(
        [
            [*(fits.get(budget, empty)[i] for budget in options.bytes), photos[i]]
            for i in range(shown_of(photos))
            for _, fits in shown
        ],
        columns=[*(f"{budget} bytes" for budget in options.bytes), "original"],
        row_labels=[name for _ in range(shown_of(photos)) for name, _ in shown],
    )
    return sorted(rows, key=lambda row: row["at most, bytes"]), sheet


def largest(tokens: Tokens, budget: int) -> tuple[Tokens, int]:
    """The longest prefix whose file is of at most ``budget`` bytes, and the file's bytes."""
    for n in range(tokens.n_tokens, 0, -1):
        if (size := len(tokens[:, :n].to_bytes())) <= budget:
            return tokens[:, :n], size
    raise ValueError(f"no .tok file is of {budget} bytes: its header alone takes more")


def smallest(
    codec: str, photos: Tensor, judge: Judge, options: argparse.Namespace
) -> dict[int, list[tuple[int, int, Tensor]]]:
    """budget -> (number, bytes, picture) of the photographs that the codec brings below it at all, each at its best."""
    best: dict[int, list[tuple[int, int, Tensor]]] = {budget: [] for budget in options.bytes}
    pixels = rearrange((photos * 255).round().to(torch.uint8), "b c h w -> b h w c").numpy()
    sides = [*(side for side in SIDES if side < options.size), options.size]
    for i, picture in enumerate(track(pixels, codec)):
        coded = [through_codec(picture, codec, quality, side) for side in sides for quality in QUALITIES]
        coded = [one for one in coded if one.nbytes <= max(options.bytes)]
        if not coded:
            continue
        made = rearrange(torch.stack([torch.from_numpy(one.pixels) for one in coded]), "b h w c -> b c h w") / 255
        found = judge.distances(made, photos[i].expand_as(made)).tolist()
        for budget, chosen in best.items():
            fitting = [(distance, k) for k, distance in enumerate(found) if coded[k].nbytes <= budget]
            if fitting:
                _, k = min(fitting)
                chosen.append((i, coded[k].nbytes, made[k]))
    return best


Study = Callable[[list[Spec], Judge, argparse.Namespace], tuple[list[dict], Any]]
STUDIES: dict[str, Study] = {"tokens": by_tokens, "steps": by_steps, "scales": by_scales, "rate": by_rate}


# What they share


def pictures(options: argparse.Namespace, size: int) -> Tensor:
    """n 3 s s in [0, 1]."""
    source = open_source(options.data)
    return torch.cat(list(val_batches(source, size, options.images, BATCH))).float() / 255


def encoded(decoders: list[Spec], photos: Tensor) -> Tokens:
    """By the first one's encoder; the others share its codes, or refuse them."""
    return decoders[0].tok.encode(photos, batch_size=BATCH)


def shown_of(photos: Tensor) -> int:
    return min(SHOWN, len(photos))


def lengths_of(spec: Spec, options: argparse.Namespace) -> list[int]:
    return options.kept or [spec.tok.max_tokens]


def seconds(call: Callable[[], Tensor]) -> float:
    """Processor time of one picture of a batch."""
    found = []
    for _ in range(3):
        start = time.process_time()
        made = call()
        found.append((time.process_time() - start) / len(made))
    return min(found)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the columns are those of all rows together."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(heads)} |", "|" + "".join(" --- |" if i == 0 else " ---: |" for i in range(len(heads)))]
    lines += [f"| {' | '.join(cell(row.get(key)) for key in heads)} |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(lines: dict[str, list[dict[str, Any]]], x: str, y: str, label: str) -> Any:
    """One line each, as a PIL image; None where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    import io

    from PIL import Image

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    solvers = list(dict.fromkeys(row["solver"] for rows in lines.values() for row in rows))
    lengths = list(dict.fromkeys(row["tokens"] for rows in lines.values() for row in rows))
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for name, rows in lines.items():
        solver, length = rows[0]["solver"], rows[0]["tokens"]
        style = {"color": colours[solvers.index(solver)], "ls": ("-", "--", ":", "-.")[lengths.index(length) % 4]}
        axes.plot([row[x] for row in rows], [row[y] for row in rows], marker="o", ms=3, label=name, **style)
    axes.set(xlabel=label, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, dpi=130, format="png")
    pyplot.close(figure)
    return Image.open(file)


if __name__ == "__main__":
    main()
