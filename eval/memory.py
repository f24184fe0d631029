"""How much memory a piece of work takes beyond what was held before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROCESS = Path("/proc/self")


class Peak:
    """bytes: the most that was held beyond what was held before; None where that cannot be measured."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """``with peak_memory(device) as peak: ...``, then ``peak.bytes``.

    On CUDA it is what torch allocates on the device. On the CPU it is resident memory, by the kernel's own high-water
    mark, which only Linux lets a process lower; memory that was freed before and is used again does not show there.
    Pages of files (libraries, mapped weights) that a kernel short of memory took back meanwhile do not hide the work's.
    """
    peak = Peak()
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    before = _lowered() if device.type == "cpu" else None
    yield peak
    if before is not None:
        after = _resident()
        taken_back = max(0, before["RssFile"] - after["RssFile"])
        peak.bytes = max(0, after["VmHWM"] - before["VmHWM"] + taken_back)


def _lowered() -> dict[str, int] | None:
    """Lowers the high-water mark to what is resident now, and gives both; None where that cannot be done."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
        return _resident()
    except (OSError, KeyError):
        return None


def _resident() -> dict[str, int]:
    """Of this process, in bytes: the high-water mark, and what is of files now."""
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    kilobytes = dict(line.split(":", 1) for line in lines)
    return {key: 1024 * int(kilobytes[key].split()[0]) for key in ("VmHWM", "RssFile")}
