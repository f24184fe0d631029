"""What a benchmark says of tokens: statistics, a pFID and probes, as they come out by hand; and how they are shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

import tokenizers_vis as tv
from tokenizers_vis.cli import main
from tokenizers_vis.eval import evaluate as evaluate_module
from tokenizers_vis.eval.benchmark import Shard, Task, folder_of, run
from tokenizers_vis.eval.distances import frechet_distance
from tokenizers_vis.eval.evaluate import evaluate
from tokenizers_vis.eval.features import FeatureNet
from tokenizers_vis.eval.judges import PictureJudge
from tokenizers_vis.eval.methods import parse_methods
from tokenizers_vis.eval.perturbation import Grid, perturbed_score
from tokenizers_vis.eval.perturbed import missing_perturbed, perturb, ticks
from tokenizers_vis.eval.probes import fixed_split, knn_probe, linear_probe, token_features
from tokenizers_vis.eval.statistics import token_statistics
from tokenizers_vis.eval.suites import Photos
from tokenizers_vis.eval.tables import latex, markdown
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer

GRID = Grid(rates=(0.5, 1.0), shares=(0.5, 1.0), strengths=(2, 8))
SIZE = 16


class Colours(FeatureNet):
    """The mean colours of a 2 x 2 grid."""

    name, sha256, resize, dim = "colours", "0" * 64, "area", 12

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255), requires_grad=False)

    def fit(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2)

    def embed(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1)


@pytest.fixture(scope="module")
def classes(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of photographs, eight each of three, a folder for each, and one picture alone in a fourth."""
    into = tmp_path_factory.mktemp("classes")
    for name, count, photo in (("a", 8, 0), ("b", 8, 1), ("c", 8, 2), ("single", 1, 3)):
        (into / name).mkdir()
        with Image.open(photos[photo]) as opened:
            for i in range(count):
                crop = opened.convert("RGB").crop((16 * i, 8 * i, 16 * i + 120, 8 * i + 120))
                crop.resize((SIZE, SIZE)).save(into / name / f"{i}.png")
    return into


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of random weights: 6 tokens of 32 codes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.safetensors"
    Tokenizer.from_config(tiny("flextok", "vq", "vit")).save(path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def colours() -> Iterator[None]:
    """``--net colours`` is the net above: no test needs weights."""
    patch = pytest.MonkeyPatch()
    patch.setattr("tokenizers_vis.eval.features.feature_net", lambda name, weights="": Colours())
    yield
    patch.undo()


def measured(out: Path, data: Path, methods: list[str], **options: Any) -> dict[str, Any]:
    given = {"data": str(data), "size": SIZE, "nets": {"colours": ""}, "tokens": True, "perturb": GRID, "samples": 0}
    return evaluate(methods, out, device="cpu", **{**given, **options}).results


@pytest.fixture(scope="module")
def report(classes: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    measured(out, classes, [f"{checkpoint}@2,6", "jpeg@q20"])
    return out


@pytest.fixture(scope="module")
def results(report: Path) -> dict[str, Any]:
    return json.loads((report / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pictures(classes: Path) -> Tensor:
    """b 3 h w, uint8, in the order of the benchmark."""
    source = open_source(str(classes))
    suite = Photos(source, SIZE)
    return torch.from_numpy(np.stack([rearrange(suite.load(i).pixels, "h w c -> c h w") for i in range(len(source))]))


def study(results: dict[str, Any], label: str) -> dict[str, Any]:
    return next(one for one in results["suites"][0]["tokens"] if one["label"] == label)


def cells(results: dict[str, Any], label: str) -> dict[str, Any]:
    return next(row["cells"] for row in results["suites"][0]["rows"] if row["label"] == label)


@pytest.mark.parametrize("n", [2, 6])
def test_the_statistics_are_those_of_the_tokens(
    n: int, results: dict[str, Any], checkpoint: str, pictures: Tensor
) -> None:
    tokens = tv.load(checkpoint, "cpu").encode(pictures, n)
    expected = token_statistics(tokens, too_few="flag")
    assert study(results, f"{checkpoint}@{n}")["statistics"] == json.loads(json.dumps(expected.to_dict()))
    (book,) = expected.codebooks
    found = cells(results, f"{checkpoint}@{n}")
    assert found["effective"]["value"] == pytest.approx(book.effective_bits)
    assert found["huffman"]["value"] == pytest.approx(book.huffman_saving) and found["dead"]["value"] == book.dead
    assert found["effective"]["mark"] == "*"  # 150 ids at most, of 32 codes


def test_the_pfid_is_that_of_perturbed_tokens(results: dict[str, Any], checkpoint: str, pictures: Tensor) -> None:
    tok, net = tv.load(checkpoint, "cpu"), Colours()
    before = net(pictures)

    def distance(tokens: tv.Tokens) -> float:
        return frechet_distance(before, net(tok.decode(tokens)))

    expected = perturbed_score(tok, tok.encode(pictures), distance, GRID)
    found = study(results, f"{checkpoint}@6")["perturbed"]
    assert [(one["rate"], one["share"], one["strength"]) for one in found["settings"]] == list(map(tuple, GRID))
    for one, (_, value) in zip(found["settings"], expected.values, strict=True):
        assert one["values"]["pfd_colours"] == pytest.approx(value, rel=1e-4)
    cell = cells(results, f"{checkpoint}@6")["pfd_colours"]
    assert cell["value"] == pytest.approx(expected.mean, rel=1e-4)
    assert found["neighbourhoods"] == list(expected.neighbourhoods) and "Euclidean" in cell["note"]
    column = next(column for column in results["suites"][0]["columns"] if column["key"] == "pfd_colours")
    said = {"rates": [0.5, 1.0], "shares": [0.5, 1.0], "strengths": [2, 8], "seed": 0}
    assert column["title"] == "pFD [colours]" and column["stamp"]["extra"]["perturbed"] == said
    assert "pfd_colours" not in cells(results, "jpeg@q20")


def test_probes_are_of_classes_by_folder(results: dict[str, Any], checkpoint: str, pictures: Tensor) -> None:
    tok = tv.load(checkpoint, "cpu")
    labels, known = [0] * 8 + [1] * 8 + [2] * 8, pictures[:24]  # the single picture has no second one of its class
    split = fixed_split(labels)
    features = token_features(tok, tok.encode(known))
    small = known.float() / 255
    for probe in (linear_probe, knn_probe):
        expected = probe(features, labels, small, split, *([18] if probe is knn_probe else []))
        found = next(p for p in study(results, f"{checkpoint}@6")["probes"] if p["probe"] == expected.probe)
        assert (found["accuracy"], found["chance"]) == pytest.approx((expected.accuracy, expected.chance))
        assert found["pixels"] == pytest.approx(expected.pixels, abs=0.17)  # a picture of six, at another resize
        cell = cells(results, f"{checkpoint}@6")[f"probe_{expected.probe}"]
        assert cell["value"] == pytest.approx(expected.accuracy) and "3 classes" in cell["note"]


def test_without_classes_there_is_a_reason(classes: Path, checkpoint: str, tmp_path: Path) -> None:
    found = measured(tmp_path, classes / "a", [checkpoint], nets={})
    assert "two classes or more" in study(found, checkpoint)["no_probes"]
    assert "perturbed" not in study(found, checkpoint) and "probe_knn" not in cells(found, checkpoint)


def test_what_is_done_is_not_done_again(report: Path, classes: Path, checkpoint: str) -> None:
    kept = [
        *report.glob("parts/**/*.jsonl"),
        *report.glob("parts/**/tokens-*"),
        *report.glob("parts/**/perturbed-*.json"),
    ]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}
    assert len(before) == 4 + 2 * 4 + 2 + 2  # rows, perturbed rows, studies, scores
    measured(report, classes, [f"{checkpoint}@2,6", "jpeg@q20"])
    assert {path: path.read_bytes() for path in kept} == {path: data for path, (_, data) in before.items()}
    studies = [path for path in kept if path.suffix == ".json"]
    assert all(path.stat().st_mtime_ns == before[path][0] for path in studies)


def test_processes_share_the_perturbed_pictures(
    classes: Path, checkpoint: str, results: dict[str, Any], tmp_path: Path
) -> None:
    task = Task(Photos(open_source(str(classes)), SIZE), PictureJudge([Colours()]))
    (method,) = parse_methods([checkpoint], device="cpu")
    done: list[int] = []
    for index in (0, 1):
        shard = Shard(index, 2)

        def more(method: Any, task: Task, shard: Shard = shard) -> None:
            perturb(method, task, tmp_path, shard, GRID, batch_size=3, tick=lambda what, n: done.append(n))

        run([method], [task], tmp_path, shard=shard, more=more)
        assert missing_perturbed([method.label], task, tmp_path, GRID) == {}  # of what is there, all was decoded again
    assert sum(done) == ticks(1, task, Shard(), GRID) == 4 * 25
    found = measured(tmp_path, classes, [checkpoint])
    whole = cells(results, f"{checkpoint}@6")["pfd_colours"]["value"]
    assert cells(found, checkpoint)["pfd_colours"]["value"] == pytest.approx(whole, rel=1e-5)


def test_a_codebook_with_too_few_codes_says_so(classes: Path, checkpoint: str, tmp_path: Path) -> None:
    found = measured(tmp_path, classes, [checkpoint], perturb=Grid((1.0,), (1.0,), (33,)))
    cell = cells(found, checkpoint)["pfd_colours"]
    assert cell["value"] is None and cell["note"] == "a codebook of 32 codes has no 33 nearest ones"
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "no 33 nearest ones" in page and "pFD [colours]" in markdown(found | {"suites": with_published(found)})


def with_published(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**suite, "published": []} for suite in results["suites"]]


def test_the_page_and_the_tables_show_all_of_it(report: Path, results: dict[str, Any], checkpoint: str) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    for said in (
        "<h3>Tokens</h3>",
        "effective bits",
        "linear probe",
        "Zipf exponent",
        "gzip bits per id",
        "codes by rank",
    ):
        assert said in page, said
    assert page.count("<h3>Errors in ids</h3>") == page.count("<h3>Probes</h3>") == 2
    assert page.count("<b>rate 0.5</b><br>strength 8") == 2 * 2  # two tokenizers, two pictures
    assert "* from too few ids" in page and "N = 150 ids are too few for K = 32 codes" in page
    head, *tables = re.split(r"\nTokens:\n", markdown(results))
    assert len(tables) == 1 and "effective bits" not in head and tables[0].count(f"`{checkpoint}@") == 2
    assert "H2\\|1" in tables[0] and "jpeg" not in tables[0].split("- ")[0]
    tex = latex(results)
    assert tex.count(r"\begin{tabular}") == 2 and tex.count("{") == tex.count("}")


# The command, and how processes end


@pytest.mark.parametrize("grid", ["1/1", "2/1/10", "1/1/0", "1/1/ten"])
def test_a_grid_that_cannot_be(grid: str, classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["eval", "identity", "--data", str(classes), "--tokens", "--perturb", grid])
    assert "--perturb is rates/shares/strengths" in capsys.readouterr().err


def test_the_command_writes_of_tokens(
    classes: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", f"{checkpoint}@6", "--data", str(classes), "--size", str(SIZE), "--net", "colours", "--tokens"]
    words += ["--perturb", "1/1/2", "--bootstrap", "0", "--out", str(tmp_path / "r"), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code and "pFD [colours]" in capsys.readouterr().out
    found = json.loads((tmp_path / "r" / "results.json").read_text())
    assert len(study(found, f"{checkpoint}@6")["perturbed"]["settings"]) == 1


def test_the_first_process_waits_and_writes(
    classes: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 ends first; while it waits, rank 1 does its part."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited: list[float] = []

    def other(seconds: float) -> None:
        waited.append(seconds)
        monkeypatch.setenv("RANK", "1")
        assert measured(tmp_path, classes, [checkpoint]) is None

    monkeypatch.setattr(evaluate_module.time, "sleep", other)
    monkeypatch.setenv("RANK", "0")
    found = measured(tmp_path, classes, [checkpoint])
    assert len(waited) == 1 and found["suites"][0]["pictures"] == 25 and study(found, checkpoint)["perturbed"]["means"]
    assert len(list(folder_of(tmp_path, f"photos@{SIZE}", checkpoint).glob("*.jsonl"))) == 2
