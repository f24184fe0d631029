"""What the recipes that ship with the library are, in a line each: the comment that opens the file."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "recipes"


def describe(name: str) -> str:
    """The first line of a shipped recipe: what it makes. The lines after it: command, hardware, number to expect."""
    with (FOLDER / f"{name}.toml").open(encoding="utf-8") as file:
        first = file.readline()
    return first.removeprefix("#").strip() if first.startswith("#") else ""
