"""Methods by name, what each makes of pictures of any size and what it costs; stamps, which say how it was measured."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_vis as tv
from tokenizers_vis.eval.codecs import through_codec
from tokenizers_vis.eval.methods import Method, parse_methods
from tokenizers_vis.eval.protocol import ContentHash, Stamp, StampError, refuse_mixture
from tokenizers_vis.tokenizer import Tokenizer

NAMES = ["a.jpg", "sub/b.png", "val.tar/c.jpg"]

Image.init()
needs_avif = pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow was built without AVIF")


@pytest.fixture(scope="module")
def pictures(photos: list[Path]) -> list[np.ndarray]:
    """Three photographs: wide, tall and square."""
    whole = [np.array(Image.open(path).convert("RGB")) for path in photos[:3]]
    return [whole[0][:90, :200], whole[1][:201, :77], whole[2][:64, :64]]


def one(spec: str, **options: object) -> Method:
    (method,) = parse_methods([spec], **options)
    return method


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    return -10 * math.log10(np.mean((x / 255 - y / 255) ** 2))


# Names


def test_names_stand_for_methods() -> None:
    specs = [
        "mini@1,16",
        "mini",
        "titok-l-32@32",
        "jpeg@q5,q10",
        "jpeg@q5,64:q5,q9",
        "webp",
        "resize@64,32",
        "identity",
    ]
    specs[4] = "avif@q5,64:q5,q9"
    labels = [method.label for method in parse_methods([*specs, "folder:some/where"])]
    ladder = [f"webp@q{q}" for q in (1, 5, 10, 25, 50)]
    assert labels == [
        *("mini@1", "mini@16", "mini", "titok-l-32@32", "jpeg@q5", "jpeg@q10", "avif@q5", "avif@64:q5", "avif@64:q9"),
        *ladder,
        *("resize@64", "resize@32", "identity", "folder:some/where"),
    ]
    for label in labels:  # a label is a name too
        assert one(label).label == label


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "nothing to evaluate"),
        (["jpgg@q5"], "no method 'jpgg@q5'. Did you mean 'jpeg'"),
        (["titok-l-23"], "Did you mean 'titok-l-32'"),
        (["jpeg@5"], "at '5': after the @ come qualities from q1 to q100"),
        (["jpeg@64"], "jpeg@64:q5 scales down"),
        (["jpeg@"], "cannot be read at ''"),
        (["webp@q0"], "q1 to q100"),
        (["avif@q101"], "q1 to q100"),
        (["jpeg@0:q5"], "at '0:q5'"),
        (["resize"], "a long side in pixels"),
        (["resize@0"], "a long side in pixels"),
        (["mini@x"], "a number of tokens, such as mini@1"),
        (["mini@1,"], "a number of tokens"),
        (["mini@129"], "asks for 129 tokens; mini makes 1 to 128"),
        (["titok-l-32@8"], "titok-l-32 makes always 32"),
        (["mini", "jpeg@q5", "mini"], "mini is there twice"),
    ],
)
def test_wrong_names_are_refused(specs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods(specs)


# What methods make of pictures


@pytest.mark.parametrize(
    "spec",
    [
        *("mini@4", "jpeg@q5", "jpeg@32:q50", "webp@q5", "resize@32", "identity"),
        pytest.param("avif@q5", marks=needs_avif),
    ],
)
def test_every_method_gives_pictures_back_in_their_sizes_however_they_are_batched(
    spec: str, pictures: list[np.ndarray]
) -> None:
    method = one(spec)
    method.prepare(NAMES)
    together = method.reconstruct(pictures, NAMES)
    for original, name, found in zip(pictures, NAMES, together, strict=True):
        assert found.pixels.shape == original.shape and found.pixels.dtype == np.uint8 and found.pixels.flags.writeable
        (alone,) = method.reconstruct([original], [name])
        # A net may differ in its last bit from batch to batch, which now and then moves a value by one level.
        assert np.abs(alone.pixels.astype(int) - found.pixels).max() <= (1 if method.kind == "tokenizer" else 0)
        assert (alone.nbytes, alone.bits) == (found.nbytes, found.bits)
        assert psnr(original, found.pixels + 1e-9) > 8
    facts = method.describe()
    assert (facts["label"], facts["kind"]) == (spec, method.kind)
    assert method.reconstruct([], []) == []


def test_a_tokenizer_costs_its_ids_and_sees_a_square_as_it_is(pictures: list[np.ndarray]) -> None:
    tok = tv.load("mini", "cpu")
    method = one("mini@16", device="cpu")
    (found,) = method.reconstruct([pictures[2]], ["c.jpg"])
    tokens = tok.encode(pictures[2], n_tokens=16)
    assert torch.equal(found.ids, tokens.ids[0])
    expected = (tok.decode(tokens)[0] * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found.pixels, expected)
    assert found.nbytes == tokens.nbytes[0] == 24 and found.bits == 16 * 12
    assert found.encode_seconds > 0 and found.decode_seconds > 0
    facts = method.describe()
    assert facts["tokens"] == 16 and facts["codebook_sizes"] == [4096] and facts["decode_passes"] == 1
    assert facts["licence"] == "research" and facts["commercial"] is False
    assert facts["parameters"] == sum(p.numel() for p in tok.parameters())


def test_bits_are_what_ids_hold_and_bytes_what_they_take(tiny: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Tokenizer.from_config(tiny("flextok", "fsq", "flow")).save(tmp_path / "tiny@home.safetensors")
    spec = str(tmp_path / "tiny@home.safetensors")
    whole, few = parse_methods([spec, f"{spec}@5"], device="cpu", sampling={"steps": 3, "guidance": 2.0})
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert whole.reconstruct([picture], ["x"])[0].ids.shape == (6, 1)
    (found,) = few.reconstruct([picture], ["x"])
    assert found.bits == pytest.approx(5 * math.log2(200))  # 8 x 5 x 5 codes
    assert found.nbytes == 5  # 5 tokens of 8 bits
    facts = few.describe()
    assert facts["decode_passes"] == 6 and facts["sampling"]["steps"] == 3
    with pytest.raises(ValueError, match="makes 1 to 6 tokens, asked for 7"):
        one(f"{spec}@7", device="cpu").prepare(["x"])


def test_a_tokenizer_that_decodes_to_nan_is_told(tiny: Callable, tmp_path: Path) -> None:
    tok = Tokenizer.from_config(tiny("flextok", "fsq", "vit"))
    with torch.no_grad():
        list(tok.decoder.parameters())[-1].fill_(float("nan"))
    tok.save(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="decodes x to NaN"):
        one(str(tmp_path / "broken.safetensors")).reconstruct([np.zeros((16, 16, 3), np.uint8)], ["x"])


def test_bytes_are_those_of_the_file(pictures: list[np.ndarray]) -> None:
    file = io.BytesIO()
    Image.fromarray(pictures[0]).save(file, "JPEG", quality=10, optimize=True)
    (found,) = one("jpeg@q10").reconstruct([pictures[0]], ["a.jpg"])
    assert found.nbytes == len(file.getvalue()) and found.bits == 8 * found.nbytes
    np.testing.assert_array_equal(found.pixels, np.array(Image.open(file)))


@pytest.mark.parametrize("codec", ["jpeg", "webp", pytest.param("avif", marks=needs_avif)])
def test_more_quality_is_more_bytes_and_closer(codec: str, pictures: list[np.ndarray]) -> None:
    coded = [through_codec(pictures[0], codec, q) for q in (1, 10, 40, 80)]
    sizes, closeness = [c.nbytes for c in coded], [psnr(pictures[0], c.pixels) for c in coded]
    assert sizes == sorted(sizes) and closeness == sorted(closeness)
    small = through_codec(pictures[0], codec, 40, long_side=40)
    assert small.nbytes < coded[2].nbytes and small.pixels.shape == pictures[0].shape
    # Never enlarged first: a smaller picture stays as it is.
    same = through_codec(pictures[0], codec, 40, long_side=400)
    assert same.nbytes == coded[2].nbytes and np.array_equal(same.pixels, coded[2].pixels)


def test_resize_keeps_more_the_larger_it_is(pictures: list[np.ndarray]) -> None:
    ladder = parse_methods(["resize@8,16,32,64,128"])
    closeness = [psnr(pictures[0], m.reconstruct(pictures[:1], NAMES[:1])[0].pixels) for m in ladder]
    assert closeness == sorted(closeness)
    (found,) = one("resize@200").reconstruct(pictures[:1], NAMES[:1])
    assert np.array_equal(found.pixels, pictures[0]) and found.nbytes is None


def test_a_pillow_without_a_codec_is_told_before_the_first_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(Image.SAVE, "AVIF", raising=False)
    with pytest.raises(ValueError, match="built without AVIF.*pip install --upgrade pillow, or leave avif out"):
        one("avif@q5").prepare(NAMES)
    with pytest.raises(ValueError, match="cannot hold a picture of 1 x 70000"):
        through_codec(np.zeros((70000, 1, 3), np.uint8), "jpeg", 5)


@pytest.mark.parametrize("spec", ["mini@1", "jpeg@q5", "resize@8", "identity"])
def test_wrong_arrays_are_refused(spec: str) -> None:
    method = one(spec)
    good = np.zeros((8, 8, 3), np.uint8)
    for images, names, message in (
        ([good], [], "1 pictures and 0 names"),
        ([good, good.astype(np.float32)], ["a", "b"], "b: a method takes uint8"),
        ([good[..., 0]], ["a"], "a: a method takes uint8"),
        ([good[:0]], ["a"], "a has no pixels"),
        ([torch.zeros(3, 8, 8)], ["a"], "a: a method takes uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            method.reconstruct(images, names)


# Reconstructions made elsewhere


def test_a_folder_holds_reconstructions_under_the_names_of_the_originals(
    tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    places = ["a.png", "sub/b.png", "c.webp"]
    (tmp_path / "sub").mkdir()
    for place, picture in zip(places, pictures, strict=True):
        Image.fromarray(255 - picture).save(tmp_path / place, lossless=True)
    method = one(f"folder:{tmp_path}")
    method.prepare(NAMES)
    found = method.reconstruct(pictures, NAMES)
    assert all(np.array_equal(f.pixels, 255 - p) for f, p in zip(found, pictures, strict=True))
    assert found[0].nbytes is None
    assert method.describe()["suffixes"] == [".png", ".webp"] and method.describe()["images"] == 3


def test_a_folder_that_does_not_fit_is_told(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        one(f"folder:{tmp_path / 'nothing'}").prepare(NAMES)
    with pytest.raises(ValueError, match="holds no image"):
        one(f"folder:{tmp_path}").prepare(NAMES)
    Image.fromarray(pictures[0][:50]).save(tmp_path / "a.png")
    method = one(f"folder:{tmp_path}")
    with pytest.raises(
        ValueError, match=r"lacks reconstructions of 2 of 3 pictures: sub/b.png, val.tar/c.jpg. It holds"
    ):
        method.prepare(NAMES)
    with pytest.raises(ValueError, match=r"a.png is 200 x 50, its original a.jpg is 200 x 90"):
        method.reconstruct(pictures[:1], NAMES[:1])
    Image.fromarray(pictures[0]).save(tmp_path / "a.webp")
    with pytest.raises(ValueError, match="a.jpg could be any of .*a.png, .*a.webp; keep one"):
        one(f"folder:{tmp_path}").prepare(NAMES[:1])
    one(f"folder:{tmp_path}").prepare(["a.webp"])  # its very name is no question


# Stamps


def test_stamps_say_what_differs() -> None:
    stamp = Stamp("abc", 100, "256", "center", extra={"bins": "new", "ddof": 1})
    assert stamp.difference(Stamp("abc", 100, "256", "center", extra={"ddof": 1, "bins": "new"})) == ""
    other = Stamp("abc", 200, "256", extra={"bins": "old", "k": 3})
    assert stamp.difference(other) == (
        "n: 100 against 200; crop: center against none; extra.bins: new against old; extra.ddof: 1 against nothing; "
        "extra.k: nothing against 3"
    )
    assert Stamp.from_dict(stamp.to_dict()) == stamp
    again = Stamp.from_dict(stamp.to_dict())
    assert again.key() == stamp.key() != other.key() and hash(again) == hash(stamp)
    with pytest.raises(StampError, match="a stamp has dataset, n and of"):
        Stamp.from_dict({"dataset": "abc"})


def test_different_stamps_do_not_share_a_column() -> None:
    stamp = Stamp("abc", 100)
    refuse_mixture("fid", {"mini": stamp, "jpeg": Stamp("abc", 100)})
    with pytest.raises(
        StampError, match="fid of mini and of webp .* cannot stand in one column: dataset: abc against d"
    ):
        refuse_mixture("fid", {"mini": stamp, "jpeg": stamp, "webp": Stamp("d", 100)})


def test_the_content_hash_is_of_the_set_of_pictures(pictures: list[np.ndarray]) -> None:
    def of(*some: np.ndarray) -> str:
        found = ContentHash()
        for picture in some:
            found.update(picture)
        return found.hexdigest()

    a, b, c = pictures
    assert of(a, b, c) == of(c, a, b) and len(of(a)) == 64
    assert len({of(a), of(b), of(a, b), of(a, a), of(a, b, c)}) == 5
    assert of(a) != of(np.ascontiguousarray(a.reshape(200, 90, 3)))
    parts = ContentHash(of(a))
    parts.merge(of(b, c))
    assert parts.hexdigest() == of(a, b, c)
    with pytest.raises(ValueError, match="uint8 h w 3"):
        parts.update(a / 255)
