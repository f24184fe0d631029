"""The checkpoints of a run folder: each appears whole, the last few stay, a damaged one is passed over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tokenizers_vis.files import write_atomically
from tokenizers_vis.train.task import RunError
from tokenizers_vis.weights import first_line

NEWEST = "checkpoint.pt"
WHOLE = ("step", "recipe", "built", "model", "average", "optimizer")  # what every checkpoint has


class Checkpoints:
    """Writes those of one run, in the process that does so.

    keep: how many stay, the newest among them. saved: the step of the newest, None before the first.
    """

    def __init__(self, folder: Path, keep: int, saved: int | None = None) -> None:
        self.folder, self.keep, self.saved = folder, keep, saved

    def save(self, state: Mapping[str, Any]) -> None:
        """``state`` becomes the newest; the one before it stays under the name of its step."""
        newest, before, step = self.folder / NEWEST, self.saved, state["step"]

        def put(path: Path) -> None:
            torch.save(state, path)
            if self.keep > 1 and before not in (None, step) and newest.exists():
                # A second name for the old file; the rename that follows takes only the first one away.
                kept = self.folder / f"checkpoint-{before:07d}.pt"
                kept.unlink(missing_ok=True)
                kept.hardlink_to(newest)

        write_atomically(newest, put)
        self.saved = step
        for path in older(self.folder)[max(0, self.keep - 1) :]:
            path.unlink()

    def guarded(self, step: int, write: Callable[[], None]) -> None:
        """Calls ``write``; where the disk does not take it, ``RunError`` says what is still there."""
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer in C++ raises RuntimeError
            kept = "there is none yet" if self.saved is None else f"that of step {self.saved} is whole"
            raise RunError(
                f"cannot write the checkpoint of step {step} in {self.folder}, {kept}: "
                f"{first_line(error)}. Make room on the disk, then go on with --resume"
            ) from error

    def clean(self) -> None:
        """Takes away what a kill in the middle of writing left aside."""
        for path in self.folder.glob(".*"):
            # safetensors, too, writes aside: .tmp and six letters or digits, without a suffix.
            if path.suffix in (".pt", ".safetensors", ".jsonl", ".toml") or re.fullmatch(r"\.tmp\w{6}", path.name):
                path.unlink(missing_ok=True)


def older(folder: Path) -> list[Path]:
    """The checkpoints beside the newest, the latest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def read_checkpoint(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The newest checkpoint that can be read; ``say`` hears of those that cannot. Raises ``RunError``."""
    wrong = []
    for file in [folder / NEWEST, *older(folder)]:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if missing := [key for key in WHOLE if key not in state]:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except Exception as error:  # on damaged bytes torch raises nearly anything
            wrong.append(f"{file} is damaged and cannot be read: {first_line(error)}")
            continue
        for line in wrong:
            say(f"{line}; going on from {file.name}, step {state['step']}")
        return state
    raise RunError(
        f"{wrong[0]}. Start a new run; its init.tokenizer may be {folder}, whose averaged weights are in a file of "
        "their own"
    )


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Of a checkpoint in ``folder``, strictly. Raises ``RunError``."""
    try:
        module.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise RunError(
            f"the checkpoint in {folder} is not of the run that recipe.toml beside it describes: {first_line(error)}"
        ) from error
