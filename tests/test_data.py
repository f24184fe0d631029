"""Training data: a batch depends on (seed, number) alone, broken images are replaced, sources say what they lack."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.sources import ImageSource, open_source
from tokenizers_vis.train.data import (
    DataConfig,
    TrainBatches,
    _Batches,
    _decode,
    random_box,
    random_square,
    val_batches,
)

COUNT = 21
# Forking is the loader's own choice; newer Pythons and machines of one core each have a word to say about it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def jpeg(value: int, width: int = 32, height: int = 24) -> bytes:
    """A horizontal ramp, so that crops and flips show, whose blue says which image it is."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = value * 12
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def contents(count: int = COUNT, first: int = 0) -> dict[str, bytes]:
    return {f"{i:03d}.jpg": jpeg(i) for i in range(first, first + count)}


def write_folder(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            for member, body in ((name, data), (Path(name).with_suffix(".json").as_posix(), b"{}")):
                info = tarfile.TarInfo(member)
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    return str(path)


def stream(source: ImageSource, **options: object) -> TrainBatches:
    return TrainBatches(source, **{"image_size": 16, "batch_size": 4, "seed": 7, "workers": 0, **options})


def take(source: ImageSource, count: int, **options: object) -> list[torch.Tensor]:
    with stream(source, **options) as batches:
        return [batch.data for batch in itertools.islice(batches, count)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    return open_source(write_tar(tmp_path / "train-0.tar", contents()))


def test_batches_have_the_promised_form(source: ImageSource) -> None:
    images, skipped = next(stream(source))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8 and images.is_contiguous()
    assert skipped == []


def test_workers_change_nothing(source: ImageSource) -> None:
    assert same(take(source, 8), take(source, 8, workers=2))


def test_resumed_stream_equals_unbroken(source: ImageSource) -> None:
    whole = take(source, 12)
    assert same(take(source, 7, start=5), whole[5:])
    assert same(take(source, 3, start=5, workers=1), whole[5:8])
    with stream(source, workers=1) as batches:
        first = [next(batches).data for _ in range(2)]
        batches.close()  # and a stream that was closed goes on where it was
        assert batches.position == 2
        assert same([*first, next(batches).data], whole[:3])


def test_seed_and_number_make_the_batch(source: ImageSource) -> None:
    whole = take(source, 6)
    assert not torch.equal(whole[0], take(source, 1, seed=8)[0])
    assert len({batch.numpy().tobytes() for batch in whole}) == 6


def test_every_view_of_an_image_is_new(tmp_path: Path) -> None:
    views = torch.cat(take(open_source(write_folder(tmp_path / "one", contents(1))), 6))
    assert len({view.numpy().tobytes() for view in views}) > 20  # two draws may fall on the same box


def test_every_image_once_per_epoch_in_a_new_order(source: ImageSource) -> None:
    # Batches of 4 straddle the epochs of 21.
    images = torch.cat(take(source, 2 * COUNT // 4 + 1, crop=(1.0, 1.0)))
    seen = [round(image[2].float().mean().item() / 12) for image in images]
    epochs = [seen[:COUNT], seen[COUNT : 2 * COUNT]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(COUNT))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_stream_leaves_the_global_generators_alone(source: ImageSource) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(source, 2)
    take(source, 1, workers=1)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_flip_is_a_chance(source: ImageSource) -> None:
    def mirrored(flip: float) -> int:
        images = torch.cat(take(source, 10, flip=flip)).float()
        return int((images[:, 0, :, 0].mean(1) > images[:, 0, :, -1].mean(1)).sum())

    assert mirrored(0.0) == 0 and mirrored(1.0) == 40 and 8 < mirrored(0.5) < 32


def test_folder_and_tar_give_the_same_pixels(tmp_path: Path, source: ImageSource) -> None:
    folder = open_source(write_folder(tmp_path / "folder", contents()))
    assert same(take(folder, 6), take(source, 6))
    assert folder.names[3] == "003.jpg" and source.names[3] == "train-0.tar/003.jpg"
    assert len(folder) == COUNT and folder.read(3) == source.read(3) == jpeg(3)
    nested = open_source(write_folder(tmp_path / "nested", {"b/0.jpg": jpeg(0), "a/deep/1.jpg": jpeg(1)}))
    assert nested.names == ["a/deep/1.jpg", "b/0.jpg"]


def test_corrupt_image_is_replaced_named_and_harms_no_other(tmp_path: Path, source: ImageSource) -> None:
    files = contents()
    files["004.jpg"] = files["004.jpg"][:300]
    files["009.jpg"] = b"no image"
    broken = open_source(write_tar(tmp_path / "broken" / "train-0.tar", files))
    clean = list(itertools.islice(stream(source), 6))
    runs = [list(itertools.islice(stream(broken), 6)) for _ in range(2)]
    with stream(broken, workers=2) as batches:
        runs.append(list(itertools.islice(batches, 6)))
    assert all(same([b.data for b in run], [b.data for b in runs[0]]) for run in runs)
    assert all([b.skipped for b in run] == [b.skipped for b in runs[0]] for run in runs)
    assert {name for b in runs[0] for name in b.skipped} == {"train-0.tar/004.jpg", "train-0.tar/009.jpg"}
    changed = [(a.data != b.data).flatten(1).any(1).sum().item() for a, b in zip(clean, runs[0], strict=True)]
    # A replacement may be broken in its turn; each sample that changed has at least one name.
    assert all(c <= len(b.skipped) and bool(c) == bool(b.skipped) for c, b in zip(changed, runs[0], strict=True))
    assert sum(changed) in (2, 3, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_corrupt_is_an_error_that_reads_well(tmp_path: Path, workers: int) -> None:
    source = open_source(write_folder(tmp_path / "bad", {f"{i}.png": b"nothing" for i in range(5)}))
    with (
        stream(source, workers=workers) as batches,
        pytest.raises(ValueError, match=r"^10 images in a row cannot be read, the last \d.png"),
    ):
        next(batches)


def test_vanished_file_counts_as_corrupt(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path / "folder", contents(6)))
    (tmp_path / "folder" / "002.jpg").unlink()
    (tmp_path / "folder" / "003.jpg").write_bytes(b"short")
    with pytest.raises(OSError, match="003.jpg: .* 5 there"):
        source.read(3)
    assert {name for b in itertools.islice(stream(source), 3) for name in b.skipped} == {"002.jpg", "003.jpg"}


def test_close_ends_the_workers_and_ctrl_c_does_not(source: ImageSource) -> None:
    # A forked worker is safe from birth; one from a fork server once it has given its first batch.
    first = 1 if multiprocessing.get_start_method() == "fork" else 2
    with stream(source, workers=2) as batches:
        got = [next(batches).data for _ in range(first)]
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
        got += [next(batches).data for _ in range(12)]
        held = batches._running  # as the traceback of an interrupted run would hold it
    assert multiprocessing.active_children() == [] and held is not None
    assert same(got, take(source, len(got)))


def test_patterns_and_unions_are_one_source(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"train-{i}.tar", contents(3, first=3 * i))
    spellings = ["", "/train-{0..2}.tar", "/train-{0,1,2}.tar", "/train-*.tar", "/train-{2..0}.tar"]
    sources = [open_source(str(tmp_path) + s) for s in spellings]
    sources.append(open_source(f"{tmp_path}/train-2.tar, {tmp_path}/train-{{0,1}}.tar,{tmp_path}/train-0.tar"))
    assert {len(s) for s in sources} == {9} and len({s.fingerprint for s in sources}) == 1
    assert all(s.names == sources[0].names for s in sources)
    assert [sources[0].read(i) for i in range(9)] == list(contents(9).values())
    assert len(open_source(f"{tmp_path}/train-{{0..1}}.tar")) == 6


def test_padded_braces_and_names_that_look_like_patterns(tmp_path: Path) -> None:
    for name in ("s-08.tar", "s-09.tar", "s-10.tar"):
        write_tar(tmp_path / "shards" / name, contents(1))
    assert len(open_source(f"{tmp_path}/shards/s-{{08..10}}.tar")) == 3
    assert len(open_source(write_folder(tmp_path / "a,b[0]{1,2}", contents(2)))) == 2


def test_union_of_folders_keeps_names_apart(tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a", contents(2)), write_folder(tmp_path / "b", contents(2, first=9))
    union = open_source(f"{b},{a}")
    assert union.names == ["a/000.jpg", "a/001.jpg", "b/009.jpg", "b/010.jpg"]
    assert union.fingerprint == open_source(f"{a},{b}").fingerprint
    assert len(open_source(f"{a},{tmp_path}")) == 4


def test_fingerprint_is_of_the_data_not_of_the_place(tmp_path: Path) -> None:
    files = contents(4)
    first = open_source(write_folder(tmp_path / "x", files)).fingerprint
    assert open_source(write_folder(tmp_path / "y", files)).fingerprint == first and len(first) == 16
    others = [
        {**files, "001.jpg": files["001.jpg"] + b"\0"},
        {**files, "004.jpg": jpeg(4)},
        {name.replace("003", "333"): data for name, data in files.items()},
    ]
    prints = {open_source(write_folder(tmp_path / str(i), other)).fingerprint for i, other in enumerate(others)}
    assert len(prints | {first}) == 4


def test_missing_and_empty_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "ok" / "train-0.tar", contents(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "zero.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "labels.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.json"))
        archive.addfile(tarfile.TarInfo("._0.jpg"))
    both = tmp_path / "both"
    write_folder(both, contents(1))
    write_tar(both / "x.tar", contents(1))
    for path, message in {
        "nowhere": "nothing at .*nowhere",
        "ok/train-{0..1}.tar": "nothing at .*train-1.tar",
        "ok/val-*.tar": r"nothing at .*val-\*.tar",
        "ok,nowhere": "nothing at",
        "empty": "empty holds no images",
        "notes.txt": "notes.txt is neither a folder nor a .tar",
        "zero.tar": "cannot read .*zero.tar",
        "labels.tar": "no images in .*labels.tar",
        "both": "both 1 .tar and 1 images",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(",".join(str(tmp_path / part) for part in path.split(",")))
    with pytest.raises(ValueError, match="nothing at ''"):
        open_source("")


def test_truncated_tar_gives_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    whole = Path(write_tar(path, contents(6))).read_bytes()
    with tarfile.open(path) as archive:
        third, fourth = archive.getmember("002.jpg"), archive.getmember("003.jpg")
    # Inside an image's bytes, inside a header, and at the border between two members.
    cuts = {third.offset_data + 100: 2, third.offset + 100: 2, fourth.offset: 3}
    for cut, left in cuts.items():
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match=f"cut.tar.*first {left} images"):
            source = open_source(str(path))
        assert [source.read(i) for i in range(len(source))] == list(contents(left).values())
    path.write_bytes(whole[: third.offset] + b"\xff" * 512 + whole[third.offset + 512 :])
    with pytest.warns(UserWarning, match="first 2 images"):
        open_source(str(path))
    for useless in (whole[:700], b"\xff" * 4096):
        path.write_bytes(useless)
        with pytest.raises(ValueError, match="cannot read .*cut.tar as a tar"):
            open_source(str(path))


def test_source_and_stream_pickle(source: ImageSource) -> None:
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(5) == source.read(5) and copy.fingerprint == source.fingerprint
    # What a spawned worker gets.
    batches = _Batches(source, 16, 4, 7, (0.6, 1.0), 0.5, range(4))
    assert torch.equal(pickle.loads(pickle.dumps(batches))[3].data, batches[3].data)


def test_shard_is_read_from_many_threads(source: ImageSource) -> None:
    from concurrent.futures import ThreadPoolExecutor

    order = list(range(COUNT)) * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [source.read(i) for i in order]


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (1, 1), (200, 9), (3, 100)])
def test_boxes_lie_inside_and_keep_area_and_aspect(width: int, height: int) -> None:
    random = np.random.default_rng(0)
    boxes = [random_box(random, width, height, (0.6, 1.0)) for _ in range(300)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if min(width, height) >= 30:
            w, h = right - left, bottom - top
            assert 0.55 < w * h / (width * height) <= 1 and 0.7 < w / h < 1.42
    if min(width, height) >= 30:
        assert min(Counter(box[0] > 0 for box in boxes).values()) > 30
    if max(width, height) >= 100:  # no draw fits: the largest centred box of an allowed aspect
        assert set(boxes) == {{200: (94, 0, 106, 9), 3: (0, 48, 3, 52)}[width]}


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (1, 1), (200, 9)])
def test_squares_lie_inside_and_keep_their_side(width: int, height: int) -> None:
    random, short = np.random.default_rng(0), min(width, height)
    whole = [random_square(random, width, height, (1.0, 1.0)) for _ in range(300)]
    assert {(right - left, bottom - top) for left, top, right, bottom in whole} == {(short, short)}
    boxes = [random_square(random, width, height, (0.8, 1.0)) for _ in range(300)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert right - left == bottom - top >= round(0.8 * short)
    if short == 300:  # the size to scale to is uniform from 1 to 1.25 times the crop's
        sizes = np.array([short / (right - left) for left, _, right, _ in boxes])
        assert abs(sizes.mean() - 1.125) < 0.015 and sizes.max() > 1.24 and sizes.min() < 1.01
        assert len({box[0] for box in whole}) > 50 or width == 300


def test_square_crops_are_not_stretched(tmp_path: Path) -> None:
    """The picture is a ramp in both directions: of a square crop as long as the short side, one is whole."""
    source = open_source(write_folder(tmp_path / "wide", contents()))
    batch = next(iter(TrainBatches(source, image_size=24, batch_size=8, seed=0, crop=(1, 1), square=True, workers=0)))
    green = batch.data[:, 1].float()
    assert (green[:, -1].mean(dim=-1) > 245).all() and (green[:, 0].mean(dim=-1) < 10).all()
    red = batch.data[:, 0].float().mean(dim=1)
    spans = (red[:, -1] - red[:, 0]).abs()  # 23 of the ramp's 31 steps
    assert ((spans - 255 * 23 / 31).abs() < 12).all()


def test_large_jpeg_is_decoded_small_but_looks_the_same() -> None:
    data = jpeg(9, 480, 360)
    small, full = _decode(data, 16, 0.6), _decode(data)
    assert full.size == (480, 360) and small.size == (60, 45)
    assert _decode(data, 64, 0.6).size == (240, 180) and _decode(data, 80, 0.6).size == (480, 360)
    views = [np.asarray(p.resize((16, 16), Image.Resampling.BICUBIC)).astype(int) for p in (small, full)]
    assert abs(views[0] - views[1]).max() <= 4


def test_validation_is_evenly_spaced_and_centred(tmp_path: Path, source: ImageSource) -> None:
    batches = list(val_batches(source, 16, 7, 3))
    assert [len(b) for b in batches] == [3, 3, 1] and batches[0].dtype == torch.uint8
    seen = [round(image[2].float().mean().item() / 12) for image in torch.cat(batches)]
    assert seen == [0, 3, 6, 9, 12, 15, 18]
    assert same(batches, list(val_batches(source, 16, 7, 3)))
    assert sum(map(len, val_batches(source, 16, 1000, 8))) == COUNT
    # Of 32 x 24 the middle 24 columns remain: the ramp loses an eighth at both ends, and no row.
    red, green = batches[0][0, 0].float().mean(0), batches[0][0, 1].float().mean(1)
    assert 25 < red[0] < 50 and 205 < red[-1] < 230 and green[0] < 20 and green[-1] > 235


def test_validation_leaves_out_the_broken(tmp_path: Path) -> None:
    files = {**contents(5), "004.jpg": b"nothing"}
    source = open_source(write_folder(tmp_path / "v", files))
    with pytest.warns(UserWarning, match="004.jpg"):
        assert [len(b) for b in val_batches(source, 16, 5, 3)] == [3, 1]
    bad = open_source(write_folder(tmp_path / "bad", {"0.jpg": b"nothing"}))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of 1 validation images"):
        list(val_batches(bad, 16, 5, 3))


def test_options_out_of_range_are_named(source: ImageSource) -> None:
    for bad in (
        {"crop": (0.0, 1.0)},
        {"crop": (0.9, 0.5)},
        {"flip": 1.5},
        {"workers": -1},
        {"batch_size": 0},
        {"image_size": 0},
        {"seed": -1},
        {"start": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            stream(source, **bad)
    with pytest.raises(ValueError, match="count"):
        val_batches(source, 16, 0, 1)
    with pytest.raises(ConfigError, match="flip"):
        build(DataConfig, {"flip": 2.0}, "data")
    assert build(DataConfig, {"crop": [0.5, 1]}).crop == (0.5, 1.0)
