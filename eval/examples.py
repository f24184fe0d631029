"""Pictures that a report shows, chosen as the rows come and kept as PNG: nothing has to be reconstructed again.

Of photographs the worst, the best and some that are the same for every method; of words and faces crops of some
instances of all sizes, the same for every method.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tokenizers_vis.eval.journal import Row
from tokenizers_vis.eval.suites import Boxed, Item, Suite
from tokenizers_vis.eval.text import crop
from tokenizers_vis.files import write_atomically

FOLDER = "examples"
_MARGIN = 0.25  # of a box's longer side, shown around it


class Examples:
    """``offer`` every picture before its row is written, ``tidy`` after it."""

    def __init__(self, folder: Path, originals: Path, suite: Suite, count: int, rows: Iterable[Row]) -> None:
        """folder, originals: of the method's rows, and of the originals'. rows: what is there already.

        count: of the worst and of the best; twice as many are the same for every method.
        """
        self._folder, self._originals, self._count = folder / FOLDER, originals / FOLDER, count
        self._boxed = isinstance(suite, Boxed)
        self._instances = chosen_instances(suite, 4 * count) if isinstance(suite, Boxed) else {}
        self._same = set() if self._boxed else chosen_pictures(len(suite), 2 * count)
        self._worst: list[tuple[float, int]] = []
        self._best: list[tuple[float, int]] = []
        self._gone: set[int] = set()
        if not self._boxed:
            for row in rows:
                self._rank(row)
        self._gone.clear()

    def offer(self, item: Item, picture: np.ndarray, row: Row) -> None:
        """picture: the reconstruction of the item, uint8 h w 3, of its size."""
        if self._boxed:
            for index in self._instances.get(item.i, ()):
                box = _around(item.boxes[index].box)
                self._save(f"{item.i}-{index}.png", crop(item.pixels, box), crop(picture, box))
        elif self._rank(row) or item.i in self._same:
            self._save(f"{item.i}.png", item.pixels, picture)

    def tidy(self) -> None:
        """Deletes what is no longer among the worst or the best."""
        for i in self._gone - self._same:
            (self._folder / f"{i}.png").unlink(missing_ok=True)
        self._gone.clear()

    def _rank(self, row: Row) -> bool:
        """Whether the row is among the worst or the best so far."""
        i = row["i"]
        for heap, value in ((self._worst, row["mse"]), (self._best, -row["mse"])):
            if len(heap) < self._count:
                heapq.heappush(heap, (value, -i))
            elif heap:
                self._gone.add(-heapq.heappushpop(heap, (value, -i))[1])
        held = {-j for heap in (self._worst, self._best) for _, j in heap}
        self._gone -= held
        return i in held

    def _save(self, name: str, original: np.ndarray, picture: np.ndarray) -> None:
        from PIL import Image

        for folder, pixels in ((self._originals, original), (self._folder, picture)):
            if folder is self._originals and (folder / name).is_file():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, Image.fromarray(pixels).save)


def chosen_pictures(total: int, count: int) -> set[int]:
    """Evenly spaced numbers, the same for every method."""
    return {k * total // count for k in range(count)} if count else set()


def chosen_instances(suite: Boxed, count: int) -> dict[int, list[int]]:
    """Words or faces, evenly spaced from the smallest to the largest scale: number of the picture -> of its boxes."""
    pictures = suite.pictures.images
    boxes = [picture.words if suite.kind == "text" else picture.faces for picture in pictures]
    ranked = sorted((box.scale, i, k) for i, some in enumerate(boxes) for k, box in enumerate(some))
    found: dict[int, list[int]] = {}
    for place in sorted({round(j * (len(ranked) - 1) / max(1, count - 1)) for j in range(count)}):
        found.setdefault(ranked[place][1], []).append(ranked[place][2])
    return found


def _around(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    margin = _MARGIN * max(x1 - x0, y1 - y0)
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin
