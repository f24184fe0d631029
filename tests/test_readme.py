"""README, CONTRIBUTING and docs/ say what is true: their Python runs, their commands exist, their links lead somewhere.

Above a block that cannot run here (it downloads weights, or takes hours) stands ``<!-- no-test: reason -->``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())

FENCE = re.compile(
    r"(?P<skip><!--\s*no-test:[^\n]*-->[ \t]*\n\s*)?"
    r"^(?P<indent>[ \t]*)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^[ \t]*```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    """One fenced block. line: of its first line of code, from 1. tested: no ``no-test`` stands above it."""

    language: str
    line: int
    code: str
    tested: bool


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        lines = match["code"].splitlines()
        code = "\n".join(line.removeprefix(match["indent"]) for line in lines)
        found.append(
            Block(match["language"], text.count("\n", 0, match.start("code")) + 1, code, match["skip"] is None)
        )
    return found


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, as words: prompts, comments, variables and the rest of a pipe are left out."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>"):
                while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def fault_of_command(command: Any, words: list[str]) -> str | None:
    """What the click command ``command`` would not understand in ``words``, or None."""
    words = list(words)
    while words:
        word = words.pop(0)
        options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
        if word == "--":
            return None
        if word.startswith("-") and len(word) > 1:
            name, equals, _ = word.partition("=")
            if name == "--help":
                continue
            if name not in options:
                return f"{command.name} has no option {name}; it has {', '.join(sorted(options))}"
            option = options[name]
            if not equals and not getattr(option, "is_flag", False) and not getattr(option, "count", False):
                if len(words) < option.nargs:
                    return f"{command.name} {name} needs a value"
                del words[: option.nargs]
        elif hasattr(command, "commands"):
            if word not in command.commands:
                return f"there is no command {word}; there are {', '.join(sorted(command.commands))}"
            command = command.commands[word]
    return None


def fault_of_module(name: str) -> str | None:
    """What stops ``python -m name``, or None."""
    spec = find_spec(name)
    if spec is None:
        return f"there is no module {name}"
    if spec.submodule_search_locations is not None and find_spec(f"{name}.__main__") is None:
        return f"{name} has no __main__.py"
    return None


@page
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # an example may leave a picture open
def test_python_blocks_run(page: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, one namespace per page, in a folder that holds the bundled photographs (cat.jpg and the others)."""
    for photo in photos:
        shutil.copy(photo, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    # A real module: dataclasses, type hints and pickle look their names up in sys.modules.
    module = types.ModuleType("page_under_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.tested:
            padded = "\n" * (block.line - 1) + block.code  # tracebacks then name the line of the page
            exec(compile(padded, str(page), "exec", dont_inherit=True), module.__dict__)


@page
def test_shell_blocks_name_what_exists(page: Path) -> None:
    from typer.main import get_command

    from tokenizers_vis.cli import app

    root = get_command(app)
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in ("bash", "sh", "shell", "console"):
            continue
        for words in commands(block.code):
            where = f"{page.name}, block at line {block.line}: {shlex.join(words)}"
            if words[0] == "tokenizers-vis":
                fault = fault_of_command(root, words[1:])
                assert fault is None, f"{where}: {fault}"
            elif words[0] == "make":
                wanted = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
                assert wanted <= targets, f"{where}: the Makefile has {sorted(targets)}"
            elif "-m" in words and words[words.index("-m") + 1].startswith("tokenizers_vis"):
                fault = fault_of_module(words[words.index("-m") + 1])
                assert fault is None, f"{where}: {fault}"


@page
def test_links_lead_somewhere(page: Path) -> None:
    for target in (a or b for a, b in LINK.findall(page.read_text(encoding="utf-8"))):
        path = target.partition("#")[0]
        if path and "://" not in target and not target.startswith(("mailto:", "data:")):
            assert (page.parent / path).exists(), f"{page.name} links to {target}, which is not there"


@page
def test_every_skip_says_why(page: Path) -> None:
    for reason in re.findall(r"<!--\s*no-test:?(.*?)-->", page.read_text(encoding="utf-8")):
        assert reason.strip(), f"{page.name}: <!-- no-test: reason -->"


def test_blocks_are_found() -> None:
    text = (
        "a\n\n```python\nx = 1\n```\n\n<!-- no-test: downloads -->\n```python\ny\n```\n- b\n\n  ```bash\n  ls\n  ```\n"
    )
    assert blocks(text) == [
        Block("python", 4, "x = 1", True),
        Block("python", 9, "y", False),
        Block("bash", 14, "ls", True),
    ]


def test_shell_commands_are_split() -> None:
    code = "# what\n$ A=1 tool x.jpg \\\n  -o out.png  # why\ntool 'a b' > log && make test | tail\n\nkey=1\n"
    assert list(commands(code)) == [
        ["tool", "x.jpg", "-o", "out.png"],
        ["tool", "a b"],
        ["log"],
        ["make", "test"],
        ["tail"],
    ]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("encode cat.jpg -o cat.tok --fast", None),
        ("encode cat.jpg --out=cat.tok a.b=1", None),
        ("encode --help", None),
        ("encode cat.jpg --outt x", "no option --outt"),
        ("encode cat.jpg -o", "needs a value"),
        ("encoed cat.jpg", "no command encoed"),
    ],
)
def test_a_wrong_command_is_seen(line: str, wrong: str | None) -> None:
    import typer

    app = typer.Typer()

    @app.command()
    def encode(images: list[str], out: str = typer.Option("x", "--out", "-o"), fast: bool = False) -> None: ...

    @app.command()
    def decode() -> None: ...

    fault = fault_of_command(typer.main.get_command(app), line.split())
    assert (fault is None) if wrong is None else (wrong in fault)
