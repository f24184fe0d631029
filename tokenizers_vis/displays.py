"""What a notebook shows of Tokens: each image's ids as a grid of coloured cells, with counts and bytes.

No colour is set for text on the page itself, and cells bring their own: both show on a dark and on a light page.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tokenizers_vis.tokens import Tokens

# How much of a batch is shown. With more codebooks than this a token's cells are dots without numbers.
_IMAGES, _TOKENS, _NUMBERED = 8, 256, 4

# Said once and inherited by the cells, of which a notebook may keep thousands.
_GRID = (
    "display:flex;flex-wrap:wrap;gap:2px;margin:3px 0;max-width:900px;text-align:center;"
    "font:10px/15px ui-monospace,Menlo,Consolas,monospace"
)
_FAINT = "opacity:.7;font-size:90%"


def tokens_html(tokens: Tokens) -> str:
    """An HTML fragment: a line of facts, then image by image its grid, its bytes and those of its prefixes."""
    lengths = [tokens.n_tokens] * len(tokens) if tokens.lengths is None else tokens.lengths.tolist()
    shown = [
        _image(tokens, index, length, nbytes)
        for index, (length, nbytes) in enumerate(zip(lengths, tokens.nbytes, strict=True))
        if index < _IMAGES
    ]
    more = [f"<div style='{_FAINT}'>and {len(tokens) - _IMAGES} more images</div>"] if len(tokens) > _IMAGES else []
    return f"<div><strong>{html.escape(repr(tokens))}</strong>{''.join(shown + more)}</div>"


def _image(tokens: Tokens, index: int, length: int, nbytes: int) -> str:
    ids = tokens.ids[index, :length].cpu()
    facts = [f"image {index}", _count(length, "token"), _count(nbytes, "byte"), _distinct(ids)]
    width = 9 + 6 * len(str(max(tokens.codebook_sizes) - 1)) if len(tokens.codebook_sizes) <= _NUMBERED else 0
    cells = "".join(_token(token, tokens.codebook_sizes, width) for token in ids[:_TOKENS].tolist())
    rest = f"<span style='{_FAINT}'>&hellip; and {length - _TOKENS} more</span>" if length > _TOKENS else ""
    grid = f"<div style='{_GRID}'>{cells}{rest}</div>"
    prefixes = _prefixes(length, tokens.bits_per_token) if tokens.nested and length > 1 else ""
    return f"<div style='margin:8px 0'><div style='{_FAINT}'>{' &middot; '.join(facts)}</div>{grid}{prefixes}</div>"


def _token(ids: list[int], sizes: tuple[int, ...], width: int) -> str:
    """One token, its codebooks from top to bottom. width: of a cell in pixels; 0 for a dot."""
    cells = []
    for id_, size in zip(ids, sizes, strict=True):
        # The hues go from red to blue and stop: further round the circle the last id would look like the first.
        hue, look = 250 * id_ // (size - 1), f"color:#111;min-width:{width}px" if width else "width:8px;height:4px"
        cell = f"background:hsl({hue},70%,{75 if width else 55}%);{look}"
        cells.append(f"<div title='{id_}' style='{cell}'>{id_ if width else ''}</div>")
    return f"<div>{''.join(cells)}</div>"


def _distinct(ids: Tensor) -> str:
    """ids: n k."""
    counts = [len(column.unique()) for column in ids.unbind(dim=1)]
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} distinct {'id' if high == 1 else 'ids'}" + (
        " in each codebook" if len(counts) > 1 else ""
    )


def _prefixes(length: int, bits: int) -> str:
    """What an ordered image costs at 1, 2, 4 ... all tokens."""
    counts = [2**i for i in range((length - 1).bit_length())] + [length]
    sizes = [-(-n * bits // 8) for n in counts]
    first, second = (", ".join(map(str, numbers)) for numbers in (counts, sizes))
    return f"<div style='{_FAINT}'>the first {first} tokens: {second} bytes</div>"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
