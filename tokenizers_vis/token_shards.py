"""Ids on disk: shards of tokenized images, to train a generator on. See docs/tokenize.md.

A folder holds ``tokens.json``, what all its shards have in common, and for each shard ``NAME.safetensors`` with its
manifest ``NAME.json``. A shard is there when its manifest is, which is written last. Its tensors:

    ids       i c n k   uint8, uint16, uint32 or int64, the first of these that holds every id
    labels    i         int64, the class of each image, -1 where it has none
    keys      bytes     a JSON list of the images' names

Letters: i images, c crops of each, n tokens, k codebooks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_vis.files import write_atomically
from tokenizers_vis.sources import Part
from tokenizers_vis.tokenizer import Tokenizer

FORMAT = 1
COMMON = "tokens.json"


class ShardError(ValueError):
    """A folder of shards that cannot be read, or was made in another way."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What ids were made with; all shards of a folder have the same.

    tokenizer: the name that its tokens carry. hash: ``codes_hash`` of it. n_tokens: n.
    augmentation: plain values that say what was cut out of an image. ``crops`` among them is c.
    classes: names, in the order of the labels' numbers; () where there are none.
    """

    tokenizer: str
    hash: str
    codebook_sizes: tuple[int, ...]
    nested: bool
    n_tokens: int
    augmentation: Mapping[str, Any]
    classes: tuple[str, ...] = ()

    def differences(self, other: Origin) -> list[str]:
        """``key: this, not that`` for everything in which the other one differs."""
        mine, others = _flat(asdict(self)), _flat(asdict(other))
        pairs = {key: (mine.get(key), others.get(key)) for key in [*mine, *others]}
        return [f"{key}: {_short(a)}, not {_short(b)}" for key, (a, b) in pairs.items() if a != b]


def codes_hash(tok: Tokenizer, n_tokens: int | None = None) -> str:
    """16 hex digits over all that makes ids: config and weights of canvas, encoder and quantizer.

    Two tokenizers of one hash make the same ids, whatever they are called and however they decode.
    n_tokens: of the tokenizer that has so many tokens and was grown to ``tok`` (``init.first_tokens``).
    """
    digest = hashlib.sha256()
    tables = () if n_tokens is None else tok.encoder.tables
    for part in ("canvas", "encoder", "quantizer"):
        config = tok.config[part]
        if part == "encoder" and tables:
            config = config | {"max_tokens": n_tokens}
        digest.update(json.dumps(config, sort_keys=True, default=list).encode())
        for name, value in getattr(tok, part).state_dict().items():
            value = value[:n_tokens] if part == "encoder" and name in tables else value
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def makes(tok: Tokenizer, codes: str, n_tokens: int) -> bool:
    """Whether ``tok`` makes the ids of that hash, or its first ``n_tokens`` are those of a tokenizer of so many."""
    if codes_hash(tok) == codes:
        return True
    return tok.encoder.causal and n_tokens < tok.max_tokens and codes_hash(tok, n_tokens) == codes


# Writing


def begin(folder: Path, origin: Origin, names: Sequence[str]) -> None:
    """Writes ``tokens.json`` into a new folder, or adds to its list of shards. Raises ``ShardError`` that says in what
    the folder's shards were made otherwise.
    """
    if (folder / COMMON).exists():
        there, known = _read_common(folder)
        if differences := there.differences(origin):
            raise ShardError(
                f"{folder} holds ids that were made otherwise: {'; '.join(differences)}. Choose another --out"
            )
        if set(names) <= set(known):
            return
        names = [*known, *(name for name in names if name not in set(known))]
    folder.mkdir(parents=True, exist_ok=True)
    table = {"format": FORMAT, **asdict(origin), "shards": sorted(names)}
    write_atomically(folder / COMMON, json.dumps(table, indent=1).encode())


def is_finished(folder: Path, part: Part) -> bool:
    """Whether the shard of these images is there, whole. Raises ``ShardError`` when it is of other images."""
    manifest = _read_manifest(folder, part.name)
    if manifest is None:
        return False
    if manifest["source"] != part.fingerprint:
        raise ShardError(
            f"the shard {part.name} in {folder} was made of other images: the data changed, or the size of parts. "
            f"Choose another --out, or delete {part.name}.json there to make it anew"
        )
    file = folder / f"{part.name}.safetensors"
    return file.is_file() and file.stat().st_size == manifest["bytes"]


def write_shard(
    folder: Path,
    origin: Origin,
    part: Part,
    *,
    keys: Sequence[str],
    ids: Tensor,
    labels: Sequence[int],
    skipped: Mapping[str, str],
) -> None:
    """Writes a shard, then its manifest.

    keys, ids (i c n k), labels: of the images that could be read. skipped: name -> reason of the others.
    """
    from safetensors.numpy import save

    data = save(
        {
            "ids": ids.cpu().numpy().astype(_dtype(origin.codebook_sizes)),
            "labels": np.array(labels, dtype=np.int64),
            "keys": np.frombuffer(json.dumps(list(keys)).encode(), dtype=np.uint8),
        }
    )
    common = {key: value for key, value in asdict(origin).items() if key != "classes"}
    manifest = {
        "format": FORMAT,
        "shard": part.name,
        "source": part.fingerprint,
        "images": len(keys),
        "skipped_count": len(skipped),
        "skipped": dict(skipped),
        **common,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    file = folder / f"{part.name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, data)
    write_atomically(file.with_suffix(".json"), json.dumps(manifest, indent=1).encode())


# Reading


class TokenShards:
    """The ids of a folder's shards, by number; read from the disk as they are asked for. Pickles, forks, threads.

    path: the folder. partial: take the shards that are there; otherwise one that is missing is a ``ShardError``.

    tokenizer, hash, codebook_sizes, nested, n_tokens, augmentation, classes: as ``Origin`` says.
    crops: c. labels: int64 array, one for each image, -1 for none. fingerprint: 16 hex digits over all shards.
    skipped: names of images that could not be read when the shards were made.

    Raises ``ShardError`` for a folder without shards, or a damaged one.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = Path(path)
        self.origin, names = _read_common(self.path)
        self.tokenizer, self.hash = self.origin.tokenizer, self.origin.hash
        self.codebook_sizes, self.nested = self.origin.codebook_sizes, self.origin.nested
        self.n_tokens, self.classes = self.origin.n_tokens, self.origin.classes
        self.augmentation, self.crops = self.origin.augmentation, int(self.origin.augmentation["crops"])
        manifests = {name: manifest for name in names if (manifest := _read_manifest(self.path, name))}
        missing = [name for name in names if name not in manifests]
        if missing and not partial:
            raise ShardError(
                f"{len(missing)} of {len(names)} shards in {self.path} are not made yet ({_short(missing)}): give the "
                "command that began them once more, or take what is there with partial=True"
            )
        self._files, offsets, counts, labels, self.skipped = [], [], [0], [], []
        digest = hashlib.sha256(json.dumps(asdict(self.origin), sort_keys=True, default=list).encode())
        for name, manifest in manifests.items():
            file = self.path / f"{name}.safetensors"
            there, at = self._look_into(file, manifest)
            self._files.append(str(file))
            offsets.append(at)
            counts.append(manifest["images"])
            labels.append(there)
            self.skipped += manifest["skipped"]
            digest.update(manifest["sha256"].encode())
        self._hashes = [manifest["sha256"] for manifest in manifests.values()]
        self._offsets, self._starts = np.array(offsets, dtype=np.int64), np.cumsum(counts)
        if not self._starts[-1]:
            raise ShardError(f"{self.path} holds no ids: none of its {len(names)} shards has an image")
        self.labels = np.concatenate(labels)
        self.fingerprint = digest.hexdigest()[:16]

    def _look_into(self, file: Path, manifest: Mapping[str, Any]) -> tuple[np.ndarray, int]:
        """The labels of a shard, and where its ids begin in the file."""
        if not file.is_file() or file.stat().st_size != manifest["bytes"]:
            raise ShardError(f"{file} is missing or was cut short; make it anew with the command that began the folder")
        found = Origin(**{key: manifest[key] for key in _ORIGIN_KEYS}, classes=self.classes)
        if differences := found.differences(self.origin):
            raise ShardError(f"{file} does not belong into {self.path}: {'; '.join(differences)}")
        table, start = _header(file)
        shape = [manifest["images"], self.crops, self.n_tokens, len(self.codebook_sizes)]
        if table["ids"]["shape"] != shape:
            raise ShardError(f"{file} holds ids {table['ids']['shape']}, its manifest says {shape}; make it anew")
        return np.frombuffer(_read(file, table["labels"], start), "<i8"), start + table["ids"]["data_offsets"][0]

    def __len__(self) -> int:
        """How many images."""
        return int(self._starts[-1])

    def ids(self, i: int, crop: int = 0) -> Tensor:
        """The ids of one crop of image i: n k, int64."""
        return self.gather([i], [crop])[0]

    def gather(self, images: Sequence[int], crops: Sequence[int]) -> Tensor:
        """The ids of these crops of these b images: b n k, int64. Raises ``IndexError``."""
        images, crops = np.asarray(images), np.asarray(crops)
        if images.min() < 0 or images.max() >= len(self) or crops.min() < 0 or crops.max() >= self.crops:
            raise IndexError(f"images are 0 to {len(self) - 1} and crops 0 to {self.crops - 1}; got {images}, {crops}")
        kind = _dtype(self.codebook_sizes).newbyteorder("<")
        rows = np.empty((len(images), self.n_tokens, len(self.codebook_sizes)), dtype=kind)
        shards = np.searchsorted(self._starts, images, side="right") - 1
        places = self._offsets[shards] + ((images - self._starts[shards]) * self.crops + crops) * rows[0].nbytes
        for row, shard, place in zip(rows, shards.tolist(), places.tolist(), strict=True):
            # Opened anew each time, as images are: nothing that forked processes or threads could share.
            with open(self._files[shard], "rb", buffering=0) as file:
                file.seek(place)
                if file.readinto(row.data) != row.nbytes:
                    raise ShardError(f"{self._files[shard]} became shorter since it was opened; make it anew")
        return torch.from_numpy(rows.astype(np.int64))

    def key(self, i: int) -> str:
        """The name of image i."""
        shard = int(np.searchsorted(self._starts, range(len(self))[i], side="right")) - 1
        return _keys(self._files[shard])[i - int(self._starts[shard])]

    def check(self, tok: Tokenizer) -> None:
        """Raises ``ShardError`` when these are not the ids that ``tok`` makes and decodes."""
        if tok.codes == self.tokenizer and tok.codebook_sizes == self.codebook_sizes:
            # Weights in half precision are others; they decode these ids all the same.
            if tok.dtype != torch.float32 or makes(tok, self.hash, self.n_tokens):
                return
        raise ShardError(
            f"{self.path} holds ids of {self.tokenizer!r} (hash {self.hash}, codebooks {self.codebook_sizes}); this "
            f"tokenizer is {tok.codes!r} (hash {codes_hash(tok)}, codebooks {tok.codebook_sizes}). Tokenize anew"
        )

    def verify(self) -> None:
        """Reads all shards and raises ``ShardError`` for one whose sha256 is not that of its manifest."""
        for path, expected in zip(self._files, self._hashes, strict=True):
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise ShardError(f"{path} is damaged: its sha256 is not that of its manifest; make it anew")


# The files

_ORIGIN_KEYS = ("tokenizer", "hash", "codebook_sizes", "nested", "n_tokens", "augmentation")


def _read_common(folder: Path) -> tuple[Origin, list[str]]:
    """What the shards have in common, and the names of all that there shall be."""
    if not (folder / COMMON).is_file():
        raise ShardError(f"{folder} holds no {COMMON}: it is no folder that tokenizers-vis tokenize wrote")
    table = _read_json(folder / COMMON)
    try:
        names = table["shards"]
        values = {key: table[key] for key in (*_ORIGIN_KEYS, "classes")}
        for key in ("codebook_sizes", "classes"):
            values[key] = tuple(values[key])
    except (KeyError, TypeError) as error:
        raise ShardError(f"{folder / COMMON} is damaged: {error}; tokenize into another folder") from error
    return Origin(**values), names


def _read_manifest(folder: Path, name: str) -> dict[str, Any] | None:
    file = folder / f"{name}.json"
    return _read_json(file) if file.is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ShardError(f"{file} cannot be read: {error}; delete it and tokenize again") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ShardError(f"{file} is not of format {FORMAT}, which this library reads; tokenize into another folder")
    return table


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file, and where its data begin: https://github.com/huggingface/safetensors#format"""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


def _read(file: Path, tensor: Mapping[str, Any], start: int) -> bytes:
    first, last = tensor["data_offsets"]
    with file.open("rb") as opened:
        opened.seek(start + first)
        return opened.read(last - first)


@lru_cache(maxsize=8)
def _keys(file: str) -> list[str]:
    table, start = _header(Path(file))
    return json.loads(_read(Path(file), table["keys"], start))


def _dtype(sizes: Sequence[int]) -> np.dtype[Any]:
    """The smallest that holds every id; uint64 is left out, since ids are int64 everywhere else."""
    most = max(sizes) - 1
    return np.dtype(next((kind for kind in (np.uint8, np.uint16, np.uint32) if most <= np.iinfo(kind).max), np.int64))


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values by dotted key, as they are after a way through JSON."""
    found: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(table)).items():
        found |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
