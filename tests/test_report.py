"""The report: a page that needs nothing else, tables that hold what was measured, comparisons that refuse mixtures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tokenizers_vis.catalogue import preset
from tokenizers_vis.config import read_toml
from tokenizers_vis.eval import published as published_module
from tokenizers_vis.eval.compare import compare
from tokenizers_vis.eval.evaluate import evaluate
from tokenizers_vis.eval.gallery import Pictures
from tokenizers_vis.eval.plots import Point, curve_plot, rate_plot, scale_plot
from tokenizers_vis.eval.protocol import StampError
from tokenizers_vis.eval.published import published
from tokenizers_vis.eval.report import write_report
from tokenizers_vis.eval.tables import latex, markdown, written

VOID = {"meta", "img", "br", "input", "link", "hr"}
NASTY = "<script>alert(1)</script>&\"'"
METHODS = ["mini@1,4,16,64", "jpeg@q1,q5,q20,q40", "resize@8", "identity"]


class Page(HTMLParser):
    """Balanced tags, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.keys: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            elif tag == "a" and key == "href":
                self.links.append(value or "")
            elif key in ("src", "href", "srcset", "action", "data") or key.startswith("on"):
                self.fetched.append(f"{tag} {key}={value}")
            elif key in ("data-p", "data-o", "data-r"):
                self.keys.add(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


@pytest.fixture(scope="module")
def pictures(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        with Image.open(photos[i % len(photos)]) as photo:
            photo.crop((8 * i, 0, 8 * i + 160, 160)).resize((96, 96)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def report(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    evaluate(METHODS, out, data=str(pictures), size=64, examples=1, command=f"tokenizers-vis eval {NASTY}")
    return out


@pytest.fixture(scope="module")
def results(report: Path) -> dict[str, Any]:
    return json.loads((report / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def html(report: Path) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_for_nothing(html: str) -> None:
    page = Page(html)
    assert not page.open and not page.fetched and "default-src 'none'" in html
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "https://")) for link in page.links)
    held = json.loads(re.search(r'<script type="application/json" id="pictures">(.*?)</script>', html)[1])
    assert page.keys == set(held) and all(value.startswith("data:image/webp;base64,") for value in held.values())


def test_the_page_shows_every_method_and_number(html: str, results: dict[str, Any]) -> None:
    (suite,) = results["suites"]
    for row in suite["rows"]:
        assert f">{row['label']}</a>" in html and f"<summary>{row['label']}<small>" in html
        assert f">{written(row['cells']['psnr']['value'], 2)}" in html
    assert "photos@64" in html and suite["columns"][0]["stamp"]["dataset"][:12] in html


def test_what_comes_from_outside_is_escaped(html: str, results: dict[str, Any], report: Path, tmp_path: Path) -> None:
    assert "alert(1)" in html and NASTY not in html
    suite = results["suites"][0]
    renamed = {
        **results,
        "suites": [{**suite, "skipped": {NASTY: NASTY}, "rows": suite["rows"][:1]}],
        "methods": [{**results["methods"][0], "licence": NASTY}],
    }
    shutil.copytree(report / "parts", tmp_path / "parts")
    write_report(renamed, tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert NASTY not in text and not Page(text).open


def test_pictures_are_the_reconstructions_themselves(report: Path, html: str) -> None:
    import base64
    import io

    held = json.loads(re.search(r'id="pictures">(.*?)</script>', html)[1])
    shown = {np.asarray(Image.open(io.BytesIO(base64.b64decode(v.split(",")[1])))).tobytes() for v in held.values()}
    files = [path for path in (report / "parts").rglob("examples/*.png")]
    kept = {np.asarray(Image.open(path)).tobytes() for path in files}
    assert len(files) > 20 and shown <= kept


def test_large_pictures_lose_nothing_that_is_seen_and_equal_ones_are_held_once(
    photos: list[Path], tmp_path: Path
) -> None:
    import base64
    import io

    pictures = Pictures()
    for name in ("a.png", "b.png"):
        Image.open(photos[0]).convert("RGB").save(tmp_path / name)
    Image.open(photos[1]).convert("RGB").resize((64, 48)).save(tmp_path / "small.png")
    keys = [pictures.add(tmp_path / name)[0] for name in ("a.png", "b.png", "small.png")]
    assert keys[0] == keys[1] != keys[2] and set(pictures.held) == {keys[0], keys[2]}
    for key, name, least in ((keys[0], "a.png", 38.0), (keys[2], "small.png", np.inf)):
        shown = Image.open(io.BytesIO(base64.b64decode(pictures.held[key].split(",")[1]))).convert("RGB")
        error = np.square(np.asarray(shown, float) - np.asarray(Image.open(tmp_path / name), float)).mean()
        with np.errstate(divide="ignore"):
            assert 10 * np.log10(255**2 / error) >= least
    assert len(pictures.held[keys[0]]) < 0.5 * (tmp_path / "a.png").stat().st_size


def test_plots_are_well_formed_and_hold_every_point(html: str, results: dict[str, Any]) -> None:
    plots = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(plots) >= 2
    for plot in plots:
        root = ElementTree.fromstring(plot)
        assert len(root.findall(".//circle")) == 8  # four of mini, four of jpeg; the others have no rate
        for circle in root.iter("circle"):
            assert 0 < float(circle.get("cx")) < 520 and 0 < float(circle.get("cy")) < 340


def test_a_plot_rises_with_its_numbers() -> None:
    points = [Point(10.0**k, float(k), f"<{k}>") for k in range(4)]
    root = ElementTree.fromstring(rate_plot({"a<b": points}, {"level": 1.5}, {"a<b": 0}, x_title="x", y_title="y"))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert places == sorted(places) and [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    gaps = np.diff([x for x, _ in places])
    assert gaps == pytest.approx(gaps[0], abs=0.11)  # equal factors, equal steps
    assert rate_plot({"a": []}, {"level": 1.0}, {"a": 0}, x_title="x", y_title="y") == ""
    spans = [(0.0, 0.5), (0.5, 1.0)]
    root = ElementTree.fromstring(scale_plot({"a": [None, 1.0], "b": [0.0, 0.5]}, spans, {"a": 0, "b": 1}, y_title="y"))
    assert len(root.findall(".//circle")) == 3
    assert scale_plot({"a": [None, None]}, spans, {"a": 0}, y_title="y") == ""


def test_a_curve_of_powers_is_a_line_on_logarithmic_axes() -> None:
    curve = [Point(10.0**k, 100.0**k, "") for k in range(-1, 3)]
    drawn = curve_plot({"": curve}, x_title="x", y_title="y", log_x=True, log_y=True)
    root = ElementTree.fromstring(drawn)
    places = np.array([pair.split(",") for pair in next(root.iter("polyline")).get("points").split()], dtype=float)
    slopes = np.diff(places[:, 1]) / np.diff(places[:, 0])
    assert slopes == pytest.approx(slopes[0], rel=0.02) and ">100<" in drawn and ">10,000<" in drawn
    assert curve_plot({"": curve[:1]}, x_title="x", y_title="y") == ""


def test_bjontegaard_differences_stand_beside_reasons(results: dict[str, Any]) -> None:
    (table,) = [one for one in results["suites"][0]["rate"] if one["metric"] == "psnr"]
    (curve,) = table["curves"]
    assert table["anchor"] == "jpeg" and curve["name"] == "mini"
    assert curve["bd_quality"] is None and "no range in common" in curve["quality_reason"]


def test_markdown_and_latex_hold_the_table(results: dict[str, Any]) -> None:
    lines = [line for line in markdown(results).splitlines() if line.startswith("|")]
    columns = results["suites"][0]["columns"]
    assert all(line.count(" | ") == len(columns) for line in lines)
    assert len(lines) == 2 + 10
    row = next(line for line in lines if "`jpeg@q5`" in line)
    cells = next(row["cells"] for row in results["suites"][0]["rows"] if row["label"] == "jpeg@q5")
    assert f"{cells['psnr']['value']:.2f}" in row and "∞" in lines[-1]
    tex = latex(results)
    body = [line for line in tex.splitlines() if line.startswith(r"\texttt{")]
    assert len(body) == 10 and len({line.count("&") for line in body}) == 1 and r"$\infty$" in body[-1]
    assert "∞" not in tex and "Σ" not in tex and not re.search(r"(?<!\\)[_#%](?! needs)", tex)
    assert tex.count("{") == tex.count("}")


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (None, 2, "–"),
        ("inf", 2, "∞"),
        (1234.5, 0, "1,234"),
        (0.126, 2, "0.13"),
        (-1e-9, 2, "0.00"),
        (-0.5, 1, "-0.5"),
        ("a", 0, "a"),
    ],
)
def test_how_numbers_are_written(value: Any, digits: int, shown: str) -> None:
    assert written(value, digits) == shown


# Published numbers


def test_every_published_table_says_where_it_is_from() -> None:
    for table in read_toml(Path(published_module.__file__).with_name("published.toml"))["table"]:
        assert table["source"] and table["protocol"] and table["suite"] in ("photos", "text")
        assert set(table["percent"]) <= set(table["columns"])
        for name, values in table["rows"].items():
            assert len(values) == len(table["columns"]), name
            for column, value in zip(table["columns"], values, strict=True):
                assert 0 <= value <= (100 if column in table["percent"] or column.endswith("FID") else 1), name


def test_text_and_faces_take_their_own_columns() -> None:
    identity = [{"label": "identity", "kind": "identity"}]
    (text,), (faces,) = published("text", 256, identity), published("faces", 256, identity)
    assert text["columns"] == ["T-ACC[PARSeq]", "T-NED[PARSeq]"] and faces["columns"] == ["F-Sim[antelopev2]"]
    assert text["rows"][0] == {"name": "Resize", "values": [0.9302, 0.9653], "label": "identity"}
    assert faces["rows"][0] == {"name": "Resize", "values": [0.93], "label": "identity"}
    assert all(row["label"] is None for row in published("text", 256, [])[0]["rows"])
    assert published("text", 77, []) == []


def test_a_preset_has_the_rfid_of_its_paper_beside_it() -> None:
    whole = {"label": "titok-l-32", "kind": "tokenizer", "source": "titok-l-32", "tokens": 32, "max_tokens": 32}
    (table,) = published("photos", 128, [whole, {**whole, "tokens": 16, "label": "shorter"}])
    assert [(row["label"], row["values"]) for row in table["rows"]] == [("titok-l-32", [preset("titok-l-32")["rfid"]])]


def test_published_numbers_are_set_apart(results: dict[str, Any], report: Path, tmp_path: Path) -> None:
    shutil.copytree(report / "parts", tmp_path / "parts")
    write_report({**results, "suites": [{**results["suites"][0], "size": 256}]}, tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert '<tr class="published"><td data-v="LlamaGen VQ-16' in text and '<td class="published" data-v="2.19">' in text
    assert "rFID, published" in text and "crops and reference sets differ between authors" in text


# Two reports


def test_a_report_does_not_differ_from_itself(report: Path) -> None:
    found = compare(report, report / "results.json")
    assert found.changes and not found.refused
    assert all(one.before == one.after and one.low in (None, 0) for one in found.changes)
    assert "*" not in str(found)


def test_a_change_comes_with_its_interval(report: Path, pictures: Path, tmp_path: Path) -> None:
    made = tmp_path / "parts"
    # The second report calls by one label what was another quality in the first.
    second = json.loads((report / "results.json").read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in second["suites"][0]["rows"]}
    rows["jpeg@q5"]["cells"] = rows["jpeg@q20"]["cells"]
    lines = [json.loads(line) for line in (report / "images.jsonl").read_text().splitlines()]
    swap = {"jpeg@q20": "jpeg@q5", "jpeg@q5": "jpeg@q20"}
    made.mkdir()
    (made / "results.json").write_text(json.dumps(second))
    (made / "images.jsonl").write_text(
        "".join(json.dumps({**line, "method": swap.get(line["method"], line["method"])}) + "\n" for line in lines)
    )
    found = {(one.method, one.title): one for one in compare(report, made).changes}
    one = found["jpeg@q5", "SSIM"]
    assert 0 < one.low <= one.after - one.before <= one.high
    assert found["mini@16", "SSIM"].low == found["mini@16", "SSIM"].high == 0
    assert found["jpeg@q5", "PSNR"].after > found["jpeg@q5", "PSNR"].before


def test_numbers_of_other_conditions_are_refused(report: Path, pictures: Path, tmp_path: Path) -> None:
    changed = json.loads((report / "results.json").read_text(encoding="utf-8"))
    for column in changed["suites"][0]["columns"]:
        column["stamp"]["crop"] = "none"
    (tmp_path / "results.json").write_text(json.dumps(changed))
    with pytest.raises(StampError, match="crop: center against none"):
        compare(report, tmp_path)
    changed["suites"][0]["columns"][0]["stamp"]["crop"] = "center"
    (tmp_path / "results.json").write_text(json.dumps(changed))
    found = compare(report, tmp_path)
    assert {one.title for one in found.changes} == {changed["suites"][0]["columns"][0]["title"]}
    assert any("PSNR: crop: center against none" in line for line in found.refused)
    changed["suites"][0]["name"] = "photos@1"
    (tmp_path / "results.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="no method in common"):
        compare(report, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "suites": []}'])
def test_what_is_no_report_is_refused(text: str, report: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="is no report"):
        compare(report, tmp_path)


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture
def browse(tmp_path: Path) -> Any:
    if BROWSER is None:
        pytest.skip("looks at the page in a browser: install chromium or google-chrome")

    def browse_(page: Path, *options: str) -> str:
        words = [BROWSER, "--headless=new", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
        words += ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        done = subprocess.run(
            [*words, f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return browse_


def test_it_looks_like_a_page(report: Path, browse: Any, tmp_path: Path) -> None:
    for name, size in (("desk", (1200, 2400)), ("phone", (500, 2400))):
        shot = tmp_path / f"{name}.png"
        browse(report / "index.html", f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}")
        pixels = np.asarray(Image.open(shot).convert("RGB"))
        assert pixels.shape[:2] == size[::-1]
        spread = pixels.reshape(24, 100, size[0], 3).std(axis=(1, 2, 3))
        assert (spread > 5).mean() > 0.8, "most of the page shows something"


def test_it_works_in_a_browser(report: Path, browse: Any, tmp_path: Path) -> None:
    probe = """<script>
document.querySelector('th[title^="dB, mean"] button').click();
document.querySelector("button.picture").click();
document.body.dataset.open = document.getElementById("zoom").open;
document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
</script></body>"""
    page = tmp_path / "page.html"
    page.write_text((report / "index.html").read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    dom = browse(page, "--dump-dom", "--window-size=500,1000")
    body = re.search(r"<body[^>]*>", dom)[0]
    assert 'data-open="true"' in body and 'data-wide="false"' in body  # the page itself never scrolls sideways
    pictures = re.findall(r'<img data-p="[^"]*"[^>]*>', dom)
    assert pictures and all('src="data:image/webp' in picture for picture in pictures)
    labels = re.findall(r'<tr><td data-v="([^"]+)">', dom)
    assert labels[0] == "identity" and labels[1] == "jpeg@q40" and labels[-1] == "mini@1"
