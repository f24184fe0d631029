"""What is known of each preset, read from its TOML; needs no torch, so that lists and completion are quick.

A preset with a ``family`` is released weights, on the Hugging Face Hub; one without comes with the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers_vis.config import did_you_mean, read_toml

FOLDER = Path(__file__).parent / "presets"


def list_presets() -> list[str]:
    """The names that ``load`` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def preset(name: str) -> dict[str, Any]:
    """The table of a preset. Raises ``ValueError`` with a did-you-mean."""
    if name not in list_presets():
        raise ValueError(
            f"there is no preset, file or folder {name!r}.{did_you_mean(name, list_presets())} "
            f"Presets: {', '.join(list_presets())}"
        )
    return read_toml(FOLDER / f"{name}.toml")


def nested_presets() -> list[str]:
    """The presets whose prefixes decode."""
    return [name for name in list_presets() if preset(name)["nested"]]


def facts(name: str, table: Mapping[str, Any]) -> dict[str, str]:
    """A preset in words, as columns of a list: each has the same keys, and "-" stands for what is not known.

    A continuous token has no codebook; its numbers are 16 bits each.
    """
    vectors = f"none, {table['bits_per_image'] // table['max_tokens'] // 16} numbers"
    return {
        "name": name,
        "tokens": f"1..{table['max_tokens']}" if table["nested"] else str(table["max_tokens"]),
        "codebook": " + ".join(f"{size:,}" for size in table["codebook_sizes"]) or vectors,
        "bits": f"{table['bits_per_image']:,}",
        "px": str(table["image_size"]),
        "rFID": f"{table['rfid']:.2f}" if "rfid" in table else "-",
        "licence": table["licence"] + ("" if table["commercial"] else " (not commercial)"),
    }


def columns(rows: Sequence[Mapping[str, str]], room: int | None = None) -> str:
    """Facts of one preset or more as a table with a head; of ``room`` characters only those columns that fit."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for key in ("px", "bits", "codebook", "licence", "rFID"):
        if room is not None and sum(widths.values()) + 2 * (len(widths) - 1) > room:
            del widths[key]
    lines = [{key: key for key in widths}, *rows]
    return "\n".join("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip() for row in lines)


def downloaded(name: str) -> bool:
    """Whether ``load(name)`` needs no network: the preset comes with the library, or lies in the Hub's cache."""
    table = preset(name)
    if "family" not in table:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(table["hub"], table["file"]), str)
