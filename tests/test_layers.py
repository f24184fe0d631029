"""The order of the floors: a folder imports only from floors below it, wherever in a file the import stands."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"cuda": 1, "quantizers": 2, "decoders": 2, "tokenizers_vis": 3, "eval": 4, "train": 5}
# The first is the command line, the others are its parts.
PORCH = tuple(f"tokenizers_vis/{name}.py" for name in ("cli", "cli_eval", "cli_train", "cli_generate"))
FORBIDDEN = {"tests", "notebooks", "benchmarks", *FLOORS} - {"tokenizers_vis", "cuda"}  # cuda alone is NVIDIA's
CUDA_MAY_USE = {"torch", "triton", "einops", "cuda", "tokenizers_vis", *sys.stdlib_module_names}

FILES = [path.relative_to(ROOT).as_posix() for folder in FLOORS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a source imports, lazily or not. A relative import starts with a dot.

    ``from a import b`` yields ``a.b``, which is either the module b or a name in a: both lie in the folder of a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function.lstrip("_") in ("import_module", "import") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def faults(file: str, source: str) -> list[str]:
    """What is wrong with the imports of ``file`` (path from the root), one line each."""
    here = file.split("/")[0]
    found = []
    for line, name in imported(source):
        first, *rest = name.split(".")
        where = f"{file}:{line} imports {name}: "
        if not first:
            found.append(where + "write it from the root, tokenizers_vis.…")
        elif first in FORBIDDEN:
            found.append(where + "code never sees the tests; folders are imported as tokenizers_vis.…")
        elif here == "cuda" and first not in CUDA_MAY_USE:
            found.append(where + "cuda/ stands on torch alone")
        elif first == "tokenizers_vis" and file != PORCH[0] and f"{'/'.join([first, *rest[:1]])}.py" in PORCH:
            found.append(where + "nothing imports the command line")
        elif first == "tokenizers_vis" and file not in PORCH:
            there = rest[0] if rest and rest[0] in FLOORS else "tokenizers_vis"
            if there != here and FLOORS[there] >= FLOORS[here]:
                found.append(where + f"{there}/ is floor {FLOORS[there]}, {here}/ is floor {FLOORS[here]}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_floors_below(file: str) -> None:
    assert not faults(file, (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("quantizers/x.py", "from tokenizers_vis.config import build"),
        ("quantizers/x.py", "def f():\n    import tokenizers_vis"),
        ("quantizers/x.py", "from tokenizers_vis.decoders.vit import ViTDecoder"),
        ("quantizers/x.py", "from tokenizers_vis import decoders"),
        ("decoders/x.py", "from tokenizers_vis.quantizers.fsq import FSQ"),
        ("decoders/x.py", "from importlib import import_module\nimport_module('tokenizers_vis.eval.metrics')"),
        ("cuda/x.py", "import timm"),
        ("cuda/x.py", "from tokenizers_vis.quantizers import base"),
        ("tokenizers_vis/x.py", "if True:\n    from tokenizers_vis import eval as judge"),
        ("tokenizers_vis/encoders/x.py", "import tokenizers_vis.train.loop"),
        ("eval/x.py", "from tokenizers_vis.train.data import shards"),
        ("train/x.py", "from tokenizers_vis.cli import app"),
        ("train/x.py", "from tokenizers_vis import cli"),
        ("eval/x.py", "from tokenizers_vis.cli_eval import evaluate"),
        ("tokenizers_vis/cli_eval.py", "from tokenizers_vis import cli"),
        ("train/x.py", "from . import loop"),
        ("train/x.py", "from .loop import fit"),
        ("train/x.py", "import quantizers.fsq"),
        ("tokenizers_vis/cli.py", "from tests import helpers"),
    ],
)
def test_a_wrong_import_is_seen(file: str, source: str) -> None:
    assert len(faults(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("quantizers/base.py", "def kinds():\n    from tokenizers_vis.quantizers import QUANTIZERS"),
        ("quantizers/x.py", "from tokenizers_vis.cuda.ops import nearest_code"),
        ("tokenizers_vis/encoders/x.py", "from tokenizers_vis.decoders.transformer import Block"),
        ("tokenizers_vis/cli.py", "def f():\n    from tokenizers_vis.train.loop import fit\n    import rich"),
        ("tokenizers_vis/cli.py", "from tokenizers_vis import cli_eval"),
        ("tokenizers_vis/cli_eval.py", "def f():\n    from tokenizers_vis.eval.compare import compare"),
        ("train/x.py", "from tokenizers_vis.eval import metrics"),
        ("cuda/x.py", "import math, torch\nimport triton.language as tl"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert not faults(file, source)


def test_cuda_is_a_namespace() -> None:
    """With an ``__init__.py`` our folder would hide NVIDIA's ``cuda`` from torch whenever Python starts at the root."""
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_pyproject_lists_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {Path(file).parent for file in FILES}
    tree = {".".join(f.parts if f.parts[0] == "tokenizers_vis" else ("tokenizers_vis", *f.parts)) for f in folders}
    assert set(setuptools["packages"]) - {"tokenizers_vis.cuda"} == tree - {"tokenizers_vis.cuda"}
    assert "tokenizers_vis.cuda" in setuptools["packages"]
    for name, folder in setuptools["package-dir"].items():
        assert (ROOT / folder).is_dir() and name in setuptools["packages"]
