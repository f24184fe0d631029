"""A suite's table as Markdown and as LaTeX, and how numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"
_ARROWS = {"higher": "↑", "lower": "↓", "": ""}
_TEX_ARROWS = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "": ""}
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "∞": r"$\infty$", "–": "--"}
_TEX |= {character: f"\\{character}" for character in "&%$#_{}"}
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


def markdown(results: Mapping[str, Any]) -> str:
    """All suites: a table, its stamps, and numbers that others published."""
    parts = []
    for suite in results["suites"]:
        columns = suite["columns"]
        heads = ["method", *(f"{column['title']} {_ARROWS[column['better']]}".strip() for column in columns)]
        rule = ["---", *("---:" for _ in columns)]
        rows = [[f"`{row['label']}`", *_cells(row, columns)] for row in suite["rows"]]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (heads, *rows)]
        lines.insert(1, "| " + " | ".join(rule) + " |")
        parts.append(f"## {suite['name']}, {suite['pictures']} pictures\n\n" + "\n".join(lines))
        parts.append("\n".join(f"- {said}" for said in stamps_said(suite)))
        for table in suite["published"]:
            heads = ["published", *table["columns"]]
            shown = [[row["name"], *(written(value, 2) for value in row["values"])] for row in table["rows"]]
            lines = ["| " + " | ".join(line) + " |" for line in (heads, *shown)]
            lines.insert(1, "| " + " | ".join(["---", *("---:" for _ in table["columns"])]) + " |")
            source = " ".join(filter(None, (table["source"], table["paper"])))
            parts.append(f"{table['title']} ({source}; {table['protocol']}):\n\n" + "\n".join(lines))
    command = f"```bash\n{results['command']}\n```\n\n" if results.get("command") else ""
    return command + "\n\n".join(parts) + "\n"


def summary(results: Mapping[str, Any]) -> str:
    """For a terminal: of each suite the columns that matter most."""
    blocks = []
    for suite in results["suites"]:
        shown = [column for column in suite["columns"] if column["key"] in _SAID_FIRST or "[" in column["title"]]
        shown = [column for column in shown if not column["key"].startswith(_SAID_ELSEWHERE)]
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
    """A booktabs table for each suite, without the columns of costs that are words."""
    parts = []
    for suite in results["suites"]:
        columns = [column for column in suite["columns"] if column["key"] != "licence"]
        heads = ["method", *(_tex(column["title"]) + _TEX_ARROWS[column["better"]] for column in columns)]
        rows = [[r"\texttt{" + _tex(row["label"]) + "}", *map(_tex, _cells(row, columns))] for row in suite["rows"]]
        body = " \\\\\n".join(" & ".join(row) for row in rows)
        caption = _tex(f"{suite['name']}, {suite['pictures']} pictures. {' '.join(stamps_said(suite))}")
        parts.append(
            "\\begin{table}\n\\centering\n\\small\n\\caption{" + caption + "}\n"
            "\\begin{tabular}{l" + "r" * len(columns) + "}\n\\toprule\n" + " & ".join(heads) + " \\\\\n\\midrule\n"
            f"{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def stamps_said(suite: Mapping[str, Any]) -> list[str]:
    """How the columns were measured, a line for each way, with the columns that it is of."""
    ways: dict[str, list[str]] = {}
    for column in suite["columns"]:
        if column["group"] != "cost":
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
    return [written(row["cells"].get(column["key"], {}).get("value"), column["digits"]) for column in columns]


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
