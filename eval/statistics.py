"""How tokens are distributed, after "Analyzing the Language of Visual Tokens" (https://arxiv.org/abs/2411.05001).

Ids are counted exactly, in integers, whatever the size of the codebook; only ids that occurred are held. Entropies are
in bits. Those of the counts ("plug-in") are too low; Miller and Madow's correction adds what is missing for the codes
that occurred, and is still too low where many did not. So every number says how many ids it is from.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from tokenizers_vis.eval.counts import Zipf, corrected_entropy, entropy, fit_zipf, huffman_bits
from tokenizers_vis.tokens import Tokens

ENOUGH = 10  # ids for each code: with fewer, entropies say more of the sample than of the tokenizer
LONGEST = 4  # of the n-grams
_SHUFFLES = 4
_CURVE = 32  # points of the innovation curve


class TooFewTokens(ValueError):
    """Fewer than 10 K ids of a codebook of K codes."""


@dataclass(frozen=True)
class NGrams:
    """Runs of n ids inside one image.

    count: how many were seen. types: how many different ones.
    entropy, corrected: bits for all n ids together, plug-in and after Miller and Madow.
    coverage: of the n-grams yet to come, the share that are of a type seen here (Good and Turing), 0 to 1.
    enough: count is at least 10 types. (Of single ids, at least 10 codebook sizes.)
    """

    n: int
    count: int
    types: int
    entropy: float
    corrected: float
    coverage: float
    enough: bool


@dataclass(frozen=True)
class Innovation:
    """How many different codes some images show: the mean over all choices of m images, computed exactly.

    curve: pairs of m and codes, from one image to all.
    heaps: exponent of codes = c m^heaps, the least-squares line through the curve on logarithms; None for one image.
    images_90: the images that on average show 90 % of the codes that all of them show.
    """

    curve: tuple[tuple[int, float], ...]
    heaps: float | None
    images_90: int


@dataclass(frozen=True)
class Positions:
    """Ids by their position in the image.

    counts, entropy, corrected: at each position that an image has; entropies in bits.
    information: mutual information of id and position, bits, plug-in. It is above 0 even for independent ones.
    by_chance: what it is when the ids are shuffled over the positions; the rest of ``information`` is real.
    enough: there are at least 10 ids for each code at every position.
    """

    counts: tuple[int, ...]
    entropy: tuple[float, ...]
    corrected: tuple[float, ...]
    information: float
    by_chance: float
    enough: bool


@dataclass(frozen=True)
class CodebookStatistics:
    """Statistics of one codebook.

    size: K. images, tokens: how many were counted. types: codes that occurred; dead: the others. used: types / K.
    entropy, corrected: H1, bits per id, plug-in and after Miller and Madow. perplexity: 2^H1, from 1 to K.
    effective_bits: the corrected entropy, at most log2 K: what an id holds of the ``fixed_bits`` it takes.
    ranks: pairs of a rank, from 1 for the most frequent code, and how often its code came; some of them.
    conditional, conditional_corrected: H2|1, bits that an id adds to the one before it; None without pairs. Of pairs
        that are not ``enough`` it is far too low: almost every pair is then new, and log2 N - H1 comes out.
    ngrams: of one id to four, as long as images are.
    huffman_bits: bits per id by a Huffman code of the counts, without its table. gzip_bits: by gzip at level 9, of the
        ids in the order given, each in as few whole bytes (1, 2, 4, 8) as hold K. The savings are 1 - bits /
        fixed_bits, where fixed_bits is log2 K, rounded up; below 0 is a loss.
    warnings: what is from too few ids.
    """

    size: int
    images: int
    tokens: int
    types: int
    dead: int
    used: float
    entropy: float
    corrected: float
    perplexity: float
    effective_bits: float
    fixed_bits: int
    ranks: tuple[tuple[int, int], ...]
    conditional: float | None
    conditional_corrected: float | None
    ngrams: tuple[NGrams, ...]
    zipf: Zipf
    innovation: Innovation
    huffman_bits: float
    huffman_saving: float
    gzip_bits: float
    gzip_saving: float
    positions: Positions
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class TokenStatistics:
    """Of a tokenizer: its name, and the statistics of each codebook by itself."""

    tokenizer: str
    codebooks: tuple[CodebookStatistics, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A Markdown table, a column for each codebook, and the warnings below it."""
        names = ["codebook"] if len(self.codebooks) == 1 else [f"codebook {j}" for j in range(len(self.codebooks))]
        columns = [dict(described(book)) for book in self.codebooks]
        labels = list(dict.fromkeys(label for column in columns for label in column))
        lines = [f"| {self.tokenizer} | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
        cells = [[label, *(column.get(label, "") for column in columns)] for label in labels]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        for name, book in zip(names, self.codebooks, strict=True):
            lines += [f"\n{name}: {warning}" for warning in book.warnings]
        return "\n".join(lines)


def token_statistics(tokens: Tokens, *, too_few: Literal["refuse", "flag"] = "refuse") -> TokenStatistics:
    """The statistics of all tokens together; give those of hundreds of images.

    too_few: "refuse" raises ``TooFewTokens``, a ``ValueError``, where a codebook of K codes has fewer than 10 K ids:
        its entropy cannot be told. "flag" computes all the same, and says so in ``warnings``. n-grams, and ids at one
        position, are seldom enough: they are flagged in either case.

    The order of images counts for gzip only.
    """
    if too_few not in ("refuse", "flag"):
        raise ValueError(f"too_few is 'refuse' or 'flag', got {too_few!r}")
    ids = tokens.ids.cpu().numpy()
    n = np.full(len(ids), ids.shape[1]) if tokens.lengths is None else tokens.lengths.cpu().numpy()
    real = np.arange(ids.shape[1]) < n[:, None]
    if too_few == "refuse":
        for j, size in enumerate(tokens.codebook_sizes):
            if real.sum() < ENOUGH * size:
                raise TooFewTokens(
                    f"{_few(int(real.sum()), size)} (codebook {j} of {tokens.tokenizer}, {len(ids)} images of up to "
                    f"{ids.shape[1]} tokens). Encode more images, or take too_few='flag' and quote the number of ids"
                )
    books = (_codebook(ids[..., j], real, size) for j, size in enumerate(tokens.codebook_sizes))
    return TokenStatistics(tokens.tokenizer, tuple(books))


def _codebook(ids: np.ndarray, real: np.ndarray, size: int) -> CodebookStatistics:
    """ids: b n; real: b n, where there is an id."""
    seen, types, counts = np.unique(ids[real], return_inverse=True, return_counts=True)
    codes = np.full(ids.shape, -1, dtype=np.int64)
    codes[real] = types  # from 0 to the number of types: small numbers, of which pairs can be made
    total = len(types)
    ngrams, conditional = [], (None, None)
    for n, runs in enumerate(_runs(codes), start=1):
        run_counts = np.unique(runs, return_counts=True)[1]
        enough = len(runs) >= ENOUGH * (size if n == 1 else len(run_counts))
        entropies = entropy(run_counts), corrected_entropy(run_counts)
        coverage = 1 - int((run_counts == 1).sum()) / len(runs)
        ngrams.append(NGrams(n, len(runs), len(run_counts), *entropies, coverage, enough))
        if n == 2:
            first = np.unique(codes[:, :-1][codes[:, 1:] >= 0], return_counts=True)[1]
            conditional = entropies[0] - entropy(first), max(0.0, entropies[1] - corrected_entropy(first))
    positions = _positions(codes, real, size)
    fixed = (size - 1).bit_length()
    huffman, zipped = huffman_bits(counts.tolist()), _gzip_bits(ids[real], size)
    few_runs = [str(gram.n) for gram in ngrams[1:] if not gram.enough]
    warnings = []
    if total < ENOUGH * size:
        warnings.append(_few(total, size))
    if few_runs:
        runs = f"n-grams of {', '.join(few_runs)}"
        warnings.append(f"{runs}: fewer than {ENOUGH} for each type, so that their entropies are too low (*)")
    if not positions.enough:
        fewest = min(positions.counts)
        warnings.append(f"positions: {fewest} ids at one, fewer than {ENOUGH} for each of {size} codes (*)")
    return CodebookStatistics(
        size=size,
        images=len(ids),
        tokens=total,
        types=len(seen),
        dead=size - len(seen),
        used=len(seen) / size,
        entropy=ngrams[0].entropy,
        corrected=ngrams[0].corrected,
        perplexity=2.0 ** ngrams[0].entropy,
        effective_bits=min(ngrams[0].corrected, math.log2(size)),
        fixed_bits=fixed,
        ranks=_ranks(counts),
        conditional=conditional[0],
        conditional_corrected=conditional[1],
        ngrams=tuple(ngrams),
        zipf=fit_zipf(counts),
        innovation=_innovation(codes, real),
        huffman_bits=huffman,
        huffman_saving=1 - huffman / fixed,
        gzip_bits=zipped,
        gzip_saving=1 - zipped / fixed,
        positions=positions,
        warnings=tuple(warnings),
    )


def _ranks(counts: np.ndarray) -> tuple[tuple[int, int], ...]:
    falling = np.sort(counts)[::-1]
    return tuple((rank, int(falling[rank - 1])) for rank in _spaced(len(falling)))


def _spaced(last: int) -> list[int]:
    """From 1 to last: all, or of many some, by equal factors."""
    places = {round(m) for m in np.geomspace(1, last, _CURVE).tolist()} if last > _CURVE else range(1, last + 1)
    return sorted(places)


def _runs(codes: np.ndarray) -> Iterator[np.ndarray]:
    """codes: b n, from 0, -1 for none -> for n = 1 to 4 a number for each run, equal for equal runs: m."""
    types = int(codes.max()) + 1
    runs = codes
    for n in range(1, min(LONGEST, codes.shape[1]) + 1):
        if n > 1:
            last = codes[:, n - 1 :]
            # Both factors are at most the number of ids, so that the product fits int64 up to 3e9 of them.
            runs = np.where(last >= 0, runs[:, :-1] * types + last, -1)
            real = runs >= 0
            runs[real] = np.unique(runs[real], return_inverse=True)[1]
        if not (runs >= 0).any():
            return
        yield runs[runs >= 0]


def _innovation(codes: np.ndarray, real: np.ndarray) -> Innovation:
    """A code that b of B images show is missed by m of them with probability C(B - b, m) / C(B, m)."""
    total = len(codes)
    rows = np.broadcast_to(np.arange(total)[:, None], codes.shape)[real]
    types = int(codes.max()) + 1
    pairs = np.unique(rows * types + codes[real])
    shown, how_many = np.unique(np.bincount(pairs % types), return_counts=True)  # b, and how many codes have it

    def choices(n: int, m: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)

    def expected(m: int) -> float:
        left = (total - shown).tolist()
        missed = [math.exp(choices(n, m) - choices(total, m)) if n >= m else 0.0 for n in left]
        return float(np.sum(how_many * (1 - np.array(missed))))

    curve = tuple((m, expected(m)) for m in _spaced(total))
    heaps = float(np.polyfit(*np.log(curve).T, 1)[0]) if len(curve) > 1 else None
    wanted = 0.9 * types * (1 - 1e-9)  # logarithms of factorials are as exact as that
    low, high = 1, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if expected(middle) >= wanted else (middle + 1, high)
    return Innovation(curve, heaps, low)


def _gzip_bits(ids: np.ndarray, size: int) -> float:
    width = next(bytes_ for bytes_ in (1, 2, 4, 8) if size <= 2 ** (8 * bytes_))
    return 8 * len(gzip.compress(ids.astype(f"<u{width}").tobytes(), 9, mtime=0)) / len(ids)


def _positions(codes: np.ndarray, real: np.ndarray, size: int) -> Positions:
    types = int(codes.max()) + 1
    used = real.any(axis=0)
    at = np.broadcast_to(np.arange(codes.shape[1]), codes.shape)[real]
    flat = codes[real]

    def counted(ids: np.ndarray) -> list[np.ndarray]:
        """The counts of the ids at each position."""
        pairs, counts = np.unique(at * types + ids, return_counts=True)
        return np.split(counts, np.searchsorted(pairs // types, np.arange(1, int(used.sum()))))

    def information(at_each: list[np.ndarray]) -> float:
        inside = math.fsum(int(counts.sum()) / len(flat) * entropy(counts) for counts in at_each)
        return entropy(np.bincount(flat)) - inside

    found = counted(flat)
    rng = np.random.default_rng(0)
    at_random = np.sort(flat)  # of the sorted ids, so that the order of images does not count
    chance = math.fsum(information(counted(rng.permutation(at_random))) for _ in range(_SHUFFLES)) / _SHUFFLES
    totals = tuple(int(counts.sum()) for counts in found)
    return Positions(
        counts=totals,
        entropy=tuple(map(entropy, found)),
        corrected=tuple(map(corrected_entropy, found)),
        information=max(0.0, information(found)),
        by_chance=max(0.0, chance),
        enough=min(totals) >= ENOUGH * size,
    )


def _few(count: int, size: int) -> str:
    return f"N = {count} ids are too few for K = {size} codes: entropies take N >= {ENOUGH} K = {ENOUGH * size}"


def described(book: CodebookStatistics) -> Iterator[tuple[str, str]]:
    """What a table shows: label and value, with a star where it is from too few ids."""

    def of(value: float | None, form: str = ".3f") -> str:
        return "" if value is None else format(value, form)

    def star(enough: bool) -> str:
        return "" if enough else " *"

    positions, zipf, innovation = book.positions, book.zipf, book.innovation
    last = len(positions.counts) - 1
    yield "ids (images)", f"{book.tokens} ({book.images})"
    yield "codes used", f"{book.types} of {book.size} ({book.used:.1%}), {book.dead} dead"
    yield "entropy H1, bits (Miller-Madow)", f"{book.entropy:.3f} ({book.corrected:.3f})"
    yield "perplexity 2^H1", of(book.perplexity, ".1f")
    yield "effective bits per id", f"{book.effective_bits:.3f} of {book.fixed_bits}"
    if len(book.ngrams) > 1:
        pair = f"{of(book.conditional)} ({of(book.conditional_corrected)})"
        yield "conditional entropy H2|1 (Miller-Madow)", pair + star(book.ngrams[1].enough)
    for gram in book.ngrams[1:]:
        label = f"entropy of {gram.n}-grams (Miller-Madow), coverage"
        yield label, f"{gram.entropy:.3f} ({gram.corrected:.3f}), {gram.coverage:.1%}{star(gram.enough)}"
    yield f"Zipf exponent, ranks {zipf.first} to {zipf.last} (KS)", f"{of(zipf.exponent)} ({of(zipf.ks)})"
    yield "Zipf exponent, ranks held out", of(zipf.held_out)
    yield "Heaps exponent; images for 90 % of codes", f"{of(innovation.heaps)}; {innovation.images_90}"
    yield "Huffman bits per id (saving)", f"{book.huffman_bits:.3f} ({book.huffman_saving:.1%})"
    yield "gzip bits per id (saving)", f"{book.gzip_bits:.3f} ({book.gzip_saving:.1%})"
    mark = star(positions.enough)
    yield f"entropy at positions 0, {last}", f"{positions.entropy[0]:.3f}, {positions.entropy[last]:.3f}{mark}"
    yield "information on position, bits (by chance)", f"{positions.information:.3f} ({positions.by_chance:.3f}){mark}"
