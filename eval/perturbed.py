"""The pFID of a benchmark: each tokenizer's ids are perturbed and decoded again, and the features kept as rows.

What a perturbation is says ``perturbation``. A picture that is not among the share of the perturbed ones is its plain
reconstruction. So each rate and strength is decoded once, at the largest share, and the set of a smaller share is put
together from those pictures and the plain ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_vis.eval.benchmark import ORIGINALS, Shard, Task, folder_of, ids_array
from tokenizers_vis.eval.examples import FOLDER, chosen_pictures
from tokenizers_vis.eval.features import FeatureNet
from tokenizers_vis.eval.journal import Array, Journal, Stored, finite, read_rows
from tokenizers_vis.eval.judges import PictureJudge
from tokenizers_vis.eval.perturbation import Grid, Setting, is_perturbed, neighbourhoods, perturbed_tokens
from tokenizers_vis.eval.protocol import Stamp
from tokenizers_vis.eval.set_distance import SetDistance
from tokenizers_vis.eval.tokenizer_method import TokenizerMethod
from tokenizers_vis.files import write_atomically

SEED = 0
SHOWN = 2  # pictures of each perturbation that are kept to be shown
_SEARCHED = 512  # pictures whose ids are perturbed together: neighbours in a table are searched on every call
_CHUNK = 1024
_NEAR = "neighbourhoods.json"


def passes(description: Mapping[str, Any], grid: Grid) -> list[tuple[float, int]]:
    """The rates and strengths that are decoded for a method; none where ``why_not`` has a reason."""
    return [] if why_not(description, grid) else [(rate, size) for rate in grid.rates for size in grid.strengths]


def why_not(description: Mapping[str, Any], grid: Grid) -> str:
    """Why a method's ids cannot be perturbed so; "" when they can."""
    sizes = description.get("codebook_sizes")
    if not sizes:
        return "no ids to perturb"
    if min(sizes) < max(grid.strengths):
        return f"a codebook of {min(sizes)} codes has no {max(grid.strengths)} nearest ones"
    return ""


def ticks(methods: int, task: Task, shard: Shard, grid: Grid) -> int:
    """How many ticks ``perturb`` makes for so many methods."""
    return len(range(shard.index, len(task.suite), shard.count)) * methods * len(grid.rates) * len(grid.strengths)


def perturb(
    method: TokenizerMethod,
    task: Task,
    out: Path,
    shard: Shard,
    grid: Grid,
    *,
    batch_size: int = 8,
    examples: int = 2,
    tick: Callable[[str, int], None] = lambda what, n: None,
) -> None:
    """Decodes what is not decoded yet, of this shard's pictures; their reconstructions are there already.

    tick: is called with a number of pictures, ``ticks`` in all. Raises ``ValueError`` for a codebook
    that is too large to be searched.
    """
    import torch

    from tokenizers_vis.tokens import Tokens

    suite, judge = task
    folder, description = folder_of(out, suite.name, method.label), method.describe()
    todo = passes(description, grid)
    rows = {row["i"]: row for row in read_rows(folder) if row["i"] % shard.count == shard.index}
    mine = [i for i in sorted(rows) if is_perturbed(i, max(grid.shares), SEED)]
    shown = sorted(chosen_pictures(len(suite), 2 * examples))[:SHOWN]
    count, tok = len(range(shard.index, len(suite), shard.count)), method.source.get()
    if todo:
        near = {"neighbourhoods": neighbourhoods(tok)}
        write_atomically(folder / _NEAR, json.dumps(near).encode())
        ids = Stored(folder, "ids", ids_array(description))
    else:
        tick(f"{suite.name}: {method.label}", count * len(grid.rates) * len(grid.strengths))
    for rate, strength in todo:
        where = _folder(folder, rate, strength)
        what = f"{suite.name}: {method.label}, rate {rate:g}, strength {strength}"
        with Journal(where / f"{shard}.jsonl", judge.arrays) as journal:
            done = {row["i"] for row in read_rows(where)}
            waiting = [i for i in mine if i not in done]
            tick(what, count - len(waiting))
            for part in _split(waiting, _SEARCHED):
                plain = torch.from_numpy(ids.at(part)).reshape(len(part), description["tokens"], -1)
                tokens = Tokens(plain, tok.codebook_sizes, tok.codes)
                tokens = perturbed_tokens(tok, tokens, rate, 1.0, strength, SEED, indices=part)
                for start in range(0, len(part), batch_size):
                    numbers = part[start : start + batch_size]
                    sizes = [(rows[i]["height"], rows[i]["width"]) for i in numbers]
                    names = [rows[i]["image"] for i in numbers]
                    pictures = method.decode(tokens[start : start + batch_size], sizes, names)
                    for i, picture in zip(numbers, pictures, strict=True):
                        if i in shown:
                            _save(where / FOLDER / f"{i}.png", picture)
                    journal.append([{"i": i} for i in numbers], judge.features(pictures))
                    tick(what, len(numbers))


def missing_perturbed(methods: Sequence[str], task: Task, out: Path, grid: Grid) -> dict[str, int]:
    """For each method's label the perturbed pictures that no process has decoded yet; its plain ones are all there."""
    found = {}
    for label in methods:
        folder = folder_of(out, task.suite.name, label)
        wanted = {row["i"] for row in read_rows(folder) if is_perturbed(row["i"], max(grid.shares), SEED)}
        for rate, strength in passes(_description(folder), grid):
            done = {row["i"] for row in read_rows(_folder(folder, rate, strength))}
            if left := len(wanted - done):
                found[label] = found.get(label, 0) + left
    return found


def stamp_of(grid: Grid, plain: Stamp, net: FeatureNet) -> Stamp:
    """That of a number which is the mean over the grid; plain: of the reconstructions without a net."""
    extra = {**plain.extra, "resize": net.resize, "perturbed": {**asdict(grid), "seed": SEED}}
    return replace(plain, features=net.name, feature_hash=net.sha256, extra=extra)


def perturbed_scores(
    label: str, task: Task, out: Path, grid: Grid, names: Mapping[int, str], plain: Stamp
) -> dict[str, Any]:
    """What came of it: ``means``, metric -> number; ``settings``, with the numbers of each; ``neighbourhoods``.

    names: of the pictures, by number. plain: the stamp of the reconstructions. Computed once for a stamp.
    Or ``reason``, why there is none.
    """
    suite, judge = task
    folder = folder_of(out, suite.name, label)
    if reason := why_not(_description(folder), grid) or ("fewer than 2 pictures" if len(names) < 2 else ""):
        return {"reason": reason}
    assert isinstance(judge, PictureJudge)
    settings = [{**setting._asdict(), "values": {}} for setting in grid]
    for net in judge.nets.values():
        path = folder / f"perturbed-{net.name}-{stamp_of(grid, plain, net).key()[:16]}.json"
        if not path.is_file():
            values = [_distance(suite.name, folder, out, net, setting, names) for setting in grid]
            write_atomically(path, json.dumps(finite(values)).encode())
        for one, value in zip(settings, json.loads(path.read_text(encoding="utf-8")), strict=True):
            one["values"][metric_of(net)] = value
    means = {key: math.fsum(one["values"][key] for one in settings) / len(settings) for key in settings[0]["values"]}
    near = json.loads((folder / _NEAR).read_text(encoding="utf-8"))["neighbourhoods"]
    shown = sorted({path.name for size in grid.strengths for path in (_folder(folder, 1.0, size) / FOLDER).glob("*")})
    return {"means": means, "settings": settings, "neighbourhoods": near, "seed": SEED, "shown": shown}


def metric_of(net: FeatureNet) -> str:
    """ "pfid", or "pfd_mobilenetv2"."""
    return "p" + net.metric("fd")


def shown_at(folder: Path, rate: float, strength: int, name: str) -> Path:
    """Where a picture that is shown of a perturbation lies. folder: of the method's rows."""
    return _folder(folder, rate, strength) / FOLDER / name


def _distance(
    suite: str, folder: Path, out: Path, net: FeatureNet, setting: Setting, names: Mapping[int, str]
) -> float:
    from torch import from_numpy

    array = Array(net.dim)
    originals, plain = (Stored(where, net.name, array) for where in (folder_of(out, suite, ORIGINALS), folder))
    changed = Stored(_folder(folder, setting.rate, setting.strength), net.name, array)
    gathered = SetDistance(net)
    for numbers in _split(sorted(names), _CHUNK):
        after = np.empty((len(numbers), net.dim), dtype=np.float32)
        hit = np.array([is_perturbed(i, setting.share, SEED) for i in numbers])
        for stored, rows in ((changed, hit), (plain, ~hit)):
            after[rows] = stored.at([i for i, row in zip(numbers, rows, strict=True) if row])
        gathered.update(from_numpy(originals.at(numbers)), from_numpy(after), [names[i] for i in numbers])
    return gathered.frechet()


def _folder(folder: Path, rate: float, strength: int) -> Path:
    return folder / f"perturbed-{rate}-{strength}-{SEED}"


def _description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "method.json").read_text(encoding="utf-8"))


def _save(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, Image.fromarray(picture).save)


def _split(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
