"""What the report says of tokens: a table of all tokenizers, and of each its statistics, curves, errors and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokenizers_vis.eval.benchmark import ORIGINALS, folder_of
from tokenizers_vis.eval.examples import FOLDER
from tokenizers_vis.eval.gallery import Pictures, figure
from tokenizers_vis.eval.html_table import cell, head_cell, plain, sortable
from tokenizers_vis.eval.perturbed import shown_at
from tokenizers_vis.eval.plots import Point, curve_plot
from tokenizers_vis.eval.tables import FEW, written


def token_table(suite: Mapping[str, Any], ids: Mapping[str, str]) -> str:
    """A row for each tokenizer that was studied; "" without any. ids: label -> of the method's own part of the page."""
    columns = [column for column in suite["columns"] if column["group"] == "tokens"]
    studied = [one["label"] for one in suite["tokens"]]
    if not columns:
        return ""
    rows = []
    for row in suite["rows"]:
        if row["label"] in studied:
            name = escape(row["label"])
            link = f'<td data-v="{name}"><a href="#{ids[row["label"]]}">{name}</a></td>'
            rows.append(f"<tr>{link}{''.join(cell(row['cells'].get(one['key']), one) for one in columns)}</tr>")
    first = '<th scope="col"><button type="button">tokenizer</button></th>'
    few = any("mark" in one for row in suite["rows"] for one in row["cells"].values())
    below = f'<p class="soft">{escape(FEW)}</p>' if few else ""
    return f"<h3>Tokens</h3>{sortable([first, *map(head_cell, columns)], rows)}{below}"


def token_section(suite: Mapping[str, Any], label: str, out: Path, pictures: Pictures) -> str:
    """Of one tokenizer on one suite; "" where it was not studied."""
    study = next((one for one in suite["tokens"] if one["label"] == label), None)
    if study is None:
        return ""
    books = study["statistics"]["codebooks"]
    heads = ["tokens", *(["codebook"] if len(books) == 1 else [f"codebook {j}" for j in range(len(books))])]
    warnings = dict.fromkeys(warning for book in books for warning in book["warnings"])
    parts = [f"<h3>Tokens, {escape(suite['name'])}</h3>", plain(heads, study["table"])]
    parts += [f'<p class="soft">{escape(warning)}</p>' for warning in warnings]
    parts.append(_curves(books))
    if "perturbed" in study:
        parts.append(_perturbed(study["perturbed"], suite, label, out, pictures))
    parts.append(_probes(study))
    return "".join(parts)


def _curves(books: Sequence[Mapping[str, Any]]) -> str:
    names = [f"codebook {j}" if len(books) > 1 else "" for j in range(len(books))]
    plots = (
        ("codes by rank", "rank", "times", True, True, [book["ranks"] for book in books]),
        ("different codes", "images", "codes", True, True, [book["innovation"]["curve"] for book in books]),
        (
            "entropy by position, Miller-Madow",
            "position",
            "bits",
            False,
            False,
            [list(enumerate(book["positions"]["corrected"])) for book in books],
        ),
    )
    figures = []
    for title, x_title, y_title, log_x, log_y, curves in plots:
        series = {
            name: [Point(x, y, f"{x_title} {x}") for x, y in curve] for name, curve in zip(names, curves, strict=True)
        }
        if svg := curve_plot(series, x_title=x_title, y_title=y_title, log_x=log_x, log_y=log_y):
            figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>")
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _perturbed(found: Mapping[str, Any], suite: Mapping[str, Any], label: str, out: Path, pictures: Pictures) -> str:
    """The numbers of every setting, and the same pictures at every rate and strength."""
    if "reason" in found:
        return f"<h3>Errors in ids</h3><p>{escape(found['reason'])}.</p>"
    metrics = list(found["means"])
    titles = [next(one["title"] for one in suite["columns"] if one["key"] == key) for key in metrics]
    rows = [
        [
            f"{one['rate']:g}",
            f"{one['share']:g}",
            str(one["strength"]),
            *(written(one["values"][k], 2) for k in metrics),
        ]
        for one in found["settings"]
    ]
    rows.append(["mean", "", "", *(written(found["means"][key], 2) for key in metrics)])
    near = ", ".join(dict.fromkeys(found["neighbourhoods"]))
    said = f"Rate of the ids of a picture, share of the pictures, drawn among so many nearest codes by {near}."
    strips = []
    folder = folder_of(out, suite["name"], label)
    places = dict.fromkeys((one["rate"], one["strength"]) for one in found["settings"])
    for name in found["shown"]:
        original = folder_of(out, suite["name"], ORIGINALS) / FOLDER / name
        given = [(original, "<b>original</b>"), (folder / FOLDER / name, "<b>no errors</b>")]
        given += [
            (shown_at(folder, rate, strength, name), f"<b>rate {rate:g}</b><br>strength {strength}")
            for rate, strength in places
        ]
        figures = (figure(pictures, original, path, text, f"{label}: {name}") for path, text in given if path.is_file())
        strips.append(f'<div class="strip">{"".join(figures)}</div>')
    return (
        f'<h3>Errors in ids</h3><p class="soft">{escape(said)}</p>'
        f"{plain(['rate', 'share', 'strength', *titles], rows)}{''.join(strips)}"
    )


def _probes(study: Mapping[str, Any]) -> str:
    if "no_probes" in study:
        return f'<p class="soft">{escape(study["no_probes"])}</p>'
    kinds = {"linear": "linear, ridge", "knn": "nearest neighbours"}
    rows = []
    for probe in study["probes"]:
        setting = f"penalty {probe['setting']:g}" if probe["probe"] == "linear" else f"k {probe['setting']:g}"
        numbers = [written(probe[key], 3) for key in ("accuracy", "pixels", "chance")]
        features = f"{probe['features']}, {probe['dim']}"
        rows.append([kinds[probe["probe"]], *numbers, features, setting])
    first = study["probes"][0]
    said = f"Top-1 of {first['classes']} classes; {first['train']} images to learn from, {first['test']} to try."
    heads = ["probe", "tokens", f"pixels, {first['pixel_dim']} components", "chance", "features", "setting"]
    return f'<h3>Probes</h3><p class="soft">{said}</p>{plain(heads, rows)}'
