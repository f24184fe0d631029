"""Presets: their tables, and the way of released weights from the Hub or a file into a tokenizer, or to a clear error.

The Hub here is its cache on disk, laid out as huggingface_hub lays it out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis import catalogue
from tokenizers_vis.catalogue import downloaded, list_presets, preset
from tokenizers_vis.config import to_toml
from tokenizers_vis.convert import FAMILIES
from tokenizers_vis.weights import CheckpointError

RELEASED = [name for name in list_presets() if "family" in preset(name)]
OWN = {
    "licence": str,
    "commercial": bool,
    "max_tokens": int,
    "nested": bool,
    "codebook_sizes": list,
    "bits_per_image": int,
    "image_size": int,
    "resize": str,
}
FOREIGN = {"family": str, "hub": str, "file": str, "sha256": str, "paper": str, "official": dict}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# Tables


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_holds_what_every_preset_holds(name: str) -> None:
    table = preset(name)
    kinds = OWN | (FOREIGN if name in RELEASED else {})
    assert {key: type(value) for key, value in table.items() if key != "rfid"} == kinds
    assert isinstance(table.get("rfid", 1.0), float) and table.get("rfid", 1.0) > 0
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+)?", name)
    assert table["licence"] and table["resize"] in ("crop", "pad", "exact")
    assert table["max_tokens"] > 0 and table["image_size"] > 0
    bits = sum((size - 1).bit_length() for size in table["codebook_sizes"]) * table["max_tokens"]
    if table["codebook_sizes"]:
        assert table["bits_per_image"] == bits
    else:  # 16 bits for each number of a continuous token
        assert table["bits_per_image"] > 0 and table["bits_per_image"] % (16 * table["max_tokens"]) == 0


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_preset_says_where_its_weights_are(name: str) -> None:
    table = preset(name)
    assert table["family"] in FAMILIES and table["paper"].startswith("https://")
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", table["hub"])
    assert Path(table["file"]).suffix in (".safetensors", ".bin", ".pt", ".pth")
    assert re.fullmatch(r"[0-9a-f]{64}|", table["sha256"])


def test_no_two_presets_are_one_file() -> None:
    files = [(preset(name)["hub"], preset(name)["file"]) for name in RELEASED]
    assert len(set(files)) == len(files) > 0


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty, and no network behind it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, repository: str, name: str, content: bytes, blob: str | None = None) -> Path:
    """A file as a download leaves it: a blob that bears its sha256 as name, and a link to it."""
    there = hub / f"models--{repository.replace('/', '--')}"
    link = there / "snapshots" / COMMIT / name
    for folder in (there / "blobs", there / "refs", link.parent):
        folder.mkdir(parents=True, exist_ok=True)
    (there / "refs" / "main").write_text(COMMIT)
    blob = hashlib.sha256(content).hexdigest() if blob is None else blob
    (there / "blobs" / blob).write_bytes(content)
    link.symlink_to(there / "blobs" / blob)
    return link


class Tiny(NamedTuple):
    """A released preset of a few thousand random weights, and what its original gave for them."""

    name: str
    table: dict[str, Any]
    state: dict[str, Tensor]
    file: Path
    recorded: dict[str, Tensor]

    def check(self, tokenizer: tv.Tokenizer) -> None:
        tokens = tokenizer.encode(self.recorded["images"])
        assert torch.equal(tokens.ids[..., 0], self.recorded["ids"])
        torch.testing.assert_close(tokenizer.decode(tokens), self.recorded["picture"].clamp(0, 1), atol=5e-5, rtol=0)


@pytest.fixture
def tiny_vqgan(
    recorded: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Tiny:
    tensors, metadata = recorded("maskgit_vqgan")
    official = json.loads(metadata["options"])
    state = {key[8:]: value.float() for key, value in tensors.items() if key.startswith("weights.")}
    table = preset("mini") | {
        "family": "maskgit-vqgan",
        "hub": "someone/tiny",
        "file": "weights/tiny.bin",
        "sha256": "",
        "licence": "CC-BY-NC-4.0",
        "paper": "https://arxiv.org/abs/2202.04200",
        "official": official,
    }
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path / "presets")
    monkeypatch.setattr("tokenizers_vis.presets._told", set())
    (tmp_path / "presets").mkdir()
    (tmp_path / "downloads").mkdir()
    torch.save(state, tmp_path / "downloads" / "tiny.bin")
    tiny = Tiny("tiny-vqgan", table, state, tmp_path / "downloads" / "tiny.bin", tensors)
    rewrite(tiny)
    return tiny


def rewrite(tiny: Tiny, **changes: Any) -> None:
    (catalogue.FOLDER / f"{tiny.name}.toml").write_text(to_toml(tiny.table | changes))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RELEASED)
def test_without_a_network_the_error_says_what_to_do(name: str, hub: Path) -> None:
    table = preset(name)
    with pytest.raises(CheckpointError) as error:
        tv.load(name, device="cpu")
    for word in (table["hub"], table["file"], "cannot be had from the Hugging Face Hub", "weights='path/to/folder'"):
        assert word in str(error.value)
    assert not downloaded(name)


def test_from_the_hub_and_told_once(tiny_vqgan: Tiny, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not downloaded(tiny_vqgan.name)
    put(hub, "someone/tiny", "weights/tiny.bin", tiny_vqgan.file.read_bytes())
    assert downloaded(tiny_vqgan.name)
    tokenizer = tv.load(tiny_vqgan.name, device="cpu")
    assert tokenizer.name == "tiny-vqgan" and not tokenizer.training
    tiny_vqgan.check(tokenizer)
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert "someone/tiny" in told.err and "CC-BY-NC-4.0, which forbids commercial use" in told.err
    tv.load(tiny_vqgan.name, device="cpu")
    assert capsys.readouterr() == ("", "")


def test_a_damaged_blob_is_noticed(tiny_vqgan: Tiny, hub: Path) -> None:
    """The preset knows no sha256; the blob's name is one."""
    whole = tiny_vqgan.file.read_bytes()
    damaged = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    put(hub, "someone/tiny", "weights/tiny.bin", damaged, blob=sha256(tiny_vqgan.file))
    with pytest.raises(CheckpointError, match="it is damaged, or another version"):
        tv.load(tiny_vqgan.name, device="cpu")


@pytest.mark.parametrize("from_hub", [True, False])
def test_the_sha256_of_a_preset_is_checked(tiny_vqgan: Tiny, hub: Path, from_hub: bool) -> None:
    # Small files of the Hub have a git hash as blob's name, which says nothing of their sha256.
    put(hub, "someone/tiny", "weights/tiny.bin", tiny_vqgan.file.read_bytes(), blob=COMMIT)
    weights = None if from_hub else tiny_vqgan.file
    rewrite(tiny_vqgan, sha256=sha256(tiny_vqgan.file))
    tiny_vqgan.check(tv.load(tiny_vqgan.name, device="cpu", weights=weights))
    rewrite(tiny_vqgan, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="expected 0{64}: it is damaged, or another version"):
        tv.load(tiny_vqgan.name, device="cpu", weights=weights)


# Weights at hand


def test_weights_are_a_file_or_a_folder_of_it(tiny_vqgan: Tiny, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "weights" / "tiny.bin"  # the repository as it is, the file in its folder
    renamed = tmp_path / "renamed" / "mine.safetensors"
    for path in (whole, renamed):
        path.parent.mkdir(parents=True)
    whole.write_bytes(tiny_vqgan.file.read_bytes())
    (whole.parent / "other.bin").write_bytes(b"another model of the repository")
    save_file(tiny_vqgan.state, renamed)
    for weights in (tiny_vqgan.file, tmp_path / "downloads", tmp_path / "whole", whole.parent, renamed.parent):
        tiny_vqgan.check(tv.load(tiny_vqgan.name, device="cpu", weights=weights))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_wrong_weights_are_refused(tiny_vqgan: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tiny_vqgan.state
    less = {key: value for key, value in state.items() if key != "decoder.conv_in.weight"}
    for name, wrong in {
        "less": less,
        "more": state | {"ema.decay": torch.zeros(1)},
        "reshaped": state | {"quantize.embedding.weight": state["quantize.embedding.weight"][:8]},
        "plain": [1, 2, 3],
        "empty": {},
        "evil": {"model": Evil()},
    }.items():
        torch.save(wrong, tmp_path / f"{name}.bin")
    (tmp_path / "cut.bin").write_bytes(tiny_vqgan.file.read_bytes()[:-5000])
    save_file(state, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5000])
    (tmp_path / "nothing").mkdir()
    not_it = "is no checkpoint of tiny-vqgan, which is weights/tiny.bin of someone/tiny: .*"
    for name, message in {
        "less.bin": f"{not_it}it does not fit its config; missing: decoder.net.path.first.weight",
        "more.bin": f"{not_it}left over: ema.decay",
        "reshaped.bin": f"{not_it}of another shape: quantizer.codebook",
        "plain.bin": f"{not_it}a table of tensors",
        "empty.bin": not_it,
        "evil.bin": "is refused: reading it would run code",
        "cut.bin": "cut.bin cannot be read as a torch file",
        "cut.safetensors": "cut.safetensors cannot be read as safetensors",
        "gone.bin": "there is no file or folder .*gone.bin; weights is where weights/tiny.bin was downloaded to",
        "nothing": "it holds none",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            tv.load(tiny_vqgan.name, device="cpu", weights=tmp_path / name)
    assert capsys.readouterr() == ("", "")


def test_the_bundled_tokenizer_takes_no_other_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="comes with the library"):
        tv.load("mini", device="cpu", weights=tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'mini'"):
        tv.load("minni", device="cpu", weights=tmp_path)


def test_a_file_of_weights_alone_asks_for_its_preset(tiny_vqgan: Tiny) -> None:
    with pytest.raises(CheckpointError, match=r"name the preset too, load\(preset, weights='.*tiny.bin'\)"):
        tv.load(tiny_vqgan.file, device="cpu")


# Folders


def test_a_download_is_named_by_where_it_lies(tiny_vqgan: Tiny, hub: Path, tmp_path: Path) -> None:
    """Tokens carry the name, so weights of the same shape from elsewhere do not get it."""
    table, config = tiny_vqgan.table | {"file": "tiny.bin"}, json.dumps(tiny_vqgan.table["official"]).encode()
    rewrite(tiny_vqgan, file=table["file"])
    snapshot = put(hub, "someone/tiny", "tiny.bin", tiny_vqgan.file.read_bytes()).parent
    put(hub, "someone/tiny", "config.json", config)
    for folder, name in {"tiny": "tiny-vqgan", "my-run": "my-run"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes(config)
        (tmp_path / folder / "tiny.bin").write_bytes(tiny_vqgan.file.read_bytes())
        assert tv.load(tmp_path / folder, device="cpu").name == name
    tokenizer = tv.load(snapshot, device="cpu")
    assert tokenizer.name == "tiny-vqgan"
    tiny_vqgan.check(tokenizer)


def test_an_incomplete_download_is_told(tiny_vqgan: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    with pytest.raises(CheckpointError, match=r"no config.json.*load\('.*', weights='.*tiny.bin'\)"):
        tv.load(folder, device="cpu")
    (folder / "config.json").write_text('{"channel_mult": [1, 2')
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        tv.load(folder, device="cpu")
    (folder / "config.json").write_text('{"hidden_size": 768}')
    with pytest.raises(CheckpointError, match="no family that is known here"):
        tv.load(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps(tiny_vqgan.table["official"]))
    (folder / "tiny.bin").unlink()
    with pytest.raises(CheckpointError, match="one other file of weights; it holds none"):
        tv.load(folder, device="cpu")
