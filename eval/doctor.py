"""Is a tokenizer sound: do its ids hang on what they should not, how near are they to being others, which are used?"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_vis.decoders.canvas import Canvas, Resize
from tokenizers_vis.encoders.base import Encoder
from tokenizers_vis.eval.margins import margins
from tokenizers_vis.eval.metrics import CodebookUsage, Usage
from tokenizers_vis.images import load_image
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.tokenizer import Tokenizer

ROUNDING = 1e-6  # a vector moves by about so much of its length, or more, when a float32 encoder rounds otherwise
SHOWN = 16  # positions in the text; the table has all


@dataclass(frozen=True)
class Change:
    """What became of the ids under another condition.

    sound: whether no id may change. ids: how many did. moved: the most that a vector moved, as a share of its length.
    """

    condition: str
    sound: bool
    ids: int
    moved: float


@dataclass(frozen=True)
class Report:
    """What ``examine`` found.

    tokens: places that hold ids, over all images; each has k ids.
    margins: the smallest, the hundredth part and the middle of the tokens' margins (``eval.margins``), as shares of a
        vector's length; exact says whether they are the shortest ways.
    rounding: the most that a vector moved where no id may change, or 1e-6. near: how many margins are below it.
    usage: of each codebook.
    """

    tokenizer: str
    device: str
    dtype: str
    images: int
    tokens: int
    ids: int
    changes: tuple[Change, ...]
    margins: tuple[float, float, float]
    exact: bool
    rounding: float
    near: int
    usage: tuple[Usage, ...]
    codebook_sizes: tuple[int, ...]

    @property
    def sound(self) -> bool:
        """Whether ids are the same whatever the batch, the order of images and the number of threads."""
        return not any(change.ids for change in self.changes if change.sound)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        usage = [use._asdict() | {"position_entropy": use.position_entropy.tolist()} for use in self.usage]
        margins = [margin if math.isfinite(margin) else None for margin in self.margins]  # JSON knows no infinity
        named = dict(zip(("smallest", "hundredth", "middle"), margins, strict=True))
        return asdict(self) | {"margins": named, "usage": usage, "sound": self.sound}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.tokenizer}: {self.images} images, {self.ids} ids, {self.dtype} on {self.device}"
        yield f"\n{'ids that change with':32} {'':>16}  a vector moves by"
        for change in self.changes:
            share = f"{change.ids} ({change.ids / self.ids:.1%})"
            yield f"  {change.condition:30} {share:>16}  {change.moved:.1e} of its length"
        smallest, hundredth, middle = self.margins
        yield f"\nto another id, a vector moves by {'' if self.exact else '(nudged, about)'}".rstrip()
        yield f"  {smallest:.1e} of its length or more; 1 % of tokens below {hundredth:.1e}, half below {middle:.1e}"
        yield f"  {self.near} of {self.tokens} tokens are below {self.rounding:.0e}, within float32 rounding"
        for j, (use, size) in enumerate(zip(self.usage, self.codebook_sizes, strict=True)):
            yield f"\ncodebook {j}: {size - use.dead:,} of {size:,} codes used by {use.tokens} ids, {use.dead:,} not"
            yield f"  perplexity {use.perplexity:.1f}, entropy {use.entropy:.2f} of {math.log2(size):.2f} bits"
            shown = " ".join(f"{bits:.1f}" for bits in use.position_entropy[:SHOWN].tolist())
            yield f"  entropy at each position: {shown}{' ...' * (len(use.position_entropy) > SHOWN)}"
            bits, most = use.position_entropy, math.log2(min(size, self.images))
            yield (
                f"  first {bits[0]:.2f}, last {bits[-1]:.2f}, mean {bits.nanmean():.2f} bits; of so many images "
                f"{most:.2f} at most"
            )


@torch.no_grad()
def examine(tok: Tokenizer, images: Sequence[Any], *, resize: Resize | None = None, batch_size: int = 32) -> Report:
    """Encodes images (paths, PIL images, tensors 3 h w) in several ways and compares the ids.

    tok: in eval mode, as ``load`` gives it; all of its tokens are looked at.
    batch_size: images at a time, in the way that the others are compared with.

    Raises ``ValueError`` for a tokenizer without ids, and ``ImageError`` for an image that cannot be read.
    """
    if not tok.codebook_sizes:
        raise ValueError(f"{tok.name} has continuous tokens: there are no ids to examine")
    if not images:
        raise ValueError("there are no images to examine: the list is empty")
    x = torch.stack([tok.canvas.see(load_image(image), resize).cpu() for image in images])
    front = _Front(tok.canvas, tok.encoder, tok.quantizer)
    z, ids = front.look(x, batch_size)

    def change(condition: str, sound: bool, other: _Front, batch: int = batch_size, reverse: bool = False) -> Change:
        again, others = other.look(x.flip(0), batch) if reverse else other.look(x, batch)
        again, others = (again.flip(0), others.flip(0)) if reverse else (again, others)
        moved = (again - z).norm(dim=-1) / z.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return Change(condition, sound, int((others != ids).sum()), moved.max().item())

    exact = tok.dtype == torch.float32  # in half precision sums round visibly, and nothing is promised
    changes = [
        change("another batch split", exact, front, batch=1 if batch_size > 1 else 2),
        change("another order of images", exact, front, reverse=True),
    ]
    if tok.device.type == "cpu":
        with _threads() as condition:
            changes.append(change(condition, exact, front))
    if exact:
        changes.append(change("a bfloat16 encoder", False, front.moved_to(torch.bfloat16)))
    if other := _another_device(tok.device):
        changes.append(change(f"the device {other}", False, front.moved_to(other)))

    values, shortest = margins(tok.quantizer, z.to(tok.device))
    values = values.flatten().sort().values.tolist()
    rounding = max([ROUNDING, *(change.moved for change in changes if change.sound)])
    usage = CodebookUsage(tok.codebook_sizes)
    usage.update(ids)
    return Report(
        tokenizer=tok.name,
        device=str(tok.device),
        dtype=str(tok.dtype).removeprefix("torch."),
        images=len(x),
        tokens=len(values),
        ids=ids.numel(),
        changes=tuple(changes),
        margins=(values[0], values[len(values) // 100], values[len(values) // 2]),
        exact=shortest,
        rounding=rounding,
        near=sum(value < rounding for value in values),
        usage=usage.compute(),
        codebook_sizes=tok.codebook_sizes,
    )


class _Front(NamedTuple):
    """The half of a tokenizer that makes ids."""

    canvas: Canvas
    encoder: Encoder
    quantizer: Quantizer

    def look(self, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """images: b 3 h w, fitted -> z, b n d, float32, and ids, b m k, on the CPU."""
        place = next(self.encoder.parameters())
        found = []
        for batch in images.split(batch_size):
            x = self.canvas.read(batch.to(place.device)).to(place.dtype)
            z = self.encoder(x, self.encoder.max_tokens)
            found.append((z.float().cpu(), self.quantizer(z).ids.cpu()))
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def moved_to(self, where: torch.device | torch.dtype) -> _Front:
        """A copy in which the encoder has another dtype, or all is on another device."""
        if isinstance(where, torch.dtype):
            return self._replace(encoder=copy.deepcopy(self.encoder).to(where))
        return _Front(*(copy.deepcopy(part).to(where) for part in self))


@contextmanager
def _threads() -> Iterator[str]:
    """For the block, torch runs on one thread, or on two where it has one."""
    before = torch.get_num_threads()
    now = 1 if before > 1 else 2
    torch.set_num_threads(now)
    try:
        yield f"{now} threads, not {before}" if now > 1 else f"1 thread, not {before}"
    finally:
        torch.set_num_threads(before)


def _another_device(device: torch.device) -> torch.device | None:
    if device.type != "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else None
