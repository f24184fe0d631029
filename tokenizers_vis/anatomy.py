"""What a token holds: pictures of prefixes, what each token changes, and images made of the tokens of two.

Letters: b batch, n tokens, k codebooks, h w pixels, m lengths, p places, t shares.

Flow decoders start every picture from the same noise unless told otherwise, so that differences are the tokens' alone.
``sampling`` are options of ``tok.decode`` that are one for all images, such as ``steps`` or ``seed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens


def prefixes(
    tok: Tokenizer, tokens: Tokens, lengths: Sequence[int] | None = None, *, batch_size: int = 32, **sampling: Any
) -> Tensor:
    """The picture so far: b m 3 h w in [0, 1], on the CPU.

    lengths: m numbers of tokens, None for 1 to n. An image that has fewer tokens is shown with all it has.
    Raises ``ValueError`` for a tokenizer that is not nested, or a length that is not from 1 to n.
    """
    _check(tok, tokens)
    n = tokens.n_tokens
    lengths = range(1, n + 1) if lengths is None else lengths
    if not tok.nested:
        raise ValueError(f"{tok.name} is not nested: fewer than its {tok.max_tokens} tokens are no picture")
    if not len(lengths) or any(not 1 <= length <= n for length in lengths):
        raise ValueError(f"lengths are from 1 to {n}, the tokens there are, at least one; got {list(lengths)}")
    pictures = []
    for one in tokens:
        here = torch.tensor(lengths).clamp(max=one.n_tokens)
        ids = repeat(one.ids.cpu(), "1 n k -> m n k", m=len(here)).clone()
        ids[torch.arange(one.n_tokens) >= here[:, None]] = -1
        pictures.append(tok.decode(replace(one, ids=ids, lengths=here), batch_size=batch_size, **sampling).cpu())
    return torch.stack(pictures)


def arrivals(tok: Tokenizer, tokens: Tokens, *, batch_size: int = 32, **sampling: Any) -> Tensor:
    """What each token changed when it came: b n 3 h w in [-1, 1], on the CPU.

    The picture with the first i tokens less that with the first i - 1; the first token's is against mid-grey (0.5), so
    that they add up to the picture. Zero after an image's last token. Needs a nested tokenizer: ``ValueError``.
    """
    so_far = prefixes(tok, tokens, batch_size=batch_size, **sampling)
    return torch.cat([so_far[:, :1] - 0.5, so_far.diff(dim=1)], dim=1)


def influences(
    tok: Tokenizer,
    tokens: Tokens,
    donors: Tokens,
    places: Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    **sampling: Any,
) -> Tensor:
    """Where the picture changes when one token is another one: b p h w, from 0, on the CPU.

    The root of the mean squared change over colours and donors, with the token at the place taken from each donor and
    all others as they are. Works with every tokenizer that has ids.

    donors: images whose ids are put in, so that they are ids that occur; a donor with the same one counts as no change.
    places: p of the tokens, counted from 0; None for all.
    Raises ``ValueError`` for tokens of another tokenizer, a ragged batch, donors with fewer tokens, wrong places.
    """
    for some in (tokens, donors):
        _check(tok, some)
        _check_even(some)
    places = list(range(tokens.n_tokens) if places is None else places)
    _check_places(places, min(tokens.n_tokens, donors.n_tokens))
    at_once = max(1, batch_size // len(donors))
    maps = []
    for image, one in zip(tok.decode(tokens, batch_size=batch_size, **sampling), tokens, strict=True):
        for start in range(0, len(places), at_once):
            some = torch.tensor(places[start : start + at_once])
            ids = repeat(one.ids, "1 n k -> p d n k", p=len(some), d=len(donors)).clone()
            ids[torch.arange(len(some)), :, some] = rearrange(donors.ids[:, some].to(ids.device), "d p k -> p d k")
            changed = replace(one, ids=rearrange(ids, "p d n k -> (p d) n k"))
            error = (tok.decode(changed, batch_size=batch_size, **sampling) - image).square()
            maps.append(reduce(error, "(p d) c h w -> p h w", "mean", d=len(donors)).sqrt().cpu())
    return rearrange(torch.cat(maps), "(b p) h w -> b p h w", p=len(places))


def swap(tokens: Tokens, donor: Tokens, places: Sequence[int] | range) -> Tokens:
    """``tokens`` with those at ``places``, counted from 0, taken from ``donor``: one image for all, or one each.

    Raises ``ValueError`` for tokens of unlike tokenizers, ragged batches, or places that one of them lacks.
    """
    _check_alike(tokens, donor)
    if len(donor) not in (1, len(tokens)):
        raise ValueError(f"donor is one image for all or one each: got {len(donor)} for {len(tokens)} images")
    places = list(places)
    _check_places(places, min(tokens.n_tokens, donor.n_tokens))
    ids = tokens.ids.clone()
    ids[:, places] = donor.ids[:, places].to(ids.device)
    return replace(tokens, ids=ids)


def morph(first: Tokens, second: Tokens, lengths: Sequence[int] | None = None) -> Tokens:
    """From one image to another by prefixes: m images, of which the first ``lengths`` tokens are the second's.

    first, second: an image each, of as many tokens. lengths: m numbers, None for 0 to n.
    Raises ``ValueError`` as ``swap`` does.
    """
    _check_pair(first, second)
    lengths = range(first.n_tokens + 1) if lengths is None else lengths
    return Tokens.stack([swap(first, second, range(length)) if length else first for length in lengths])


def interpolate(
    tok: Tokenizer, first: Tokens, second: Tokens, shares: Sequence[float], *, batch_size: int = 32, **sampling: Any
) -> Tensor:
    """Between two images in the space of codes: t 3 h w in [0, 1], on the CPU; no ids of the codebook in between.

    first, second: an image each, of as many tokens. shares: t numbers, how much of the second: 0 is the first, 1 the
    second; beyond is allowed. Each code is (1 - share) first + share second.
    Raises ``ValueError`` as ``swap`` does.
    """
    for some in (first, second):
        _check(tok, some)
    _check_pair(first, second)
    if not len(shares):
        raise ValueError("shares are how much of the second image there is, at least one number; got none")
    pictures = []
    with torch.no_grad():
        start, end = (tok.quantizer.lookup(one.ids.to(tok.device)) for one in (first, second))
        for part in torch.tensor(shares, dtype=torch.float32, device=tok.device).split(batch_size):
            codes = torch.lerp(start, end, rearrange(part, "t -> t 1 1"))
            pictures.append(tok.canvas.paint(tok.decoder(codes, None, **sampling)).float().clamp(0, 1).cpu())
    return torch.cat(pictures)


def _check(tok: Tokenizer, tokens: Tokens) -> None:
    if not isinstance(tokens, Tokens) or (tokens.tokenizer, tokens.codebook_sizes) != (tok.codes, tok.codebook_sizes):
        raise ValueError(f"these are no tokens of {tok.name} (ids of {tok.codes!r}): {tokens!r}")


def _check_even(tokens: Tokens) -> None:
    if tokens.lengths is not None:
        raise ValueError("these images have unlike numbers of tokens; go image by image, or take a common prefix")


def _check_alike(first: Tokens, second: Tokens) -> None:
    for tokens in (first, second):
        _check_even(tokens)
    if (first.tokenizer, first.codebook_sizes) != (second.tokenizer, second.codebook_sizes):
        raise ValueError(f"only tokens of one tokenizer mix; got {first!r} and {second!r}")


def _check_pair(first: Tokens, second: Tokens) -> None:
    _check_alike(first, second)
    if not len(first) == len(second) == 1 or first.n_tokens != second.n_tokens:
        raise ValueError(f"first and second are an image each, of as many tokens; got {first!r} and {second!r}")


def _check_places(places: list[int], n: int) -> None:
    if not places or any(not 0 <= place < n for place in places):
        raise ValueError(f"places are tokens from 0 to {n - 1}, at least one; got {places}")
