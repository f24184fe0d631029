"""Vocabulary: the ids of one tokenizer's images as a language of integers, with specials after the last code.

Letters: b batch, n tokens, k codebooks, m ids that one token is in a sequence, l ids of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from tokenizers_vis.quantizers.base import check_option
from tokenizers_vis.quantizers.integers import IdFormat
from tokenizers_vis.sequences import join, split
from tokenizers_vis.token_file import check_sizes
from tokenizers_vis.tokens import Tokens

if TYPE_CHECKING:
    from tokenizers_vis.tokenizer import Tokenizer

_LARGEST = 2**63 - 1  # of int64


@dataclass(frozen=True)
class Vocabulary:
    """Which integer means what, and which may stand where. ``tok.vocabulary`` and ``Vocabulary.of(tok)`` make one.

    A sequence is ``begin [label] code code ... end pad ...``. From ``first`` on come the codes, codebook by codebook,
    then begin, end, pad, mask if ``masked``, and last the labels.

    codebook_sizes, tokenizer, max_tokens, nested: of the tokens.
    classes: how many labels there are; with any, every image has one.
    masked: whether there is a mask id, for models that fill in what is masked.
    first: the first id; above 0 where others, such as a text's, come before.
    bits_per_id: None for an id per codebook. Otherwise the bits of a token are cut into ids of so many bits, whatever
        its codebooks: 64 codebooks of one bit become 8 ids of 8 bits, one codebook of 2^18 becomes two ids of 9.
        Codebooks are powers of two then.

    Raises ``ValueError`` when any of this cannot be.
    """

    codebook_sizes: tuple[int, ...]
    tokenizer: str
    max_tokens: int
    nested: bool
    classes: int = 0
    masked: bool = False
    first: int = 0
    bits_per_id: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", check_sizes(self.codebook_sizes))
        check_option(self.max_tokens >= 1, "max_tokens is 1 or more", self.max_tokens)
        check_option(self.classes >= 0, "classes is 0 or more", self.classes)
        check_option(self.first >= 0, "first is 0 or more", self.first)
        if self.bits_per_id is not None:
            bits = IdFormat(self.codebook_sizes).bits
            powers = all(size & (size - 1) == 0 for size in self.codebook_sizes)
            check_option(powers, "bits_per_id needs codebook_sizes that are powers of two", self.codebook_sizes)
            fits = 1 <= self.bits_per_id <= 62 and bits % self.bits_per_id == 0
            check_option(fits, f"bits_per_id is a divisor of a token's {bits} bits, up to 62", self.bits_per_id)
        if self.stop > _LARGEST:
            raise ValueError(
                f"this vocabulary ends at {self.stop}, past int64: codebooks of {self.codebook_sizes}; give "
                f"bits_per_id, or predict them with a head of several outputs (tokenizers_vis.heads)"
            )

    @classmethod
    def of(
        cls,
        tok: Tokenizer,
        *,
        classes: int = 0,
        masked: bool = False,
        first: int = 0,
        bits_per_id: int | None = None,
    ) -> Vocabulary:
        """The vocabulary of a tokenizer. Raises ``ValueError`` for one of continuous tokens, which have no ids."""
        if tok.continuous:
            raise ValueError(f"{tok.name} has no vocabulary: its tokens are vectors, not ids")
        return cls(tok.codebook_sizes, tok.codes, tok.max_tokens, tok.nested, classes, masked, first, bits_per_id)

    # -- which id is what

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many ids there are for each of the m places of a token."""
        if self.bits_per_id is None:
            return self.codebook_sizes
        return (1 << self.bits_per_id,) * (IdFormat(self.codebook_sizes).bits // self.bits_per_id)

    @property
    def codes(self) -> tuple[range, ...]:
        """The ids for each of the m places of a token."""
        stops = list(accumulate(self.sizes, initial=self.first))
        return tuple(map(range, stops[:-1], stops[1:]))

    @property
    def begin(self) -> int:
        """Stands before an image."""
        return self.first + sum(self.sizes)

    @property
    def end(self) -> int:
        """Stands after an image's last code."""
        return self.begin + 1

    @property
    def pad(self) -> int:
        """Fills a batch."""
        return self.begin + 2

    @property
    def mask(self) -> int | None:
        """Stands for a code that is not known yet; None where ``masked`` is False."""
        return self.begin + 3 if self.masked else None

    @property
    def labels(self) -> range:
        """The ids of the classes, class 0 first."""
        start = self.begin + 3 + self.masked
        return range(start, start + self.classes)

    @property
    def specials(self) -> dict[str, int]:
        """begin, end, pad, and mask where there is one; without the labels."""
        named = {"begin": self.begin, "end": self.end, "pad": self.pad, "mask": self.mask}
        return {name: id_ for name, id_ in named.items() if id_ is not None}

    @property
    def total(self) -> int:
        """How many ids there are, specials and labels included: what an embedding needs where ``first`` is 0."""
        return self.stop - self.first

    @property
    def stop(self) -> int:
        """The first id that is not of this vocabulary any more."""
        return self.labels.stop

    @property
    def lengths(self) -> range:
        """How many tokens an image may have."""
        return range(1 if self.nested else self.max_tokens, self.max_tokens + 1)

    @property
    def max_length(self) -> int:
        """l of the longest image, with begin, label and end."""
        return self.max_tokens * len(self.sizes) + 2 + bool(self.classes)

    def __repr__(self) -> str:
        ranges = ", ".join(f"{codes.start} to {codes.stop - 1}" for codes in self.codes[:4])
        ranges += ", ..." * (len(self.codes) > 4)
        named = ", ".join(f"{name} {id_}" for name, id_ in self.specials.items())
        labels = f", labels {self.labels.start} to {self.labels.stop - 1}" if self.classes else ""
        return f"Vocabulary({self.total} ids of {self.tokenizer}: codes {ranges}; {named}{labels})"

    # -- tokens to sequences and back

    def encode(
        self,
        tokens: Tokens,
        labels: int | Sequence[int] | Tensor | None = None,
        *,
        begin: bool = True,
        end: bool = True,
    ) -> Tensor:
        """Tokens as sequences: b l, int64; shorter images are padded at the end.

        labels: one class for all images or one for each, needed where the vocabulary has classes.
        begin, end: whether these stand around the codes.

        Raises ``ValueError`` for tokens of another tokenizer, or labels out of range, missing or too many.
        """
        if not isinstance(tokens, Tokens):
            raise ValueError(f"a vocabulary encodes Tokens, got {type(tokens).__name__}; tok.encode makes them")
        if (tokens.tokenizer, tokens.codebook_sizes) != (self.tokenizer, self.codebook_sizes):
            raise ValueError(f"this is the vocabulary of {self.tokenizer} {self.codebook_sizes}, got {tokens!r}")
        lengths = [tokens.n_tokens] if tokens.lengths is None else tokens.lengths.tolist()
        self._check_lengths(lengths)
        return join(
            tokens.ids if self.bits_per_id is None else _regroup(tokens.ids, self.codebook_sizes, self.sizes),
            tokens.lengths,
            self.sizes,
            begin=self.begin if begin else None,
            label=None if labels is None and not self.classes else self.label(labels, len(tokens)),
            end=self.end if end else None,
            pad=self.pad,
            first=self.first,
        )

    def decode(self, ids: Tensor, *, begin: bool = True) -> Tokens:
        """Sequences, b l or l, as Tokens; begin, label, end and pad are taken off. begin: whether rows start with it.

        A row may lack its end where it stops after a whole token.
        Raises ``ValueError`` that names the first wrong id and its place: another id than begin or a label at the
        start, an id of another place or of no place at all, half a token, or a number of tokens that no image has.
        """
        if isinstance(ids, Tensor) and ids.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
            outside = (ids < self.first) | (ids >= self.stop)
            if outside.any():
                raise ValueError(
                    f"id {ids[outside][0].item()} is outside the vocabulary of {self.tokenizer}, which has "
                    f"{self.first} to {self.stop - 1}"
                )
        parts = split(
            ids,
            self.sizes,
            begin=self.begin if begin else None,
            labels=self.labels if self.classes else None,
            end=self.end,
            pad=self.pad,
            first=self.first,
        )
        self._check_lengths(parts.lengths.tolist())
        token_ids = parts.ids if self.bits_per_id is None else _regroup(parts.ids, self.sizes, self.codebook_sizes)
        return Tokens(token_ids, self.codebook_sizes, self.tokenizer, parts.lengths, self.nested)

    def attention_mask(self, ids: Tensor) -> Tensor:
        """1 where an id is not pad, int64."""
        return (ids != self.pad).long()

    def label(self, labels: int | Sequence[int] | Tensor | None, b: int | None = None) -> Tensor:
        """The ids of classes 0 to ``classes - 1``, int64: b, or one for each of ``labels`` where b is None.

        Raises ``ValueError`` for a class that there is not.
        """
        if not self.classes:
            raise ValueError("this vocabulary has no classes; Vocabulary.of(tok, classes=200) has")
        if labels is None:
            raise ValueError(f"this vocabulary has {self.classes} classes: every image needs a label")
        numbers = torch.as_tensor(labels)
        if numbers.is_floating_point() or numbers.dtype == torch.bool or numbers.ndim > 1:
            raise ValueError(f"labels are whole numbers, one or one for each image; got {labels!r}")
        numbers = numbers.long().reshape(-1)
        if b is not None and numbers.numel() not in (1, b):
            raise ValueError(f"labels is one class or one for each of {b} images, got {numbers.numel()}")
        wrong = (numbers < 0) | (numbers >= self.classes)
        if wrong.any():
            raise ValueError(f"classes run from 0 to {self.classes - 1}, got {numbers[wrong][0].item()}")
        return self.labels.start + (numbers if b is None else numbers.expand(b))

    def prompt(self, labels: int | Sequence[int] | Tensor | None = None, b: int | None = None) -> Tensor:
        """What a model continues into images: begin, and a label where there are classes; b 1 or b 2, int64."""
        if not self.classes:
            check_option(labels is None, "this vocabulary has no classes, so there are no labels", labels)
            return torch.full((1 if b is None else b, 1), self.begin)
        label = self.label(labels, b)
        return torch.stack([torch.full_like(label, self.begin), label], dim=1)

    def _check_lengths(self, lengths: list[int]) -> None:
        wrong = [length for length in lengths if length not in self.lengths]
        if wrong:
            allowed = f"1 to {self.max_tokens}" if self.nested else str(self.max_tokens)
            raise ValueError(f"an image of {self.tokenizer} has {allowed} tokens, got {wrong[0]}")


def _regroup(ids: Tensor, sizes: tuple[int, ...], into: tuple[int, ...]) -> Tensor:
    """The bits of ``sizes`` cut anew, exactly: b n k -> b n m. Tokens of -1, padding, stay -1."""
    padding = rearrange((ids == -1).all(dim=-1), "b n -> b n 1")
    bits = IdFormat(sizes).to_bits(ids.masked_fill(padding, 0))
    return IdFormat(into).from_bits(bits).masked_fill(padding, -1)
