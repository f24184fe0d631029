"""Ids of tokens as one stream of integers with special ids around them, and back. ``Tokens`` and ``Vocabulary`` use it.

A row is ``begin label codes ... end pad ...``; each special is there or not. Codes stand token by token, codebook j
offset by the sizes of those before it, and all by ``first``; specials come after the last code.

Letters: b batch, n tokens, k codebooks, l ids of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Split(NamedTuple):
    """A stream taken apart. ids: b n k, -1 after an image's last token. lengths: b. labels: b, or None."""

    ids: Tensor
    lengths: Tensor
    labels: Tensor | None


def join(
    ids: Tensor,
    lengths: Tensor | None,
    sizes: tuple[int, ...],
    *,
    begin: int | None = None,
    label: int | Sequence[int] | Tensor | None = None,
    end: int | None = None,
    pad: int | None = None,
    first: int = 0,
) -> Tensor:
    """ids: b n k, of which an image has ``lengths`` tokens -> b l, int64. Raises ``ValueError`` for bad specials."""
    b, n, k = ids.shape
    labels = None if label is None else _label_column(label, b, ids.device)
    after = first + sum(sizes)
    _check_specials(after, begin=begin, label=labels, end=end, pad=pad)
    if lengths is not None and pad is None:
        low, high = int(lengths.min()), int(lengths.max())
        numbers = str(low) if low == high else f"{low} to {high}"
        raise ValueError(
            f"these images have unlike numbers of tokens ({numbers}): give pad, an id "
            f"from {after} on, or go image by image"
        )
    rows = rearrange(ids + _offsets(sizes, first, ids.device), "b n k -> b (n k)")
    if end is not None:
        rows = torch.cat([rows, rows.new_full((b, 1), end)], dim=1)
    if lengths is not None:
        places, counts = torch.arange(rows.shape[1], device=ids.device), lengths[:, None] * k
        rows = rows.masked_fill(places >= counts, pad)
        rows = rows if end is None else rows.masked_fill(places == counts, end)
    heads = [] if begin is None else [rows.new_full((b, 1), begin)]
    heads += [] if labels is None else [labels[:, None]]
    return torch.cat([*heads, rows], dim=1)


def split(
    ids: Tensor,
    sizes: tuple[int, ...],
    *,
    begin: int | None = None,
    labels: range | None = None,
    end: int | None = None,
    pad: int | None = None,
    first: int = 0,
) -> Split:
    """The inverse of ``join``. ids: b l or l, integers.

    begin, labels: when given, every row starts so, with one of ``labels``. end: when given, the codes of a row stop
    there, or at its own end. pad: when given, fills a row from its stop on.

    Raises ``ValueError`` for floats, rows that do not start or stop so, a number of codes that is no multiple of k, an
    id that does not belong to the codebook of its place.
    """
    k, after = len(sizes), first + sum(sizes)
    _check_specials(after, begin=begin, label=None if labels is None else torch.tensor(labels), end=end, pad=pad)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"a sequence is a tensor of integers, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.ndim not in (1, 2) or ids.numel() == 0:
        raise ValueError(f"a sequence is b (n {k}) or (n {k}) with at least one token, got {tuple(ids.shape)}")
    ids = ids.long() if ids.ndim == 2 else rearrange(ids.long(), "l -> 1 l")
    start, found = 0, None
    if begin is not None:
        _refuse(ids[:, :1] != begin, ids, 0, f"a row starts with {begin}")
        start = 1
    if labels is not None:
        if ids.shape[1] == start:
            raise ValueError(f"a row has a label, {labels.start} to {labels.stop - 1}, at place {start}; it ends there")
        found = ids[:, start]
        wrong = (found < labels.start) | (found >= labels.stop)
        _refuse(wrong[:, None], ids, start, f"a label is {labels.start} to {labels.stop - 1}")
        start += 1
    codes = ids[:, start:]
    if end is None and codes.shape[1] % k:
        raise ValueError(f"a sequence is {k} ids a token, but {codes.shape[1]} is no multiple of {k}; strip specials")

    stops = [stop for stop in (end, pad) if stop is not None]
    real = torch.ones_like(codes)
    for stop in stops:
        real &= (codes != stop).long()
    counts = real.cumprod(dim=1).sum(dim=1)
    if (counts % k).any() or (counts == 0).any():
        words = " or ".join(f"{name} {stop}" for name, stop in (("end", end), ("pad", pad)) if stop is not None)
        raise ValueError(
            f"before {words or 'the end'} come whole tokens of {k} ids, at least one; got {counts.tolist()} ids"
        )
    places = torch.arange(codes.shape[1], device=ids.device)
    wrong = places > counts[:, None] if end is not None else places >= counts[:, None]
    wrong = wrong if pad is None else wrong & (codes != pad)
    allowed = "nothing follows the end" if pad is None else f"{pad} follows from there to the end"
    _refuse(wrong, ids, start, allowed)

    # Room for all tokens that the row has room for, so that what was joined comes back in its own shape.
    room = (codes.shape[1] - (end is not None)) // k * k
    codes = codes[:, : max(room, int(counts.max()))]
    real = rearrange(places[: codes.shape[1]] < counts[:, None], "b (n k) -> b n k", k=k)
    by_token, low = rearrange(codes, "b (n k) -> b n k", k=k), _offsets(sizes, first, ids.device)
    local = by_token - low
    wrong = real & ((by_token < low) | (local >= torch.tensor(sizes, device=ids.device)))
    if wrong.any():
        b, n, j = wrong.nonzero()[0].tolist()
        lowest = int(low[j])
        raise ValueError(
            f"sequence {b} has id {by_token[b, n, j].item()} at place {start + n * k + j}, where codebook {j} takes "
            f"{lowest} to {lowest + sizes[j] - 1}"
            + ("" if not stops else f" (or {' or '.join(map(str, stops))} after whole tokens)")
            + f"; ids from {after} on are special"
        )
    return Split(local.masked_fill(~real, -1), counts // k, found)


def _refuse(wrong: Tensor, ids: Tensor, start: int, allowed: str) -> None:
    """Raises ``ValueError`` for the first of ``wrong``, b places from ``start`` on, and says what is allowed there."""
    if wrong.any():
        b, place = wrong.nonzero()[0].tolist()
        value = ids[b, start + place].item()
        raise ValueError(f"sequence {b} has id {value} at place {start + place}, where {allowed}")


def _label_column(label: int | Sequence[int] | Tensor, b: int, device: torch.device) -> Tensor:
    labels = torch.as_tensor(label, device=device)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape not in ((), (b,)):
        raise ValueError(f"label is the id of one class, or one for each of {b} images; got {label!r}")
    return labels.long().expand(b)


def _check_specials(after: int, *, label: Tensor | None, **ids: int | None) -> None:
    given = {name: id_ for name, id_ in ids.items() if id_ is not None}
    if label is not None:
        given["label"] = int(label.min())
    for name, id_ in given.items():
        if id_ < after:
            raise ValueError(f"{name} {id_} is the id of a token; specials come after the last code, from {after} on")
    plain = [id_ for name, id_ in given.items() if name != "label"]
    if len(set(plain)) < len(plain) or (label is not None and any((label == id_).any() for id_ in plain)):
        raise ValueError(f"specials are ids of their own, no two alike; got {given}")


def _offsets(sizes: tuple[int, ...], first: int, device: torch.device) -> Tensor:
    return torch.tensor([first + sum(sizes[:j]) for j in range(len(sizes))], dtype=torch.int64, device=device)
