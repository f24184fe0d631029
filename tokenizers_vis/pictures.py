"""Pictures beside pictures: a labelled contact sheet as one PIL image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from tokenizers_vis.images import load_image, to_pil

_SMALLEST_CELL = 96


def contact_sheet(
    rows: Sequence[Sequence[Any]],
    *,
    columns: Sequence[str] | None = None,
    captions: Sequence[Sequence[str | None]] | None = None,
    row_labels: Sequence[str | None] | None = None,
    cell: int | None = None,
    background: str = "white",
) -> Image.Image:
    """Rows of pictures in a grid.

    rows: each a row of pictures: PIL images, tensors 3 h w (uint8, or float, clamped to [0, 1]), or anything else that
        ``load_image`` takes. None, and what a shorter row lacks, stays empty.
    columns: a heading over each column.
    captions: a text under each picture, in the layout of ``rows``.
    row_labels: a text left of each row.
    cell: the longer side, in pixels, to which every picture is scaled; the longest side there is, at least 96.
    background: a colour as PIL names them; the text is dark or light by it.

    Long texts are wrapped. Raises ``ValueError`` when nothing is there to show or a number of texts does not fit.
    """
    if isinstance(rows, Tensor):
        raise ValueError(f"rows are lists of pictures, got a tensor {tuple(rows.shape)}; give [list(images)] for a row")
    grid = [[None if picture is None else _as_pil(picture) for picture in row] for row in rows]
    shown = [picture for row in grid for picture in row if picture is not None]
    if not shown:
        raise ValueError("a contact sheet shows at least one picture, got none")
    width = max(len(row) for row in grid)
    _check_texts(grid, width, columns, captions, row_labels)
    cell = max(_SMALLEST_CELL, *(max(picture.size) for picture in shown)) if cell is None else cell
    if cell < 1:
        raise ValueError(f"cell is a number of pixels, at least 1; got {cell}")

    grid = [[None if picture is None else _scale(picture, cell) for picture in row] for row in grid]
    cell_w = max(picture.width for row in grid for picture in row if picture is not None)
    gap = max(6, cell // 16)
    text = _Writer(max(13, min(28, cell // 12)), background)
    heads = [text.wrap(head, cell_w) for head in columns or [""] * width]
    labels = [text.wrap(label or "", cell) for label in row_labels or [""] * len(grid)]
    below = [[text.wrap(caption or "", cell_w) for caption in row] for row in captions or [[]] * len(grid)]

    label_w = max(text.width(label) for label in labels)
    left = gap + (label_w + gap if label_w else 0)
    head_h = max(text.height(head) for head in heads)
    top = gap + (head_h + gap // 2 if head_h else 0)
    picture_hs = [max((p.height for p in row if p is not None), default=0) for row in grid]
    below_hs = [max((text.height(caption) for caption in row), default=0) for row in below]
    row_hs = [p + (gap // 2 + c if c else 0) for p, c in zip(picture_hs, below_hs, strict=True)]

    sheet = Image.new("RGB", (left + width * (cell_w + gap), top + sum(h + gap for h in row_hs)), background)
    draw = ImageDraw.Draw(sheet)
    for j, head in enumerate(heads):
        text.draw(draw, head, left + j * (cell_w + gap) + cell_w // 2, top - gap // 2 - text.height(head), "center")
    y = top
    for i, row in enumerate(grid):
        text.draw(draw, labels[i], gap + label_w, y + (picture_hs[i] - text.height(labels[i])) // 2, "right")
        for j, picture in enumerate(row):
            x = left + j * (cell_w + gap)
            if picture is not None:
                place = (x + (cell_w - picture.width) // 2, y + (picture_hs[i] - picture.height) // 2)
                sheet.paste(picture, place)
            if j < len(below[i]):
                text.draw(draw, below[i][j], x + cell_w // 2, y + picture_hs[i] + gap // 2, "center")
        y += row_hs[i] + gap
    return sheet


class _Writer:
    """Measures, wraps and draws text in PIL's own font."""

    def __init__(self, size: int, background: str):
        self.font = ImageFont.load_default(size=size)
        self.line = round(size * 1.3)
        red, green, blue = ImageColor.getrgb(background)[:3]
        self.colour = "#222222" if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else "#eeeeee"

    def wrap(self, text: str, width: int) -> list[str]:
        """Lines of at most ``width`` pixels; a word that is too long alone is cut."""
        lines = []
        for paragraph in text.splitlines():
            line = ""
            for word in paragraph.split():
                longer = f"{line} {word}" if line else word
                if line and self.font.getlength(longer) > width:
                    lines.append(line)
                    longer = word
                while self.font.getlength(longer) > width and len(longer) > 1:
                    fits = next(i for i in range(len(longer) - 1, 0, -1) if i == 1 or self._fits(longer[:i], width))
                    lines.append(longer[:fits])
                    longer = longer[fits:]
                line = longer
            lines.append(line)
        return lines

    def _fits(self, text: str, width: int) -> bool:
        return self.font.getlength(text) <= width

    def width(self, lines: list[str]) -> int:
        return max((round(self.font.getlength(line)) for line in lines), default=0)

    def height(self, lines: list[str]) -> int:
        return self.line * len(lines)

    def draw(self, draw: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, align: str) -> None:
        """x is the middle of the text, or its right edge; y its top."""
        for i, line in enumerate(lines):
            draw.text(
                (x, y + i * self.line), line, self.colour, self.font, anchor={"center": "ma", "right": "ra"}[align]
            )


def _as_pil(picture: Any) -> Image.Image:
    # A tensor goes straight to to_pil, which clamps; load_image would refuse what overshoots.
    return to_pil(picture if isinstance(picture, Tensor) else load_image(picture))


def _scale(picture: Image.Image, cell: int) -> Image.Image:
    factor = cell / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _check_texts(
    grid: Sequence[Sequence[Any]],
    width: int,
    columns: Sequence[str] | None,
    captions: Sequence[Sequence[str | None]] | None,
    row_labels: Sequence[str | None] | None,
) -> None:
    if columns is not None and len(columns) != width:
        raise ValueError(f"columns is one heading for each of {width} columns, got {len(columns)}")
    if row_labels is not None and len(row_labels) != len(grid):
        raise ValueError(f"row_labels is one text for each of {len(grid)} rows, got {len(row_labels)}")
    if captions is not None and [len(row) for row in captions] != [len(row) for row in grid]:
        raise ValueError(
            f"captions has the layout of rows, {[len(row) for row in grid]} texts; got {[len(row) for row in captions]}"
        )
