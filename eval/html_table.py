"""Cells of the report's tables as HTML: a number, its interval below it, what is said of it on pointing at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tokenizers_vis.eval.tables import NOTHING, marked, written


def sortable(heads: Sequence[str], rows: Sequence[str]) -> str:
    """heads: th elements; rows: tr elements."""
    return (
        f'<div class="scroll tall" tabindex="0"><table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def plain(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Texts, of which the first column is words and the others are numbers."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    table = f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def head_cell(column: Mapping[str, Any]) -> str:
    better = f' data-better="{column["better"]}"' if column["better"] else ""
    said = escape(f"{column['what']}{', ' + column['better'] + ' is better' if column['better'] else ''}")
    return f'<th scope="col"{better} title="{said}"><button type="button">{escape(column["title"])}</button></th>'


def cell(found: Mapping[str, Any] | None, column: Mapping[str, Any]) -> str:
    note = f' title="{escape(found["note"])}"' if found and found.get("note") else ""
    if found is None or found.get("value") is None:
        return f"<td{note}>{NOTHING}</td>"
    value = found["value"]
    shown = escape(marked(found, column["digits"]))
    if found.get("low") is not None and found["low"] < found["high"]:
        low, high = (written(found[end], column["digits"]) for end in ("low", "high"))
        shown += f'<span class="span">{low} to {high}</span>'
    return f'<td data-v="{escape("Infinity" if value == "inf" else str(value))}"{note}>{shown}</td>'


def span(found: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """An interval in brackets; "" where there is none."""
    if found.get("low") is None or found["low"] == found["high"]:
        return ""
    low, high = (written(found[end], column["digits"]) for end in ("low", "high"))
    return f' <span class="soft">({low} to {high})</span>'
