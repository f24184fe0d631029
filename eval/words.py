"""Rendered words, of which everything is known: a licence-free set for text fidelity, made on the spot.

Every word has a height, a contrast and a rotation, so that a score can be read against each of them. The font is the
one that Pillow carries, Aileron (CC0); the words are the list below and random strings. The same arguments give the
same pixels with the same Pillow and FreeType, whose versions are written into the set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version

from tokenizers_vis.files import write_atomically

HEIGHTS = (8, 10, 12, 16, 20, 24, 32, 48, 64)
CONTRASTS = (1.0, 0.4)
ROTATIONS = (0.0, 15.0)
WORDS = (
    "about above again almost always apple autumn basket before bridge bright bottle butter candle carbon castle "
    "cherry circle copper corner cotton dinner dragon eleven engine family finger flower forest friend garden "
    "ginger guitar hammer harbor hidden island jacket jungle kettle kitchen ladder lemon library market memory "
    "middle mirror morning needle number orange oxygen packet pencil people pepper picture planet pocket purple "
    "quartz queen rabbit ribbon river rocket saddle school season secret shadow silver simple single spring "
    "square station stone street summer sunset table thunder ticket tomato travel tunnel under valley velvet "
    "village violin walnut water weather window winter wizard yellow zebra"
).split()
_SYMBOLS = "ABCDEFGHJKLMNPQRTUVWXY346789"  # no O 0, I 1, S 5, Z 2; no small letters: c and C differ in size alone
_FINER = 4  # words are drawn this much larger and scaled down: no hinting, and edges are smooth at any angle
_MARGIN = 0.15  # of the height, around a word: its box is as loose as people draw them


@dataclass(frozen=True)
class Look:
    """How words are drawn.

    height: of a line, from the highest ascender to the lowest descender, in pixels; a capital is 0.58 of it.
    contrast: the difference of the greys of word and ground over that of black and white, above 0, at most 1.
    rotation: degrees, counter-clockwise.
    """

    height: int
    contrast: float = 1.0
    rotation: float = 0.0

    def __post_init__(self) -> None:
        if self.height < 4 or not 0 < self.contrast <= 1 or not -90 <= self.rotation <= 90:
            raise ValueError(
                f"a word is 4 pixels high or more, its contrast above 0 and at most 1, its rotation from -90 to 90; "
                f"got {self}"
            )


def render_word(text: str, look: Look, *, dark_on_light: bool = True) -> np.ndarray:
    """One word on its ground, uint8 h w 3, as large as the word, turned, and a margin around it."""
    font = _font(look.height * _FINER)
    left, top, right, bottom = font.getbbox(text)
    margin = max(1, round(look.height * _MARGIN)) * _FINER
    ink = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin), 0)
    ImageDraw.Draw(ink).text((margin - left, margin - top), text, fill=255, font=font)
    ink = ink.rotate(look.rotation, Image.Resampling.BICUBIC, expand=True)
    size = tuple(max(1, round(side / _FINER)) for side in ink.size)
    share = np.asarray(ink.resize(size, Image.Resampling.LANCZOS), dtype=np.float64)[:, :, None] / 255
    light, dark = 0.5 + look.contrast / 2, 0.5 - look.contrast / 2
    word, ground = (dark, light) if dark_on_light else (light, dark)
    grey = ground + (word - ground) * share
    return np.repeat((grey * 255).round().clip(0, 255).astype(np.uint8), 3, axis=2)


def render_page(
    look: Look, *, count: int = 20, size: int = 512, seed: int = 0
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A page of words that do not touch: uint8 size size 3, and annotations of ours, {"box", "text", "tags"} each.

    count: at most so many; fewer where the page is full, or too narrow for some. Of one look and seed the words are
        always the same; half of them are random strings of capitals and digits, the others common words, small,
        capitalised or in capitals.

    Raises ``ValueError`` when not a single word fits.
    """
    draw = random.Random(f"{seed} {look}")
    dark_on_light = draw.random() < 0.5
    ground = 0.5 + (look.contrast / 2 if dark_on_light else -look.contrast / 2)
    page = np.full((size, size, 3), round(ground * 255), dtype=np.uint8)
    gap = max(2, look.height // 4)
    x, y, row = gap, gap, 0
    annotations: list[dict[str, Any]] = []
    for _ in range(count):
        text = _text(draw)
        word = render_word(text, look, dark_on_light=dark_on_light)
        h, w = word.shape[:2]
        if w + 2 * gap > size:
            continue
        if x + w + gap > size:
            x, y, row = gap, y + row + gap, 0
        if y + h + gap > size:
            break
        page[y : y + h, x : x + w] = word
        tags = {"height": look.height, "contrast": look.contrast, "rotation": look.rotation}
        annotations.append({"box": [x, y, x + w, y + h], "text": text, "tags": tags})
        x, row = x + w + gap, max(row, h)
    if not annotations:
        raise ValueError(f"no word {look.height} pixels high fits on a page of {size}; take a larger page")
    return page, annotations


def write_words(
    folder: str | Path,
    *,
    heights: Sequence[int] = HEIGHTS,
    contrasts: Sequence[float] = CONTRASTS,
    rotations: Sequence[float] = ROTATIONS,
    count: int = 20,
    size: int = 512,
    seed: int = 0,
) -> Path:
    """A page of each look, as PNG files with annotations.jsonl, which ``eval.text.open_text`` reads: its path.

    Raises ``ValueError`` when the folder holds a set already, and as ``Look`` and ``render_page`` do.
    """
    folder = Path(folder)
    table = folder / "annotations.jsonl"
    if table.exists():
        raise ValueError(f"{table} is there already; delete the set, or write into another folder")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    versions = {"pillow": pillow_version, "freetype": features.version("freetype2")}
    lines = []
    for look in [Look(h, c, r) for h in heights for c in contrasts for r in rotations]:
        page, words = render_page(look, count=count, size=size, seed=seed)
        name = f"images/words-h{look.height}-c{look.contrast:g}-r{look.rotation:g}.png"
        write_atomically(folder / name, Image.fromarray(page).save)
        line = {"file": name, "width": size, "height": size, "words": words, "font": "Aileron Regular", **versions}
        lines.append(json.dumps(line))
    write_atomically(table, ("\n".join(lines) + "\n").encode())
    return table


def _text(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return "".join(draw.choice(_SYMBOLS) for _ in range(draw.randint(4, 8)))
    word = draw.choice(WORDS)
    return draw.choice([word, word.capitalize(), word.upper()])


def _font(height: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, so large that a line is ``height`` pixels high."""
    font = ImageFont.load_default(100)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("words are drawn with FreeType, which this Pillow was built without; Pillow's wheels have it")
    return font.font_variant(size=100 * height / sum(font.getmetrics()))
