"""What a tokenizer's ids on the photographs of a benchmark say: their statistics, and what a probe reads off them.

The ids are those that the runner kept, so that nothing is encoded again; those of all pictures are in memory at once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.eval.benchmark import ids_array
from tokenizers_vis.eval.columns import Cell
from tokenizers_vis.eval.journal import Stored, finite
from tokenizers_vis.eval.probes import NEIGHBOURS, PIXELS, fixed_split, knn_probe, linear_probe, token_features
from tokenizers_vis.eval.statistics import described, token_statistics
from tokenizers_vis.eval.suites import Photos, as_tensor
from tokenizers_vis.files import write_atomically
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens

FORMAT = 1
PROBED = 5000  # images that probes learn from and are tried on, at most, evenly spaced over all
WIDEST = 16384  # features of an image; where all its codes are more, their mean is taken


class TokenStudy:
    """``of`` a method is its study, computed once and kept beside its rows."""

    def __init__(self, suite: Photos, numbers: Sequence[int], dataset: str) -> None:
        """numbers: of the pictures that can be read, of which ``dataset`` is the hash."""
        self.suite, self.numbers, self.dataset = suite, sorted(numbers), dataset

    def of(self, folder: Path, description: Mapping[str, Any], load: Callable[[], Tokenizer]) -> dict[str, Any]:
        """Of a tokenizer of ids, whose rows are in ``folder``. load: gives it, when it is wanted.

        statistics: of ``TokenStatistics``. table: rows of it to be read, label and a text for each codebook.
        probes: of ``ProbeResult``, with ``features``, what they learn from; or ``no_probes``, why there are none.
        """
        key = hashlib.sha256(repr((FORMAT, self.dataset, self._classes, PROBED, WIDEST)).encode()).hexdigest()[:16]
        path = folder / f"tokens-{key}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        tok, stored = load(), Stored(folder, "ids", ids_array(description))

        def tokens(numbers: Sequence[int]) -> Tokens:
            ids = torch.from_numpy(stored.at(numbers)).reshape(len(numbers), description["tokens"], -1)
            return Tokens(ids, tok.codebook_sizes, tok.codes)

        statistics = token_statistics(tokens(self.numbers), too_few="flag")
        columns = [dict(described(book)) for book in statistics.codebooks]
        labels = dict.fromkeys(label for column in columns for label in column)
        found: dict[str, Any] = {
            "statistics": statistics.to_dict(),
            "table": [[label, *(column.get(label, "") for column in columns)] for label in labels],
        }
        if self._reason:
            found["no_probes"] = self._reason
        else:
            found["probes"] = self._probe(tok, tokens(list(self._classes)))
        write_atomically(path, json.dumps(finite(found)).encode())
        return found

    def _probe(self, tok: Tokenizer, tokens: Tokens) -> list[dict[str, Any]]:
        labels = list(self._classes.values())
        split = fixed_split(labels)
        wide = tokens.n_tokens * tok.quantizer.dim > WIDEST
        features = token_features(tok, tokens, "mean" if wide else "concat")
        said = "mean of the codes" if wide else "all codes"
        neighbours = min(NEIGHBOURS, len(split.train))
        results = (
            linear_probe(features, labels, self._pixels, split),
            knn_probe(features, labels, self._pixels, split, neighbours),
        )
        return [{**result._asdict(), "features": said} for result in results]

    @cached_property
    def _classes(self) -> dict[int, int]:
        """Number of a picture -> of its class, for those that probes are of: in a class of two or more."""
        names = self.suite.labels()
        known = [i for i in self.numbers if names[i] is not None]
        chosen = [known[k * len(known) // PROBED] for k in range(PROBED)] if len(known) > PROBED else known
        count = Counter(names[i] for i in chosen)
        classes = sorted((name for name in count if count[name] > 1), key=lambda name: (isinstance(name, str), name))
        number = {name: k for k, name in enumerate(classes)}
        return {i: number[names[i]] for i in chosen if names[i] in number}

    @property
    def _reason(self) -> str:
        """Why there can be no probe; "" when there can."""
        if len(set(self._classes.values())) > 1:
            return ""
        return "no probes: they need two classes or more of two pictures each, by sub-folder or by key.cls in shards"

    @cached_property
    def _pixels(self) -> Tensor:
        """The pictures of the probes at the size of the pixel baseline, b 3 h w in [0, 1]."""
        small = []
        for i in self._classes:
            x = as_tensor(self.suite.load(i).pixels)[None]
            small.append(F.interpolate(x, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False))
        return torch.cat(small)


def cells_of(study: Mapping[str, Any]) -> dict[str, Cell]:
    """The study's numbers by the keys of ``columns.TOKENS``; bits are of all codebooks of a token together.

    A cell has the mark * where there were too few ids for it.
    """
    books = study["statistics"]["codebooks"]
    n = books[0]["tokens"]

    def cell(value: float, enough: bool = True, note: str = "") -> Cell:
        return {"value": value, "n": n, "note": note or f"of {n} ids"} | ({} if enough else {"mark": "*"})

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    singles = all(book["ngrams"][0]["enough"] for book in books)
    places = all(book["positions"]["enough"] for book in books)
    fixed = sum(book["fixed_bits"] for book in books)
    bits = sum(book["effective_bits"] for book in books)
    found = {
        "dead": cell(sum(book["dead"] for book in books), singles, f"of {sum(book['size'] for book in books)} codes"),
        "effective": cell(bits, singles, f"of {fixed} that are stored"),
        "huffman": cell(1 - sum(book["huffman_bits"] for book in books) / fixed, singles),
        "gzip": cell(1 - sum(book["gzip_bits"] for book in books) / fixed),
        "position": cell(
            sum(book["positions"]["information"] - book["positions"]["by_chance"] for book in books), places
        ),
    }
    if all(book["conditional_corrected"] is not None for book in books):
        pairs = all(book["ngrams"][1]["enough"] for book in books)
        found["conditional"] = cell(sum(book["conditional_corrected"] for book in books), pairs)
    for key, values in (
        ("zipf", [book["zipf"]["held_out"] for book in books]),
        ("heaps", [book["innovation"]["heaps"] for book in books]),
    ):
        if (value := mean(values)) is not None:
            found[key] = cell(value, singles)
    for probe in study.get("probes", ()):
        said = f"chance {probe['chance']:.3f}, pixels {probe['pixels']:.3f}; {probe['classes']} classes, "
        said += f"{probe['train']} images to learn from, {probe['test']} to try"
        found[f"probe_{probe['probe']}"] = {"value": probe["accuracy"], "n": probe["test"], "note": said}
    return found
