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
        peak.bytes = max(0, _highest() - before)


def _lowered() -> int | None:
    """Lowers the high-water mark to what is resident now, and gives it, in bytes; None where that cannot be done."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
        return _highest()
    except (OSError, StopIteration):
        return None


def _highest() -> int:
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
