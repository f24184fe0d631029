"""The command line, as a person meets it: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_vis as tv
from tokenizers_vis.catalogue import preset
from tokenizers_vis.cli import main
from tokenizers_vis.config import to_toml

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"dim": 3, "max_tokens": 4, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ended]:
    """Runs the program in an empty folder and gives its exit code and both streams."""
    monkeypatch.chdir(tmp_path)

    def ended(*words: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_, warnings.catch_warnings():
            warnings.simplefilter("always")
            main([str(word) for word in words])
        return Ended(exit_.value.code or 0, *capsys.readouterr())

    return ended


def build(folder: Path, name: str, decoder: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = {
        "name": name,
        "canvas": {"kind": "pixels", "size": 16},
        "encoder": {"kind": "flextok", **SHAPE},
        "quantizer": {"kind": "fsq", "levels": [8, 8, 8]},
        "decoder": {"kind": decoder, **SHAPE},
    }
    tv.Tokenizer.from_config(config).save(folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 to 4 tokens of 9 bits, 16 px, a one-pass decoder."""
    return build(tmp_path_factory.mktemp("tiny"), "tiny", "vit")


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a flow decoder, whose layers that start at zero are made to say something."""
    path = build(tmp_path_factory.mktemp("flow"), "flow", "flow")
    tokenizer = tv.load(path, device="cpu")
    for parameter in tokenizer.decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    tokenizer.save(path)
    return path


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    corners = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR).save(path)
    return path


def files(folder: Path) -> set[str]:
    """Everything below a folder, hidden files included."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def is_one_error(ended: Ended) -> bool:
    lines = ended.err.splitlines()
    return ended.code == 1 and len(lines) == 1 and lines[0].startswith("error: ")


# Encode


def test_encode_one_file_beside_it(run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    picture(tmp_path / "cat.jpg")
    ended = run("encode", "cat.jpg", "-t", tiny)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "encoded 1 image with tiny, 4 tokens = 5 bytes each, into cat.tok\n"
    expected = tv.load(tiny, device="cpu").encode(tmp_path / "cat.jpg")
    assert tv.Tokens.load(tmp_path / "cat.tok") == expected


def test_encode_into_a_named_file(run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    picture(tmp_path / "cat.png")
    assert run("encode", "cat.png", "-t", tiny, "--n-tokens", 1, "--out", "new/short.TOK").code == 0
    assert tv.Tokens.load(tmp_path / "new" / "short.TOK").n_tokens == 1
    assert files(tmp_path) == {"cat.png", "new/short.TOK"}


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_encode_nested_folders(batch_size: int, run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    names = ["a.png", "deep/b.jpg", "deep/deeper/c.PNG", "z.webp"]
    for seed, name in enumerate(names):
        picture(tmp_path / "in" / name, seed)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    ended = run("encode", "in", "-t", tiny, "-o", "out", "--batch-size", batch_size, "--resize", "pad")
    assert (ended.code, "encoded 4 images" in ended.out, "into out\n" in ended.out) == (0, True, True)
    assert files(tmp_path / "out") == {"a.tok", "deep/b.tok", "deep/deeper/c.tok", "z.tok"}
    tokenizer = tv.load(tiny, device="cpu")
    for name in names:
        alone = tokenizer.encode(tmp_path / "in" / name, resize="pad")
        assert tv.Tokens.load((tmp_path / "out" / name).with_suffix(".tok")) == alone


def test_corrupt_images_are_skipped_and_counted(run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(["a.png", "c.png", "e.png"]):
        picture(tmp_path / "in" / name, seed)
    whole = (tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "d.jpg").write_bytes(b"")
    ended = run("encode", "in", "-t", tiny, "-o", "out")
    assert ended.code == 1
    assert "encoded 3 images" in ended.out
    first, second, last = ended.err.splitlines()
    assert first.startswith("skipped: in/b.png is damaged")
    assert second == "skipped: in/d.jpg is empty (0 bytes)"
    assert last == "skipped 2 files that could not be read"
    assert files(tmp_path / "out") == {"a.tok", "c.tok", "e.tok"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.png"], "there is no file or folder gone.png"),
        (["texts"], "the folder texts holds no image file"),
        (["empty"], "the folder empty holds no image file"),
        (["in", "--n-tokens", 0], "n_tokens is a whole number from 1 to 4, got 0"),
        (["in", "--n-tokens", 5], "n_tokens is a whole number from 1 to 4, got 5"),
        (["in", "--resize", "squeeze"], "resize is one of crop, pad, exact; got 'squeeze'"),
        (["in", "--out", "all.tok"], "all.tok is one file, but there are 3 inputs: give a folder"),
        (["in", "in/a.png", "-o", "out"], "two results would both be written to out/a.tok"),
        (["in/b.png", "in/b.jpg"], "two results would both be written to in/b.tok"),
        (["in", "--device", "abacus", "-o", "out"], "the device 'abacus' cannot be used here"),
        (["in", "-o", "in/a.png"], "in/a.png"),
    ],
)
def test_encode_refuses(words: list[Any], message: str, run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    """One line of error, exit code 1, and nothing written."""
    for seed, name in enumerate(["a.png", "b.png"]):
        picture(tmp_path / "in" / name, seed)
    picture(tmp_path / "in" / "sub" / "b.jpg").rename(tmp_path / "in" / "c.jpg")
    if "in/b.jpg" in words:
        picture(tmp_path / "in" / "b.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    ended = run("encode", *words, "-t", tiny)
    assert is_one_error(ended), ended
    assert message in ended.err
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_full_disk_leaves_whole_files_only(
    run: Callable[..., Ended], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third .tok finds no room: two are whole, of the third there is nothing."""
    for seed in range(4):
        picture(tmp_path / "in" / f"{seed}.png", seed)
    synced: list[int] = []
    fsync = os.fsync

    def full(handle: int) -> None:
        synced.append(handle)
        if len([path for path in (tmp_path / "out").iterdir() if path.suffix == ".tok"]) == 3:  # the third's own aside
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    ended = run("encode", "in", "-t", tiny, "-o", "out")
    assert is_one_error(ended) and "No space left on device" in ended.err
    assert files(tmp_path / "out") == {"0.tok", "1.tok"}


# Which tokenizer


def test_misspelt_tokenizer(run: Callable[..., Ended], tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    ended = run("encode", "a.png", "-t", "minni")
    assert is_one_error(ended)
    assert "there is no preset, file or folder 'minni'. Did you mean 'mini'?" in ended.err


def test_folder_without_a_tokenizer(run: Callable[..., Ended], tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    ended = run("encode", "in", "-t", tmp_path / "in")
    assert is_one_error(ended) and "should hold tokenizer.safetensors, model.safetensors" in ended.err


def test_list_is_a_table_of_every_preset(run: Callable[..., Ended]) -> None:
    ended = run("list")
    assert (ended.code, ended.err) == (0, "")
    head, *lines = [re.split(r"  +", line) for line in ended.out.splitlines()]
    assert head == ["name", "tokens", "codebook", "bits", "px", "rFID", "licence"]
    assert [line[0] for line in lines] == tv.list_presets() and all(len(line) == len(head) for line in lines)
    (mini,) = [line for line in lines if line[0] == "mini"]
    assert mini[1:] == ["1..128", "4,096", "1,536", "64", "-", "research (not commercial)"]


def test_list_for_commercial_use_and_for_programs(run: Callable[..., Ended]) -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--json").out)}
    assert list(rows) == tv.list_presets() and rows["mini"]["bits_per_image"] == 1536
    allowed = {name for name, row in rows.items() if row["commercial"]}
    assert {row["name"] for row in json.loads(run("list", "--json", "--commercial-ok").out)} == allowed
    lines = run("list", "--commercial-ok").out.splitlines()[1:]
    assert {line.split()[0] for line in lines} == allowed and "mini" not in allowed


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("room", "left"), [(500, 7), (30, 2)])
def test_list_keeps_to_the_width_of_a_terminal(room: int, left: int) -> None:
    ours, theirs = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(room)}
    words = [sys.executable, "-m", "tokenizers_vis.cli", "list"]
    with os.fdopen(theirs) as terminal:
        shown = b""
        with subprocess.Popen(words, env=environment, stdout=terminal, cwd=ROOT) as program:
            while program.poll() is None or select.select([ours], [], [], 0)[0]:
                if select.select([ours], [], [], 0.1)[0]:
                    shown += os.read(ours, 65536)
    os.close(ours)
    lines = shown.decode().splitlines()
    assert lines[0].split()[:2] == ["name", "tokens"] and len(lines[0].split()) == left
    assert len(lines) == 1 + len(tv.list_presets()) and max(map(len, lines)) <= room


def test_info_of_a_tokenizer(run: Callable[..., Ended], tiny: Path) -> None:
    ended = run("info", tiny)
    assert (ended.code, ended.err) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert shown["name"] == "tiny"
    assert "1 to 4" in shown["tokens"]
    assert "512" in shown["codebooks"]
    assert "flextok, fsq, vit" in ended.out


# Released weights


@pytest.fixture
def released(recorded: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a small preset "tiny-vqgan", which is not in the Hub's cache; there is no network."""
    tensors, metadata = recorded("maskgit_vqgan")
    official = json.loads(metadata["options"])
    torch.save({key[8:]: value.float() for key, value in tensors.items() if key[:8] == "weights."}, tmp_path / "w.bin")
    foreign = {"family": "maskgit-vqgan", "hub": "some/one", "file": "w.bin", "sha256": "", "paper": "https://x.org"}
    own = {"max_tokens": 36, "nested": False, "codebook_sizes": [40], "official": official}
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "tiny-vqgan.toml").write_text(to_toml(preset("mini") | foreign | own))
    monkeypatch.setattr("tokenizers_vis.catalogue.FOLDER", tmp_path / "presets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "w.bin"


def test_info_of_a_preset_downloads_nothing(run: Callable[..., Ended], released: Path) -> None:
    ended = run("info", "tiny-vqgan")
    assert (ended.code, ended.err) == (0, "")
    *lines, hint = ended.out.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown["hub"] == "some/one" and shown["tokens"] == "36" and shown["paper"] == "https://x.org"
    assert shown["licence"] == "research" and "not downloaded yet" in hint and "--weights" in hint
    ended = run("info", "tiny-vqgan", "--weights", released)
    assert ended.code == 0 and "grid, vq, conv" in ended.out and "some/one" in ended.out


def test_weights_at_hand_serve_every_command(run: Callable[..., Ended], released: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    preset = ("-t", "tiny-vqgan", "--weights", released)
    ended = run("encode", "a.png", *preset)
    assert ended.code == 0 and "36 tokens = 27 bytes each" in ended.out
    assert run("decode", "a.tok", "--weights", released, "-o", "b.png").code == 0
    assert run("reconstruct", "a.png", *preset).code == 0
    assert run("doctor", "tiny-vqgan", "--weights", released, "--data", "a.png").code == 0
    ended = run("encode", "a.png", "-t", "tiny-vqgan")
    assert is_one_error(ended) and "cannot be had from the Hugging Face Hub" in ended.err


# Continuous tokens


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    part = {**SHAPE, "max_tokens": 4}
    config = {
        "name": "vae",
        "canvas": {"kind": "pixels", "size": 16},
        "encoder": {"kind": "titok", **part, "dim": 6},
        "quantizer": {"kind": "gaussian", "dim": 3},
        "decoder": {"kind": "vit", **part},
    }
    tv.Tokenizer.from_config(config).save(tmp_path / "vae.ckpt.safetensors")
    return tmp_path / "vae.ckpt.safetensors"


def test_continuous_tokens_there_and_back(run: Callable[..., Ended], vae: Path, tmp_path: Path) -> None:
    for seed in range(2):
        picture(tmp_path / "in" / f"{seed}.png", seed)
    ended = run("encode", "in", "-t", vae)
    assert (ended.code, ended.out) == (
        0,
        "encoded 2 images with vae, 4 tokens of 3 numbers each, into their folders\n",
    )
    assert files(tmp_path / "in") == {"0.png", "0.safetensors", "1.png", "1.safetensors"}
    tokenizer = tv.load(vae, device="cpu")
    latents = tokenizer.encode([tmp_path / "in" / f"{seed}.png" for seed in range(2)])
    for i, one in enumerate(latents):
        assert torch.equal(tv.Latents.load(tmp_path / "in" / f"{i}.safetensors").values, one.values)
    assert run("decode", "in", "-t", vae, "-o", "out").code == 0
    expected = tv.to_pil(tokenizer.decode(latents))
    for i in range(2):
        assert np.abs(pixels(tmp_path / "out" / f"{i}.png").astype(int) - np.array(expected[i])).max() <= 1
    assert run("encode", "in/0.png", "-t", vae, "-o", "new/one.safetensors").code == 0
    ended = run("info", "new/one.safetensors")
    first, line = ended.out.splitlines()
    assert first == repr(latents[0]) and line.startswith(f"image 0: 4 tokens: {latents.values[0, 0, 0]:.3g} ")
    assert run("reconstruct", "in/0.png", "-t", vae).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "a.png", "-o", "a.tok"], "the tokens of vae go into a .safetensors file, got --out a.tok"),
        (["encode", "a.png", "--n-tokens", 2], "always makes 4 tokens"),
        (["decode", "z.safetensors", "-o", "out", "--n-tokens", 2], "belong together"),
        (["decode", "z.safetensors", "-o", "out", "--n-tokens", 5], "--n-tokens is from 1 to 4"),
        (["doctor", "--data", "a.png"], "vae has continuous tokens"),
    ],
)
def test_continuous_tokens_refused(
    words: list[Any], message: str, run: Callable[..., Ended], vae: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "a.png")
    assert run("encode", "a.png", "-t", vae, "-o", "z.safetensors").code == 0
    before = files(tmp_path)
    ended = run(*words, *((vae,) if words[0] == "doctor" else ("-t", vae)))
    assert is_one_error(ended) and message in ended.err, ended
    assert files(tmp_path) == before


def test_a_checkpoint_is_no_file_of_tokens(run: Callable[..., Ended], vae: Path, tiny: Path, tmp_path: Path) -> None:
    ended = run("decode", vae, "-t", vae, "-o", "out")
    assert ended.code == 1 and "holds no latents" in ended.err and not (tmp_path / "out").exists()
    ended = run("encode", picture(tmp_path / "a.png"), "-t", tiny, "-o", "a.safetensors")
    assert is_one_error(ended) and "the tokens of tiny go into a .tok file" in ended.err
    assert run("info", vae).out.splitlines()[0].split() == ["name", "vae"]


# Doctor


def test_doctor_reports_and_writes_its_numbers(run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    for seed in range(3):
        picture(tmp_path / "in" / f"{seed}.png", seed)
    ended = run("doctor", tiny, "--data", "in", "--data", "in/0.png", "--limit", 3, "--json", "new/report.json")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("tiny: 3 images, 12 ids, float32 on ") and "codebook 0: " in ended.out
    told = json.loads((tmp_path / "new" / "report.json").read_text())
    assert told["sound"] and told["images"] == 3 and told["margins"]["smallest"] > 0


def test_doctor_ends_with_an_error_where_ids_hang_on_the_batch(run: Callable[..., Ended], tmp_path: Path) -> None:
    config = tv.load(build(tmp_path, "unsound", "vit"), device="cpu").config
    quantizer = {"kind": "opt_vq", "dim": 3, "codebook_size": 32, "eval_assignment": "sinkhorn"}
    tv.Tokenizer.from_config({**config, "quantizer": quantizer}).save(tmp_path / "unsound.safetensors")
    ended = run("doctor", "unsound.safetensors")
    assert is_one_error(ended) and "ids depend on what they should not" in ended.err and "6 images" in ended.out


# Decode


@pytest.fixture
def encoded(tiny: Path, tmp_path: Path) -> Path:
    """A folder with a.tok, sub/b.tok, and two.tok of two images."""
    tokenizer, folder = tv.load(tiny, device="cpu"), tmp_path / "tok"
    paths = [picture(tmp_path / f"{seed}.png", seed) for seed in range(2)]
    tokens = tokenizer.encode(paths)
    (folder / "sub").mkdir(parents=True)
    tokens[0].save(folder / "a.tok")
    tokens[1].save(folder / "sub" / "b.tok")
    tokens.save(folder / "two.tok")
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.array(opened)


def test_decode_folder(run: Callable[..., Ended], tiny: Path, encoded: Path, tmp_path: Path) -> None:
    ended = run("decode", "tok", "-t", tiny, "-o", "out", "--device", "cpu")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "decoded 3 files into out\n"
    assert files(tmp_path / "out") == {"a.png", "sub/b.png", "two-0.png", "two-1.png"}
    tokenizer = tv.load(tiny, device="cpu")
    first, second = tv.to_pil(tokenizer.reconstruct([tmp_path / "0.png", tmp_path / "1.png"]))
    for name, expected in {"a": first, "sub/b": second, "two-0": first, "two-1": second}.items():
        assert (pixels(tmp_path / "out" / f"{name}.png") == np.array(expected)).all()


def test_decode_one_file_and_a_prefix(run: Callable[..., Ended], tiny: Path, encoded: Path, tmp_path: Path) -> None:
    assert run("decode", "tok/a.tok", "-t", tiny).code == 0  # beside its file
    assert run("decode", "tok/a.tok", "-t", tiny, "--n-tokens", 1, "-o", "new/short.bmp").code == 0
    assert pixels(encoded / "a.png").shape == pixels(tmp_path / "new" / "short.bmp").shape == (16, 16, 3)
    assert not (pixels(encoded / "a.png") == pixels(tmp_path / "new" / "short.bmp")).all()


def test_decode_never_replaces_the_original(run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    original = picture(tmp_path / "cat.png").read_bytes()
    assert run("encode", "cat.png", "-t", tiny).code == 0
    ended = run("decode", "cat.tok", "-t", tiny)
    assert is_one_error(ended) and "cat.png is there already, maybe the original" in ended.err
    assert (tmp_path / "cat.png").read_bytes() == original
    assert run("decode", "cat.tok", "-t", tiny, "-o", "cat.png").code == 0
    assert pixels(tmp_path / "cat.png").shape == (16, 16, 3)


def test_decode_by_the_name_in_the_file(run: Callable[..., Ended], tiny: Path, encoded: Path, tmp_path: Path) -> None:
    ended = run("decode", "tok", "-o", "out")
    assert is_one_error(ended)
    assert "no preset, file or folder 'tiny'" in ended.err and "tok/a.tok names it" in ended.err
    assert "--tokenizer" in ended.err
    # A folder of that name is one.
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tokenizer.safetensors").write_bytes(tiny.read_bytes())
    assert run("decode", "tok", "-o", "out").code == 0


def test_damaged_tok_files_are_skipped(run: Callable[..., Ended], tiny: Path, encoded: Path, tmp_path: Path) -> None:
    whole = (encoded / "a.tok").read_bytes()
    for i in (0, 8, len(whole) - 1):
        (encoded / f"flipped-{i}.tok").write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
    (encoded / "empty.tok").write_bytes(b"")
    ended = run("decode", "tok", "-t", tiny, "-o", "out")
    assert ended.code == 1
    *skipped, last = ended.err.splitlines()
    assert [line.split(".tok")[0] for line in skipped] == [
        "skipped: tok/empty",
        "skipped: tok/flipped-0",
        f"skipped: tok/flipped-{len(whole) - 1}",
        "skipped: tok/flipped-8",
    ]
    assert last == "skipped 4 files that could not be read"
    assert files(tmp_path / "out") == {"a.png", "sub/b.png", "two-0.png", "two-1.png"}


def test_tok_file_cut_short_decodes_with_a_warning(
    run: Callable[..., Ended], tiny: Path, encoded: Path, tmp_path: Path
) -> None:
    (encoded / "a.tok").write_bytes((encoded / "a.tok").read_bytes()[:-2])
    ended = run("decode", "tok/a.tok", "-t", tiny, "-o", "out")
    assert ended.code == 0
    assert ended.err.startswith("warning: tok/a.tok: the file is cut short: 2 of 4 tokens arrived whole")
    assert files(tmp_path / "out") == {"a.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.tok"], "gone.tok cannot be read"),
        (["empty"], "the folder empty holds no .tok or .safetensors files"),
        (["tok", "--n-tokens", 0], "--n-tokens is from 1 to 4 for this file, got 0"),
        (["tok/a.tok", "--n-tokens", 9], "--n-tokens is from 1 to 4 for this file, got 9"),
        (["tok", "--steps", 5], "takes no sampling options, got steps"),
        (["tok", "--seed", 5], "takes no sampling options, got generator"),
        (["tok", "--out", "all.png"], "all.png is one file, but there are 3 inputs: give a folder"),
        (["tok", "clash/two-1.tok"], "two results would both be written to out/two-1.png"),
        (["tok", "--device", "abacus"], "the device 'abacus' cannot be used here"),
    ],
)
def test_decode_refuses(
    words: list[Any], message: str, run: Callable[..., Ended], tiny: Path, encoded: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "clash").mkdir()
    (tmp_path / "clash" / "two-1.tok").write_bytes((encoded / "a.tok").read_bytes())
    before = files(tmp_path)
    ended = run("decode", *words, "-t", tiny, *([] if "--out" in words else ["-o", "out"]))
    assert ended.code == 1 and message in ended.err, ended
    assert files(tmp_path) == before


def test_tok_file_of_another_tokenizer(run: Callable[..., Ended], flow: Path, encoded: Path, tmp_path: Path) -> None:
    ended = run("decode", "tok/a.tok", "-t", flow, "-o", "out")
    assert is_one_error(ended)
    assert "these tokens are of 'tiny'" in ended.err and "'flow'" in ended.err
    assert not (tmp_path / "out").exists()


def test_info_of_tokens(run: Callable[..., Ended], encoded: Path) -> None:
    ended = run("info", "tok/two.tok")
    tokens = tv.Tokens.load(encoded / "two.tok")
    first, *images = ended.out.splitlines()
    assert (ended.code, first) == (0, repr(tokens))
    for i, line in enumerate(images):
        assert line == f"image {i}: 4 tokens: {' '.join(map(str, tokens.ids[i].flatten().tolist()))}"
    assert len(images) == 2
    (encoded / "two.tok").write_bytes(b"no tokens")
    assert is_one_error(run("info", "tok/two.tok"))


# Sampling


def test_seed_and_steps_reach_a_flow_decoder(run: Callable[..., Ended], flow: Path, tmp_path: Path) -> None:
    tokenizer = tv.load(flow, device="cpu")
    tokens = tokenizer.encode(picture(tmp_path / "a.png"))
    tokens.save(tmp_path / "a.tok")
    for name, seed in {"one": 3, "again": 3, "other": 4}.items():
        assert run("decode", "a.tok", "-t", flow, "--seed", seed, "--steps", 2, "-o", f"{name}.png").code == 0
    (expected,) = tv.to_pil(tokenizer.decode(tokens, steps=2, generator=torch.Generator().manual_seed(3)))
    assert (pixels(tmp_path / "one.png") == np.array(expected)).all()
    assert (pixels(tmp_path / "one.png") == pixels(tmp_path / "again.png")).all()
    assert not (pixels(tmp_path / "one.png") == pixels(tmp_path / "other.png")).all()


def test_columns_of_one_seed_share_their_noise(run: Callable[..., Ended], flow: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    ended = run("reconstruct", "a.png", "-t", flow, "--n-tokens", 4, "--n-tokens", 4, "--seed", 1, "--steps", 2)
    assert ended.code == 0, ended
    first, second, _ = ended.out.splitlines()
    assert first == second


@pytest.mark.parametrize("option", [["--seed", -1], ["--seed", 2**63], ["--steps", 0]])
def test_sampling_options_out_of_range(option: list[Any], run: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run("decode", "a.tok", *option)
    assert (ended.code, f"'{option[0]}'" in ended.err) == (2, True)


# Reconstruct


def test_reconstruct_draws_a_sheet(run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    lengths = ["--n-tokens", 1, "--n-tokens", 2, "--n-tokens", 4]
    assert run("reconstruct", paths[0], "-t", tiny, "-o", "new/one.png").code == 0
    ended = run("reconstruct", *paths, "-t", tiny, *lengths, "-o", "new/all.jpg", "--resize", "exact")
    assert (ended.code, ended.err) == (0, "")
    one, many = pixels(tmp_path / "new" / "one.png"), pixels(tmp_path / "new" / "all.jpg")
    # Cells are 96 px; the originals stand at the end.
    assert 2 * 96 < one.shape[1] < 3 * 96 and 96 < one.shape[0] < 2 * 96
    assert 4 * 96 < many.shape[1] < 5 * 96 and 3 * 96 < many.shape[0] < 5 * 96
    first, *_, last = ended.out.splitlines()
    tokenizer = tv.load(tiny, device="cpu")
    originals = torch.stack([tokenizer.canvas.fit(tv.images.load_image(path), "exact") for path in paths])
    error = (tokenizer.reconstruct(originals, 1) - originals).square().mean(dim=(1, 2, 3))
    assert first == f"1 token, 2 bytes: PSNR {-10 * error.log10().mean():.2f} dB over 3 images"
    assert last == f"wrote {Path('new/all.jpg')}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n-tokens", 0], "n_tokens is a whole number from 1 to 4, got 0"),
        (["--out", "sheet"], "--out is the picture to write, such as reconstruction.png; got sheet"),
        (["--out", "sheet.tok"], "got sheet.tok"),
        (["--guidance", 2], "takes no sampling options, got guidance"),
        (["broken.png"], "broken.png is empty"),
    ],
)
def test_reconstruct_refuses(
    words: list[Any], message: str, run: Callable[..., Ended], tiny: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"")
    before = files(tmp_path)
    ended = run("reconstruct", "a.png", *words, "-t", tiny)
    assert is_one_error(ended), ended
    assert message in ended.err
    assert files(tmp_path) == before


# Train


RECIPE = """
name = "tiny"
precision = "fp32"
device = "cpu"
[tokenizer]
canvas = { kind = "pixels", size = 16 }
quantizer = { kind = "fsq", levels = [8, 8, 8] }
encoder = { kind = "flextok", dim = 3, max_tokens = 4, size = 16, patch = 8, width = 32, depth = 1, heads = 2 }
decoder = { kind = "vit", dim = 3, max_tokens = 4, size = 16, patch = 8, width = 32, depth = 1, heads = 2 }
[optim]
steps = 50
batch_size = 2
[data]
workers = 0
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text(RECIPE)
    for seed in range(3):
        # Quotes, backslashes and spaces in a path are nobody's business.
        picture(tmp_path / 'my "best" \\photos' / f"{seed}.png", seed)
    return tmp_path / "r.toml"


DATA = ["--data", 'my "best" \\photos']


def test_train_then_use(run: Callable[..., Ended], recipe: Path, tmp_path: Path) -> None:
    ended = run("train", "r.toml", "optim.steps=2", *DATA)
    assert ended.code == 0, ended
    folder = Path("runs/tiny")
    assert ended.out == f"trained 2 steps; the tokenizer is {folder / 'tokenizer.safetensors'}\n"
    assert run("encode", tmp_path / DATA[1] / "0.png", "-t", folder, "-o", "a.tok").code == 0
    assert run("decode", "a.tok", "-t", folder, "-o", "a.png").code == 0
    again = run("train", "r.toml", *DATA)
    assert is_one_error(again) and "already holds a run" in again.err
    assert run("train", "--resume", folder).out == ended.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a recipe (see --list), --from TOKENIZER, or --resume RUN"),
        (["r.toml", "--decoder-only"], "say more of --from"),
        (["r.toml"], "data.train is empty: say where the images are (--data PATH)"),
        (["r.toml", "--data", "gone"], "there is nothing at 'gone'"),
        (["r.toml", "optim.stepz=2", *DATA], "optim.stepz: OptimConfig has no option 'stepz'. Did you mean 'steps'?"),
        (["r.toml", "steps", *DATA], "an override reads key.sub=value, got 'steps'"),
        (["r.toml", "device=abacus", *DATA], "the device 'abacus' cannot be used here"),
        (["minni", *DATA], "there is no recipe 'minni'. Did you mean 'mini'?"),
        (["gone.toml", *DATA], "there is no file gone.toml"),
        (["--resume", "gone"], "gone holds no checkpoint.pt to go on from"),
        (["--from", "mini", "--resume", "gone"], "give --resume alone"),
        (["--resume", "gone", "--out", "here"], "give --resume alone"),
        (["--resume", "gone", *DATA], "give --resume alone"),
    ],
)
def test_train_refuses(words: list[Any], message: str, run: Callable[..., Ended], recipe: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    ended = run("train", *words)
    assert is_one_error(ended), ended
    assert message in ended.err
    assert files(tmp_path) == before


def test_train_lists_recipes(run: Callable[..., Ended]) -> None:
    from tokenizers_vis.train.loop import list_recipes

    lines = run("train", "--list").out.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes() != []
    (mini,) = (line for line in lines if line.startswith("mini "))
    assert mini.endswith("  mini, as the bundled tokenizer began: 1 to 64 ordered tokens of 4096 codes at 64 px")


def test_train_without_its_extra(run: Callable[..., Ended], recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    ended = run("train", "r.toml", *DATA)
    assert is_one_error(ended)
    assert ended.err == "error: training needs tensorboard: pip install 'tokenizers-vis[train]'\n"


# The program itself


def test_debug_shows_where(run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tv.images.ImageError, match="there is no file or folder gone.png"):
        main(["encode", "gone.png", "--debug"])
    assert is_one_error(run("encode", "gone.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "a.png", "--colour", "red"], "--colour"),
        (["encode"], "inputs"),
        (["encod", "a.png"], "'encod'"),
        (["encode", "a.png", "--n-tokens", "many"], "'--n-tokens'"),
        (["encode", "a.png", "--batch-size", "0"], "'--batch-size'"),
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], message: str, run: Callable[..., Ended]) -> None:
    ended = run(*words)
    assert ended.code == 2
    assert "Usage: " in ended.err and message in ended.err.lower() and "Traceback" not in ended.err


def test_interrupt_is_exit_code_130(run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tv.images, "find_images", interrupted)
    assert run("encode", "a.png").code == 130


def test_help_needs_no_torch() -> None:
    """Help and completion answer at once: nothing heavy is imported."""
    program = """
import sys
from tokenizers_vis.cli import main
try:
    main(["--help"])
finally:
    heavy = {"torch", "numpy", "PIL", "einops", "safetensors", "rich", "huggingface_hub"} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert all(name in done.stdout for name in ("encode", "decode", "reconstruct", "info", "list", "doctor", "train"))
