"""Reconstructions that another program made, in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_vis.eval.method import Method, Reconstruction, check_images, some_of
from tokenizers_vis.images import find_images, load_image, to_pil


class FolderMethod(Method):
    """Reconstructions made elsewhere, named as their originals; the suffix may be another.

    A lossy file (.jpg) has a loss of its own, which counts as the method's: better hand in PNG.
    """

    kind = "folder"

    def __init__(self, label: str, folder: str | Path) -> None:
        self.label, self.folder = label, Path(folder)
        self._by_name: dict[str, Path] = {}
        self._by_stem: dict[str, list[Path]] = {}

    def prepare(self, names: Sequence[str] = ()) -> None:
        if not self._by_name:
            if not self.folder.is_dir():
                raise ValueError(f"{self.label}: there is no folder {self.folder}")
            for path in find_images(self.folder):
                name = path.relative_to(self.folder)
                self._by_name[name.as_posix()] = path
                self._by_stem.setdefault(name.with_suffix("").as_posix(), []).append(path)
        missing = [name for name in names if self._find(name) is None]
        if missing:
            raise ValueError(
                f"{self.folder} lacks reconstructions of {len(missing)} of {len(names)} pictures: {some_of(missing)}. "
                f"It holds {some_of(list(self._by_name))}; name each as its original, the suffix may be another"
            )

    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        check_images(images, names)
        self.prepare(names)
        found = []
        for image, name in zip(images, names, strict=True):
            path = self._find(name)
            pixels = np.asarray(to_pil(load_image(path)))
            if pixels.shape != image.shape:
                (h, w), (height, width) = pixels.shape[:2], image.shape[:2]
                raise ValueError(f"{path} is {w} x {h}, its original {name} is {width} x {height}; scale it back first")
            found.append(Reconstruction(pixels, None, None, None, None))
        return found

    def describe(self) -> dict[str, Any]:
        self.prepare()
        suffixes = sorted({path.suffix.lower() for path in self._by_name.values()})
        return super().describe() | {"folder": str(self.folder), "images": len(self._by_name), "suffixes": suffixes}

    def _find(self, name: str) -> Path | None:
        # Pictures of a shard are named "val.tar/0001.jpg"; their reconstructions lie in no folder of that name.
        for asked in (name, "/".join(part for part in name.split("/") if not part.endswith(".tar"))):
            if asked in self._by_name:
                return self._by_name[asked]
            same = self._by_stem.get(str(Path(asked).with_suffix("").as_posix()), [])
            if len(same) > 1:
                raise ValueError(f"{self.label}: {name} could be any of {some_of([str(p) for p in same])}; keep one")
            if same:
                return same[0]
        return None
