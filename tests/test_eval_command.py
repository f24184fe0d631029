"""``tokenizers-vis eval`` and ``compare``, whole: real methods on the bundled photographs, and what is left there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenizers_vis.cli import app, main
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
        (("eval", "mini@129", "--data", tmp_path), "128"),
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


# The command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def ended(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        return (exit_.value.code or 0, *capsys.readouterr())

    return ended


def test_a_shard_leaves_the_rest(report: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    words = (
        "eval",
        "jpeg@q5,q40",
        "identity",
        "--data",
        report.parent / "photos",
        "--size",
        48,
        "--out",
        tmp_path / "r",
    )
    code, out, err = command(*words, "--shard", "0/2")
    assert (code, out) == (0, f"this part is done; {3 * 2} reconstructions are left for other shards\n")
    said = [f"photos@48: {what}" for what in ("originals (0", "jpeg@q5 (2", "jpeg@q40 (4", "identity (6")]
    assert err.splitlines() == [f"{line} of 8 done)" for line in said]
    code, out, err = command(*words)
    assert code == 0 and "no set distances" in err and f"wrote {tmp_path / 'r' / 'index.html'}" in out
    assert out.splitlines()[1].startswith("jpeg@q5")
    assert {"index.html", "results.json", "tables.md", "tables.tex", "images.jsonl"} <= {
        path.name for path in (tmp_path / "r").iterdir()
    }
    code, out, _ = command("compare", tmp_path / "r", tmp_path / "r")
    assert code == 0 and "+0.00" in out


def test_an_unreadable_picture_is_named_and_ends_in_one(
    report: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    data = tmp_path / "photos"
    shutil.copytree(report.parent / "photos", data)
    (data / "broken.png").write_bytes(b"no picture")
    for _ in range(2):  # also where there is nothing left to do
        code, out, err = command("eval", "identity", "--data", data, "--size", 48, "--out", tmp_path / "r")
        assert code == 1 and "left out of photos@48: broken.png: " in err and "index.html" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "jpeg@q5"), "nothing to judge on"),
        (("eval", "jpg@q5", "--data", "."), "there is no method 'jpg@q5'. Did you mean"),
        (("eval", "jpeg", "--data", "nowhere"), "there is nothing at 'nowhere'"),
        (("eval", "jpeg", "--data", ".", "--net-weights", "w"), "--net-weights are files for the nets of --net"),
        (("eval", "jpeg", "--data", ".", "--shard", "1"), "--shard is I/N"),
        (("eval", "jpeg", "--text", "nowhere"), "no file or folder nowhere"),
        (("eval", "jpeg", "--text", "nowhere", "--recogniser-weights", "w"), "pp-ocr has weights of its own"),
        (
            ("eval", "jpeg", "--faces", ".", "--face-recogniser", "antelopev2", "--face-recogniser-weights", "no.onnx"),
            "there is no no.onnx, the weights of antelopev2",
        ),
        (("compare", "a", "b"), "there is no report a"),
        (("landmarks", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: tuple[str, ...], said: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = command(*words)
    assert code == 1 and said in err and len(err.splitlines()) == 1


# Several processes


def launched(report: Path, out: Path) -> list[str]:
    """The command without the interpreter."""
    words = ["-m", "tokenizers_vis.cli", "eval", "jpeg@q5", "identity", "--data", str(report.parent / "photos")]
    return [*words, "--size", "48", "--out", str(out), "--device", "cpu"]


def whole(out: Path) -> None:
    (suite,) = json.loads((out / "results.json").read_text())["suites"]
    assert suite["pictures"] == 4 and all(row["cells"]["psnr"]["n"] == 4 for row in suite["rows"])
    shards = {path.name for path in (out / "parts").glob("photos@48/*/*.jsonl")}
    assert shards == {"0-of-2.jsonl", "1-of-2.jsonl"}


def test_processes_of_a_launcher_share_the_work_and_the_first_writes(report: Path, tmp_path: Path) -> None:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, *launched(report, tmp_path)]
    started = [
        subprocess.Popen(command, env={**quiet, "RANK": rank}, stdout=subprocess.PIPE, text=True) for rank in "01"
    ]
    first, second = (process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert "index.html" in first and second.startswith("this part is done")
    whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["torch.distributed.run", "--standalone", "--nproc_per_node=2"], ["accelerate.commands.launch", "--multi_gpu"]],
)
def test_under_torchrun_and_accelerate(launcher: list[str], report: Path, tmp_path: Path) -> None:
    if not importlib.util.find_spec(launcher[0].partition(".")[0]):
        pytest.skip(f"needs {launcher[0]}")
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [sys.executable, "-m", *launcher, *(options if launcher[0].startswith("accelerate") else [])]
    done = subprocess.run(
        [*words, *launched(report, tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    whole(tmp_path)
