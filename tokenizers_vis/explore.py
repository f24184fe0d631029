"""A local web page to look at tokenizers: drop a photo, move the token slider, compare two. Needs the explore extra.

Built on Gradio (Abid et al. 2019, https://arxiv.org/abs/1906.02569). The page takes everything from this machine: no
fonts, scripts or statistics from or to anywhere else.

Letters: h w pixels, n tokens, k codebooks.
"""

from __future__ import annotations

import base64
import html
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import reduce
from PIL import Image
from torch import Tensor

from tokenizers_vis.images import load_image, to_pil
from tokenizers_vis.presets import load
from tokenizers_vis.tokens import Tokens

if TYPE_CHECKING:
    import gradio as gr

    from tokenizers_vis.latents import Latents
    from tokenizers_vis.tokenizer import Tokenizer

PHOTOS = Path(__file__).parent / "photos"
_FULL = 0.5  # the difference that is drawn white
_SHORT = 8  # a nested tokenizer that is compared with itself starts at this share of its tokens, 1 / 8

_STYLE = """
.gradio-container {max-width: 1300px !important; margin: 0 auto !important}
.look .pictures {display: flex; gap: 12px}
.look figure {flex: 1; margin: 0}
.look figure img {display: block; width: 100%; image-rendering: pixelated; border-radius: 4px}
.look figcaption {padding-top: 4px; opacity: .7; font-size: 90%}
.look dl {display: grid; grid-template-columns: minmax(7em, auto) 1fr; gap: 0; margin: 12px 0 4px}
.look dt, .look dd {margin: 0; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--border-color-primary)}
.look dd {font-variant-numeric: tabular-nums}
.look dt {opacity: .7}
.look summary {cursor: pointer; padding: 6px 0}
"""


class Look(NamedTuple):
    """One photo through one tokenizer. difference: where the two differ, from black to white. facts: in words."""

    reconstruction: Image.Image
    difference: Image.Image
    facts: dict[str, str]
    tokens: Tokens | Latents

    def to_html(self) -> str:
        """An HTML fragment that holds its pictures, in the style of the page."""
        named = {"reconstruction": self.reconstruction, "difference": self.difference}
        figures = "".join(
            f"<figure><img alt='{name}' src='{_data_uri(picture)}'><figcaption>{name}</figcaption></figure>"
            for name, picture in named.items()
        )
        rows = "".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in self.facts.items())
        ids = self.tokens._repr_html_() if isinstance(self.tokens, Tokens) else ""
        grid = f"<details><summary>ids</summary>{ids}</details>" if ids else ""
        return f"<div class='look'><div class='pictures'>{figures}</div><dl>{rows}</dl>{grid}</div>"


class Explorer:
    """What the page shows, without the page. Tokenizers are loaded when first looked at, and kept.

    names: presets, checkpoints or folders, as ``tv.load`` takes them. device: as there.
    second: what the second side shows at first; the second name when None, the first shows the first.
    """

    def __init__(self, names: Sequence[str], device: str | None = None, second: str | None = None) -> None:
        if not names:
            raise ValueError("there is no tokenizer to explore; name one at least")
        self.names = list(dict.fromkeys(names))
        self.shown = self.names[0], second or self.names[min(1, len(self.names) - 1)]
        self.device = device
        self._loaded: dict[str, Tokenizer] = {}
        self._lock = Lock()

    def tokenizer(self, name: str) -> Tokenizer:
        """Raises ``ValueError`` for a name that the page does not list."""
        if name not in self.names:
            raise ValueError(f"this page shows {', '.join(self.names)}; got {name!r}")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load(name, self.device)
            return self._loaded[name]

    def look(self, photo: Any, name: str, n_tokens: int) -> Look:
        """photo: as ``load_image`` takes it. n_tokens: at most what the tokenizer has; it may leave no choice."""
        tok = self.tokenizer(name)
        n = min(int(n_tokens), tok.max_tokens) if tok.nested else tok.max_tokens
        image = load_image(photo)
        seen, read = tok.canvas.fit(image), tok.canvas.see(image)
        start = time.perf_counter()
        tokens = tok.encode(read, n)
        between = time.perf_counter()
        painted = tok.decode(tokens)[0].cpu()
        seconds = between - start, time.perf_counter() - between
        error = reduce((painted - seen).abs(), "c h w -> h w", "mean")
        mean_square = (painted - seen).square().mean().item()
        facts = {
            "tokens": f"{n} (1 to {tok.max_tokens})" if tok.nested else f"{n}, always",
            "bytes": f"{-(-n * tok.bits_per_token // 8):,} ({tok.bits_per_token} bits a token)",
            "bits per pixel": f"{n * tok.bits_per_token / tok.image_size**2:.3f} at {tok.image_size} px",
            "PSNR": "equal" if mean_square == 0 else f"{-10 * math.log10(mean_square):.2f} dB",
            "time": f"encode {1000 * seconds[0]:.0f} ms, decode {1000 * seconds[1]:.0f} ms",
        }
        facts |= codebook_facts(tokens) if isinstance(tokens, Tokens) else {"codebook": "none, vectors"}
        return Look(to_pil(painted), heat(error / _FULL), facts, tokens)


def codebook_facts(tokens: Tokens) -> dict[str, str]:
    """How one picture uses its codebooks, in words.

    The entropy is that of the ids' own histogram, in bits: at most log2 n, however large the codebook.
    """
    ids, sizes = tokens.ids[0].cpu(), tokens.codebook_sizes
    counts = [column.unique(return_counts=True) for column in ids.unbind(dim=1)]
    distinct = [len(values) for values, _ in counts]
    shares = [number.double() / len(ids) for _, number in counts]
    entropy = sum(-(share * share.log2()).sum().item() for share in shares) / len(shares)
    most = max(number.max().item() for _, number in counts)
    used = f"{sum(distinct) / len(sizes):.3g}" if len(set(distinct)) > 1 else str(distinct[0])
    books = f"{len(sizes)} of {max(sizes):,} ids" if len(sizes) > 1 else f"{sizes[0]:,} ids"
    return {
        "codebook" if len(sizes) == 1 else "codebooks": books,
        "distinct ids here": f"{used} of {len(ids)}{' in a codebook, on average' if len(sizes) > 1 else ''}",
        "commonest id": f"{most} times" if most > 1 else "once",
        "entropy of the ids": f"{entropy:.2f} bits, at most {math.log2(len(ids)):.2f} here",
    }


def heat(values: Tensor) -> Image.Image:
    """h w, 0 to 1 and cut there -> black, red, yellow, white."""
    ramps = torch.stack([3 * values, 3 * values - 1, 3 * values - 2]).clamp(0, 1)
    return to_pil(ramps)


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def page(explorer: Explorer) -> gr.Blocks:
    """The Gradio page. Raises ``ValueError`` where what it shows at first cannot be loaded."""
    import gradio as gr

    first, second = explorer.shown
    photos = sorted(PHOTOS.glob("*.jpg"))

    def side(letter: str, name: str, share: int) -> tuple[gr.Dropdown, gr.Slider, gr.HTML]:
        """One of the two columns. share: of its tokens, 1 / share are shown at first."""
        tok = explorer.tokenizer(name)
        n = max(1, tok.max_tokens // share) if tok.nested else tok.max_tokens
        with gr.Column(min_width=300):
            chosen = gr.Dropdown(explorer.names, value=name, label=f"Tokenizer {letter}", elem_id=f"tokenizer-{letter}")
            slider = gr.Slider(**_slider(tok), value=n, step=1, label="Tokens", buttons=[], elem_id=f"tokens-{letter}")
            shown = gr.HTML(elem_id=f"look-{letter}", min_height=200)
        return chosen, slider, shown

    def look(photo: str | None, name: str, n_tokens: int) -> str:
        if photo is None:
            return ""
        try:
            return explorer.look(photo, name, n_tokens).to_html()
        except ValueError as error:
            raise gr.Error(str(error), duration=None) from error

    def switch(name: str) -> Any:
        try:
            tok = explorer.tokenizer(name)
        except ValueError as error:
            raise gr.Error(str(error), duration=None) from error
        return gr.Slider(**_slider(tok), value=tok.max_tokens)

    with gr.Blocks(title="tokenizers_vis", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(
            f"## Explore tokenizers\nDrop a photo, move the sliders. Differences are black where there are none and "
            f"white from {_FULL} of full scale on. Nothing leaves this machine."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                photo = gr.Image(
                    value=str(photos[0]),
                    type="filepath",
                    image_mode=None,  # the very file that was dropped, not a copy in another format
                    label="Photo",
                    sources=["upload", "clipboard"],
                    elem_id="photo",
                    height=300,
                    buttons=["fullscreen"],
                )
                gr.Examples([[str(path)] for path in photos], photo, cache_examples=False, label="Bundled photos")
            with gr.Column(scale=3, min_width=300), gr.Row():
                sides = [side("A", first, 1), side("B", second, _SHORT if first == second else 1)]
        for chosen, slider, shown in sides:
            inputs, quietly = [photo, chosen, slider], {"show_progress": "hidden", "api_visibility": "private"}
            # A slider that is dragged asks many times; only the last question is answered late.
            for event in (photo.change, slider.input, blocks.load):
                event(look, inputs, shown, trigger_mode="always_last", **quietly)
            chosen.change(switch, chosen, slider, **quietly).then(look, inputs, shown, **quietly)
    return blocks


def launch(explorer: Explorer, *, port: int | None = None, open_browser: bool = True) -> tuple[gr.Blocks, str]:
    """Serves the page, on this machine alone, from threads of its own. The page, whose ``close`` ends it; its address.

    port: the first free one from 7860 on when None. Raises ``OSError`` for a port that is taken.
    """
    import gradio as gr

    blocks = page(explorer)
    _, address, _ = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        run_history=False,
        allowed_paths=[str(PHOTOS)],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
        prevent_thread_lock=True,
    )
    return blocks, address


def wait(blocks: gr.Blocks) -> None:
    """Until Ctrl-C; closes the page."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        blocks.close(verbose=False)


def _slider(tok: Tokenizer) -> dict[str, Any]:
    """A tokenizer without prefixes has nothing to slide."""
    if tok.nested and tok.max_tokens > 1:
        return {"minimum": 1, "maximum": tok.max_tokens, "interactive": True, "info": None}
    return {
        "minimum": tok.max_tokens - 1,
        "maximum": tok.max_tokens,
        "interactive": False,
        "info": f"{tok.name} always makes {tok.max_tokens}",
    }
