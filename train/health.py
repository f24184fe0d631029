"""Is a run well: how codebooks are used, what should alarm a person, how much of a GPU's arithmetic is put to use.

Letters: b batch, n tokens, k codebooks, m ids.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenizers_vis.eval.metrics import CodebookUsage

TIMES = 16  # ids in the window for each code of the largest codebook
_LEAST, _LARGEST = 2**14, 2**18  # ids in the window at least; the largest codebook that is counted so
_FOR_POSITIONS = 2**18  # ids that the entropies at positions are taken from
_SHOWN = 8  # codebooks with numbers of their own
_ENOUGH = 10  # earlier entries before something is called unusual


class CodeHealth:
    """How codebooks are used over a rolling window of the newest ids: ``update`` each step, ``compute`` to log.

    codebook_sizes: k sizes, up to 2^63. max_tokens: n at most.

    The window holds 16 ids for each code of the largest codebook (with even use, one code in ten million is missed), at
    least 2^14, and 2^18 where that codebook has more than 2^18 codes; images are its unit, so it may be a few ids
    longer. It does not depend on how often ``compute`` is called, which empties nothing. Memory is that of the window,
    4 bytes an id (8 for codebooks above 2^31), on the device of the ids; ``update`` waits for no device.
    """

    def __init__(self, codebook_sizes: Sequence[int], max_tokens: int) -> None:
        if not codebook_sizes or min(codebook_sizes) < 1 or max_tokens < 1:
            raise ValueError(
                f"codebook_sizes are one positive size or more, max_tokens is at least 1; got {codebook_sizes} "
                f"and {max_tokens}"
            )
        self.codebook_sizes, self.max_tokens = tuple(codebook_sizes), max_tokens
        largest = max(codebook_sizes)
        window = max(TIMES * largest, _LEAST) if largest <= _LARGEST else _LARGEST
        shape = (-(-window // max_tokens), max_tokens, len(codebook_sizes))
        self._ring = torch.full(shape, -1, dtype=torch.int32 if largest <= 2**31 else torch.int64)
        self._next = 0  # images seen so far; the next one's place is this modulo the ring's length

    def update(self, ids: Tensor, lengths: Tensor | None = None) -> None:
        """ids: b n k, integers; -1 is padding. lengths: b, how many of an image's tokens count; None is all."""
        if ids.ndim != 3 or ids.shape[1] > self.max_tokens or ids.shape[2] != len(self.codebook_sizes):
            raise ValueError(
                f"ids are b n {len(self.codebook_sizes)} with n up to {self.max_tokens}, got {tuple(ids.shape)}"
            )
        ids = ids.detach()
        if lengths is not None:
            past = torch.arange(ids.shape[1], device=ids.device) >= rearrange(lengths.to(ids.device), "b -> b 1")
            ids = ids.masked_fill(rearrange(past, "b n -> b n 1"), -1)
        ring = self._ring = self._ring.to(ids.device)
        ids = ids[-len(ring) :]
        places = (torch.arange(len(ids), device=ids.device) + self._next) % len(ring)
        ring[places, : ids.shape[1]] = ids.to(ring.dtype)
        ring[places, ids.shape[1] :] = -1
        self._next += len(ids)

    def compute(self) -> dict[str, float]:
        """Scalars of codebook j, by name; {} before the first ``update``.

        usage/j: different codes in the window over those that as many even draws would show, about 0 to 1: the share of
            the codebook that is in use, also where the window is not full yet, or smaller than the codebook.
        perplexity/j: 2 to the entropy of the ids in the window. dead/j: codes that are not in it; left out until it
            holds 8 ids for each code.
        entropy_first/j, entropy_last/j, entropy_mean/j: bits of the ids at the first and the last position, and the
            mean over all, of the newest 2^18 / (n k) images, 64 at least; never more than the log of their number. A
            position that nothing was counted at is left out.

        Of more than 8 codebooks: usage and perplexity of the worst (usage/least, perplexity/least), the most dead
        (dead/most), and the mean of the entropies (entropy_first/all ...).
        """
        newest = self._newest()
        if not len(newest):
            return {}
        found = [self._used(newest[..., j], size) for j, size in enumerate(self.codebook_sizes)]
        n, k = newest.shape[1:]
        usage = CodebookUsage(self.codebook_sizes)
        usage.update(newest[-max(_FOR_POSITIONS // (n * k), 64) :])
        for scalars, use in zip(found, usage.compute(), strict=True):
            bits = torch.full((self.max_tokens,), torch.nan, dtype=torch.float64)
            bits[: len(use.position_entropy)] = use.position_entropy
            scalars |= {"entropy_first": bits[0].item(), "entropy_last": bits[-1].item()}
            scalars["entropy_mean"] = bits.nanmean().item()
        if k <= _SHOWN:
            flat = {f"{name}/{j}": value for j, scalars in enumerate(found) for name, value in scalars.items()}
        else:
            columns = {
                name: [one[name] for one in found if name in one] for name in dict.fromkeys(sum(map(list, found), []))
            }
            how: dict[str, tuple[str, Callable[[list[float]], float]]] = {
                "usage": ("least", min),
                "perplexity": ("least", min),
                "dead": ("most", max),
            }
            flat = {}
            for name, values in columns.items():
                word, of = how.get(name, ("all", statistics.fmean))
                flat[f"{name}/{word}"] = of(values)
        return {name: value for name, value in flat.items() if not math.isnan(value)}

    def _newest(self) -> Tensor:
        """Images of the window, oldest first: b n k on the CPU, with -1 for padding."""
        count = min(self._next, len(self._ring))
        places = torch.arange(self._next - count, self._next) % len(self._ring)
        return self._ring[places.to(self._ring.device)].cpu()

    @staticmethod
    def _used(ids: Tensor, size: int) -> dict[str, float]:
        ids = ids[ids >= 0]
        counts = torch.bincount(ids, minlength=size) if size <= _LARGEST else ids.unique(return_counts=True)[1]
        counts = counts[counts > 0].double()
        m, used = len(ids), len(counts)
        if not m:
            return {}
        share = counts / m
        entropy = -(share * share.log()).sum().item()
        even = -size * math.expm1(m * math.log1p(-1 / size)) if size > 1 else 1.0
        dead = {"dead": float(size - used)} if m >= 8 * size else {}
        return {"usage": used / even, "perplexity": math.exp(entropy), **dead}


def alarms(scalars: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> list[str]:
    """What a person should hear of a run, with what to try. Each is said when it begins, not at every call.

    scalars: of now: ``loss``, ``gradient_norm`` and what ``CodeHealth.compute`` gives; a key that is not there is not
    judged. history: the same of earlier times, oldest first.
    """
    before = history[-1] if history else {}
    found = []
    for key, value in scalars.items():
        name, _, which = key.partition("/")
        book = f"codebook {which}" if which.isdecimal() else f"a codebook ({which})"
        was = before.get(key, 1.0)
        if name == "usage" and value < 0.2 <= was:
            found.append(
                f"usage of {book} fell below 20 %: {value:.1%}. Try to revive codes (vq: revive_after = 100), "
                'kmeans_start = true, a larger entropy of the quantizer, distance = "cosine" with a dim of 8, or a '
                "lower optim.lr; fsq needs no such care"
            )
        elif name == "usage" and value < 0.5 <= was:
            count = scalars.get(f"dead/{which}")
            dead = f"{1 - value:.0%} of its codes" if count is None else f"{count:,.0f} codes"
            found.append(
                f"more than half of {book} is dead: {dead} did not come up of late. Try to revive codes (vq: "
                "revive_after = 100), a larger entropy of the quantizer, or a smaller codebook"
            )
        if name == "perplexity" and _first_below(key, value, history, 1 / 4):
            found.append(
                f"perplexity of {book} collapsed to {value:.1f}, from {_usual(key, history):.0f}: few codes take all. "
                "Try a lower optim.lr, a larger entropy or a smaller commitment of the quantizer, from a checkpoint "
                "before this"
            )
    norm, loss = scalars.get("gradient_norm", 0.0), scalars.get("loss", 0.0)
    if _first_above("gradient_norm", norm, history, 10):
        found.append(
            f"the gradient's norm is {norm:.3g}, over ten times its median, {_usual('gradient_norm', history):.3g}. "
            "Once is no harm where optim.clip is set; if it comes again, try a lower optim.clip or optim.lr, or "
            'precision = "fp32"'
        )
    if not math.isfinite(loss) or not math.isfinite(norm):
        found.append(
            f"the loss is {loss}, the gradient's norm {norm}: nothing is learned from here on. Try a lower optim.lr, a "
            'longer optim.warmup or precision = "fp32", from a checkpoint before this'
        )
    elif _first_above("loss", loss, history, 4):
        found.append(
            f"the loss is {loss:.3g}, over four times its median, {_usual('loss', history):.3g}: it may end as NaN. "
            "Try a lower optim.lr, a longer optim.warmup or a lower optim.clip"
        )
    if plateau := _plateau(loss, history):
        found.append(plateau)
    return found


def _usual(key: str, history: Sequence[Mapping[str, float]]) -> float:
    """The median of the newest 50; nan where there are too few."""
    values = [entry[key] for entry in history[-50:] if math.isfinite(entry.get(key, math.nan))]
    return statistics.median(values) if len(values) >= _ENOUGH else math.nan


def _first_above(key: str, value: float, history: Sequence[Mapping[str, float]], times: float) -> bool:
    bound = times * _usual(key, history)  # nan compares false
    return bound > 0 and value > bound and history[-1].get(key, 0.0) <= bound


def _first_below(key: str, value: float, history: Sequence[Mapping[str, float]], times: float) -> bool:
    bound = times * _usual(key, history)
    return value < bound <= history[-1].get(key, math.inf)


def _plateau(loss: float, history: Sequence[Mapping[str, float]], span: int = 50) -> str:
    """Every ``span`` entries: whether the newer half's median loss is not below the older half's."""
    losses = [*(entry["loss"] for entry in history if "loss" in entry), loss]
    if len(losses) % span:
        return ""
    older, newer = losses[-span : -span // 2], losses[-span // 2 :]
    if statistics.median(newer) < statistics.median(older):
        return ""
    return (
        f"the loss has not fallen over the last {span} entries of the log ({statistics.median(older):.4g}, then "
        f"{statistics.median(newer):.4g}). At the start try a shorter optim.warmup or a higher optim.lr (1e-3 for "
        "small widths); late, a lower optim.lr, or stop here"
    )


# Arithmetic


def training_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of one call of ``step``, forward and backward if it has both; a multiply-add is two.

    Matrix products, convolutions and attention are counted, as PyTorch runs them: not what a compiled graph or a kernel
    of another library does. It is called once, and does what it does.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# Words of a GPU's name, all of which it has -> TFLOP/s of dense products in bfloat16, float16 (summed in float32), TF32
# and float32, without sparsity, by its maker's data sheet; None: it has none. The first that fits counts.
_PEAKS: tuple[tuple[str, tuple[float | None, float | None, float | None, float]], ...] = (
    ("B200", (2250, 2250, 1125, 75)),
    ("H200 NVL", (835.5, 835.5, 417.5, 60)),
    ("H200", (989.4, 989.4, 494.7, 66.9)),
    ("GH200", (989.4, 989.4, 494.7, 66.9)),
    ("H100 NVL", (835.5, 835.5, 417.5, 60)),
    ("H100 PCIe", (756, 756, 378, 51.2)),
    ("H100", (989.4, 989.4, 494.7, 66.9)),
    ("A100", (312, 312, 156, 19.5)),
    ("A40", (149.7, 149.7, 74.8, 37.4)),
    ("A10", (125, 125, 62.5, 31.2)),
    ("A10G", (70, 70, 35, 35)),
    ("A6000", (154.8, 154.8, 77.4, 38.7)),
    ("L40S", (362, 362, 183, 91.6)),
    ("L40", (181, 181, 90.5, 90.5)),
    ("L4", (121, 121, 60, 30.3)),
    ("6000 Ada", (364.2, 364.2, 182.1, 91.1)),
    ("5090", (209.5, 209.5, 104.8, 104.8)),
    ("4090", (165.2, 165.2, 82.6, 82.6)),
    ("3090", (71, 71, 35.6, 35.6)),
    ("V100", (None, 125, None, 15.7)),
    ("T4", (None, 65, None, 8.1)),
)
_OTHER = {"MIG", "Laptop", "D", "Ti"}  # words that make it another one


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Operations a second that the device could do at most on dense products of this dtype; None where not known.

    float32 is taken to be TF32 where ``torch.set_float32_matmul_precision`` allows that. The share of it that a run
    reaches (MFU) is ``training_flops(step) / seconds / peak_flops``.
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip:
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """The same for a GPU by the name that its driver gives it, such as "NVIDIA H100 80GB HBM3"."""
    words = set(re.split(r"[\s-]+", name))
    if words & _OTHER:
        return None
    row = next((row for wanted, row in _PEAKS if set(wanted.split()) <= words), None)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2 if tf32 else 3}.get(dtype)
    if row is None or column is None:
        return None
    peak = row[column] if row[column] is not None or column != 2 else row[3]
    return None if peak is None else peak * 1e12
