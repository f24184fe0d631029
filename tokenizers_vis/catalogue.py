"""What is known of each preset, read from its TOML; needs no torch, so that lists and completion are quick."""

from __future__ import annotations

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
