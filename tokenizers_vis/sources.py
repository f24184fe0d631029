"""Encoded images by number, from folders, WebDataset tar shards or data sets: indexed once, read at random."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenizers_vis.images import ImageError, find_images

# In a shard other formats are as a rule labels (a .tif mask), not the image.
SHARD_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OF_DATASETS = ("dataset_dict.json", "state.json", "dataset_info.json")


class Part(NamedTuple):
    """Images ``start`` to ``stop - 1`` of a source, which lie together: a shard, or so many of a folder.

    fingerprint: 16 hex digits over their names and sizes.
    """

    name: str
    start: int
    stop: int
    fingerprint: str


class ImageSource(ABC):
    """A fixed sequence of encoded images. Abstract; pickles, forks, threads.

    names: unique, in order. classes: names of the classes, in the order of their numbers; () where not known.
    fingerprint: 16 hex digits; the same data give the same one, however their place was spelled.
    """

    names: Sequence[str]
    fingerprint: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded image i; raises ``OSError`` when it is gone or has become shorter."""

    @abstractmethod
    def parts(self, size: int) -> list[Part]:
        """All images, cut where the source is cut, or where it is not, every ``size`` images."""

    @abstractmethod
    def labels(self, start: int, stop: int) -> list[int | str | None]:
        """The class of each of these images, a number or a name; None where it has none. Raises ``ValueError``."""


class FileSource(ImageSource):
    """Images in files of their own and in tar shards. Names are paths below the nearest folder that holds the whole
    source, sorted, shards counted as folders. The class of an image is the sub-folder it lies in, or in a shard what
    the ``.cls`` or ``.json`` (``label``, ``cls`` or ``class``) of the same key says.
    """

    def __init__(
        self,
        places: Iterable[tuple[str, str, int, int]],
        folders: Mapping[str, str] | None = None,
        shards: Mapping[str, str] | None = None,
    ) -> None:
        """places: name, file, offset and size in bytes of every image.

        folders: for files that are an image, the sub-folder that says its class, or "". shards: for those that are a
        tar, its name.
        """
        places = sorted(places)
        self.names = [name for name, _, _, _ in places]
        self._files = sorted({file for _, file, _, _ in places})
        number = {file: i for i, file in enumerate(self._files)}
        # Arrays, not lists of objects: forked workers would copy those page by page as they count references.
        self._places = np.array([(number[file], offset, size) for _, file, offset, size in places], dtype=np.int64)
        self.fingerprint = self._fingerprint(0, len(places))
        folders = folders or {}
        self.classes = tuple(sorted({folders.get(file, "") for file in self._files} - {""}))
        class_numbers = {name: i for i, name in enumerate(self.classes)}
        self._classes = np.array([class_numbers.get(folders.get(file, ""), -1) for file in self._files], dtype=np.int32)
        self._shards = dict(shards or {})

    def _fingerprint(self, start: int, stop: int) -> str:
        digest = hashlib.sha256()
        for name, size in zip(self.names[start:stop], self._places[start:stop, 2].tolist(), strict=True):
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

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

    def parts(self, size: int) -> list[Part]:
        loose = np.array([file not in self._shards for file in self._files])[self._places[:, 0]]
        # Names in a shard share its name and a slash, so that in order they follow each other.
        kind = np.where(loose, -1, self._places[:, 0])
        edges = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(self)]
        found, count = [], 0
        for start, stop in zip(edges, edges[1:], strict=False):
            if not loose[start]:
                name = self._shards[self._files[kind[start]]].removesuffix(".tar")
                found.append(Part(name, start, stop, self._fingerprint(start, stop)))
                continue
            for first in range(start, stop, size):
                last = min(first + size, stop)
                found.append(Part(f"images-{count:05d}", first, last, self._fingerprint(first, last)))
                count += 1
        return found

    def labels(self, start: int, stop: int) -> list[int | str | None]:
        beside: dict[str, dict[str, int | str]] = {}
        found: list[int | str | None] = []
        for i in range(start, stop):
            number = int(self._places[i, 0])
            file = self._files[number]
            if file not in self._shards:
                found.append(self.classes[self._classes[number]] if self._classes[number] >= 0 else None)
                continue
            if file not in beside:
                beside[file] = _labels_in_tar(file)
            found.append(beside[file].get(_key(self.names[i][len(self._shards[file]) + 1 :])))
        return found


def open_source(path: str) -> ImageSource:
    """The images at ``path``, indexed once.

    path: a folder of images (searched to any depth), a folder of .tar shards, one .tar, a pattern of these
    (``train-{0..2}.tar``, ``train-*.tar``), or several with commas between, which is their union. Or a data set of
    Hugging Face's ``datasets``, alone: ``hf:NAME`` or ``hf:NAME:SPLIT`` (the split "train" if not said), where NAME is
    one on the Hub or a folder that ``save_to_disk`` wrote; such a folder needs no ``hf:``.

    Raises ``ValueError`` when something is not there, holds no images or cannot be read; warns when a shard is cut off.
    """
    path = os.fspath(path)
    if path.startswith("hf:") or is_saved_dataset(path):
        from tokenizers_vis.dataset_source import open_dataset

        return open_dataset(path.removeprefix("hf:"))
    images: dict[str, str] = {}
    shards: dict[str, None] = {}
    folders: list[str] = []
    for found in _find(path):
        absolute = os.path.abspath(found)
        if os.path.isdir(absolute):
            inside, tars = _list_folder(Path(absolute))
            images.update((image, _first_folder(image, absolute)) for image in inside)
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
    return FileSource(places, images, {shard: _name(shard, root) for shard in shards})


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` of Hugging Face's ``datasets`` wrote the folder."""
    there = {name: os.path.isfile(os.path.join(folder, name)) for name in _OF_DATASETS}
    return there["dataset_dict.json"] or (there["state.json"] and there["dataset_info.json"])


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


def _first_folder(file: str, folder: str) -> str:
    """The folder directly inside ``folder`` that holds the file, at any depth; "" for ``folder`` itself."""
    return Path(file).relative_to(folder).as_posix().rpartition("/")[0].partition("/")[0]


def _key(member: str) -> str:
    """What a member of a shard shares with those of the same sample: its path up to the first dot of its name."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _labels_in_tar(path: str) -> dict[str, int | str]:
    """Key -> class number or name, from ``.cls`` and ``.json`` members."""
    found: dict[str, int | str] = {}
    with tarfile.open(path, mode="r:") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if not member.isreg() or not name.lower().endswith((".cls", ".json")):
                continue
            try:
                text = archive.extractfile(member).read().decode("utf-8")  # type: ignore[union-attr]  (it is a file)
                label = text.strip()
                if not name.lower().endswith(".cls"):
                    table = json.loads(text)
                    words = [word for word in ("label", "cls", "class") if isinstance(table, dict) and word in table]
                    label = table[words[0]] if words else None
                if label is not None:
                    found[_key(name)] = int(label) if str(label).lstrip("-").isdecimal() else str(label)
            except (OSError, ValueError) as error:
                raise ValueError(f"{name} in {path} is no label: {error}; write the shard again") from error
    return found


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
