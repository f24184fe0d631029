"""The ``.tok`` file, version 1: tokens as bits, with a header that says whose they are and checksums over both.

Letters: b batch, n tokens, k codebooks, t tokens of all images together.

A varint is an unsigned LEB128: 7 bits a byte, lowest first, the top bit set on all bytes but the last. A CRC32 is the
one of zlib and PNG, 4 bytes, big-endian.

    magic           4 bytes   89 54 4F 4B ("\\x89TOK"; the first byte is not text, so a file sent as text is noticed)
    version         1 byte    1
    flags           1 byte    1: it is known whether the tokenizer is nested; 2: it is; 4: ragged. Others are 0
    b, n, k         varints   images, tokens of the longest image, codebooks; none is 0
    sizes           k varints the size of each codebook, 2 to 2**62
    name            varint, then as many bytes of UTF-8: the tokenizer
    lengths         b varints the tokens of each image, 1 to n; only when ragged
    payload CRC32   4 bytes   of all that follows the header
    header CRC32    4 bytes   of all bytes before it
    payload         the ids, bit after bit, highest bit first, 0 bits up to the last whole byte

One token is k ids, codebook 0 first; an id of a codebook of size s takes ceil(log2(s)) bits. The order is token 0 of
every image, then token 1 of every image that has one, and so on. A file that was cut short thus holds a prefix of
every image, which a nested tokenizer can decode. Version 2 is ``generators.prior``'s.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange

MAGIC = b"\x89TOK"
VERSION = 1
CODED_VERSION = 2  # with a generator's probabilities: ``generators.prior``
_NESTED_KNOWN, _NESTED, _RAGGED = 1, 2, 4
_MAX_SIZE = 2**62


class TokenFileError(ValueError):
    """A ``.tok`` file that cannot be read."""


class Contents(NamedTuple):
    """What a file holds.

    ids: b n k, int64; the places after an image's last token hold -1. lengths: b, 1 to n, the tokens of each image.
    nested: None when not known.
    """

    ids: np.ndarray
    codebook_sizes: tuple[int, ...]
    tokenizer: str
    lengths: Sequence[int]
    nested: bool | None


def write(contents: Contents) -> bytes:
    """The bytes of a file."""
    ids, sizes, tokenizer, lengths, nested = contents
    n, ragged, name = max(lengths), min(lengths) < max(lengths), tokenizer.encode()
    payload = pack(rearrange(ids[:, :n], "b n k -> n b k")[_real(lengths, n)], sizes)
    flags = _RAGGED * ragged + _NESTED_KNOWN * (nested is not None) + _NESTED * (nested is True)
    numbers = [len(ids), n, len(sizes), *sizes, len(name)]
    header = MAGIC + bytes([VERSION, flags]) + b"".join(map(varint, numbers)) + name
    header += b"".join(map(varint, lengths)) if ragged else b""
    header += zlib.crc32(payload).to_bytes(4, "big")
    return header + zlib.crc32(header).to_bytes(4, "big") + payload


def read(data: bytes) -> tuple[Contents, str]:
    """What the bytes of a file hold, and a warning if some tokens are missing, else "".

    Raises ``TokenFileError``. Whether each id is within its codebook is for the caller to check.
    """
    header, expected_crc, start = _read_header(data)
    sizes, lengths, payload = header.codebook_sizes, header.lengths, data[start:]
    b, total, bits = len(lengths), sum(lengths), sum(bits_of(sizes))
    whole = -(-total * bits // 8)
    arrived, warning = total, ""
    if len(payload) > whole:
        raise TokenFileError(
            f"{len(payload) - whole} bytes follow the {whole} bytes of tokens; are these two files in one? Save it anew"
        )
    if len(payload) < whole:
        arrived = len(payload) * 8 // bits
        found = f"the file is cut short: {arrived} of {total} tokens arrived whole"
        if not header.nested:
            raise TokenFileError(f"{found}, and its tokenizer is not known to be nested; fetch the file again")
        if arrived < b:
            raise TokenFileError(f"{found}, not one for each of {b} images; fetch the file again")
        warning = f"{found}; every image is decoded from a shorter prefix"
    elif zlib.crc32(payload) != expected_crc:
        raise TokenFileError("the tokens do not match their checksum: the file is damaged; fetch or save it again")
    # Only as many rows of tokens as arrived: memory follows the bytes there are, not the header's promise.
    n = max(lengths)
    if arrived < total:
        n = 1 + bisect_left(range(n), arrived, key=lambda row: sum(min(length, row + 1) for length in lengths))
    real = _real([min(length, n) for length in lengths], n)
    # The cut falls inside a row: the tokens of the first images are there, those of the last are not.
    real &= (real.cumsum() <= arrived).reshape(real.shape)
    ids = np.full((*real.shape, len(sizes)), -1, dtype=np.int64)
    ids[real] = _unpack(payload, sizes, arrived)
    by_image = np.ascontiguousarray(rearrange(ids, "n b k -> b n k"))
    return header._replace(ids=by_image, lengths=real.sum(axis=0).tolist()), warning


def check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """The codebook sizes as a tuple; raises ``ValueError`` for what no file can hold."""
    try:
        sizes = tuple(int(size) for size in sizes)
    except TypeError as error:
        raise ValueError(f"codebook_sizes is one whole number per codebook, such as (4096,); got {sizes!r}") from error
    if not sizes or min(sizes) < 2 or max(sizes) > _MAX_SIZE or sum(sizes) > 2**63:
        raise ValueError(f"codebook_sizes is one or more sizes of 2 to 2**62, together at most 2**63; got {sizes}")
    return sizes


def bits_of(sizes: Iterable[int]) -> list[int]:
    """ceil(log2(size)) of each, exactly."""
    return [(size - 1).bit_length() for size in sizes]


def _real(lengths: Sequence[int], n: int) -> np.ndarray:
    """n b, True where there is a token: the order of the file."""
    return np.arange(n)[:, None] < np.array(lengths)


def pack(ids: np.ndarray, sizes: Sequence[int]) -> bytes:
    """ids: t k -> bits, highest first."""
    columns = [
        ((ids[:, j] >> shift) & 1).astype(np.uint8)
        for j, width in enumerate(bits_of(sizes))
        for shift in reversed(range(width))
    ]
    return np.packbits(np.stack(columns, axis=1)).tobytes()


def _unpack(payload: bytes, sizes: Sequence[int], count: int) -> np.ndarray:
    """The first ``count`` tokens of a payload: t k, int64."""
    widths = bits_of(sizes)
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), count=count * sum(widths))
    columns = iter(rearrange(bits, "(t w) -> w t", w=sum(widths)))
    ids = np.zeros((count, len(sizes)), dtype=np.int64)
    for j, width in enumerate(widths):
        for _ in range(width):
            ids[:, j] = ids[:, j] << 1 | next(columns)
    return ids


def varint(value: int) -> bytes:
    """The bytes of a number."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Header:
    """Reads the start of a file piece by piece. ``place`` is how far it has come. Raises ``TokenFileError``."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(MAGIC[: len(data)]):
            raise TokenFileError(f"this is no .tok file: it starts with {data[:4]!r}, a .tok file with {MAGIC!r}")
        self.data, self.place = data, len(MAGIC)

    def take(self, count: int) -> bytes:
        if self.place + count > len(self.data):
            raise TokenFileError(f"the file ends inside its header, after {len(self.data)} bytes; fetch it again")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self) -> int:
        """A varint."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise TokenFileError(
            f"the header is damaged: the number before byte {self.place} does not end; fetch the file again"
        )


def version_of(data: bytes) -> int:
    """The version of a file. Raises ``TokenFileError`` for what is none."""
    return Header(data).take(1)[0]


def _read_header(data: bytes) -> tuple[Contents, int, int]:
    """What the header says (without ids), the payload's CRC32, and where the payload starts."""
    header = Header(data)
    take, number = header.take, header.number
    version, flags = take(2)
    if version != VERSION:
        raise TokenFileError(f"the file is of version {version}, this reads version {VERSION}; update tokenizers_vis")
    b, n, k = number(), number(), number()
    sizes = tuple(number() for _ in range(k))
    name = take(number())
    lengths = [number() for _ in range(b)] if flags & _RAGGED else None
    payload_crc = int.from_bytes(take(4), "big")
    header_crc = zlib.crc32(data[: header.place])
    if int.from_bytes(take(4), "big") != header_crc:
        raise TokenFileError("the header does not match its checksum: the file is damaged; fetch or save it again")
    # From here on the header is what was written; what follows guards against a writer that got it wrong.
    try:
        check_sizes(sizes)
        tokenizer = name.decode()
    except ValueError as error:
        raise TokenFileError(f"the header is wrong: {error}") from error
    wrong_flags = flags > 7 or flags & (_NESTED_KNOWN | _NESTED) == _NESTED
    wrong_lengths = lengths and (min(lengths) < 1 or max(lengths) != n)
    if wrong_flags or wrong_lengths or min(b, n) < 1 or n > _MAX_SIZE:
        raise TokenFileError(f"the header is wrong: flags {flags}, {b} images of {n} tokens, lengths {lengths}")
    if lengths is None:
        if b > 8 * len(data):  # each image has at least one token of at least one bit
            raise TokenFileError(f"the file is cut short: {len(data)} bytes cannot hold {b} images; fetch it again")
        lengths = [n] * b
    nested = bool(flags & _NESTED) if flags & _NESTED_KNOWN else None
    return Contents(np.empty(0, np.int64), sizes, tokenizer, lengths, nested), payload_crc, header.place
