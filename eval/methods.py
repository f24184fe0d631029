"""What is compared: tokenizers, file codecs, smaller pictures, the original itself, reconstructions made elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenizers_vis.catalogue import list_presets
from tokenizers_vis.config import did_you_mean
from tokenizers_vis.eval.codecs import CODECS, QUALITIES, check_codec, through_codec
from tokenizers_vis.eval.folder import FolderMethod
from tokenizers_vis.eval.method import Method, Reconstruction, check_images, some_of
from tokenizers_vis.eval.squares import fit_square, unfit_square
from tokenizers_vis.eval.tokenizer_method import LazyTokenizer, TokenizerMethod

if TYPE_CHECKING:
    import torch

LADDER = (1, 5, 10, 25, 50)  # qualities of a codec that is named without any
_ALLOWED = (
    "a preset, checkpoint or run folder (mini, flextok-d18-d28@1,16), a codec (jpeg@q5, jpeg@64:q5, webp, avif), "
    "resize@64, identity or folder:PATH"
)


def parse_methods(
    specs: Sequence[str], *, device: str | torch.device | None = None, sampling: Mapping[str, Any] | None = None
) -> list[Method]:
    """Methods by name, in order; one spec may stand for several.

    "mini", "titok-s-128"      a preset, checkpoint file or run folder, as ``tv.load`` takes it, at all its tokens
    "flextok-d18-d28@1,16"     a nested tokenizer at 1 and at 16 tokens
    "jpeg@q5,q10"              a codec (jpeg, webp, avif) at these qualities; without any, at 1, 5, 10, 25 and 50
    "jpeg@64:q5,q10"           scaled down to a long side of 64 pixels first
    "resize@64,128"            scaled to a long side of 64 pixels and back, and of 128
    "identity"                 the originals
    "folder:PATH"              reconstructions made elsewhere, under the names of the originals

    A method's label is the spec with one of its numbers: "jpeg@64:q10". Nothing is loaded yet: ``Method.prepare``
    does. device: of tokenizers. sampling: options of ``decode`` (steps, guidance, ...) for decoders that take several
    passes.

    Raises ``ValueError`` for a spec that cannot be read, an unknown name, a number of tokens that a preset does not
    have, or a method that is there twice.
    """
    methods = [method for spec in specs for method in _parse(spec, device, sampling)]
    if not methods:
        raise ValueError(f"there is nothing to evaluate: name a method or more, {_ALLOWED}")
    labels = [method.label for method in methods]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"{some_of(twice)} is there twice: name every method once")
    return methods


class CodecMethod(Method):
    """A file codec at one quality, of the picture as it is or scaled down first (``through_codec``)."""

    kind = "codec"

    def __init__(self, label: str, codec: str, quality: int, long_side: int | None = None) -> None:
        self.label, self.codec, self.quality, self.long_side = label, codec, quality, long_side

    def prepare(self, names: Sequence[str] = ()) -> None:
        check_codec(self.codec)

    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        check_images(images, names)
        coded = [through_codec(image, self.codec, self.quality, self.long_side) for image in images]
        return [Reconstruction(c.pixels, c.nbytes, 8.0 * c.nbytes, c.encode_seconds, c.decode_seconds) for c in coded]

    def describe(self) -> dict[str, Any]:
        import PIL

        own = {"codec": self.codec, "quality": self.quality, "long_side": self.long_side}
        return super().describe() | own | {"options": dict(CODECS[self.codec][1]), "pillow": PIL.__version__}


class ResizeMethod(Method):
    """The picture scaled to a long side of ``long_side`` pixels and back (Lanczos, 8 bit): TokBench's row "Resize"."""

    kind = "resize"

    def __init__(self, label: str, long_side: int) -> None:
        self.label, self.long_side = label, long_side

    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        check_images(images, names)
        there_and_back = [np.array(unfit_square(*fit_square(image, self.long_side))) for image in images]
        return [Reconstruction(pixels, None, None, None, None) for pixels in there_and_back]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"long_side": self.long_side}


class IdentityMethod(Method):
    """The original: every metric at its best."""

    kind = "identity"
    label = "identity"

    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        check_images(images, names)
        return [Reconstruction(image.copy(), None, None, None, None) for image in images]


# How names are read


def _parse(spec: str, device: Any, sampling: Mapping[str, Any] | None) -> list[Method]:
    name, _, numbers = spec.partition("@")
    if spec == "identity":
        return [IdentityMethod()]
    if spec.startswith("folder:"):
        return [FolderMethod(spec, spec.removeprefix("folder:"))]
    if name in CODECS:
        return [CodecMethod(f"{name}@{label}", name, q, side) for label, q, side in _qualities(spec, numbers)]
    if name == "resize":
        sides = _numbers(spec, numbers, "a long side in pixels, such as resize@64 or resize@64,128")
        return [ResizeMethod(f"resize@{side}", side) for side in sides]
    # A path may hold an @ of its own.
    target, at, numbers = (spec, "", "") if Path(spec).exists() else spec.rpartition("@")
    if not at:
        target, numbers = spec, ""
    if target not in list_presets() and not Path(target).exists():
        near = did_you_mean(target, [*list_presets(), *CODECS, "resize", "identity", "folder"])
        raise ValueError(f"there is no method {spec!r}.{near} A method is {_ALLOWED}")
    source = LazyTokenizer(target, device)
    if not at:
        return [TokenizerMethod(target, source, None, sampling)]
    lengths = _numbers(spec, numbers, f"a number of tokens, such as {target}@1 or {target}@1,16")
    most, nested = source.table.get("max_tokens"), source.table.get("nested")
    for n in lengths:
        if most is not None and (n > most or (n < most and not nested)):
            allowed = f"1 to {most}" if nested else f"always {most}"
            raise ValueError(f"{spec!r} asks for {n} tokens; {target} makes {allowed}")
    return [TokenizerMethod(f"{target}@{n}", source, n, sampling) for n in lengths]


def _numbers(spec: str, text: str, what: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part.isascii() and part.isdigit()]
    if len(found) != len(text.split(",")) or min(found) < 1:
        raise ValueError(f"{spec!r} cannot be read: after the @ comes {what}")
    return found


def _qualities(spec: str, text: str) -> list[tuple[str, int, int | None]]:
    """(label, quality, long side) of each; a long side holds for what follows it."""
    side = None
    found = []
    for part in text.split(",") if text or "@" in spec else [f"q{q}" for q in LADDER]:
        match = re.fullmatch(r"(?:([1-9][0-9]*):)?q([0-9]+)", part)
        if match is None or not QUALITIES[0] <= int(match[2]) <= QUALITIES[1]:
            raise ValueError(
                f"{spec!r} cannot be read at {part!r}: after the @ come qualities from q{QUALITIES[0]} to "
                f"q{QUALITIES[1]}, such as jpeg@q5,q10; jpeg@64:q5 scales down to 64 pixels first"
            )
        side = int(match[1]) if match[1] else side
        found.append((f"{side}:q{int(match[2])}" if side else f"q{int(match[2])}", int(match[2]), side))
    return found
