"""Pictures of the report: the same ones through every method, and the worst and best of each, with their originals."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from tokenizers_vis.eval.benchmark import ORIGINALS, folder_of
from tokenizers_vis.eval.examples import FOLDER
from tokenizers_vis.eval.tables import written

_LARGEST = 512  # pixels of the longer side of a picture in the page
_SMALL = 64 * 64  # up to so many pixels, which are looked at enlarged, nothing is lost
_QUALITY = 90  # of the others: about 43 dB, to which JPEG at its usual quality is coarse
_SHOWN = 4  # photographs that all methods are shown on


class Pictures:
    """Each picture once, as WebP, under a short key: two that are equal are one, wherever they come from."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self._keys: dict[Path, tuple[str, float]] = {}
        self._of_data: dict[str, str] = {}

    def add(self, path: Path) -> tuple[str, float]:
        """Its key, and width over height."""
        if path not in self._keys:
            from PIL import Image

            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            shape = picture.width / picture.height
            picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
            data = io.BytesIO()
            lossless = picture.width * picture.height <= _SMALL
            picture.save(data, "WEBP", lossless=lossless, quality=_QUALITY, method=4)
            address = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
            key = self._of_data.setdefault(address, f"p{len(self.held)}")
            self.held[key] = address
            self._keys[path] = key, shape
        return self._keys[path]


def gallery(suite: Mapping[str, Any], out: Path, pictures: Pictures) -> str:
    """The same pictures for all methods, a strip for each."""
    held = [{one["file"]: one for one in row["examples"]} for row in suite["rows"]]
    common = [file for file in held[0] if all(file in other for other in held)] if held else []
    boxed = suite["kind"] != "photos"
    strips = []
    for file in common if boxed else sorted(common, key=lambda file: int(Path(file).stem))[:_SHOWN]:
        original = folder_of(out, suite["name"], ORIGINALS) / FOLDER / file
        first = held[0][file]
        said = f"<b>original</b><br>{escape(first.get('instance', {}).get('text', '') or first['image'])}"
        figures = [figure(pictures, original, original, said, first["image"])]
        for row, files in zip(suite["rows"], held, strict=True):
            path = folder_of(out, suite["name"], row["label"]) / FOLDER / file
            said = f"<b>{escape(row['label'])}</b><br>{escape(_said(files[file]))}"
            figures.append(figure(pictures, original, path, said, f"{row['label']}: {first['image']}"))
        strips.append(f'<div class="strip{" words" * boxed}">{"".join(figures)}</div>')
    return "<h3>The same for all</h3>" + "".join(strips) if strips else ""


def pair(suite: str, label: str, one: Mapping[str, Any], out: Path, pictures: Pictures) -> str:
    original = folder_of(out, suite, ORIGINALS) / FOLDER / one["file"]
    picture = folder_of(out, suite, label) / FOLDER / one["file"]
    shown = "".join(_button(pictures, original, path, f"{label}: {one['image']}") for path in (original, picture))
    return (
        f'<figure class="pair">{shown}<figcaption>{escape(one["image"])}<br>{escape(_said(one))}</figcaption></figure>'
    )


def figure(pictures: Pictures, original: Path, picture: Path, said: str, name: str) -> str:
    """A picture that opens beside its original. said: HTML below it; name: what it is called."""
    return f"<figure>{_button(pictures, original, picture, name)}<figcaption>{said}</figcaption></figure>"


def _button(pictures: Pictures, original: Path, picture: Path, said: str) -> str:
    before, after = pictures.add(original)[0], pictures.add(picture)
    return (
        f'<button type="button" class="picture" data-o="{before}" data-r="{after[0]}" data-said="{escape(said)}" '
        f'style="--shape:{after[1]:.3f}"><img data-p="{after[0]}" alt="{escape(said)}"></button>'
    )


def _said(one: Mapping[str, Any]) -> str:
    """What is known of a picture or an instance, for its caption."""
    instance = one.get("instance")
    if instance is None:
        size = "" if one["bytes"] is None else f", {one['bytes']:,} bytes"
        return f"{written(one['psnr'], 2)} dB{size}"
    if "read" in instance:
        read = f"read “{instance['read']}”" if instance["read"] else "nothing read"
        return f"{read}, T-NED {instance['t_ned']:.2f}"
    return f"F-Sim {instance['f_sim']:.2f}"
