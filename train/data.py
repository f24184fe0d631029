"""Batches for training, in an order that a run can resume exactly, and the views of images that they are made of.

Batch i is a pure function of (seed, i): which images, which crops, which flips. A run that stops after batch i goes on
with batch i + 1, bitwise the same whatever the number of workers. The webdataset reader is not used since its streaming
shuffle depends on what was read before, so that it cannot resume at an exact sample.

Letters: b batch, h w height and width, s the side of a training image.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenizers_vis.images import ImageError, load_image, to_pil
from tokenizers_vis.sources import ImageSource

ATTEMPTS = 10
# What a random stream is for; the first word after the seed, so that no two streams are ever the same.
_ORDER, _VIEW, _REPLACE = range(3)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run learns from.

    train, val: folder or shards as ``open_source`` reads them; an empty ``val`` is no validation.
    crop: range of the random-resized crop's area, as a part of the image's. flip: chance of a mirror image.
    square: crops are squares, and ``crop`` is the range of their side, as a part of the image's shorter side. (1, 1) is
        "resize the shorter side, crop at random", in which TiTok and others train; nothing is ever stretched.
    workers: processes that decode; 0 decodes in the training process. val_images: how many images to validate on.
    """

    train: str = ""
    val: str = ""
    crop: tuple[float, float] = (0.6, 1.0)
    square: bool = False
    flip: float = 0.5
    workers: int = 2
    val_images: int = 256

    def __post_init__(self) -> None:
        _check_views(self.crop, self.flip, self.workers)
        _check_whole(1, val_images=self.val_images)


class Batch(NamedTuple):
    """data: b 3 s s, uint8. skipped: names of images that could not be read; others took their place."""

    data: Tensor
    skipped: list[str]


class _Batches(Dataset[Batch | ValueError]):
    """Batch number -> batch. An error is returned, not raised: the loader would bury its message in a traceback."""

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        batch_size: int,
        seed: int,
        crop: tuple[float, float],
        flip: float,
        rows: range,
        square: bool = False,
    ) -> None:
        self.source, self.image_size, self.batch_size, self.rows = source, image_size, batch_size, rows
        self.seed, self.crop, self.flip, self.square = seed, crop, flip, square
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, number: int) -> Batch | ValueError:
        images = np.empty((len(self.rows), self.image_size, self.image_size, 3), dtype=np.uint8)
        skipped: list[str] = []
        try:
            for place, row in enumerate(self.rows):
                images[place] = self._view(number * self.batch_size + row, skipped)
        except ValueError as error:
            return error
        return Batch(rearrange(torch.from_numpy(images), "b h w c -> b c h w").contiguous(), skipped)

    def _random(self, *words: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *words))

    def _index(self, sample: int) -> int:
        """Which image sample j of the endless stream shows: every image once per epoch."""
        epoch, place = divmod(sample, len(self.source))
        if self._order[0] != epoch:
            self._order = (epoch, self._random(_ORDER, epoch).permutation(len(self.source)))
        return int(self._order[1][place])

    def _view(self, sample: int, skipped: list[str]) -> np.ndarray:
        """h w 3, uint8: a random crop of sample j, or of another image when that one is broken."""
        index = self._index(sample)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                picture = _decode(self.source.read(index), self.image_size, self.crop[0] ** (1 + self.square))
            except (ImageError, OSError) as error:
                skipped.append(self.source.names[index])
                reason = error
                index = int(self._random(_REPLACE, sample, attempt).integers(len(self.source)))
                continue
            random = self._random(_VIEW, sample)
            box = (random_square if self.square else random_box)(random, *picture.size, self.crop)
            view = np.asarray(picture.resize((self.image_size,) * 2, Image.Resampling.BICUBIC, box=box))
            return view[:, ::-1] if random.random() < self.flip else view
        raise ValueError(
            f"{ATTEMPTS} images in a row cannot be read, the last {skipped[-1]} ({reason}); "
            "the data are broken: check the disk and copy them again"
        )


class TrainBatches(Iterator[Batch]):
    """An endless stream of random-resized, randomly flipped batches. ``position`` is the number of the next one.

    source: the images. image_size: s, in pixels. batch_size: b. seed: 0 or more. start: the first batch number.
    crop, square, flip, workers: see ``DataConfig``; the aspect ratio of a crop that is no square is 3/4 to 4/3.
    rank, world: this process gets its b / world rows of each batch; together they see what one process would.

    To resume, save ``position`` and ``source.fingerprint``, and pass the one as ``start`` when the other is the same.
    ``close`` (or a ``with`` block) ends the workers; a later ``next`` starts new ones at ``position``.
    Raises ``ValueError`` for options out of range, and from ``next`` when 10 images in a row cannot be read.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        crop: tuple[float, float] = DataConfig.crop,
        flip: float = DataConfig.flip,
        workers: int = DataConfig.workers,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        square: bool = DataConfig.square,
    ) -> None:
        _check_views(crop, flip, workers)
        _check_whole(1, image_size=image_size, batch_size=batch_size)
        _check_whole(0, seed=seed, start=start)
        self.workers, self.position = workers, start
        if not 0 <= rank < world or batch_size % world:
            raise ValueError(
                f"rank is from 0 to below world, which divides batch_size; got {rank}, {world}, {batch_size}"
            )
        share = batch_size // world
        rows = range(rank * share, (rank + 1) * share)
        self._batches = _Batches(source, image_size, batch_size, seed, crop, flip, rows, square)
        self._running: Any = None  # the iterator of a loader, while there is one

    @classmethod
    def of(cls, source: ImageSource, data: DataConfig, **where: int) -> TrainBatches:
        """As ``data`` says. where: the other options."""
        return cls(source, crop=data.crop, square=data.square, flip=data.flip, workers=data.workers, **where)

    def __next__(self) -> Batch:
        if self._running is None:
            with _hold_interrupts():
                self._running = iter(self._loader())
        batch = next(self._running)
        if isinstance(batch, ValueError):
            self.close()
            raise batch
        self.position += 1
        return batch

    def _loader(self) -> DataLoader[Batch | ValueError]:
        return DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(self.position, sys.maxsize),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_init_worker,
            # A loader draws a seed when it starts; from its own generator, so that the model's draws do not shift.
            generator=torch.Generator(),
        )

    def close(self) -> None:
        """Ends the worker processes now."""
        running, self._running = self._running, None
        if running is not None and self.workers:
            # The loader has no public way to stop; waiting for its last reference fails while a traceback holds one.
            running._shutdown_workers()

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def val_batches(source: ImageSource, image_size: int, count: int, batch_size: int) -> Iterator[Tensor]:
    """``count`` images evenly spaced over the source, always the same ones: b 3 s s, uint8, the last batch smaller.

    Each has its shorter side resized to ``image_size`` (bicubic, antialiased) and its centre cropped. A broken image is
    left out with a warning. Raises ``ValueError`` for options out of range, and when no image can be read.
    """
    _check_whole(1, image_size=image_size, count=count, batch_size=batch_size)
    return _val_batches(source, image_size, min(count, len(source)), batch_size)


def _val_batches(source: ImageSource, size: int, count: int, batch_size: int) -> Iterator[Tensor]:
    views: list[np.ndarray] = []
    readable = 0
    for k in range(count):
        index = k * len(source) // count
        try:
            views.append(_centre(_decode(source.read(index)), size))
        except (ImageError, OSError) as error:
            warnings.warn(f"left out of validation: {source.names[index]}: {error}", stacklevel=2)
        else:
            readable += 1
        if views and (len(views) == batch_size or k == count - 1):
            yield rearrange(torch.from_numpy(np.stack(views)), "b h w c -> b c h w").contiguous()
            views = []
    if not readable:
        raise ValueError(f"none of {count} validation images can be read; the data are broken: copy them again")


def random_box(
    random: np.random.Generator, width: int, height: int, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop, drawn as torchvision's ``RandomResizedCrop.get_params`` does.

    The area is uniform in ``area`` times the image's, the log of the aspect ratio uniform from 3/4 to 4/3; after ten
    draws that do not fit, the largest centred box whose aspect ratio is allowed.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        target = width * height * random.uniform(*area)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_square(
    random: np.random.Generator, width: int, height: int, side: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random square crop, whose side is in ``side`` times the image's shorter side.

    What is uniform is the size to which the image is scaled before it is cropped, 1 / side, as in ADM and LlamaGen.
    """
    short = min(width, height)
    s = min(short, max(1, round(short / random.uniform(1 / side[1], 1 / side[0]))))
    left, top = int(random.integers(width - s + 1)), int(random.integers(height - s + 1))
    return left, top, left + s, top + s


def _decode(data: bytes, image_size: int = 0, smallest: float = 1.0) -> Image.Image:
    """RGB, upright. With an ``image_size``, a JPEG much larger than that is decoded at 1/2, 1/4 or 1/8 of its size.

    smallest: the least part of the area that a crop may keep. Raises ``ImageError``.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        # The short side of the smallest crop. Twice the pixels needed remain, so that bicubic still has the last word.
        short = min(*picture.size, math.sqrt(smallest * picture.width * picture.height * 3 / 4))
        if image_size and short > 4 * image_size:
            scale = 2 * image_size / short
            picture.draft(None, (math.ceil(picture.width * scale), math.ceil(picture.height * scale)))
        return to_pil(load_image(picture))
    except ImageError:
        raise
    except Exception as error:  # on broken bytes PIL's readers raise OSError, SyntaxError, struct.error and more
        raise ImageError(f"cannot decode the image: {error}") from error


def _centre(picture: Image.Image, size: int) -> np.ndarray:
    """h w 3, uint8: the shorter side resized to ``size``, the centre kept."""
    short = min(picture.size)
    width, height = (max(size, round(side * size / short)) for side in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


@contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block; workers forked inside never see them, not even early on."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; the training process ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """Only the training process' own SIGTERM ends a worker; ``timeout`` and job schedulers send it to all processes.

    A worker that it ended would take the training process down before the last checkpoint is written.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _check_whole(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is a whole number, {least} or more; got {value!r}")


def _check_views(crop: tuple[float, float], flip: float, workers: int) -> None:
    if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
        raise ValueError(f"crop is the range of the crop's area, 0 < low <= high <= 1; got {crop!r}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip is a chance from 0 to 1, got {flip!r}")
    _check_whole(0, workers=workers)
