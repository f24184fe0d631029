"""Data sets of Hugging Face's datasets as a source of images, and the labels and parts of every source."""

from __future__ import annotations

import io
import itertools
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tokenizers_vis.sources import open_source
from tokenizers_vis.train.data import TrainBatches


def picture(value: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 18), (value * 20, 255 - value * 20, 90)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def saved(datasets: Any, tmp_path: Path) -> Path:
    """Nine pictures of two classes, saved to disk."""
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "picture": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {
        "text": [str(i) for i in range(9)],
        "picture": [{"bytes": picture(i), "path": None} for i in range(9)],
        "label": [-1, *(i % 2 for i in range(1, 9))],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_rows_are_read_as_the_bytes_they_are(saved: Path) -> None:
    source = open_source(str(saved))
    assert len(source) == 9 and source.classes == ("cat", "dog")
    assert [source.read(i) for i in range(9)] == [picture(i) for i in range(9)]
    assert source.names[3] == "train/00000003" and list(source.names)[-1] == source.names[8] and len(source.names) == 9
    assert source.names[2:4] == ["train/00000002", "train/00000003"]
    with pytest.raises(IndexError):
        source.names[9]
    assert source.labels(0, 4) == [None, 1, 0, 1]
    assert source.fingerprint == open_source(f"hf:{saved}").fingerprint and len(source.fingerprint) == 16
    parts = source.parts(4)
    assert [part[:3] for part in parts] == [("train-00000", 0, 4), ("train-00001", 4, 8), ("train-00002", 8, 9)]
    assert len({part.fingerprint for part in parts}) == 3
    again = pickle.loads(pickle.dumps(source))
    assert again.read(5) == picture(5) and again.fingerprint == source.fingerprint
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, range(9))) == [picture(i) for i in range(9)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_run_trains_on_it(saved: Path, workers: int) -> None:
    options = {"image_size": 8, "batch_size": 3, "seed": 0, "workers": workers}
    with TrainBatches(open_source(f"hf:{saved}"), **options) as batches:
        images = torch.cat([batch[0] for batch in itertools.islice(batches, 3)])
    # An epoch shows each row once.
    assert sorted(round(value / 20) for value in images[:, 0].float().mean(dim=(1, 2)).tolist()) == list(range(9))


def test_splits_and_files_beside_the_rows(datasets: Any, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(picture(7, "PNG"))
    beside = datasets.Dataset.from_dict({"image": [str(tmp_path / "one.png"), None]}).cast_column(
        "image", datasets.Image()
    )
    whole = datasets.DatasetDict(train=datasets.load_from_disk(str(saved)), val=beside)
    whole.save_to_disk(tmp_path / "splits")
    assert len(open_source(str(tmp_path / "splits"))) == 9
    source = open_source(f"hf:{tmp_path / 'splits'}:val")
    assert source.read(0) == picture(7, "PNG") and source.classes == () and source.labels(0, 2) == [None, None]
    with pytest.raises(OSError, match="val/00000001: the row holds no image"):
        source.read(1)
    with pytest.raises(ValueError, match="its splits are train, val, not 'test'"):
        open_source(f"hf:{tmp_path / 'splits'}:test")
    with pytest.raises(ValueError, match="the folder is a single split; leave out :val"):
        open_source(f"hf:{saved}:val")


def test_what_is_missing_is_said(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"a": [1], "b": ["x"]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(
        ValueError, match=r"1 rows of a \(Value\), b \(Value\): a column of type datasets.Image is needed"
    ):
        open_source(f"hf:{tmp_path / 'numbers'}")
    with pytest.raises(ValueError, match="hf:nobody/nothing:val cannot be opened"):
        open_source("hf:nobody/nothing:val")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs datasets: pip install 'tokenizers-vis\[data\]'"):
        open_source("hf:nobody/nothing")


def test_labels_and_parts_of_shards(tmp_path: Path) -> None:
    image = picture(1)
    first = {"a.jpg": image, "a.cls": b"3\n", "b.x.jpg": image, "b.json": b'{"label": "dog", "w": 1}', "c/a.jpg": image}
    second = {"0.png": image, "0.json": b'{"cls": 0}', "1.jpg": image, "1.json": b'{"name": "x"}', "2.jpg": image}
    write_tar(tmp_path / "s-0.tar", first)
    write_tar(tmp_path / "s-1.tar", second)
    source = open_source(str(tmp_path))
    assert source.labels(0, len(source)) == [3, "dog", None, 0, None, None] and source.classes == ()
    assert source.labels(1, 4) == ["dog", None, 0]
    parts = source.parts(1)
    assert [part[:3] for part in parts] == [("s-0", 0, 3), ("s-1", 3, 6)]
    alone = open_source(str(tmp_path / "s-1.tar"))
    assert alone.parts(100)[0].fingerprint == parts[1].fingerprint == alone.fingerprint
    broken = write_tar(tmp_path / "s-2.tar", {"0.jpg": image, "0.json": b"[1]", "1.jpg": image, "1.json": b"{"})
    with pytest.raises(ValueError, match=r"1.json in .*s-2.tar is no label"):
        open_source(broken).labels(0, 1)


def test_folders_and_shards_together(tmp_path: Path) -> None:
    for name in ("loose/b/0.jpg", "loose/b/deep/1.jpg", "loose/a/2.jpg", "loose/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(2))
    write_tar(tmp_path / "m.tar", {"x.jpg": picture(1), "x.cls": b"1"})
    source = open_source(f"{tmp_path / 'loose'},{tmp_path / 'm.tar'}")
    assert source.names == ["loose/3.jpg", "loose/a/2.jpg", "loose/b/0.jpg", "loose/b/deep/1.jpg", "m.tar/x.jpg"]
    assert source.classes == ("a", "b") and source.labels(0, 5) == [None, "a", "b", "b", 1]
    assert [part[:3] for part in source.parts(3)] == [("images-00000", 0, 3), ("images-00001", 3, 4), ("m", 4, 5)]
