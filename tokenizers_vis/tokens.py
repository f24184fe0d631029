"""Tokens: a batch of images as ids, and the bridge to one stream of integers. Their file is ``token_file``'s.

Letters: b batch, n tokens, k codebooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from tokenizers_vis import token_file
from tokenizers_vis.displays import tokens_html
from tokenizers_vis.files import write_atomically
from tokenizers_vis.quantizers.base import check_ids
from tokenizers_vis.sequences import join, split
from tokenizers_vis.token_file import TokenFileError, bits_of, check_sizes

if TYPE_CHECKING:
    from tokenizers_vis.generator import Generator
    from tokenizers_vis.generators.prior import Prior


@dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """A batch of tokenized images. Frozen; ``==`` compares what is in it, on any device.

    ids: b n k integers (b n will do for one codebook), kept as int64; each within its codebook. In a ragged batch
        the places after an image's last token hold -1.
    codebook_sizes: k sizes, each at least 2.
    tokenizer: the name of the tokenizer that made them.
    lengths: b, 1 to n, the real tokens of each image of a ragged batch; None when all have n.
    nested: whether a prefix of the tokens is an image too; None when not known.

    ``tokens[2]``, ``tokens[:2]``, ``tokens[[0, 3]]`` are parts of the batch, always a batch; ``tokens[:, :8]`` is a
    prefix.

    Raises ``ValueError`` when any of this does not hold.
    """

    ids: Tensor
    codebook_sizes: tuple[int, ...]
    tokenizer: str
    lengths: Tensor | None = None
    nested: bool | None = None

    def __post_init__(self) -> None:
        sizes = check_sizes(self.codebook_sizes)
        if not isinstance(self.tokenizer, str):
            raise ValueError(f"tokenizer is the tokenizer's name, a text; got {self.tokenizer!r}")
        if self.nested is not None and not isinstance(self.nested, bool):
            raise ValueError(f"nested is True, False or None (not known); got {self.nested!r}")
        ids = self.ids
        if not isinstance(ids, Tensor):
            raise ValueError(f"ids are a tensor b n {len(sizes)}, got {type(ids).__name__}; torch.as_tensor makes one")
        if ids.ndim == 2 and len(sizes) == 1:
            ids = rearrange(ids, "b n -> b n 1")
        if ids.ndim == 3 and 0 in ids.shape[:2]:
            raise ValueError(f"a batch holds at least one image of at least one token, got ids {tuple(ids.shape)}")
        lengths = None
        if self.lengths is None:
            check_ids(ids, sizes)
        else:
            check_ids(ids[:0] if ids.ndim else ids, sizes)  # rank, width and dtype first; the values need the lengths
            lengths = _check_lengths(self.lengths, ids)
            real = _real(lengths, ids.shape[1])
            if (ids.masked_select(~real) != -1).any():
                raise ValueError("ids after an image's last token are -1; check lengths, or fill the rest with -1")
            check_ids(ids.masked_fill(~real, 0), sizes)
            lengths = None if bool((lengths == ids.shape[1]).all()) else lengths
        for name, value in (("ids", ids.long()), ("codebook_sizes", sizes), ("lengths", lengths)):
            object.__setattr__(self, name, value)

    # -- what it is

    @property
    def n_tokens(self) -> int:
        """n, the places for tokens; in a ragged batch ``lengths`` says how many of them each image fills."""
        return self.ids.shape[1]

    @property
    def vocab_size(self) -> int:
        """How many ids the one stream of ``to_sequence`` has, without specials."""
        return sum(self.codebook_sizes)

    @property
    def bits_per_token(self) -> int:
        return sum(bits_of(self.codebook_sizes))

    @property
    def nbytes(self) -> list[int]:
        """For each image, the bytes that its ids take, packed alone and without a header."""
        return [-(-length * self.bits_per_token // 8) for length in self._length_list()]

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        """The same tokens of the same tokenizer. Device, room for padding and ``nested`` do not count."""
        if not isinstance(other, Tokens):
            return NotImplemented
        same_kind = self.codebook_sizes == other.codebook_sizes and self.tokenizer == other.tokenizer
        if not same_kind or self._length_list() != other._length_list():
            return False
        n = max(self._length_list())
        return torch.equal(self.ids[:, :n].cpu(), other.ids[:, :n].cpu())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sizes, lengths, nbytes = self.codebook_sizes, self._length_list(), self.nbytes
        books = "1 codebook" if len(sizes) == 1 else f"{len(sizes)} codebooks"
        most = max(nbytes)
        return (
            f"Tokens({len(self)} x {_span(lengths)} of {self.tokenizer}, {books} of {_span(sizes)}, "
            f"{_span(nbytes)} {'byte' if most == 1 else 'bytes'} an image)"
        )

    def _repr_html_(self) -> str:
        return tokens_html(self)

    # -- parts and wholes

    def __getitem__(self, index: Any) -> Tokens:
        rows, prefix = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
        n = self._prefix_length(prefix)
        rows = _rows(rows, len(self))
        lengths = None if self.lengths is None else self.lengths[rows].clamp(max=n)
        return replace(self, ids=self.ids[rows, :n], lengths=lengths)

    def __iter__(self) -> Iterator[Tokens]:
        """Each image as a batch of one, without padding."""
        for index, length in enumerate(self._length_list()):
            yield replace(self, ids=self.ids[index : index + 1, :length], lengths=None)

    @classmethod
    def stack(cls, parts: Iterable[Tokens]) -> Tokens:
        """One batch of several, in their order, on the first one's device; images of unlike lengths make it ragged.

        Raises ``ValueError`` for no parts, or parts of unlike tokenizers or codebooks.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("Tokens.stack joins at least one Tokens, got none")
        first = parts[0]
        for part in parts:
            if (part.tokenizer, part.codebook_sizes) != (first.tokenizer, first.codebook_sizes):
                raise ValueError(f"only tokens of one tokenizer stack; got {first!r} and {part!r}")
        n = max(part.n_tokens for part in parts)
        ids = [pad_tensor(part.ids.to(first.ids.device), (0, 0, 0, n - part.n_tokens), value=-1) for part in parts]
        lengths = [length for part in parts for length in part._length_list()]
        nested = first.nested if all(part.nested == first.nested for part in parts) else None
        return cls(torch.cat(ids), first.codebook_sizes, first.tokenizer, torch.tensor(lengths), nested)

    def to(self, device: torch.device | str) -> Tokens:
        lengths = None if self.lengths is None else self.lengths.to(device)
        return replace(self, ids=self.ids.to(device), lengths=lengths)

    def cpu(self) -> Tokens:
        return self.to("cpu")

    # -- one stream of integers

    def to_sequence(
        self,
        pad: int | None = None,
        *,
        begin: int | None = None,
        end: int | None = None,
        label: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """ids as one vocabulary: b l int64, token by token, codebook j offset by ``sum(codebook_sizes[:j])``.

        begin, label, end: special ids around the codes of an image, ``begin label codes ... end``, where given; a label
            is one for all images, or one each. ``Vocabulary`` names ids for them.
        pad: fills the places after an image's last; needed for a ragged batch.

        All specials are ``vocab_size`` or more, and no two alike. Raises ``ValueError``.
        """
        return join(self.ids, self.lengths, self.codebook_sizes, begin=begin, label=label, end=end, pad=pad)

    @classmethod
    def from_sequence(
        cls,
        ids: Tensor,
        codebook_sizes: Sequence[int],
        tokenizer: str,
        pad: int | None = None,
        nested: bool | None = None,
        *,
        begin: int | None = None,
        end: int | None = None,
        labels: range | None = None,
    ) -> Tokens:
        """The inverse of ``to_sequence``, without the specials. ids: b l integers, or one l. labels: the ids of them.

        Raises ``ValueError`` for floats, a number of codes that is no multiple of k, an id that does not belong to the
        codebook of its place (a special that was not named, say), or anything but pad after the end.
        """
        sizes = check_sizes(codebook_sizes)
        parts = split(ids, sizes, begin=begin, labels=labels, end=end, pad=pad)
        return cls(parts.ids, sizes, tokenizer, parts.lengths, nested)

    # -- the .tok file

    def to_bytes(self, prior: Prior | Generator | None = None, labels: Any = None) -> bytes:
        """The content of a ``.tok`` file.

        prior: a generator of these tokens, whose probabilities make the file shorter; the file is then read with the
            same generator. Where that is not shorter, or not read back as it was, the file is one without.
        labels: the class of all images or of each, if known, for the prior.
        """
        if prior is not None:
            from tokenizers_vis.generators.prior import as_prior

            return as_prior(prior).to_bytes(self, labels)
        if labels is not None:
            raise ValueError("labels are for a prior: give one, or none of both")
        ids = self.ids.cpu().numpy()
        return token_file.write(
            token_file.Contents(ids, self.codebook_sizes, self.tokenizer, self._length_list(), self.nested)
        )

    @classmethod
    def from_bytes(cls, data: bytes, prior: Prior | Generator | None = None) -> Tokens:
        """The tokens of a ``.tok`` file's content.

        prior: the generator that the file was coded with; None takes the one that it names, if that comes with the
            library. A file that was coded without does not need it.

        A nested tokenizer's file that was cut short gives the tokens that arrived whole, with a ``UserWarning``; what
        is left of it cannot be checked against the checksum.

        Raises ``TokenFileError`` for anything else that is not a whole, undamaged file.
        """
        tokens, warning = cls._parse(bytes(data), prior)
        if warning:
            warnings.warn(warning, stacklevel=2)
        return tokens

    def save(self, path: str | Path, prior: Prior | Generator | None = None, labels: Any = None) -> None:
        """Writes a ``.tok`` file, as ``to_bytes``, whole or not at all; ``OSError`` when the disk does not take it."""
        write_atomically(path, self.to_bytes(prior, labels))

    @classmethod
    def load(cls, path: str | Path, prior: Prior | Generator | None = None) -> Tokens:
        """Reads a ``.tok`` file, as ``from_bytes`` does."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TokenFileError(f"{path} cannot be read: {error.strerror or error}") from error
        try:
            tokens, warning = cls._parse(data, prior)
        except TokenFileError as error:
            raise TokenFileError(f"{path}: {error}") from error
        if warning:
            warnings.warn(f"{path}: {warning}", stacklevel=2)
        return tokens

    @classmethod
    def _parse(cls, data: bytes, prior: Prior | Generator | None) -> tuple[Tokens, str]:
        """The tokens, and a warning if some are missing."""
        if token_file.version_of(data) == token_file.CODED_VERSION:
            from tokenizers_vis.generators.prior import as_prior, named_in

            return (named_in(data) if prior is None else as_prior(prior)).from_bytes(data), ""
        contents, warning = token_file.read(data)
        ids, lengths = torch.from_numpy(contents.ids), torch.tensor(contents.lengths)
        try:
            return cls(ids, contents.codebook_sizes, contents.tokenizer, lengths, contents.nested), warning
        except ValueError as error:
            raise TokenFileError(f"the file holds ids that no codebook has: {error}; it was written wrongly") from error

    def _length_list(self) -> list[int]:
        return [self.ids.shape[1]] * len(self) if self.lengths is None else self.lengths.tolist()

    def _prefix_length(self, index: Any) -> int:
        if not isinstance(index, slice) or index.start not in (None, 0) or index.step not in (None, 1):
            raise ValueError(f"along the tokens only a prefix can be taken, tokens[:, :8]; got {index!r}")
        n = index.indices(self.n_tokens)[1]
        if n < 1:
            raise ValueError(f"a prefix holds at least one token, got {index.stop} of {self.n_tokens}")
        if n < self.n_tokens and self.nested is False:
            raise ValueError(
                f"{self.tokenizer} is not nested: all of its {self.n_tokens} tokens are needed for an image, got "
                f"a prefix of {n}; prefixes need a nested tokenizer"
            )
        return n


def _check_lengths(lengths: Any, ids: Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths, device=ids.device)
    b, n = ids.shape[:2]
    if lengths.shape != (b,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths is one whole number for each of {b} images, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if lengths.min() < 1 or lengths.max() > n:
        raise ValueError(f"lengths run from 1 to {n}, the tokens there are; got {lengths.tolist()}")
    return lengths.long()


def _rows(index: Any, b: int) -> list[int]:
    """The images that an index names. numpy's indexing, since torch's knows no negative step."""
    chosen = index.cpu().numpy() if isinstance(index, Tensor) else index
    if not isinstance(chosen, slice):
        chosen = np.asarray(chosen)
        numbers = chosen.dtype.kind in "iu" and chosen.ndim < 2
        mask = chosen.dtype.kind == "b" and chosen.shape == (b,)
        if isinstance(index, tuple) or not (numbers or mask):
            raise ValueError(
                f"tokens take [images] or [images, :prefix], images chosen by whole numbers, a slice or {b} booleans; "
                f"got {index!r}"
            )
    try:
        rows = np.atleast_1d(np.arange(b)[chosen]).tolist()
    except IndexError as error:
        raise IndexError(f"a batch of {b} has images 0 to {b - 1}, got {index!r}") from error
    if not rows:
        raise ValueError(f"no image is left: {index!r} of a batch of {b}")
    return rows


def _real(lengths: Tensor, n: int) -> Tensor:
    """b n 1, True where there is a token."""
    return rearrange(torch.arange(n, device=lengths.device) < lengths[:, None], "b n -> b n 1")


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
