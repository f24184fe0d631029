"""What a benchmark leaves for people: index.html, results.json, tables.md and tables.tex, each a view of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers_vis.eval.page import page
from tokenizers_vis.eval.published import published
from tokenizers_vis.eval.rate import Curve, RateError, against, curves
from tokenizers_vis.eval.tables import latex, markdown
from tokenizers_vis.files import write_atomically

RESULTS = "results.json"
PAGE = "index.html"
_ANCHORS = ("jpeg", "webp", "avif")  # the curve that others are compared with is the first of these that is there


def write_report(results: Mapping[str, Any], out: Path, rows: Sequence[str] = ()) -> list[Path]:
    """Writes the four files into ``out``; each appears whole or not at all.

    results: of ``summary.summarise``, with ``command`` and ``versions``. rows: names of the files of rows beside them.
    """
    suites = [{**suite, "rate": _rates(suite), "published": _published(suite, results)} for suite in results["suites"]]
    whole = {**results, "rows": list(rows), "suites": suites}
    texts = {
        RESULTS: json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False),
        "tables.md": markdown(whole),
        "tables.tex": latex(whole),
        PAGE: page(whole, out),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in texts]


def _published(suite: Mapping[str, Any], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What others published; of tokens only where tokens were measured."""
    tables = published(suite["kind"], suite["size"], results["methods"])
    return [table for table in tables if suite["tokens"] or table["columns"] != ["pFID"]]


def _rates(suite: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each metric of quality the Bjontegaard differences of all curves to a codec's."""
    tables = []
    for column in suite["columns"]:
        if column["group"] != "quality" or not column["better"] or column["key"] == "psnr_pooled":
            continue
        points = [
            {
                "method": row["label"],
                "nbytes": row["cells"]["bytes"]["value"],
                "quality": row["cells"][column["key"]]["value"],
            }
            for row in suite["rows"]
            if {"bytes", column["key"]} <= set(row["cells"]) and isinstance(row["cells"][column["key"]]["value"], float)
        ]
        try:
            found = curves(points, quality="quality", higher_is_better=column["better"] == "higher")
        except RateError:  # two settings of one size: no curve
            continue
        anchor = next((curve for name in _ANCHORS for curve in found if curve.name == name), None)
        others = [curve for curve in found if curve is not anchor and len(curve.points) > 1]
        if anchor and others:
            tables.append({"metric": column["key"], "title": column["title"], **_compared(anchor, others)})
    return tables


def _compared(anchor: Curve, others: Sequence[Curve]) -> dict[str, Any]:
    rows = [
        {
            "name": one.name,
            "bd_rate": one.bd_rate.value if one.bd_rate else None,
            "rate_reason": one.rate_reason,
            "bd_quality": one.bd_quality.value if one.bd_quality else None,
            "quality_reason": one.quality_reason,
        }
        for one in against(anchor, others)
    ]
    return {"anchor": anchor.name, "curves": rows}
