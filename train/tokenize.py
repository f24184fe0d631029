"""Shards of images -> shards of ids, once, so that a generator trains without the tokenizer. See docs/tokenize.md.

What is done is not done again: a shard that is there, whole and of the same images, is passed over. Several processes
share the work, each with its shards. Letters: b batch, c crops of an image, s the tokenizer's image size.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from tokenizers_vis.decoders.canvas import Resize, fit
from tokenizers_vis.images import ImageError, load_image
from tokenizers_vis.sources import ImageSource, open_source
from tokenizers_vis.token_shards import Origin, begin, codes_hash, is_finished, write_shard
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.data import random_box


@dataclass(frozen=True, kw_only=True)
class Crops:
    """What is cut out of an image before it is tokenized.

    kind: "center" is what ``Tokenizer.encode`` sees. "center-flip" is that and its mirror image. "ten-crop" is
        LlamaGen's (https://arxiv.org/abs/2406.06525): the image at ``enlarge`` times the size, its four corners and its
        middle, and the mirror images of these five. "random-K" is K boxes of ``area`` to all of the image's area and
        an aspect of 3/4 to 4/3, scaled to a square, each mirrored or not; drawn from the image's name, so that they are
        the same on every machine.
    """

    kind: str = "center"
    enlarge: float = 1.1
    area: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        number = self.kind.removeprefix("random-")
        known = self.kind in ("center", "center-flip", "ten-crop")
        if not known and not (self.kind.startswith("random-") and number.isdecimal() and 1 <= int(number) <= 1000):
            raise ValueError(
                f"crops are center, center-flip, ten-crop or random-K, such as random-8; got {self.kind!r}"
            )
        if not 1 <= self.enlarge <= 4 or not 0 < self.area <= 1 or self.seed < 0:
            raise ValueError(
                f"enlarge is from 1 to 4, area above 0 and at most 1, seed at least 0; got {self.enlarge}, {self.area} "
                f"and {self.seed}"
            )

    def __len__(self) -> int:
        known = {"center": 1, "center-flip": 2, "ten-crop": 10}
        return known[self.kind] if self.kind in known else int(self.kind.removeprefix("random-"))

    def record(self, size: int, how: Resize) -> dict[str, Any]:
        """Plain values that say all of it, and nothing that does not matter for this kind."""
        used: dict[str, Any] = {"kind": self.kind, "crops": len(self), "image_size": size, "resize": how}
        if self.kind == "ten-crop":
            used["enlarge"] = self.enlarge
        if self.kind.startswith("random-"):
            used |= {"area": self.area, "seed": self.seed}
        return used

    def cut(self, image: Tensor, key: str, size: int, how: Resize) -> Tensor:
        """image: 3 h w, uint8 or float in [0, 1] -> c 3 s s, float32 in [0, 1]."""
        if self.kind == "center":
            return fit(image, size, how)[None]
        if self.kind == "center-flip":
            middle = fit(image, size, how)
            return torch.stack([middle, middle.flip(-1)])
        if self.kind == "ten-crop":
            large = fit(image, int(size * self.enlarge), how)
            end = large.shape[-1] - size
            # The order is that of torchvision's TenCrop, and so is the rounding.
            places = [(0, 0), (0, end), (end, 0), (end, end), (round(end / 2), round(end / 2))]
            both = (large, large.flip(-1))
            return torch.stack([x[:, top : top + size, left : left + size] for x in both for top, left in places])
        random = np.random.default_rng((self.seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")))
        views = []
        for _ in range(len(self)):
            left, top, right, bottom = random_box(random, image.shape[-1], image.shape[-2], (self.area, 1.0))
            view = fit(image[:, top:bottom, left:right], size, "exact")
            views.append(view.flip(-1) if random.random() < 0.5 else view)
        return torch.stack(views)


class Done(NamedTuple):
    """What a call of ``tokenize`` did.

    shards: made now. before: of this process's shards, those that were there. images: in those made now.
    skipped: name -> reason of images that cannot be read, in those made now.
    """

    shards: int
    before: int
    images: int
    skipped: dict[str, str]


def tokenize(
    data: str,
    out: str | Path,
    tok: Tokenizer,
    *,
    n_tokens: int | None = None,
    crops: Crops | None = None,
    resize: Resize | None = None,
    classes: Sequence[str] = (),
    batch_size: int = 32,
    part_size: int = 10_000,
    workers: int = 2,
    shard: tuple[int, int] = (0, 1),
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Done:
    """Writes the ids of all images of ``data`` into the folder ``out``; ``TokenShards`` reads them.

    data: as ``open_source`` takes it. One shard for each tar, or for every ``part_size`` images.
    n_tokens: of each image, None is all. resize: None is the tokenizer's own.
    classes: names in the order of their numbers; () takes those of the data, such as the sub-folders in order.
    batch_size: crops at a time. workers: threads that read and decode images.
    shard: (I, N), only every N-th shard of images, from the I-th, counted from 0.
    tick: called with the shard's name, and how many images are done of this process's, after every batch.

    Raises ``ValueError`` for a continuous tokenizer, a folder that was made in another way, a label without its class,
    and data of which nothing can be read.
    """
    crops = crops or Crops()
    index, count = shard
    if min(batch_size, part_size, workers) < 1 or not 0 <= index < count:
        raise ValueError(
            f"batch_size, part_size and workers are at least 1, shard is (I, N) with I from 0 to N - 1; got "
            f"{batch_size}, {part_size}, {workers} and {shard}"
        )
    if tok.continuous:
        raise ValueError(f"{tok.name} has continuous tokens: there are no ids to write; choose one with a codebook")
    how = resize or tok.canvas.resize
    # A first image, before anything is written: n_tokens and resize may be wrong.
    n = tok.encode(torch.zeros(3, tok.canvas.read_size, tok.canvas.read_size), n_tokens, resize=how).n_tokens
    source = open_source(data)
    classes = tuple(classes) or source.classes
    origin = Origin(
        tokenizer=tok.codes,
        hash=codes_hash(tok),
        codebook_sizes=tok.codebook_sizes,
        nested=tok.nested,
        n_tokens=n,
        augmentation=crops.record(tok.canvas.read_size, how),
        classes=classes,
    )
    folder, everything = Path(out), source.parts(part_size)
    begin(folder, origin, [part.name for part in everything])
    parts = everything[index::count]
    waiting = [part for part in parts if not is_finished(folder, part)]
    total = sum(part.stop - part.start for part in parts)
    done = total - sum(part.stop - part.start for part in waiting)
    tick("", done, total)
    step = max(1, batch_size // len(crops))
    ranges = [range(i, min(i + step, part.stop)) for part in waiting for i in range(part.start, part.stop, step)]
    images, all_skipped = 0, {}

    def look(job: range) -> list[Tensor | str]:
        return [_view(source, i, crops, tok.canvas.read_size, how) for i in job]

    with closing(_ahead(look, ranges, workers)) as ready:
        for part in waiting:
            numbers = [_number(label, classes) for label in source.labels(part.start, part.stop)]
            found, skipped = [], {}
            kept: list[int] = []
            for job, views in ready:
                for i, view in zip(job, views, strict=True):
                    if isinstance(view, Tensor):
                        kept.append(i)
                    else:
                        skipped[source.names[i]] = view
                if readable := [view for view in views if isinstance(view, Tensor)]:
                    tokens = tok.encode(torch.cat(readable), n_tokens, resize=how, batch_size=batch_size)
                    found.append(rearrange(tokens.ids.cpu(), "(i c) n k -> i c n k", c=len(crops)))
                done += len(job)
                tick(part.name, done, total)
                if job.stop == part.stop:
                    break
            shape = (0, len(crops), n, len(tok.codebook_sizes))
            write_shard(
                folder,
                origin,
                part,
                keys=[source.names[i] for i in kept],
                ids=torch.cat(found) if found else torch.empty(shape, dtype=torch.int64),
                labels=[numbers[i - part.start] for i in kept],
                skipped=skipped,
            )
            images += len(kept)
            all_skipped |= skipped
    if all_skipped and waiting == parts and not images:
        name, reason = next(iter(all_skipped.items()))
        raise ValueError(f"none of {len(all_skipped)} images can be read, the first of them {name}: {reason}")
    return Done(len(waiting), len(parts) - len(waiting), images, all_skipped)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Names of classes in the order of their numbers: a JSON list of names, or a name a line. Raises ``ValueError``."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix != ".json":
        names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            names = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds no classes: a JSON list of names is wanted, or a text with a name a line")
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names a class twice: {next(name for name in names if names.count(name) > 1)}")
    return tuple(names)


def _number(label: int | str | None, classes: Sequence[str]) -> int:
    """The number of a class, -1 for none."""
    if label is None:
        return -1
    if isinstance(label, int):
        if label < -1 or (classes and label >= len(classes)):
            raise ValueError(f"the data hold the label {label}; there are classes 0 to {len(classes) - 1}, -1 is none")
        return label
    if label not in classes:
        named = f"it is none of the {len(classes)} classes" if classes else "labels that are names need a list of them"
        raise ValueError(f"the data hold the label {label!r}: {named}; give a file of names with --classes")
    return classes.index(label)


def _view(source: ImageSource, i: int, crops: Crops, size: int, how: Resize) -> Tensor | str:
    """c 3 s s, or why the image cannot be read."""
    try:
        with Image.open(io.BytesIO(source.read(i))) as opened:
            image = load_image(opened)
    except ImageError as error:
        return str(error)
    except Exception as error:  # on broken bytes PIL's readers raise OSError, SyntaxError, struct.error and more
        return f"cannot be decoded: {error}"
    return crops.cut(image, source.names[i], size, how)


def _ahead(
    work: Callable[[range], list[Tensor | str]], jobs: Sequence[range], workers: int
) -> Iterator[tuple[range, list[Tensor | str]]]:
    """Each job with its result, in order; ``workers`` threads are at the next ones meanwhile."""
    # Threads, since decoding and resizing let go of the interpreter; nothing has to be copied between processes.
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[tuple[range, Future[list[Tensor | str]]]] = deque()
        try:
            for job in jobs:
                under_way.append((job, pool.submit(work, job)))
                if len(under_way) > 2 * workers:
                    first, future = under_way.popleft()
                    yield first, future.result()
            while under_way:
                first, future = under_way.popleft()
                yield first, future.result()
        finally:
            for _, future in under_way:
                future.cancel()
