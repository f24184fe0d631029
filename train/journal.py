"""What a run says of itself while it goes, and how it hears that it should stop."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers_vis.files import write_atomically
from tokenizers_vis.images import load_image


class Journal:
    """What a run says of itself: a progress bar, ``metrics.jsonl``, TensorBoard, sample sheets.

    rows: what a batch holds ("images"). main: whether this process writes; the others only speak.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, batch_size: int, rows: str = "images", main: bool = True
    ) -> None:
        self.folder, self.start, self.steps, self.batch_size = folder, start, steps, batch_size
        self.rows, self.main = rows, main
        self.health = ""
        self.flops = 0.0  # seconds of a device's best that a step on one process is worth; 0 where that is unknown

    def __enter__(self) -> Journal:
        self.began = self.since = time.monotonic()
        self.written = self.start
        if self.main:
            self._open()
        return self

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from torch.utils.tensorboard import SummaryWriter

        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.progress = Progress(
            *columns, console=self.console, disable=not self.console.is_terminal, speed_estimate_period=120
        )
        self.task = self.progress.add_task("training", total=self.steps, completed=self.start, speed="")
        self.progress.start()
        self.lines = self.folder / "metrics.jsonl"
        self._forget_after(self.start)
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.start + 1)

    def __exit__(self, *exception: object) -> None:
        if not self.main:
            return
        self.progress.stop()
        # A disk too full for the board's last events must not hide the error that says so of the checkpoint.
        with suppress(OSError):
            self.board.close()

    def say(self, text: str) -> None:
        if self.main:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, step: int, scalars: dict[str, float]) -> None:
        """Moves the bar."""
        if self.main:
            text = f"loss {scalars['loss']:.4f}  gradient {scalars['gradient_norm']:.2g}"
            speed = f"{self._speed(step):.0f} {self.rows}/s{self.health}"
            self.progress.update(self.task, completed=step, description=text, speed=speed)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes what is logged of a step, and says it where there is no bar."""
        if not self.main:
            return
        now = time.monotonic()
        steps_a_second = (step - self.written) / max(now - self.since, 1e-9)
        recent = steps_a_second * self.batch_size
        self.written, self.since = step, now
        speeds = {f"{self.rows}_per_second": round(recent, 2)}
        if self.flops:
            speeds["mfu"] = round(self.flops * steps_a_second, 4)
        self._write(step, "train", scalars | speeds)
        used = [value for key, value in scalars.items() if key.startswith("usage/")]
        self.health = f"  codes {min(used):.0%}" if used else ""
        self.health += f"  MFU {speeds['mfu']:.0%}" if self.flops else ""
        if self.progress.disable:
            left = (self.steps - step) * self.batch_size / self._speed(step)
            speed = f"{recent:.0f} {self.rows}/s{self.health}  {left / 60:.0f} min left"
            self.say(f"step {step}/{self.steps}  loss {scalars['loss']:.4f}  {speed}")

    def alarm(self, step: int, text: str) -> None:
        if self.main:
            self.say(f"step {step}: {text}")
            self.board.add_text("alarms", text, step)

    def _speed(self, step: int) -> float:
        """Examples a second since the start of this call."""
        return (step - self.start) * self.batch_size / max(time.monotonic() - self.began, 1e-9)

    def validation(self, step: int, scalars: dict[str, float], sheet: Any) -> None:
        self._write(step, "val", scalars)
        if sheet is not None:
            write_atomically(self.folder / "samples" / f"{step:07d}.png", lambda path: sheet.save(path, format="PNG"))
            self.board.add_image("val/samples", load_image(sheet), step)
        self.say(f"step {step} validation  " + "  ".join(f"{key} {value:.3f}" for key, value in scalars.items()))

    def _write(self, step: int, kind: str, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self.board.add_scalar(f"{kind}/{key}", value, step)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **scalars}) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drops the lines past the checkpoint, which will be written again, and one that a kill cut short."""
        if not self.lines.exists():
            return
        kept = []
        for line in self.lines.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                continue
        write_atomically(self.lines, "".join(kept).encode())


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second one interrupts at once. Only the main thread can listen."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
