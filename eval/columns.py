"""The columns of a benchmark's tables: what they are called, which direction is better, what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# {"value", "low", "high", "n", "note", "mark"}: a number (or "inf", which JSON lacks), its 95 % interval by bootstrap
# over pictures, of how many pictures or instances it is, what is to be said of it, and * where these are too few.
Cell = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """key: in a row's cells. better: higher, lower or "". group: quality, sets, cost or tokens. what: for a tooltip."""

    key: str
    title: str
    better: str
    digits: int
    group: str
    what: str


QUALITY = (
    Column("psnr", "PSNR", "higher", 2, "quality", "dB, mean of the pictures' own; an exact picture counts as 100 dB"),
    Column("psnr_pooled", "PSNR pooled", "higher", 2, "quality", "dB, of the mean squared error over all pictures"),
    Column("ssim", "SSIM", "higher", 4, "quality", "Gaussian window of 11, sigma 1.5; mean over pictures"),
    Column("ms_ssim", "MS-SSIM", "higher", 4, "quality", "five scales, Gaussian window of 11, sigma 1.5"),
    Column("sharpness", "sharpness", "", 2, "quality", "gradient energy over the originals': below 1 is soft"),
)
COST = (
    Column("bytes", "bytes", "lower", 0, "cost", "of the true file, or of the packed ids without a header; mean"),
    Column("bpp", "bpp", "lower", 4, "cost", "bits of those bytes per pixel of the judged picture; mean"),
    Column("tokens", "tokens", "", 0, "cost", "a picture"),
    Column("bits", "bits", "lower", 0, "cost", "n Σ log2 K of ids, 8 x bytes of files; mean"),
    Column("used", "codes used", "", 4, "cost", "share of the codebook's codes that occurred, lowest of its codebooks"),
    Column("entropy", "bits/token", "", 2, "cost", "entropy of the ids that occurred, all positions together"),
    Column("encode_ms", "encode ms", "lower", 1, "cost", "a picture, within its batch; median"),
    Column("decode_ms", "decode ms", "lower", 1, "cost", "a picture, within its batch; median"),
    Column("peak_mb", "peak MB", "lower", 0, "cost", "memory: the weights, and the most that a batch took beyond them"),
    Column("decode_passes", "passes", "lower", 0, "cost", "of the decoder's net for one picture"),
    Column("parameters", "parameters", "", 0, "cost", "of the whole tokenizer"),
    Column("licence", "licence", "", 0, "cost", "of the weights"),
)
# Of a second table, for tokenizers alone. Bits are of a token, all its codebooks together.
TOKENS = (
    Column("dead", "dead codes", "lower", 0, "tokens", "codes that never occurred, of all codebooks"),
    Column(
        "effective", "effective bits", "higher", 2, "tokens", "entropy of the ids, after Miller and Madow; of a token"
    ),
    Column(
        "conditional", "H2|1", "", 2, "tokens", "bits that a token adds to the one before it, after Miller and Madow"
    ),
    Column("huffman", "Huffman saves", "", 3, "tokens", "share of the stored bits, by a code of single ids"),
    Column("gzip", "gzip saves", "", 3, "tokens", "share of the stored bits; below 0 is a loss"),
    Column("zipf", "Zipf", "", 2, "tokens", "exponent by maximum likelihood, ranks held out; mean over codebooks"),
    Column("heaps", "Heaps", "", 2, "tokens", "exponent of the codes that m images show; mean over codebooks"),
    Column("position", "on position", "", 2, "tokens", "bits that an id tells of its position, beyond chance"),
    Column(
        "probe_linear", "linear probe", "higher", 3, "tokens", "top-1 of the class, by ridge regression from the codes"
    ),
    Column("probe_knn", "kNN probe", "higher", 3, "tokens", "top-1 of the class, by the codes' nearest neighbours"),
)
_SET = {
    "fd": ("FD", "lower", 2, "Fréchet distance of features; lower is closer"),
    "fid": ("FID", "lower", 2, "Fréchet distance of the FID's Inception features (6726825d)"),
    "pfd": ("pFD", "lower", 2, "Fréchet distance after errors in the ids, mean over rates, shares and strengths"),
    "pfid": ("pFID", "lower", 2, "FID after errors in the ids, mean over rates, shares and strengths"),
    "kd": ("KD", "lower", 4, "kernel distance of features, unbiased for pairs"),
    "kid": ("KID", "lower", 5, "kernel distance of the FID's Inception features, unbiased for pairs"),
    "precision": ("precision", "higher", 3, "reconstructions among the originals' 3 neighbours"),
    "recall": ("recall", "higher", 3, "originals among the reconstructions' 3 neighbours"),
    "density": ("density", "higher", 3, "how many originals' neighbourhoods a reconstruction is in"),
    "coverage": ("coverage", "higher", 3, "originals with a reconstruction among their 5 neighbours"),
    "inception_score": ("IS", "higher", 2, "Inception Score of the reconstructions"),
}


def set_column(key: str, net: str) -> Column:
    """Of a set distance by the name that ``SetDistance.compute`` gives it."""
    kind = max((kind for kind in _SET if key.startswith(kind)), key=len)
    title, better, digits, what = _SET[kind]
    infinity = "∞" if "infinity" in key else ""
    named = title + infinity if kind in ("fid", "pfid", "kid", "inception_score") else f"{title}{infinity} [{net}]"
    said = "at infinitely many pictures, by a line through n; " if infinity else ""
    return Column(key, named, better, digits, "sets", said + what)


def pair_column(key: str) -> Column:
    """Of a perceptual distance or a feature cosine."""
    cosine = key.startswith("cosine_")
    title = f"cosine [{key.removeprefix('cosine_')}]" if cosine else f"distance [{key}]"
    what = "cosine of features; mean over pictures" if cosine else "in the features of a frozen net; mean over pictures"
    return Column(key, title, "higher" if cosine else "lower", 4, "quality", what)
