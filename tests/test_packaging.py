"""What a user gets: an import that is quick, a wheel that is whole, and a neighbourly ``cuda/``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tokenizers_vis

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tokenizers_vis", "cuda", "decoders", "eval", "quantizers", "train")
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", ".*", "*.pyc", "*.so")


def python(code: str, cwd: Path, **environment: str) -> str:
    """The output of ``code`` in a fresh interpreter that starts in ``cwd``."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=_clean_environment() | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from; building in the repository would leave build/ there."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_SHIPPED)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installer would."""
    built, unpacked = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("wheel")
    # The build backend itself: what pip calls, without an isolated environment that would have to be downloaded.
    python(f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})", source)
    (file,) = built.glob("*.whl")
    assert file.name == f"tokenizers_vis-{tokenizers_vis.__version__}-py3-none-any.whl"
    zipfile.ZipFile(file).extractall(unpacked)
    return unpacked


def test_the_wheel_holds_every_file(source: Path, wheel: Path) -> None:
    expected = set()
    for folder in FOLDERS:
        inside = Path() if folder == "tokenizers_vis" else Path("tokenizers_vis")
        files = [path for path in (source / folder).rglob("*") if path.is_file()]
        expected |= {(inside / path.relative_to(source)).as_posix() for path in files}
    got = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    shipped = {name for name in got if not name.split("/")[0].endswith(".dist-info")}
    assert shipped == expected, "name new kinds of files under [tool.setuptools.package-data]"
    assert {"tokenizers_vis/py.typed", "tokenizers_vis/photos/LICENSES.md", "tokenizers_vis/photos/cat.jpg"} <= shipped
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in got)


def test_the_wheel_claims_one_name(wheel: Path) -> None:
    (top_level,) = wheel.glob("*.dist-info/top_level.txt")
    assert top_level.read_text().split() == ["tokenizers_vis"]
    assert {path.name for path in wheel.iterdir()} == {"tokenizers_vis", top_level.parent.name}


def test_the_unpacked_wheel_imports_from_anywhere(wheel: Path) -> None:
    code = """
import importlib, json
names = ["", ".cuda", ".decoders", ".encoders", ".eval", ".quantizers", ".train"]
print(json.dumps([p for n in names for p in importlib.import_module("tokenizers_vis" + n).__path__]))
"""
    paths = json.loads(python(code, Path(ROOT.anchor), PYTHONPATH=str(wheel)))
    assert len(paths) == 7
    assert all(Path(path).is_relative_to(wheel) for path in paths), paths


def test_the_import_is_light() -> None:
    code = "import sys, tokenizers_vis; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert python(code, ROOT).strip() == "set()"


def test_dir_lists_the_public_names() -> None:
    public = {"load", "list_presets", "Tokenizer", "Tokens", "Latents", "TokenFileError", "to_pil"}
    public |= {"Generator", "load_generator"}
    assert set(tokenizers_vis.__all__) == public
    assert set(dir(tokenizers_vis)) == public | {"__version__"}
    for name in public:
        assert getattr(tokenizers_vis, name).__name__ == name


def test_nvidia_cuda_is_found_from_the_root() -> None:
    """torch imports ``cuda.bindings`` and falls silent without it; our folder of that name must not stand before it."""
    try:
        importlib.metadata.distribution("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs cuda-bindings, which torch brings along on Linux")
    paths = json.loads(python("import cuda.bindings, json; print(json.dumps(list(cuda.__path__)))", ROOT))
    assert any(Path(path).resolve() != ROOT / "cuda" for path in paths)


def test_one_ruff_everywhere() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (pin,) = [text.removeprefix("ruff==") for text in extras["dev"] if text.startswith("ruff")]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks)[1] == pin


def test_every_photograph_has_a_licence(photos: list[Path]) -> None:
    from PIL import Image

    table = (photos[0].parent / "LICENSES.md").read_text(encoding="utf-8")
    assert {path.name for path in photos} == set(re.findall(r"^\| `(\S+\.jpg)`", table, flags=re.MULTILINE))
    for path in photos:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))


def test_a_test_cannot_reach_the_network() -> None:
    with socket.socket() as sock, pytest.raises(pytest.fail.Exception, match="192.0.2.1"):
        sock.connect(("192.0.2.1", 80))  # an address reserved for examples
    with pytest.raises(pytest.fail.Exception, match="example.org"):
        socket.getaddrinfo("example.org", 80)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2]):
        pass
