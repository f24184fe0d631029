"""Files that appear whole or not at all: write aside, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | Path, data: bytes | Callable[[Path], object]) -> None:
    """Writes ``path`` so that a reader finds the old file or the whole new one, never a part.

    data: the bytes, or a function that writes them to the path it is given, such as ``image.save``. That path lies
    in the same folder and has the same suffix, so that a writer which chooses its format by suffix chooses rightly.

    Whatever goes wrong (``OSError`` for a full disk or a missing folder, anything the function raises) passes
    through; the old file is then untouched and nothing is left beside it.
    """
    # Writing through a link changes the file it points at, as open(path, "w") does; a bare rename would cut the link.
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        # The mode of new files here: some writers (safetensors) put a file in place that only its owner can read.
        aside.touch()
        mode = stat.S_IMODE((target if target.exists() else aside).stat().st_mode)
        if callable(data):
            data(aside)
        else:
            aside.write_bytes(data)
        aside.chmod(mode)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself outlive a power cut. The new file is already in place, so a failure is no error."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
