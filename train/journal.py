"""What a run says of itself while it goes, and how it hears that it should stop."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers_vis.files import write_atomically
from tokenizers_vis.images import load_image


class Journal:
    """What a run says of itself: a progress bar, ``log.jsonl``, TensorBoard, sample sheets."""

    def __init__(self, folder: Path, start: int, steps: int, batch_size: int) -> None:
        self.folder, self.start, self.steps, self.batch_size = folder, start, steps, batch_size

    def __enter__(self) -> Journal:
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
        self.lines = self.folder / "log.jsonl"
        self._forget_after(self.start)
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.start + 1)
        self.began = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        # A disk too full for the board's last events must not hide the error that says so of the checkpoint.
        with suppress(OSError):
            self.board.close()

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, scalars: dict[str, float], *, write: bool) -> None:
        speed = (step - self.start) * self.batch_size / (time.monotonic() - self.began)
        self.progress.update(
            self.task, completed=step, description=f"loss {scalars['loss']:.4f}", speed=f"{speed:.0f} images/s"
        )
        if write:
            self._write(step, "train", scalars)
            if self.progress.disable:
                left = (self.steps - step) * self.batch_size / speed
                self.say(
                    f"step {step}/{self.steps}  loss {scalars['loss']:.4f}  "
                    f"{speed:.0f} images/s  {left / 60:.0f} min left"
                )

    def validation(self, step: int, scalars: dict[str, float], sheet: Any) -> None:
        self._write(step, "val", scalars)
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
