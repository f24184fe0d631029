"""Encoded images by number, from folders or from WebDataset tar shards: indexed once, read at random."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import warnings
from collections.abc import Iterable
from glob import glob
from pathlib import Path

import numpy as np

from tokenizers_vis.images import ImageError, find_images

# In a shard other formats are as a rule labels (a .tif mask), not the image.
SHARD_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ImageSource:
    """A fixed sequence of encoded images: ``len``, ``names[i]``, ``read(i)``, ``fingerprint``. Pickles, forks, threads.

    names: unique, sorted; path below the nearest folder that holds the whole source, shards counted as folders.
    fingerprint: 16 hex digits over names and sizes; the same data give the same one, however the path was spelled.
    """

    def __init__(self, places: Iterable[tuple[str, str, int, int]]) -> None:
        """places: name, file, offset and size in bytes of every image."""
        places = sorted(places)
        self.names = [name for name, _, _, _ in places]
        self._files = sorted({file for _, file, _, _ in places})
        number = {file: i for i, file in enumerate(self._files)}
        # Arrays, not lists of objects: forked workers would copy those page by page as they count references.
        self._places = np.array([(number[file], offset, size) for _, file, offset, size in places], dtype=np.int64)
        digest = hashlib.sha256()
        for name, _, _, size in places:
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The encoded image i; raises ``OSError`` when its file is gone or has become shorter."""
        file, offset, size = self._places[i].tolist()
        # Opened anew each time: 10 microseconds against the milliseconds of decoding, and nothing that forked processes
        # or threads could share, such as a file's position.
        with open(self._files[file], "rb") as opened:
            opened.seek(offset)
            data = opened.read(size)
        if len(data) != size:
            raise OSError(f"{self.names[i]}: {size} bytes expected, {len(data)} there; the file changed since opening")
        return data


def open_source(path: str) -> ImageSource:
    """The images at ``path``, indexed once.

    path: a folder of images (searched to any depth), a folder of .tar shards, one .tar, a pattern of these
    (``train-{0..2}.tar``, ``train-*.tar``), or several with commas between, which is their union.

    Raises ``ValueError`` when something is not there, holds no images or cannot be read; warns when a shard is cut off.
    """
    images: dict[str, None] = {}
    shards: dict[str, None] = {}
    folders: list[str] = []
    for found in _find(os.fspath(path)):
        absolute = os.path.abspath(found)
        if os.path.isdir(absolute):
            inside, tars = _list_folder(Path(absolute))
            images.update(dict.fromkeys(inside))
            shards.update(dict.fromkeys(tars))
            folders.append(absolute)
        elif absolute.endswith(".tar"):
            shards[absolute] = None
            folders.append(os.path.dirname(absolute))
        else:
            raise ValueError(
                f"{found} is neither a folder nor a .tar; give a folder of images or uncompressed .tar shards "
                "(a compressed one cannot be read at random: gunzip it)"
            )
    root = os.path.commonpath(folders)
    places = [(_name(file, root), file, 0, os.path.getsize(file)) for file in images]
    for shard in shards:
        places += [(f"{_name(shard, root)}/{member}", shard, at, size) for member, at, size in _index_tar(shard)]
    if not places:
        raise ValueError(f"no images in {path}: its shards hold no {' '.join(SHARD_SUFFIXES)}")
    return ImageSource(places)


def _find(path: str) -> list[str]:
    """The existing files and folders that ``path`` stands for; a name that exists as it is is never a pattern."""
    found: list[str] = []
    path = os.path.expanduser(path)
    # Commas inside braces belong to the braces.
    for part in [path] if os.path.exists(path) else re.split(r",(?![^{}]*\})", path):
        for pattern in [part] if os.path.exists(part.strip()) else _expand(part):
            pattern = os.path.expanduser(pattern.strip())
            matches = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
            if not matches:
                raise ValueError(
                    f"there is nothing at {pattern!r} (from {path!r}); give a folder of images, .tar shards, a pattern "
                    "like train-{0..2}.tar or train-*.tar, or several of these with commas between"
                )
            found += matches
    return found


def _expand(pattern: str) -> list[str]:
    """``a{0..2}`` -> a0 a1 a2, ``a{00..02}`` -> a00 a01 a02, ``a{x,y}`` -> ax ay; anything else is left as it is."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices = [str(n).zfill(width) for n in range(int(first), int(last) + step, step)]
    else:
        choices = words.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for choice in choices for expanded in _expand(head + choice + tail)]


def _list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Images at any depth and .tar shards directly inside: one kind or the other."""
    tars = [str(tar) for tar in folder.glob("*.tar")]
    try:
        images = [str(image) for image in find_images(folder)]
    except ImageError:
        images = []
    if tars and images:
        raise ValueError(
            f"{folder} holds both {len(tars)} .tar and {len(images)} images; move one kind away, or name {folder}/*.tar"
        )
    if not tars and not images:
        raise ValueError(f"{folder} holds no images, at any depth, and no .tar shards directly inside")
    return images, tars


def _name(file: str, root: str) -> str:
    return Path(file).relative_to(root).as_posix()


def _index_tar(path: str) -> list[tuple[str, int, int]]:
    """Name, offset and size of every whole image in a tar.

    Raises ``ValueError`` when the tar is broken and holds no whole image; warns when it is broken after some.
    """
    members: list[tuple[str, int, int]] = []
    fault = ""
    try:
        end = os.path.getsize(path)
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            try:
                for member in archive:
                    name = member.name.removeprefix("./")
                    # A name with a dot in front is a companion that macOS writes, not an image.
                    wanted = name.lower().endswith(SHARD_SUFFIXES) and not os.path.basename(name).startswith(".")
                    if wanted and member.isreg() and member.offset_data + member.size <= end:
                        members.append((name, member.offset_data, member.size))
            finally:
                file.seek(archive.offset)
                # tarfile ends in silence at a header it cannot read; a whole tar ends with a block of zeros.
                if file.read(512) != bytes(512):
                    fault = "it is cut off or broken before its end mark"
    except (tarfile.TarError, OSError, ValueError) as error:
        fault = str(error)
    if fault and not members:
        raise ValueError(f"cannot read {path} as a tar of images: {fault}; copy it again")
    if fault:
        warnings.warn(f"{path}: {fault}; its first {len(members)} images are used", stacklevel=3)
    return members
