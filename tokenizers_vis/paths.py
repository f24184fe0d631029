"""Which files a command reads, and where each result goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def find_files(inputs: Iterable[Path], suffixes: Sequence[str] | None) -> list[tuple[Path, Path]]:
    """Each file with its path relative to the folder it was found in.

    suffixes: those of the files that are looked for in folders; None for images. A file is taken whatever its suffix.
    Raises ``ValueError`` for a folder without such files.
    """
    from tokenizers_vis.images import find_images

    found: list[tuple[Path, Path]] = []
    for path in inputs:
        if suffixes is None:
            files = find_images(path)
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
            if not files:
                raise ValueError(f"the folder {path} holds no {' or '.join(suffixes)} files")
        else:
            files = [path]
        found += [(file, file.relative_to(path) if path.is_dir() else Path(file.name)) for file in files]
    return found


def place_results(
    found: Sequence[tuple[Path, Path]], out: Path | None, suffix: str, file_suffixes: Sequence[str]
) -> list[Path]:
    """Where the result of each file goes: beside it, or under the folder ``out`` as it lay in its own.

    out: a file when it ends in one of ``file_suffixes``. suffix: of the results.
    Raises ``ValueError`` where two results would be one file.
    """
    if out is not None and out.suffix.lower() in file_suffixes and not out.is_dir():
        if len(found) > 1:
            raise ValueError(f"{out} is one file, but there are {len(found)} inputs: give a folder")
        return [out]
    targets = [(file if out is None else out / relative).with_suffix(suffix) for file, relative in found]
    refuse_doubles(targets)
    return targets


def refuse_doubles(targets: Iterable[Path]) -> None:
    """Raises ``ValueError`` when a path is there twice."""
    seen: set[Path] = set()
    for target in targets:
        if target in seen:
            raise ValueError(f"two results would both be written to {target}: rename an input, or use two folders")
        seen.add(target)
