"""A suite's table as Markdown and as LaTeX, and how numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"
_ARROWS = {"higher": "↑", "lower": "↓", "": ""}
_TEX_ARROWS = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "": ""}
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "∞": r"$\infty$", "–": "--"}
_TEX |= {character: f"\\{character}" for character in "&%$#_{}"}
FEW = "* from too few ids: fewer than 10 for each code, each pair that occurred, or each code at every position."
_SAID_FIRST = ("bytes", "psnr", "ssim", "fid", "kid")
_SAID_ELSEWHERE = ("precision", "recall", "density", "coverage", "fd_infinity", "fid_infinity")
_TEX |= {"Σ": r"$\Sigma$", "é": r"\'e"}


def written(value: Any, digits: int) -> str:
    """A number with so many decimals, or what stands for it."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return "∞" if value == "inf" else value
    shown = f"{value:,.{digits}f}"
    return shown.removeprefix("-") if not shown.strip("-0.") else shown  # no minus before what rounds to 0


def marked(cell: Mapping[str, Any], digits: int) -> str:
    """A cell's number, and its mark."""
    return written(cell.get("value"), digits) + cell.get("mark", "")


def markdown(results: Mapping[str, Any]) -> str:
    """All suites: a table, its stamps, and numbers that others published."""
    parts = []
    for suite in results["suites"]:
        own, of_tokens = _split(suite["columns"])
        parts.append(f"## {suite['name']}, {suite['pictures']} pictures\n\n" + _table(suite["rows"], own))
        if of_tokens:
            parts.append(f"Tokens:\n\n{_table(_studied(suite), of_tokens)}\n\n\\{FEW}")
        parts.append("\n".join(f"- {said}" for said in (*stamps_said(suite), *notes(suite))))
        for table in suite["published"]:
            heads = ["published", *table["columns"]]
            shown = [[row["name"], *(written(value, 2) for value in row["values"])] for row in table["rows"]]
            lines = ["| " + " | ".join(line) + " |" for line in (heads, *shown)]
            lines.insert(1, "| " + " | ".join(["---", *("---:" for _ in table["columns"])]) + " |")
            source = " ".join(filter(None, (table["source"], table["paper"])))
            parts.append(f"{table['title']} ({source}; {table['protocol']}):\n\n" + "\n".join(lines))
    command = f"```bash\n{results['command']}\n```\n\n" if results.get("command") else ""
    return command + "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    heads = ["method", *(f"{column['title']} {_ARROWS[column['better']]}".strip() for column in columns)]
    cells = [[f"`{row['label']}`", *_cells(row, columns)] for row in rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (heads, *cells)]
    lines.insert(1, "| " + " | ".join(["---", *("---:" for _ in columns)]) + " |")
    return "\n".join(lines)


def _split(columns: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Those of reconstructions, and those of tokens."""
    of_tokens = [column for column in columns if column["group"] == "tokens"]
    return [column for column in columns if column["group"] != "tokens"], of_tokens


def _studied(suite: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    labels = {one["label"] for one in suite["tokens"]}
    return [row for row in suite["rows"] if row["label"] in labels]


def summary(results: Mapping[str, Any]) -> str:
    """For a terminal: of each suite the columns that matter most."""
    blocks = []
    for suite in results["suites"]:
        shown = [column for column in suite["columns"] if column["key"] in _SAID_FIRST or "[" in column["title"]]
        shown = [
            one for one in shown if not one["key"].startswith(_SAID_ELSEWHERE) and not one["key"].endswith(" micro")
        ]
        heads = [suite["name"], *(column["title"] for column in shown)]
        rows = [[row["label"], *_cells(row, shown)] for row in suite["rows"]]
        widths = [max(len(line[k]) for line in (heads, *rows)) for k in range(len(heads))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in (heads, *rows)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def latex(results: Mapping[str, Any]) -> str:
    """A booktabs table for each suite, without the columns of costs that are words; one more for its tokens."""
    parts = []
    for suite in results["suites"]:
        own, of_tokens = _split(suite["columns"])
        columns = [column for column in own if column["key"] != "licence"]
        caption = f"{suite['name']}, {suite['pictures']} pictures. {' '.join(stamps_said(suite))}"
        parts.append(_tabular(suite["rows"], columns, caption))
        if of_tokens:
            caption = f"Tokens on {suite['name']}, {suite['pictures']} pictures. {FEW}"
            parts.append(_tabular(_studied(suite), of_tokens, caption))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def _tabular(rows: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]], caption: str) -> str:
    heads = ["method", *(_tex(column["title"]) + _TEX_ARROWS[column["better"]] for column in columns)]
    lines = [[r"\texttt{" + _tex(row["label"]) + "}", *map(_tex, _cells(row, columns))] for row in rows]
    body = " \\\\\n".join(" & ".join(line) for line in lines)
    return (
        "\\begin{table}\n\\centering\n\\small\n\\caption{" + _tex(caption) + "}\n"
        "\\begin{tabular}{l" + "r" * len(columns) + "}\n\\toprule\n" + " & ".join(heads) + " \\\\\n\\midrule\n"
        f"{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def notes(suite: Mapping[str, Any]) -> list[str]:
    """What is missing, and what is said of a set distance for every method alike; the rest is with the numbers."""
    found = list(suite["remarks"])
    for column in suite["columns"]:
        said = [row["cells"][column["key"]].get("note") for row in suite["rows"] if column["key"] in row["cells"]]
        if column["group"] == "sets" and said and said[0] and len(set(said)) == 1 and said[0] not in found:
            found.append(said[0])
    return found


def stamps_said(suite: Mapping[str, Any]) -> list[str]:
    """How the columns were measured, a line for each way, with the columns that it is of."""
    ways: dict[str, list[str]] = {}
    for column in suite["columns"]:
        if column["group"] not in ("cost", "tokens"):
            ways.setdefault(_stamp_said(column["stamp"]), []).append(column["title"])
    return [f"{', '.join(titles)}: {way}." for way, titles in ways.items()]


def _stamp_said(stamp: Mapping[str, Any]) -> str:
    said = [
        f"{stamp['n']} pictures",
        f"data {stamp['dataset'][:12]}",
        f"size {stamp['size']}",
        f"crop {stamp['crop']}",
        f"resize {stamp['resize']}",
        stamp["quantise"],
    ]
    if stamp["features"]:
        said.append(f"features {stamp['features']} {stamp['feature_hash'][:8]}")
    for key, value in stamp["extra"].items():
        items = value.items() if isinstance(value, dict) else [(key, value)] if value else []
        said += [f"{name} {str(item)[:12] if name == 'weights' else item}" for name, item in items]
    return ", ".join(said)


def _cells(row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    return [marked(row["cells"].get(column["key"], {}), column["digits"]) for column in columns]


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
