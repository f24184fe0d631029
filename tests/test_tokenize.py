"""Shards of ids: equal to ``encode``, whole after a kill, refused where they do not belong, batches in fixed order."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torchvision.transforms import TenCrop

from tokenizers_vis import token_shards
from tokenizers_vis.cli import main
from tokenizers_vis.decoders.canvas import fit
from tokenizers_vis.files import write_atomically
from tokenizers_vis.images import load_image
from tokenizers_vis.sources import Part, open_source
from tokenizers_vis.token_shards import Origin, ShardError, TokenShards, begin, codes_hash, write_shard
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.token_data import TokenBatches
from tokenizers_vis.train.tokenize import Crops, read_classes, tokenize


def jpeg(number: int) -> bytes:
    random = np.random.default_rng(number)
    side = (int(random.integers(20, 40)), int(random.integers(20, 40)))
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(side).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two tars of seven images each, with labels."""
    for j in range(2):
        files = {
            f"{j}{i}.{end}": data for i in range(7) for end, data in (("jpg", jpeg(10 * j + i)), ("cls", b"%d" % i))
        }
        write_tar(tmp_path / f"train-{j}.tar", files)
    return str(tmp_path / "train-{0..1}.tar")


@pytest.fixture
def tok(tiny: Callable[..., dict[str, Any]]) -> Tokenizer:
    return Tokenizer.from_config(tiny()).eval()


def encoded_alone(tok: Tokenizer, data: str, n_tokens: int | None = None) -> torch.Tensor:
    source = open_source(data)
    images = [Image.open(io.BytesIO(source.read(i))) for i in range(len(source))]
    return torch.cat([tok.encode(image, n_tokens).ids for image in images])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("quantizer", ["fsq", "library"])
def test_ids_are_those_of_encode_to_the_bit(
    quantizer: str, tiny: Callable[..., dict[str, Any]], shards: str, tmp_path: Path
) -> None:
    tok = Tokenizer.from_config(tiny(quantizer=quantizer)).eval()
    done = tokenize(shards, tmp_path / "ids", tok, batch_size=3)
    assert done == (2, 0, 14, {})
    found = TokenShards(tmp_path / "ids")
    assert len(found) == 14 and found.crops == 1 and found.n_tokens == 6 and found.nested == tok.nested
    assert found.codebook_sizes == tok.codebook_sizes and found.tokenizer == tok.name and found.classes == ()
    assert torch.equal(found.gather(range(14), [0] * 14), encoded_alone(tok, shards))
    assert torch.equal(found.ids(9), encoded_alone(tok, shards)[9]) and found.ids(9).dtype == torch.int64
    assert found.labels.tolist() == [*range(7), *range(7)]
    assert [found.key(i) for i in range(14)] == open_source(shards).names
    found.verify()
    found.check(tok)
    assert torch.equal(pickle.loads(pickle.dumps(found)).ids(3), found.ids(3))
    stored = load_file(tmp_path / "ids" / "train-0.safetensors")
    assert stored["ids"].shape == (7, 1, 6, len(tok.codebook_sizes))
    assert stored["ids"].dtype == (np.uint8 if max(tok.codebook_sizes) <= 256 else np.uint16)
    assert json.loads(stored["keys"].tobytes()) == [found.key(i) for i in range(7)]


def test_a_prefix_of_a_nested_tokenizer(tok: Tokenizer, shards: str, tmp_path: Path) -> None:
    tokenize(shards, tmp_path / "ids", tok, n_tokens=2)
    found = TokenShards(tmp_path / "ids")
    assert torch.equal(found.gather(range(14), [0] * 14), encoded_alone(tok, shards, 2))
    with pytest.raises(ValueError, match="n_tokens is a whole number from 1 to 6"):
        tokenize(shards, tmp_path / "other", tok, n_tokens=7)
    assert not (tmp_path / "other").exists()


def tokenize_and_die(when: str, data: str, out: Path, tok: Tokenizer) -> None:
    """Kills its process in the middle."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def tick(name: str, done: int, _total: int) -> None:
        if when == "in the second shard" and name == "train-1" and done > 9:
            die()

    def write_or_die(path: Path, data: bytes) -> None:
        if when == "before the second manifest" and path.name == "train-1.json":
            die()
        write_atomically(path, data)

    torch.set_num_threads(1)  # threads of before the fork are not there any more
    token_shards.write_atomically = write_or_die
    tokenize(data, out, tok, batch_size=2, tick=tick)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("when", ["in the second shard", "before the second manifest"])
def test_after_sigkill_the_same_command_ends_as_an_unbroken_run(
    when: str, tok: Tokenizer, shards: str, tmp_path: Path
) -> None:
    tokenize(shards, tmp_path / "whole", tok)
    out = tmp_path / "killed"
    child = multiprocessing.get_context("fork").Process(target=tokenize_and_die, args=(when, shards, out, tok))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    half = {"train-1.safetensors"} if when == "before the second manifest" else set()
    assert set(files_of(out)) == {"tokens.json", "train-0.safetensors", "train-0.json"} | half
    with pytest.raises(ShardError, match=r"1 of 2 shards .* not made yet \(train-1\)"):
        TokenShards(out)
    assert len(TokenShards(out, partial=True)) == 7
    first = (out / "train-0.safetensors").stat()
    assert tokenize(shards, out, tok) == (1, 1, 7, {})
    assert files_of(out) == files_of(tmp_path / "whole")
    assert (out / "train-0.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert tokenize(shards, out, tok) == (0, 2, 0, {})


def test_what_does_not_belong_is_refused_and_named(
    tok: Tokenizer, shards: str, tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "ids"
    tokenize(shards, out, tok)
    before = files_of(out)
    other = Tokenizer.from_config(tiny()).eval()  # of the same name, with other weights
    with pytest.raises(ShardError, match=f"hash: {codes_hash(tok)}, not {codes_hash(other)}"):
        tokenize(shards, out, other)
    with pytest.raises(ShardError, match=r"augmentation.kind: center, not random-2; augmentation.crops: 1, not 2"):
        tokenize(shards, out, tok, crops=Crops(kind="random-2"))
    with pytest.raises(ShardError, match="n_tokens: 6, not 3"):
        tokenize(shards, out, tok, n_tokens=3)
    with pytest.raises(ShardError, match="resize: crop, not pad"):
        tokenize(shards, out, tok, resize="pad")
    with pytest.raises(ShardError, match="this tokenizer is"):
        TokenShards(out).check(other)
    assert files_of(out) == before
    write_tar(tmp_path / "train-0.tar", {"x.jpg": jpeg(1)})
    with pytest.raises(ShardError, match=r"train-0 .* made of other images"):
        tokenize(shards, out, tok)
    with pytest.raises(ShardError, match="holds no tokens.json"):
        TokenShards(tmp_path)


def test_the_hash_is_of_what_makes_ids(tok: Tokenizer, tmp_path: Path) -> None:
    before = codes_hash(tok)
    tok.save(tmp_path / "tok.safetensors")
    assert codes_hash(Tokenizer.from_file(tmp_path / "tok.safetensors")) == before
    with torch.no_grad():
        next(tok.decoder.parameters()).add_(1)
        assert codes_hash(tok) == before
        next(tok.encoder.parameters()).view(-1)[0] += 1e-3
    assert codes_hash(tok) != before


def test_damage_is_found(tok: Tokenizer, shards: str, tmp_path: Path) -> None:
    tokenize(shards, tmp_path / "ids", tok)
    file = tmp_path / "ids" / "train-1.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ShardError, match="train-1.safetensors is damaged"):
        TokenShards(tmp_path / "ids").verify()
    file.write_bytes(data[:-5])
    with pytest.raises(ShardError, match=r"train-1.safetensors is missing or was cut short"):
        TokenShards(tmp_path / "ids")
    assert tokenize(shards, tmp_path / "ids", tok).shards == 1  # and mended
    assert file.read_bytes() == data


def test_corrupt_images_are_left_out_counted_and_named(tok: Tokenizer, tmp_path: Path) -> None:
    good = {f"{i}.jpg": jpeg(i) for i in range(5)}
    write_tar(tmp_path / "a.tar", good | {"2.jpg": good["2.jpg"][:150], "4.jpg": b"nothing"})
    done = tokenize(str(tmp_path / "a.tar"), tmp_path / "ids", tok, batch_size=2)
    assert done.images == 3 and list(done.skipped) == ["a.tar/2.jpg", "a.tar/4.jpg"]
    manifest = json.loads((tmp_path / "ids" / "a.json").read_text())
    assert manifest["images"] == 3 and manifest["skipped_count"] == 2 and manifest["skipped"] == done.skipped
    found = TokenShards(tmp_path / "ids")
    assert [found.key(i) for i in range(3)] == ["a.tar/0.jpg", "a.tar/1.jpg", "a.tar/3.jpg"]
    assert found.skipped == ["a.tar/2.jpg", "a.tar/4.jpg"] and found.labels.tolist() == [-1] * 3
    assert torch.equal(found.ids(2), tok.encode(Image.open(io.BytesIO(good["3.jpg"]))).ids[0])
    write_tar(tmp_path / "b.tar", {"0.jpg": b"nothing", "1.jpg": b""})
    with pytest.raises(ValueError, match="none of 2 images can be read, the first of them b.tar/0.jpg"):
        tokenize(str(tmp_path / "b.tar"), tmp_path / "none", tok)


@pytest.mark.parametrize("size", [16, 15])
def test_ten_crops_are_those_of_torchvision(size: int) -> None:
    image = load_image(Image.open(io.BytesIO(jpeg(3))))
    views = Crops(kind="ten-crop", enlarge=1.4).cut(image, "x", size, "crop")
    assert torch.equal(views, torch.stack(TenCrop(size)(fit(image, int(size * 1.4), "crop"))))


def test_every_crop_is_encoded(tok: Tokenizer, shards: str, tmp_path: Path) -> None:
    source = open_source(shards)
    for kind, count in (("center-flip", 2), ("ten-crop", 10), ("random-3", 3)):
        crops = Crops(kind=kind)
        tokenize(shards, tmp_path / kind, tok, crops=crops, batch_size=7)
        found = TokenShards(tmp_path / kind)
        assert found.crops == len(crops) == count and len(found) == 14
        image = load_image(Image.open(io.BytesIO(source.read(4))))
        views = crops.cut(image, source.names[4], 16, "crop")
        assert views.shape == (count, 3, 16, 16)
        assert torch.equal(found.gather([4] * count, range(count)), tok.encode(views).ids)
        assert found.augmentation["kind"] == kind


def test_random_crops_hang_on_name_and_seed_alone() -> None:
    image = torch.rand(3, 40, 60)
    crops = Crops(kind="random-4", area=0.3)
    first = crops.cut(image, "a", 16, "crop")
    assert torch.equal(first, crops.cut(image, "a", 16, "crop"))
    assert len({view.numpy().tobytes() for view in first}) == 4
    assert not torch.equal(first, crops.cut(image, "b", 16, "crop"))
    assert not torch.equal(first, Crops(kind="random-4", area=0.3, seed=1).cut(image, "a", 16, "crop"))
    ramp = torch.linspace(0, 1, 60).expand(3, 40, 60)
    mirrored = [bool(v[0, 0, 0] > v[0, 0, -1]) for v in Crops(kind="random-60", area=1.0).cut(ramp, "a", 16, "crop")]
    assert 15 < sum(mirrored) < 45
    for wrong in ("random", "random-0", "random-x", "five"):
        with pytest.raises(ValueError, match="crops are center, center-flip, ten-crop or random-K"):
            Crops(kind=wrong)


def test_folders_are_classes_and_are_cut_into_parts(tok: Tokenizer, tmp_path: Path) -> None:
    for i, name in enumerate(("cat/0", "cat/deep/1", "dog/2", "dog/3", "eel/4")):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{name}.jpg").write_bytes(jpeg(i))
    data = str(tmp_path / "data")
    tokenize(data, tmp_path / "ids", tok, part_size=2)
    found = TokenShards(tmp_path / "ids")
    assert found.classes == ("cat", "dog", "eel") and found.labels.tolist() == [0, 0, 1, 1, 2]
    assert [path.name for path in sorted((tmp_path / "ids").glob("*.safetensors"))] == [
        f"images-{i:05d}.safetensors" for i in range(3)
    ]
    assert torch.equal(found.gather(range(5), [0] * 5), encoded_alone(tok, data))
    (tmp_path / "names.txt").write_text("eel\ndog\ncat\n")
    names = read_classes(tmp_path / "names.txt")
    tokenize(data, tmp_path / "other", tok, classes=names)
    assert TokenShards(tmp_path / "other").labels.tolist() == [2, 2, 1, 1, 0]
    with pytest.raises(ValueError, match="label 'eel': it is none of the 2 classes; give a file of names"):
        tokenize(data, tmp_path / "third", tok, classes=("cat", "dog"))
    for text, words in (
        ('{"a": 1}', "a JSON list of names"),
        ('["a", "a"]', "names a class twice: a"),
        ("[", "no JSON"),
    ):
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_classes(tmp_path / "names.json")


def test_processes_share_the_shards(tok: Tokenizer, shards: str, tmp_path: Path) -> None:
    tokenize(shards, tmp_path / "one", tok)
    assert tokenize(shards, tmp_path / "two", tok, shard=(1, 2)) == (1, 0, 7, {})
    assert tokenize(shards, tmp_path / "two", tok, shard=(0, 2)) == (1, 0, 7, {})
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert tokenize(shards, tmp_path / "two", tok, shard=(2, 3)) == (0, 0, 0, {})  # more processes than shards
    with pytest.raises(ValueError, match="I from 0 to N - 1"):
        tokenize(shards, tmp_path / "two", tok, shard=(2, 2))


def test_large_ids_are_kept_whole(tmp_path: Path) -> None:
    for bits, kind in (
        (8, np.uint8),
        (16, np.uint16),
        (18, np.uint32),
        (32, np.uint32),
        (40, np.int64),
        (62, np.int64),
    ):
        origin = Origin(
            tokenizer="t",
            hash="0",
            codebook_sizes=(2**bits, 3),
            nested=False,
            n_tokens=2,
            augmentation={"crops": 1},
        )
        ids = torch.tensor([[[[2**bits - 1, 2], [0, 1]]]])
        folder = tmp_path / str(bits)
        begin(folder, origin, ["s"])
        write_shard(folder, origin, Part("s", 0, 1, "f"), keys=["ä/0.jpg"], ids=ids, labels=[5], skipped={})
        found = TokenShards(folder)
        assert torch.equal(found.ids(0), ids[0, 0]) and found.key(0) == "ä/0.jpg"
        assert load_file(folder / "s.safetensors")["ids"].dtype == kind


def test_batches_are_a_function_of_seed_and_number(tok: Tokenizer, shards: str, tmp_path: Path) -> None:
    tokenize(shards, tmp_path / "ids", tok, crops=Crops(kind="random-4"))
    found = TokenShards(tmp_path / "ids")

    def take(count: int, **options: int) -> list[Any]:
        with TokenBatches(found, **({"batch_size": 4, "seed": 3} | options)) as batches:
            return list(itertools.islice(batches, count))

    whole = take(14)
    assert whole[0].ids.shape == (4, 6, 1) and whole[0].ids.dtype == whole[0].labels.dtype == torch.int64
    for number in (0, 5, 13):
        again = take(1, start=number)[0]
        assert torch.equal(again.ids, whole[number].ids) and torch.equal(again.labels, whole[number].labels)
    assert not torch.equal(take(1, seed=4)[0].ids, whole[0].ids)
    halves = [take(3, rank=rank, world=2) for rank in range(2)]
    for i in range(3):
        assert torch.equal(torch.cat([half[i].ids for half in halves]), whole[i].ids)
    # 14 batches of 4 are 4 epochs of 14 images: each image once in each, two for each label.
    labels = torch.cat([batch.labels for batch in whole]).tolist()
    assert all(Counter(labels[14 * e : 14 * (e + 1)]) == Counter({i: 2 for i in range(7)}) for e in range(4))
    assert labels[:14] != labels[14:28]
    every = {found.ids(i, c).numpy().tobytes() for i in range(14) for c in range(4)}
    seen = {row.numpy().tobytes() for batch in take(200) for row in batch.ids}
    assert seen == every
    for wrong in ({"rank": 2, "world": 2}, {"world": 3}, {"batch_size": 0}, {"start": -1}):
        with pytest.raises(ValueError, match="rank is|at least"):
            take(1, **wrong)
    with pytest.raises(IndexError, match="images are 0 to 13 and crops 0 to 3"):
        found.ids(14)


def test_the_command(
    tok: Tokenizer, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tok.save(tmp_path / "tok.safetensors")

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["tokenize", shards, "-o", str(tmp_path / "ids"), "-t", str(tmp_path / "tok.safetensors"), *words])
        return ended.value.code or 0, *capsys.readouterr()

    options = ["--crops", "ten-crop", "--enlarge", "1.2", "--device", "cpu"]
    assert run(*options, "--shard", "1/2")[:2] == (0, f"tokenized 7 images into 1 shard: {tmp_path / 'ids'}\n")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*options)[0] == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    code, out, _ = run(*options)
    assert code == 0 and out.startswith("tokenized 0 images into 0 shards, 2 were there")
    assert TokenShards(tmp_path / "ids").augmentation["enlarge"] == 1.2
    code, _, err = run("--device", "cpu")
    assert code == 1 and "holds ids that were made otherwise: augmentation.kind: ten-crop, not center" in err
    assert "--shard is I/N" in run("--shard", "1")[2]


def test_continuous_tokens_are_refused(
    tok: Tokenizer, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tok.quantizer), "discrete", False)
    with pytest.raises(ValueError, match="continuous tokens: there are no ids to write"):
        tokenize(shards, tmp_path / "ids", tok)


def test_the_bundled_tokenizer_on_labelled_pictures(shared: Path, tmp_path: Path) -> None:
    from tokenizers_vis.presets import load

    tok = load("mini", "cpu")
    with tarfile.open(shared / "data" / "tiny-imagenet" / "val.tar") as archive:
        members = [archive.next() for _ in range(24)]
        write_tar(tmp_path / "val.tar", {m.name: archive.extractfile(m).read() for m in members})
        labels = [int(archive.extractfile(m).read()) for m in members if m.name.endswith(".cls")]
    tokenize(str(tmp_path / "val.tar"), tmp_path / "ids", tok)
    found = TokenShards(tmp_path / "ids")
    assert len(found) == 12 and sorted(found.labels.tolist()) == sorted(labels)
    assert torch.equal(found.gather(range(12), [0] * 12), encoded_alone(tok, str(tmp_path / "val.tar")))
