"""The benchmark's runner: every pair is judged once, whatever stops it, however the work is shared."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tokenizers_vis import presets
from tokenizers_vis.eval.benchmark import ORIGINALS, Shard, Task, folder_of, missing, run
from tokenizers_vis.eval.features import FeatureNet
from tokenizers_vis.eval.journal import read_rows
from tokenizers_vis.eval.judges import BoxJudge, PictureJudge
from tokenizers_vis.eval.method import Method, Reconstruction
from tokenizers_vis.eval.methods import parse_methods
from tokenizers_vis.eval.rows import write_rows
from tokenizers_vis.eval.suites import Boxed, Photos
from tokenizers_vis.eval.summary import summarise
from tokenizers_vis.eval.text import TextFidelity, TextSet, open_text
from tokenizers_vis.eval.text_recognisers import TextRecogniser
from tokenizers_vis.sources import open_source

METHODS = ["mini@1,16", "jpeg@q5,q40", "resize@8", "identity"]
TIMES = ("encode_ms", "decode_ms", "peak_mb")


class Colours(FeatureNet):
    """A net small enough for a test: the mean colours of a 2 x 2 grid."""

    name, sha256, resize, dim = "colours", "0" * 64, "area", 12

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255), requires_grad=False)

    def fit(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2)

    def embed(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1)


class Counted(Method):
    """Darkens pictures; knows what it was given, and stops the program at the ``stop``-th picture."""

    kind, label = "codec", "darker"

    def __init__(self, stop: int = -1) -> None:
        self.stop, self.seen, self.most = stop, [], 0

    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        self.most = max(self.most, len(images))
        found = []
        for image, name in zip(images, names, strict=True):
            if len(self.seen) == self.stop:
                raise KeyboardInterrupt
            self.seen.append(name)
            found.append(Reconstruction(image // 2, 7, 56.0, 0.001, 0.002))
        return found


@pytest.fixture(scope="module")
def folder(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine different pictures of one size, the crops of photographs."""
    into = tmp_path_factory.mktemp("pictures")
    for i in range(9):
        with Image.open(photos[i % len(photos)]) as photo:
            photo.crop((8 * i, 4 * i, 8 * i + 144, 4 * i + 128)).resize((72, 64)).save(into / f"{i}.png")
    return into


def task(folder: Path, size: int = 48, nets: bool = True) -> Task:
    return Task(Photos(open_source(str(folder)), size), PictureJudge([Colours()] if nets else []))


def tables(out: Path, one: Task, labels: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What a finished run says, without what it took, and its rows of pictures likewise."""
    name = one.suite.name
    described = [json.loads((folder_of(out, name, label) / "method.json").read_text()) for label in labels]
    (suite,) = summarise(described, [one], out, samples=3)["suites"]
    for row in suite["rows"]:
        for key in TIMES:
            row["cells"].pop(key, None)
    write_rows(out, [name], labels)
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    return suite, json.dumps([{key: value for key, value in row.items() if key not in TIMES} for row in rows])


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The tables and rows of a run that nothing stopped."""
    out, one = tmp_path_factory.mktemp("whole"), task(folder)
    assert run(parse_methods(METHODS), [one], out) == []
    return tables(out, one, [method.label for method in parse_methods(METHODS)])


def cells(suite: dict[str, Any], label: str) -> dict[str, Any]:
    row = next(row for row in suite["rows"] if row["label"] == label)
    return {key: cell["value"] for key, cell in row["cells"].items() if key != "licence"}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Up to float32 rounding in a net's sums."""
    return found.keys() == expected.keys() and all(
        value == (expected[key] if isinstance(value, str) else pytest.approx(expected[key], rel=1e-5, abs=1e-9))
        for key, value in found.items()
    )


def test_the_identity_has_every_metric_at_its_best(whole: tuple[dict[str, Any], str]) -> None:
    best = cells(whole[0], "identity")
    assert best["psnr"] == best["psnr_pooled"] == "inf"
    assert best["ssim"] == best["cosine_colours"] == best["sharpness"] == 1
    assert best["fd_colours"] == pytest.approx(0, abs=1e-9)


def test_a_row_of_the_table_is_the_mean_of_its_pictures(whole: tuple[dict[str, Any], str]) -> None:
    suite, text = whole
    rows = [row for row in json.loads(text) if row["method"] == "jpeg@q5"]
    errors = np.array([row["mse"] for row in rows])
    found = cells(suite, "jpeg@q5")
    assert len(rows) == suite["pictures"] == 9
    assert found["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)))
    assert found["psnr_pooled"] == pytest.approx(-10 * np.log10(errors.mean())) and found["psnr_pooled"] < found["psnr"]
    assert found["bytes"] == pytest.approx(np.mean([row["bytes"] for row in rows]))
    assert found["bpp"] == pytest.approx(8 * found["bytes"] / 48**2)


def test_more_bits_are_better_and_cost_more(whole: tuple[dict[str, Any], str]) -> None:
    for worse, better in (("mini@1", "mini@16"), ("jpeg@q5", "jpeg@q40")):
        low, high = cells(whole[0], worse), cells(whole[0], better)
        assert low["psnr"] < high["psnr"] and low["ssim"] < high["ssim"] and low["bytes"] < high["bytes"]
        assert low["fd_colours"] > high["fd_colours"]


def test_ids_give_the_use_of_the_codebook(whole: tuple[dict[str, Any], str]) -> None:
    row = next(row for row in whole[0]["rows"] if row["label"] == "mini@16")
    assert row["cells"]["used"]["n"] == 9 * 16
    assert 0 < row["cells"]["used"]["value"] <= 9 * 16 / 4096 and 0 < row["cells"]["entropy"]["value"] <= 12
    assert "used" not in next(row for row in whole[0]["rows"] if row["label"] == "jpeg@q5")["cells"]


def test_nothing_is_done_twice(folder: Path, tmp_path: Path) -> None:
    first, again = Counted(), Counted()
    for method in (first, again):
        run([method], [task(folder)], tmp_path, batch_size=4)
    assert sorted(first.seen) == sorted(f"{i}.png" for i in range(9)) and first.most == 4
    assert not again.seen


@pytest.mark.parametrize("stop", [0, 1, 4, 8])
def test_a_stopped_run_goes_on_and_finds_the_same(stop: int, folder: Path, tmp_path: Path) -> None:
    one = task(folder)
    run([Counted()], [one], tmp_path / "whole", batch_size=2)
    stopped, rest = Counted(stop), Counted()
    with pytest.raises(KeyboardInterrupt):
        run([stopped], [one], tmp_path / "parts", batch_size=2)
    kept = stop - stop % 2
    assert missing(["darker"], [one], tmp_path / "parts") == {"darker": 9 - kept}
    run([rest], [one], tmp_path / "parts", batch_size=2)
    assert len(rest.seen) == 9 - kept
    assert tables(tmp_path / "parts", one, ["darker"]) == tables(tmp_path / "whole", one, ["darker"])


@pytest.mark.parametrize("batch_size", [1, 9])
def test_the_batch_size_does_not_matter(
    batch_size: int, folder: Path, whole: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    one = task(folder)
    labels = ["jpeg@q5", "resize@8"]
    run(parse_methods(labels), [one], tmp_path, batch_size=batch_size)
    suite, _ = tables(tmp_path, one, labels)
    for label in labels:
        assert same(cells(suite, label), cells(whole[0], label))


def test_a_tokenizer_is_loaded_once_and_let_go(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    held: list[int] = []
    real = presets.load

    def load(*given: Any, **options: Any) -> Any:
        held.append(sum(one() is not None for one in loaded))
        tok = real(*given, **options)
        loaded.append(weakref.ref(tok))
        return tok

    monkeypatch.setattr(presets, "load", load)
    saved = tmp_path / "other.safetensors"
    real("mini", "cpu").save(saved)
    methods = parse_methods(["mini@1,4", f"{saved}@2"])
    run(methods, [task(folder, nets=False)], tmp_path / "out")
    gc.collect()
    assert held == [0, 0] and [one() for one in loaded] == [None, None]


def test_shards_find_what_one_process_finds(folder: Path, whole: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    one = task(folder)
    labels = [method.label for method in parse_methods(METHODS)]
    for index in (2, 0):
        run(parse_methods(METHODS), [one], tmp_path, shard=Shard(index, 3))
    assert missing(labels, [one], tmp_path) == dict.fromkeys(labels, 3)
    run(parse_methods(METHODS), [one], tmp_path)  # the rest by a process that has all pictures
    assert not missing(labels, [one], tmp_path)
    suite, text = tables(tmp_path, one, labels)
    assert [row["label"] for row in suite["rows"]] == labels and len(json.loads(text)) == 9 * len(labels)
    for label in labels:
        assert same(cells(suite, label), cells(whole[0], label)), label


# What must be refused, or said


def test_another_benchmark_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    run([Counted()], [task(folder)], tmp_path)
    with pytest.raises(ValueError, match=r"photos@48 is something there and nothing here"):
        run([Counted()], [task(folder, size=32)], tmp_path)
    with pytest.raises(ValueError, match=r"judge\.nets\.colours is something there and nothing here"):
        run([Counted()], [task(folder, nets=False)], tmp_path)


def test_a_method_or_picture_that_has_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    class Other(Counted):
        def describe(self) -> dict[str, Any]:
            return super().describe() | {"strength": 2}

    data = tmp_path / "data"
    shutil.copytree(folder, data)
    one = Task(Photos(open_source(str(data)), 48), PictureJudge())
    with pytest.raises(KeyboardInterrupt):
        run([Counted(4)], [one], tmp_path / "out", batch_size=2)
    with pytest.raises(ValueError, match=r"darker was another method .* strength is nothing there and 2 here"):
        run([Other()], [one], tmp_path / "out")
    Image.fromarray(255 - np.asarray(Image.open(data / "8.png"))).save(data / "8.png")
    with pytest.raises(ValueError, match=r"8\.png of photos@48 is no longer the picture"):
        changed = Task(Photos(one.suite.source, 48), PictureJudge())  # indexed before, as a running process has it
        _pad(data / "8.png", open_source(str(folder)).read(8))
        run([Counted()], [changed], tmp_path / "out")


def _pad(path: Path, as_long_as: bytes) -> None:
    """The index of a source knows sizes: a changed file of the same size is what only the pixels tell."""
    data = path.read_bytes()
    path.write_bytes(data[: len(as_long_as)].ljust(len(as_long_as), b"\0"))


def test_originals_that_cannot_be_read_are_left_out_by_name(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "3.png").write_bytes(b"no picture")
    broken = np.full((20, 20), np.nan, np.float32)
    Image.fromarray(broken).save(data / "nan.tif")
    out, one = tmp_path / "out", task(data)
    skipped = run(parse_methods(["jpeg@q5", "identity"]), [one], out)
    assert [(skip.picture, "NaN" in skip.reason) for skip in skipped] == [("3.png", False), ("nan.tif", True)]
    suite, _ = tables(out, one, ["jpeg@q5", "identity"])
    assert suite["pictures"] == 8 and set(suite["skipped"]) == {"3.png", "nan.tif"}
    assert all(row["cells"]["psnr"]["n"] == 8 for row in suite["rows"])
    assert suite["columns"][0]["stamp"]["n"] == 8


def test_no_picture_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the pictures of photos@48 can be read"):
        run([Counted()], [task(tmp_path)], tmp_path / "out")


def test_pictures_of_mixed_sizes_as_they_are(folder: Path, photos: list[Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    shutil.copy(photos[0], data / "large.jpg")
    Image.new("RGB", (7, 5), "red").save(data / "tiny.png")
    one = task(data, size=0)
    run(parse_methods(["jpeg@q5", "mini@16", "resize@4"]), [one], tmp_path / "out")
    suite, text = tables(tmp_path / "out", one, ["jpeg@q5", "mini@16", "resize@4"])
    rows = {row["image"]: row for row in json.loads(text) if row["method"] == "mini@16"}
    assert (rows["tiny.png"]["width"], rows["tiny.png"]["height"], rows["large.jpg"]["width"]) == (7, 5, 256)
    # MS-SSIM is of the large one alone and SSIM of all but one: such means would be of other pictures than PSNR.
    assert "ms_ssim" in rows["large.jpg"] and "ssim" not in rows["tiny.png"]
    assert {"ssim", "ms_ssim"}.isdisjoint(cells(suite, "mini@16")) and cells(suite, "mini@16")["psnr"] > 10
    assert suite["remarks"][:2] == [
        "no SSIM: it takes 11 pixels, and 1 of 11 pictures have fewer",
        "no MS-SSIM: it takes 176 pixels, and 10 of 11 pictures have fewer",
    ]
    assert suite["columns"][1]["stamp"]["size"] == "native"


def test_one_picture_has_no_set_distance(folder: Path, tmp_path: Path) -> None:
    one = Task(Photos(open_source(str(folder)), 48, limit=1), PictureJudge([Colours()]))
    run(parse_methods(["jpeg@q5"]), [one], tmp_path)
    suite, _ = tables(tmp_path, one, ["jpeg@q5"])
    (row,) = suite["rows"]
    assert "fd_colours" not in row["cells"] and row["cells"]["cosine_colours"]["n"] == 1
    assert "no set distances: 2 pictures are needed, and there are 1" in suite["remarks"]


def test_few_pictures_say_which_distances_they_lack(whole: tuple[dict[str, Any], str]) -> None:
    suite, _ = whole
    assert "no fd_infinity_colours: 50 pictures are needed, and there are 9" in suite["remarks"]
    assert not any("precision" in said for said in suite["remarks"]) and "fd_infinity_colours" not in {
        column["key"] for column in suite["columns"]
    }


def test_reconstructions_made_elsewhere(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    one = task(folder)
    for i in range(9):
        Image.fromarray(one.suite.load(i).pixels).save(made / f"{i}.png")
    spec = f"folder:{made}"
    run(parse_methods([spec]), [one], tmp_path / "out")
    assert cells(tables(tmp_path / "out", one, [spec])[0], spec)["psnr"] == "inf"
    Image.new("RGB", (40, 48)).save(made / "5.png")
    with pytest.raises(ValueError, match=r"5\.png is 40 x 48, its original 5\.png is 48 x 48"):
        run(parse_methods([spec]), [one], tmp_path / "second")
    (made / "5.png").rename(made / "five.png")
    with pytest.raises(ValueError, match=r"lacks reconstructions of 1 of 9 pictures: 5\.png"):
        run(parse_methods([spec]), [one], tmp_path / "third")


def test_a_method_that_gives_back_something_else(folder: Path, tmp_path: Path) -> None:
    class Cropped(Counted):
        def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
            return [one._replace(pixels=one.pixels[:-1]) for one in super().reconstruct(images, names)]

    with pytest.raises(ValueError, match=r"darker gave back uint8 \(47, 48, 3\) for 0\.png"):
        run([Cropped()], [task(folder)], tmp_path)
    with pytest.raises(ValueError, match="nothing to judge on"):
        run([Counted()], [], tmp_path)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_cannot_be(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a shard is I/N"):
        Shard(*shard)


# Words and faces


class Brightness(TextRecogniser):
    """Reads "bright" or "dark" off a crop: no weights, and an answer that a method can change."""

    name = "brightness"

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        return ["bright" if crop.mean() > 100 else "dark" for crop in crops]

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.name}


@pytest.fixture
def words(tmp_path: Path) -> TextSet:
    """Three pages, each with a bright word on the left and a dark one on the right, of two scales."""
    lines = []
    for i in range(3):
        page = np.full((60, 100, 3), 20, np.uint8)
        page[:, :50] = 150 + i
        Image.fromarray(page).save(tmp_path / f"{i}.png")
        found = [{"box": [2, 2, 32, 20], "text": "bright"}, {"box": [60, 5, 95, 50], "text": "dark"}]
        lines.append({"file": f"{i}.png", "width": 100, "height": 60, "words": found})
    (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_text(tmp_path)


@pytest.mark.parametrize("size", [0, 256])
def test_words_are_judged_in_their_boxes(size: int, words: TextSet, tmp_path: Path) -> None:
    one = Task(Boxed(words, size), BoxJudge(TextFidelity(Brightness())))
    methods = [Counted(), *parse_methods(["identity"])]
    out = tmp_path / "out"
    run(methods, [one], out, batch_size=2, examples=1)
    suite, _ = tables(out, one, ["darker", "identity"])
    lines = [json.loads(line) for line in (out / "instances.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 6 and {line["suite"] for line in lines} == {one.suite.name}
    read = {(line["method"], line["text"]): line["read"] for line in lines}
    assert read["darker", "bright"] == read["darker", "dark"] == "dark" and read["identity", "bright"] == "bright"
    assert cells(suite, "identity")["T-ACC[brightness]"] == 1 and cells(suite, "darker")["T-ACC[brightness]"] == 0.5
    assert suite["columns"][0]["key"] == "bytes" and suite["columns"][1]["key"] == "T-ACC[brightness]"
    assert suite["columns"][1]["stamp"]["extra"]["bins"] == ("text-256-v1" if size else "text-coarse-v1")
    scale = suite["scales"][0]["rows"]["darker"]["bins"]
    assert sum(one["count"] for one in scale) == 6 and any(one["mean"] is None for one in scale)
    examples = folder_of(out, one.suite.name, "darker") / "examples"
    assert len(list(examples.glob("*.png"))) == 4
    assert cells(suite, "identity")["psnr"] == "inf" or size


def test_boxes_over_the_edge_and_words_that_are_not_judged_are_counted(words: TextSet, tmp_path: Path) -> None:
    path = next(iter(words)).path.parent / "annotations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["words"][1]["box"] = [60, 5, 140, 50]
    lines[1]["words"][0]["text"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = Task(Boxed(open_text(path), 0), BoxJudge(TextFidelity(Brightness())))
    run(parse_methods(["identity"]), [one], tmp_path / "out")
    assert tables(tmp_path / "out", one, ["identity"])[0]["remarks"] == [
        "1 of 5 boxes reaches over the edge of its picture, where it is cut off",
        "1 annotated words are not judged: illegible, or of a single character",
    ]


# What is left on the disk


def test_only_the_pictures_that_are_shown_are_kept(folder: Path, tmp_path: Path) -> None:
    one = task(folder)
    run(parse_methods(["jpeg@q5"]), [one], tmp_path, examples=1, batch_size=2)
    rows = sorted(read_rows(folder_of(tmp_path, "photos@48", "jpeg@q5")), key=lambda row: row["mse"])
    kept = {int(path.stem) for path in (folder_of(tmp_path, "photos@48", "jpeg@q5") / "examples").glob("*.png")}
    assert kept == {rows[0]["i"], rows[-1]["i"], 0, 4}
    assert kept <= {int(path.stem) for path in (folder_of(tmp_path, "photos@48", ORIGINALS) / "examples").glob("*")}


def test_parquet_holds_what_the_lines_hold(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="rows are written as Parquet where pyarrow is installed")
    one = task(folder)
    run(parse_methods(["jpeg@q5", "identity"]), [one], tmp_path)
    write_rows(tmp_path, ["photos@48"], ["jpeg@q5", "identity"])
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "images.parquet").to_pylist() == lines
