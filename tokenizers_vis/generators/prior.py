"""Tokens as few bytes: range coding (Martin 1979) with a generator's probabilities; the ``.tok`` file, version 2.

    magic           4 bytes   as in version 1, whose numbers and checksums are meant here too
    version         1 byte    2
    flags           1 byte    1: ragged; 2: with labels. Others are 0
    b, n            varints   images, tokens of the longest image
    name            varint, then as many bytes of UTF-8: the generator, whose tokenizer and codebooks are the file's
    hash            4 bytes   the start of ``prior_hash``
    lengths         b varints the tokens of each image; only when ragged
    labels          b varints 0 for no class, else the class and 1; only with labels
    sizes           b varints the bytes of each image
    ids CRC32       4 bytes   of the ids as version 1 packs them
    file CRC32      4 bytes   of all other bytes of the file
    images          one after the other, each a range coder's words, highest byte first, without what 0 bytes after the
                    end stand for

A choice is coded with integer weights: 2^30 2^-(l / 16), cut to whole numbers, where l is how far its logit is below
the largest in sixteenths of a bit, rounded. The range coder, constriction's, makes shares of 2^24 of them, none 0.
The logits are ``Exact``, so that every machine finds the same weights. Tokens of an ordered tokenizer that come after
the last the generator knows follow with equal shares for all ids, 16 bits of an id at a time, the lowest first.

Letters: b batch, n tokens, k codebooks, v ids to choose from.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizers_vis.generator import Generator, Label
from tokenizers_vis.generators.exact import Exact, exact_copy
from tokenizers_vis.generators.sequential import Sequential
from tokenizers_vis.token_file import CODED_VERSION, MAGIC, Header, TokenFileError, pack, varint
from tokenizers_vis.tokens import Tokens

_RAGGED, _LABELS = 1, 2
_STEPS = 16  # of a logit, in one bit
_WEIGHTS = np.array([round(2 ** (30 - step / _STEPS)) for step in range(_STEPS)])
_MOST = 2**20  # ids to choose from: each gets a share of 2^24
_BATCH = 32
_DIGIT = 2**16  # of an id that is coded without the generator
_OTHER = (
    "the ids do not match their checksum, though the file is whole: this machine computes other probabilities than the "
    "one that wrote it, or another version of constriction divides the line in another way; please report both"
)


class Prior:
    """Writes and reads files of tokens with the probabilities of a generator.

    generator: one that goes token by token (causal or random_order). Its guidance and temperature do not count.

    Raises ``ValueError`` for another kind, and where constriction is not installed.
    """

    def __init__(self, generator: Generator) -> None:
        if not isinstance(generator.model, Sequential):
            raise ValueError(
                f"{generator.name} is a {generator.config['model']['kind']} generator, which has no law of the next "
                f"token; code with a causal or random_order one"
            )
        codes = generator.model.codes
        if any(
            len(codes.choice_range(place, j)) > _MOST for place in range(codes.per_token) for j in range(codes.draws)
        ):
            raise ValueError(f"codebooks of more than {_MOST} ids are coded by bits alone: codes.kind = 'bits'")
        try:
            import constriction
        except ModuleNotFoundError as error:
            raise ValueError(
                "coding with a prior needs constriction: pip install 'tokenizers-vis[generate]'"
            ) from error
        self.generator, self._stream = generator, constriction.stream

    @cached_property
    def hash(self) -> str:
        """8 hex digits over all that its probabilities follow from."""
        return prior_hash(self.generator)

    @cached_property
    def _model(self) -> Sequential:
        return exact_copy(self.generator.model)

    # Files

    def to_bytes(self, tokens: Tokens, labels: Label | Sequence[Label] | Tensor = None) -> bytes:
        """The content of a ``.tok`` file: of version 2, or of version 1 where that is not longer.

        labels: one class for all images or one each, by number or name; None is none. A file of version 2 keeps them,
            so that reading it takes none.

        It is read back before it is returned. Raises ``ValueError`` for tokens of another tokenizer.
        """
        lengths, rows = self._check(tokens), self._labels(labels, len(tokens))
        ids = tokens.ids[:, : max(lengths)].cpu().clamp_min(0)
        images = self._encode(ids, rows, lengths)
        numbers = [len(ids), max(lengths), len(name := self.generator.name.encode())]
        ragged, labelled = min(lengths) < max(lengths), bool((rows < self.generator.classes).any())
        head = MAGIC + bytes([CODED_VERSION, _RAGGED * ragged + _LABELS * labelled]) + _varints(numbers) + name
        head += bytes.fromhex(self.hash)
        head += _varints(lengths) if ragged else b""
        # The last row of a generator's classes is none; here none is 0.
        head += _varints((rows + 1).remainder(self.generator.classes + 1).tolist()) if labelled else b""
        head += _varints(map(len, images)) + _crc(_packed(ids, lengths, tokens.codebook_sizes))
        body = b"".join(images)
        coded, plain = head + _crc(head + body) + body, tokens.to_bytes()
        # What cannot be read back must not be written, whatever the reason.
        return coded if len(coded) < len(plain) and self._reads(coded, tokens) else plain

    def from_bytes(self, data: bytes) -> Tokens:
        """The tokens of a file of version 2. Raises ``TokenFileError``."""
        file = read_header(data)
        gen = self.generator
        if file.hash != self.hash:
            raise TokenFileError(
                f"the file was coded with the generator {file.name!r} of hash {file.hash}; {gen.name!r} here has "
                f"{self.hash}, so its probabilities are others. Load that one, in float32"
            )
        if max(file.labels) > gen.classes or not all(map(self._can_hold, file.images, file.lengths)):
            raise TokenFileError(f"the header is wrong: {gen.name} has {gen.classes} classes, {gen.max_tokens} tokens")
        rows = torch.tensor([label - 1 if label else gen.classes for label in file.labels])
        ids = self._decode(file.images, rows, file.lengths)
        if _crc(_packed(ids, file.lengths, gen.codebook_sizes)) != file.ids_crc:
            raise TokenFileError(_OTHER)
        places = torch.arange(ids.shape[1]) < torch.tensor(file.lengths)[:, None]
        ids = ids.masked_fill(~places[..., None], -1)
        return Tokens(ids, gen.codebook_sizes, gen.tokenizer, torch.tensor(file.lengths), gen.nested)

    # Coding

    @torch.no_grad()
    def _encode(self, ids: Tensor, labels: Tensor, lengths: Sequence[int]) -> list[bytes]:
        """ids: b n k, whatever after an image's last token -> the bytes of each image."""
        images: list[bytes] = []
        codes, known = self._model.codes, self.generator.max_tokens
        for part in _parts(len(ids)):
            stream = codes.to_stream(ids[part, :known])
            length, ends = stream.shape[1], [n * codes.per_token for n in lengths[part]]
            coded: list[list[tuple[int, np.ndarray]]] = [[] for _ in ends]
            with Exact():
                session = self._model.session(labels[part], length)
                # One pass over all; the same bits as step by step, because they are exact.
                hidden = torch.cat([session.hidden, session.advance(stream[:, :-1])], dim=1)
                choices = codes.to_choices(stream)
                for place in range(length):
                    for j in range(codes.draws):
                        table = self._weights(hidden[:, place, None], choices[:, place, None], place, j)
                        first = codes.choice_range(place, j).start
                        for row, end in enumerate(ends):
                            if place < end:
                                coded[row].append((int(choices[row, place, j]) - first, table[row]))
            for row, image in enumerate(ids[part].tolist()):
                for token in image[known : lengths[part][row]]:
                    coded[row] += [(token[j] // worth % len(even), even) for j, worth, even in self._digits]
            images += map(self._shortest, coded)
        return images

    @torch.no_grad()
    def _decode(self, images: Sequence[bytes], labels: Tensor, lengths: Sequence[int]) -> Tensor:
        """b n k, 0 after an image's last token."""
        codes, known, found = self._model.codes, self.generator.max_tokens, []
        for part in _parts(len(images)):
            decoders, ends = [self._decoder(one) for one in images[part]], [n * codes.per_token for n in lengths[part]]
            length = min(max(lengths), known) * codes.per_token
            with Exact():
                session = self._model.session(labels[part], length)
                hidden, stream = session.hidden, []
                for place in range(length):
                    choices = torch.zeros(len(ends), 1, codes.draws, dtype=torch.int64)
                    for j in range(codes.draws):
                        table = self._weights(hidden, choices, place, j)
                        first = codes.choice_range(place, j).start
                        for row, end in enumerate(ends):
                            choices[row, 0, j] = first
                            if place < end:
                                choices[row, 0, j] += self._read(decoders[row], self._law(table[row]))
                    stream.append(codes.from_choices(choices))
                    if place + 1 < length:
                        hidden = session.advance(stream[-1])
            ids = codes.from_stream(torch.cat(stream, dim=1))
            found.append(F.pad(ids, (0, 0, 0, max(lengths) - ids.shape[1])))
            for row, image in enumerate(found[-1]):
                for token in image[known : lengths[part][row]]:
                    for j, worth, even in self._digits:
                        token[j] += worth * self._read(decoders[row], self._law(even))
        return torch.cat(found)

    @cached_property
    def _digits(self) -> list[tuple[int, int, np.ndarray]]:
        """How a token is coded that the generator does not know: each digit's codebook, worth and even weights."""
        found = []
        for j, size in enumerate(self.generator.codebook_sizes):
            worth = 1
            while worth < size:
                found.append((j, worth, np.ones(min(-(-size // worth), _DIGIT))))
                worth *= _DIGIT
        return found

    def _weights(self, hidden: Tensor, choices: Tensor, place: int, j: int) -> np.ndarray:
        """hidden: b 1 d, choices: b 1 draws -> b v, whole numbers in float64."""
        codes = self._model.codes
        legal = codes.choice_range(place, j)
        logits = codes.choice_logits(hidden, choices, torch.tensor([place]), j)[:, 0, legal.start : legal.stop]
        return integer_weights(logits.numpy())

    def _law(self, weights: np.ndarray) -> Any:
        return self._stream.model.Categorical(weights, perfect=False)

    def _decoder(self, image: bytes) -> Any:
        words = np.frombuffer(image + bytes(-len(image) % 4), ">u4").astype(np.uint32)
        return self._stream.queue.RangeDecoder(words)

    @staticmethod
    def _read(decoder: Any, law: Any) -> int:
        try:
            return decoder.decode(law)
        except AssertionError as error:  # what constriction raises for numbers that no encoder writes
            raise TokenFileError(_OTHER) from error

    def _shortest(self, choices: Sequence[tuple[int, np.ndarray]]) -> bytes:
        """The fewest bytes that these choices, each with its weights, can be read from."""
        laws = [self._law(weights) for _, weights in choices]
        encoder = self._stream.queue.RangeEncoder()
        for (choice, _), law in zip(choices, laws, strict=True):
            encoder.encode(choice, law)
        whole = encoder.get_compressed().astype(">u4").tobytes()
        # The coder ends on whole words; any number in its last interval will do, so the shortest one is looked for.
        for keep in range(max(0, len(whole) - 8), len(whole)):
            for more in (0, 1):
                number = int.from_bytes(whole[:keep], "big") + more
                if number >= 256**keep:
                    continue
                short = number.to_bytes(keep, "big")
                decoder = self._decoder(short)
                try:
                    if all(self._read(decoder, law) == choice for (choice, _), law in zip(choices, laws, strict=True)):
                        return short
                except TokenFileError:
                    continue
        return whole

    # What callers hand in

    def _check(self, tokens: Tokens) -> list[int]:
        """The lengths of the images."""
        gen = self.generator
        if not isinstance(tokens, Tokens):
            raise ValueError(f"a prior codes Tokens, got {type(tokens).__name__}; tv.Tokens(ids, ...) makes them")
        if (tokens.tokenizer, tokens.codebook_sizes) != (gen.tokenizer, gen.codebook_sizes):
            raise ValueError(
                f"these tokens are of {tokens.tokenizer!r} with codebooks {tokens.codebook_sizes}; {gen.name} knows "
                f"those of {gen.tokenizer!r} with {gen.codebook_sizes}"
            )
        lengths = [tokens.n_tokens] * len(tokens) if tokens.lengths is None else tokens.lengths.tolist()
        if max(lengths) > gen.max_tokens and not gen.nested:
            raise ValueError(f"{gen.name} goes up to {gen.max_tokens} tokens an image, got {max(lengths)}")
        return lengths

    def _can_hold(self, image: bytes, n: int) -> bool:
        """Whether so many tokens may be in these bytes, of which ``_shortest`` leaves out 8 at most."""
        gen = self.generator
        rest = n - gen.max_tokens
        return rest <= 0 or (gen.nested and rest * sum(map(math.log2, gen.codebook_sizes)) <= 8 * (len(image) + 9))

    def _labels(self, labels: Any, b: int) -> Tensor:
        rows = self.generator.label_rows(labels).cpu()
        if len(rows) not in (1, b):
            raise ValueError(f"labels are one for all or one each: got {len(rows)} for {b} images")
        return rows.expand(b)

    def _reads(self, data: bytes, tokens: Tokens) -> bool:
        try:
            return self.from_bytes(data) == tokens.cpu()
        except ValueError:
            return False


def prior_hash(generator: Generator) -> str:
    """8 hex digits over whose tokens a generator knows, how it is built, and its weights in float32."""
    config = {key: value for key, value in generator.config.items() if key not in ("name", "class_names", "sampling")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    for name, value in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:8]


def integer_weights(logits: np.ndarray) -> np.ndarray:
    """logits: b v -> b v, whole numbers from 0 to 2^30, in float64. The same everywhere for the same logits."""
    steps = np.round(logits * (_STEPS / math.log(2))).astype(np.int64)
    below = steps.max(axis=1, keepdims=True) - steps
    return (_WEIGHTS[below % _STEPS] >> np.minimum(below // _STEPS, 62)).astype(np.float64)


class CodedFile(NamedTuple):
    """A file of version 2. labels: 0 for none, else the class and 1. images: the bytes of each."""

    name: str
    hash: str
    lengths: list[int]
    labels: list[int]
    ids_crc: bytes
    images: list[bytes]


def read_header(data: bytes) -> CodedFile:
    """What a file of version 2 is made of. Raises ``TokenFileError`` for one that is cut short or damaged."""
    header = Header(data)
    version, flags = header.take(2)
    if version != CODED_VERSION or flags > 3:
        raise TokenFileError(f"the file is of version {version} with flags {flags}, this reads version {CODED_VERSION}")
    b, n, name = header.number(), header.number(), header.take(header.number())
    generator_hash = header.take(4).hex()
    if b > len(data):  # each image has at least the byte of its size
        raise TokenFileError(f"the file is cut short: {len(data)} bytes cannot hold {b} images; fetch it again")
    lengths = [header.number() for _ in range(b)] if flags & _RAGGED else [n] * b
    labels = [header.number() for _ in range(b)] if flags & _LABELS else [0] * b
    sizes = [header.number() for _ in range(b)]
    ids_crc, head, file_crc = header.take(4), data[: header.place], header.take(4)
    body = data[header.place :]
    if len(body) < sum(sizes):
        raise TokenFileError(
            f"the file is cut short: {len(body)} of the {sum(sizes)} bytes of its images arrived; fetch it again"
        )
    if len(body) > sum(sizes):
        raise TokenFileError(
            f"{len(body) - sum(sizes)} bytes follow the {sum(sizes)} bytes of the images; are these two files in one?"
        )
    if _crc(head + body) != file_crc:
        raise TokenFileError("the file does not match its checksum: it is damaged; fetch or save it again")
    # From here on the file is what was written; what follows guards against a writer that got it wrong.
    if not b or not n or min(lengths) < 1 or max(lengths) != n:
        raise TokenFileError(f"the header is wrong: {b} images of {n} tokens, lengths {lengths}")
    ends = list(accumulate(sizes, initial=0))
    images = [body[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
    try:
        return CodedFile(name.decode(), generator_hash, lengths, labels, ids_crc, images)
    except UnicodeDecodeError as error:
        raise TokenFileError(f"the header is wrong: {error}") from error


def as_prior(prior: Prior | Generator) -> Prior:
    """Raises ``ValueError`` for what is neither."""
    if isinstance(prior, Generator):
        return Prior(prior)
    if not isinstance(prior, Prior):
        raise ValueError(f"prior is a generator, as tv.load_generator gives; got {type(prior).__name__}")
    return prior


def named_in(data: bytes) -> Prior:
    """The prior that a file names, where it is a generator that comes with the library. Raises ``TokenFileError``."""
    from tokenizers_vis.generator import list_generators, load_generator

    file = read_header(data)
    if file.name not in list_generators():
        raise TokenFileError(
            f"the file was coded with the generator {file.name!r} (hash {file.hash}), which does not come with the "
            f"library: give it as prior=tv.load_generator(...), or --prior on the command line"
        )
    return Prior(load_generator(file.name, "cpu"))


def _parts(b: int) -> Iterable[slice]:
    return (slice(start, start + _BATCH) for start in range(0, b, _BATCH))


def _packed(ids: Tensor, lengths: Sequence[int], sizes: Sequence[int]) -> bytes:
    real = np.arange(ids.shape[1])[:, None] < np.array(lengths)
    return pack(rearrange(ids.numpy(), "b n k -> n b k")[real], sizes)


def _varints(numbers: Iterable[int]) -> bytes:
    return b"".join(map(varint, numbers))


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")
