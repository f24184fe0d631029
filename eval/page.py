"""The report as one HTML page that needs nothing but itself: tables, plots and pictures are inside.

Its frame, styles and scripts are report_page.html. Everything that comes from outside (labels, names, texts that were
read) is escaped, and the page's own policy forbids requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokenizers_vis.eval.gallery import Pictures, gallery, pair
from tokenizers_vis.eval.html_table import cell, head_cell, sortable, span
from tokenizers_vis.eval.plots import Point, rate_plot, scale_plot
from tokenizers_vis.eval.rate import curve_name
from tokenizers_vis.eval.tables import NOTHING, marked, notes, stamps_said, written
from tokenizers_vis.eval.token_page import token_section, token_table

_FRAME = Path(__file__).parent / "report_page.html"
_SHOWN = 4  # plots of metrics against rate
_SAID = {"photos": "photographs", "text": "pictures with words to read", "faces": "pictures with faces to recognise"}


def page(results: Mapping[str, Any], out: Path) -> str:
    """The whole page. out: the folder with the parts, of which the pictures are taken."""
    pictures = Pictures()
    suites = results["suites"]
    parts = [_head(results)]
    parts += [_suite(suite, out, pictures) for suite in suites]
    parts.append('<h2 id="methods">Methods</h2>')
    parts += [_method(method, suites, out, pictures) for method in results["methods"]]
    frame = _FRAME.read_text(encoding="utf-8")
    title = "Reconstruction: " + ", ".join(suite["name"] for suite in suites)
    # A "</script>" inside of the JSON would end it; base64 and short keys hold no "<".
    filled = {"{{title}}": escape(title), "{{pictures}}": json.dumps(pictures.held), "{{body}}": "\n".join(parts)}
    for mark, text in filled.items():
        frame = frame.replace(mark, text)
    return frame


def _head(results: Mapping[str, Any]) -> str:
    suites = results["suites"]
    links = [f'<a href="#{_id(suite["name"])}">{escape(suite["name"])}</a>' for suite in suites]
    links.append('<a href="#methods">methods</a>')
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    command = f"<pre>{escape(results['command'])}</pre>" if results.get("command") else ""
    counts = " and ".join(f"{suite['pictures']} {_SAID[suite['kind']]} ({suite['name']})" for suite in suites)
    return (
        f"<h1>What reconstructions keep</h1><p>{len(results['methods'])} methods on {escape(counts)}.</p>"
        f'<nav aria-label="sections">{"".join(links)}</nav>{command}<p class="soft">{escape(versions)}</p>'
    )


def _suite(suite: Mapping[str, Any], out: Path, pictures: Pictures) -> str:
    parts = [f'<h2 id="{_id(suite["name"])}">{escape(suite["name"])}</h2>']
    parts.append(f'<p class="soft">{suite["pictures"]} {_SAID[suite["kind"]]}.</p>')
    for name, reason in suite["skipped"].items():
        parts.append(f'<p class="soft"><b>left out</b> {escape(name)}: {escape(reason)}</p>')
    parts.append(_table(suite))
    parts += [f'<p class="soft">{escape(said)}</p>' for said in stamps_said(suite)]
    parts += [f'<p class="soft"><b>note</b> {escape(note)}</p>' for note in notes(suite)]
    parts.append(_plots(suite))
    parts.append(_differences(suite))
    parts.append(token_table(suite, {row["label"]: _method_id(row["label"]) for row in suite["rows"]}))
    parts.append(gallery(suite, out, pictures))
    parts += [
        f'<p class="soft">Published, in italics: <b>{escape(table["title"])}</b>. {escape(table["protocol"])}. '
        f"From {_linked(table['source'])} {_linked(table['paper'])}</p>"
        for table in suite["published"]
    ]
    return "\n".join(parts)


def _table(suite: Mapping[str, Any]) -> str:
    """Measured rows and columns, and in italics what others published: their columns follow those like them."""
    theirs = [(table, k) for table in suite["published"] for k in range(len(table["columns"]))]
    photos = suite["kind"] == "photos"
    columns = [column for column in suite["columns"] if column["group"] != "tokens"]
    before = [one for one in columns if one["key"] == "bytes" or _alike(one, photos)]
    after = [column for column in columns if column not in before]
    foreign = "".join(
        f'<th scope="col" class="published" title="{escape(table["title"])}"><button type="button">'
        f"{escape(table['columns'][k])}, published</button></th>"
        for table, k in theirs
    )
    method = '<th scope="col"><button type="button">method</button></th>'
    body = []
    for row in suite["rows"]:
        label = escape(row["label"])
        name = f'<td data-v="{label}"><a href="#{_method_id(row["label"])}">{label}</a></td>'
        own = {id(table): one for table, _ in theirs for one in table["rows"] if one["label"] == row["label"]}
        values = [own[id(table)]["values"][k] if id(table) in own else None for table, k in theirs]
        left, right = ("".join(cell(row["cells"].get(one["key"]), one) for one in some) for some in (before, after))
        body.append(f"<tr>{name}{left}{''.join(map(_published, values))}{right}</tr>")
    for table in suite["published"]:
        for one in table["rows"]:
            if one["label"] is None:
                values = [one["values"][k] if owner is table else None for owner, k in theirs]
                name, left, right = escape(one["name"]), "<td></td>" * len(before), "<td></td>" * len(after)
                body.append(
                    f'<tr class="published"><td data-v="{name}">{name}</td>{left}{"".join(map(_published, values))}'
                    f"{right}</tr>"
                )
    return sortable([method, *map(head_cell, before), foreign, *map(head_cell, after)], body)


def _alike(column: Mapping[str, Any], photos: bool) -> bool:
    """Whether a column is of the kind that others publish: of text and faces the mean of bins, without pixels."""
    return column["group"] == "quality" and (photos or ("[" in column["title"] and column["title"].endswith("]")))


def _published(value: float | None) -> str:
    return "<td></td>" if value is None else f'<td class="published" data-v="{value}">{value:g}</td>'


def _plots(suite: Mapping[str, Any]) -> str:
    figures = []
    families = list(dict.fromkeys(curve_name(row["label"]) for row in suite["rows"]))
    colours = {name: number for number, name in enumerate(families)}
    scores = [one for one in suite["columns"] if one["better"] and one["key"] not in ("psnr_pooled", "bytes")]
    of_sets = [column for column in scores if column["group"] == "sets"][:1]
    of_pairs = [column for column in scores if column["group"] == "quality" and not column["key"].endswith(" micro")]
    for column in of_pairs[: _SHOWN - len(of_sets)] + of_sets:
        series: dict[str, list[Point]] = {}
        levels: dict[str, float] = {}
        for row in suite["rows"]:
            found, size = row["cells"].get(column["key"]), row["cells"].get("bytes")
            if found is None or not isinstance(found["value"], (int, float)):
                continue
            if size is None:
                levels[row["label"]] = found["value"]
            else:
                point = Point(size["value"], found["value"], row["label"], found.get("low"), found.get("high"))
                series.setdefault(curve_name(row["label"]), []).append(point)
        title = f"{column['title']} ({column['better']} is better)"
        if svg := rate_plot(series, levels, colours, x_title="bytes a picture", y_title=column["title"]):
            figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>")
    # Of a family only the largest: with all of them nothing could be told apart. The table has all.
    largest = {curve_name(row["label"]): row["label"] for row in sorted(suite["rows"], key=_bytes)}
    for scale in suite["scales"]:
        series = {
            name: [one["mean"] for one in scale["rows"][largest[name]]["bins"]] for name in families if name in largest
        }
        if svg := scale_plot(series, scale["spans"], colours, y_title=scale["metric"]):
            said = f"{scale['metric']} by scale, {scale['bins']}; of each family its largest"
            figures.append(f"<figure><figcaption>{escape(said)}</figcaption>{svg}{_scale_table(scale)}</figure>")
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _bytes(row: Mapping[str, Any]) -> float:
    return row["cells"].get("bytes", {"value": 0})["value"]


def _scale_table(scale: Mapping[str, Any]) -> str:
    heads = "".join(f'<th scope="col">{start:g}–{stop:g}</th>' for start, stop in scale["spans"])
    first = next(iter(scale["rows"].values()))
    under = "".join(f"<td>{one['count']}</td>" for one in first["bins"])
    rows = ""
    for label, row in scale["rows"].items():
        values = [*(one["mean"] for one in row["bins"]), row["macro"], row["micro"]]
        rows += f"<tr><td>{escape(label)}</td>{''.join(f'<td>{written(value, 3)}</td>' for value in values)}</tr>"
    return (
        '<details><summary>all numbers</summary><div class="scroll" tabindex="0"><table><thead><tr>'
        f'<th scope="col">scale</th>{heads}<th>macro</th><th>micro</th></tr></thead><tbody><tr class="published">'
        f"<td>instances</td>{under}<td></td><td>{first['instances']}</td></tr>{rows}</tbody></table></div></details>"
    )


def _differences(suite: Mapping[str, Any]) -> str:
    """Bjontegaard differences where there are any, and why there are none elsewhere."""
    rows, reasons = [], {}
    for table in suite["rate"]:
        for one in table["curves"]:
            if one["bd_rate"] is None and one["bd_quality"] is None:
                reasons.setdefault(one["name"], one["quality_reason"])
                continue
            cells = ""
            for value, why, unit in (
                (one["bd_rate"], one["rate_reason"], " %"),
                (one["bd_quality"], one["quality_reason"], ""),
            ):
                shown = NOTHING if value is None else f"{value:+.1f}{unit}" if unit else f"{value:+.3f}"
                cells += f'<td title="{escape(why)}">{shown}</td>'
            rows.append(f"<tr><td>{escape(one['name'])}</td><td>{escape(table['title'])}</td>{cells}</tr>")
    if not rows:
        return ""
    said = "".join(f'<p class="soft">{escape(why)}</p>' for why in reasons.values())
    return (
        f"<h3>Against {escape(suite['rate'][0]['anchor'])}, over the range that both reach</h3>"
        '<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">method</th><th scope="col">metric</th>'
        '<th scope="col">bytes at equal quality</th><th scope="col">quality at equal bytes</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{said}"
    )


def _method(method: Mapping[str, Any], suites: Sequence[Mapping[str, Any]], out: Path, pictures: Pictures) -> str:
    label = method["label"]
    facts = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in method.items()
        if key != "label" and value not in (None, {}, [])
    )
    parts = [f"<dl>{facts}</dl>"]
    for suite in suites:
        row = next(one for one in suite["rows"] if one["label"] == label)
        columns = [
            column for column in suite["columns"] if column["group"] != "tokens" and column["key"] in row["cells"]
        ]
        cells = [(column, row["cells"][column["key"]]) for column in columns]
        numbers = "".join(
            f"<dt>{escape(column['title'])}</dt><dd>{escape(marked(found, column['digits']))}{span(found, column)}</dd>"
            for column, found in cells
        )
        parts.append(f"<h3>{escape(suite['name'])}</h3><dl>{numbers}</dl>")
        parts.append(token_section(suite, label, out, pictures))
        if suite["kind"] == "photos" and len(row["examples"]) >= 2:
            half = min(2, len(row["examples"]) // 2)
            for said, some in (("Worst", row["examples"][:half]), ("Best", row["examples"][-half:])):
                pairs = "".join(pair(suite["name"], label, one, out, pictures) for one in some)
                parts.append(f'<h3>{said} by PSNR</h3><div class="pairs">{pairs}</div>')
    kind = escape(method["kind"])
    return (
        f'<details id="{_method_id(label)}"><summary>{escape(label)}<small>{kind}</small></summary>'
        f"<div>{''.join(parts)}</div></details>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _linked(text: str) -> str:
    words = []
    for word in text.split():
        safe = escape(word)
        words.append(f'<a href="{safe}" rel="noreferrer">{safe}</a>' if word.startswith("https://") else safe)
    return " ".join(words)


def _id(name: str) -> str:
    return escape("suite-" + name.replace("@", "-"))


def _method_id(label: str) -> str:
    return "method-" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in label)
