"""The notebooks run from the first cell to the last and show pictures; they are kept without outputs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import tokenizers_vis

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WEIGHTS = Path(tokenizers_vis.__file__).parent / "presets" / "mini.safetensors"
STEPS = "8"  # of the trainings: enough to come to the end of a notebook, where it would be read in a minute
notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_they_are_numbered_and_the_readme_lists_them() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in range(1, len(NOTEBOOKS) + 1)]
    listed = re.findall(r"\(notebooks/(\w+\.ipynb)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert listed == [path.name for path in NOTEBOOKS] != []


@notebook
def test_it_is_valid_and_kept_without_outputs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in code_cells(book):
        assert not cell.outputs and cell.execution_count is None, f"clear the outputs of {path.name}"


@notebook
def test_it_runs_and_shows_pictures(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not WEIGHTS.is_file():
        pytest.skip(f"the bundled weights are missing: there is no {WEIGHTS.relative_to(WEIGHTS.parents[2])}")
    # The kernel starts in an empty folder: it finds a checkout's package by this, an installed one anyway.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("NOTEBOOK_STEPS", STEPS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = nbformat.read(path, as_version=4)
    # A cell that raises raises here, with its traceback.
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(shown) >= 2
