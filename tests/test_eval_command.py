"""``tokenizers-vis eval`` and ``compare``, whole: real methods on the bundled photographs, and what is left there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenizers_vis.cli import app
from tokenizers_vis.eval.protocol import StampError

METHODS = ["mini@1,64", "jpeg@q10,q50", "resize@16", "resize@32", "identity"]


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tokenizers_vis

    folder = tmp_path_factory.mktemp("eval")
    data = folder / "photos"
    data.mkdir()
    for photo in sorted((Path(tokenizers_vis.__file__).parent / "photos").glob("*.jpg"))[:4]:
        shutil.copy(photo, data)
    code, output = run("eval", *METHODS, "--data", data, "--size", "64", "--out", folder / "report", "--device", "cpu")
    assert code == 0, output
    return folder / "report"


def rows(report: Path) -> list[dict]:
    return [json.loads(line) for line in (report / "images.jsonl").read_text().splitlines()]


def test_every_method_has_a_row_for_every_picture(report: Path):
    found = rows(report)
    methods = {row["method"] for row in found}
    assert methods == {"mini@1", "mini@64", "jpeg@q10", "jpeg@q50", "resize@16", "resize@32", "identity"}
    assert len(found) == 4 * len(methods)


def test_the_numbers_are_in_the_order_that_they_must_have(report: Path):
    def mean(method: str, metric: str) -> float:
        values = [row[metric] for row in rows(report) if row["method"] == method]
        return sum(values) / len(values)

    for worse, better in (("mini@1", "mini@64"), ("resize@16", "resize@32"), ("jpeg@q10", "jpeg@q50")):
        assert mean(worse, "ssim") < mean(better, "ssim") and mean(worse, "mse") > mean(better, "mse")
    assert all(row["mse"] == 0 for row in rows(report) if row["method"] == "identity")


def test_the_page_stands_by_itself(report: Path):
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "tokenizers-vis" in page and "mini@64" in page and "<svg" in page
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert loaded and all(address.startswith(("#", "data:")) for address in loaded if "http" not in address)
    assert not re.search(r'<(?:script|img|link)[^>]*(?:src|href)="https?:', page)
    for name in ("results.json", "tables.md", "tables.tex"):
        assert (report / name).stat().st_size > 100


def test_the_same_command_again_measures_nothing_again(report: Path):
    before = {path: path.read_bytes() for path in (report / "parts").rglob("*.jsonl")}
    assert before and any(b"seconds" in part or b"_ms" in part for part in before.values())  # a second run would differ
    data = report.parent / "photos"
    code, _ = run("eval", *METHODS, "--data", data, "--size", "64", "--out", report, "--device", "cpu")
    assert code == 0 and before == {path: path.read_bytes() for path in (report / "parts").rglob("*.jsonl")}


def test_other_protocols_are_not_compared(report: Path, tmp_path: Path):
    fewer = tmp_path / "photos"
    shutil.copytree(report.parent / "photos", fewer)
    next(fewer.glob("*.jpg")).unlink()
    assert run("eval", "resize@16", "identity", "--data", fewer, "--size", "64", "--out", tmp_path / "other")[0] == 0
    with pytest.raises(StampError, match="different ways: .* n: 4 against 3"):
        run("compare", report, tmp_path / "other")
    assert run("compare", report, report)[0] == 0


def test_what_cannot_be_measured_says_why(tmp_path: Path):
    for arguments, message in (
        (("eval", "mini@65", "--data", tmp_path), "64"),
        (("eval", "jpg@q5", "--data", tmp_path), "jpeg"),
        (("eval", "identity"), "nothing to judge"),
        (("eval", "identity", "--data", tmp_path / "none"), "none"),
    ):
        result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "report")])
        said = result.output + str(result.exception)
        assert result.exit_code != 0 and message in said, (arguments, said)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium, to look at the page as a browser shows it")
def test_a_browser_shows_the_page(report: Path, tmp_path: Path):
    from PIL import Image

    shots = {}
    for name, width in (("desk", 1280), ("phone", 390)):
        shots[name] = tmp_path / f"{name}.png"
        page = (report / "index.html").resolve().as_uri()
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / name}", f"--window-size={width},900", f"--screenshot={shots[name]}"]
        subprocess.run([*command, page], check=True, capture_output=True, timeout=90)
    for shot in shots.values():
        picture = Image.open(shot).convert("L")
        assert len(picture.getcolors(maxcolors=256) or []) > 20  # text and curves, not an empty page
