"""Numbers as others published them (published.toml, and the rFID of our presets), for a look beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers_vis.catalogue import list_presets, preset
from tokenizers_vis.config import read_toml

_FILE = Path(__file__).parent / "published.toml"
_OF_FACES = "F-Sim"  # what the name of a face score starts with; the leaderboard has text and faces in one table


def published(kind: str, size: int, descriptions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tables that belong beside those of a suite: title, source, paper, protocol, columns, rows.

    kind: photos, text or faces. size: of the suite. descriptions: of the methods that were measured.
    A row has a name, its values, and as ``label`` the measured method that is the same thing, or None.
    """
    tables = []
    for table in read_toml(_FILE)["table"]:
        if table["suite"] != ("text" if kind == "faces" else kind) or table["size"] != size:
            continue
        # Text and faces of TokBench stand in one table; each suite takes its own columns.
        own = [i for i, name in enumerate(table["columns"]) if kind == "photos" or _is_face(name) == (kind == "faces")]
        unit = [100 if name in table["percent"] else 1 for name in table["columns"]]
        rows = []
        for name, values in table["rows"].items():
            label = _measured(table["same"].get(name), descriptions)
            shown = [round(values[k] / unit[k], 4) if unit[k] > 1 else values[k] for k in own]
            rows.append({"name": name, "values": shown, "label": label})
        said = {key: table[key] for key in ("title", "source", "paper", "protocol")}
        tables.append({**said, "columns": [table["columns"][i] for i in own], "rows": rows})
    if kind == "photos":
        tables += _presets(descriptions)
    return tables


def _presets(descriptions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rFID of presets that were measured, at the size that they are made for."""
    rows = []
    for description in descriptions:
        name = description.get("source")
        if name in list_presets() and description["tokens"] == description["max_tokens"]:
            table = preset(name)
            if "rfid" in table:
                said = f"{name} ({table['paper']})"
                rows.append({"name": said, "values": [table["rfid"]], "label": description["label"]})
    if not rows:
        return []
    said = {"title": "rFID as the papers give it", "source": "each tokenizer's paper", "paper": ""}
    protocol = "ImageNet val, 50,000 pictures at the tokenizer's own size; crops and references differ between papers"
    return [{**said, "protocol": protocol, "columns": ["rFID"], "rows": rows}]


def _measured(label: str | None, descriptions: Sequence[Mapping[str, Any]]) -> str | None:
    return label if label in {description["label"] for description in descriptions} else None


def _is_face(column: str) -> bool:
    return column.startswith(_OF_FACES)
