from __future__ import annotations

import copy
import errno
import os
import pickle
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenizers_vis.files import write_atomically
from tokenizers_vis.token_file import TokenFileError
from tokenizers_vis.tokens import Tokens

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def batches(draw, nested=(None, True, False)):
    sizes = draw(st.lists(st.integers(2, 70) | st.integers(2, 2**62), min_size=1, max_size=3))
    b, n = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, n), min_size=b, max_size=b)) if draw(st.booleans()) else [n] * b
    ids = np.full((b, n, len(sizes)), -1, dtype=np.int64)
    for i, length in enumerate(lengths):
        for j, size in enumerate(sizes):
            ids[i, :length, j] = draw(st.lists(st.integers(0, size - 1), min_size=length, max_size=length))
    name = draw(st.sampled_from(["mini", "flextok-d18-d28.dfn", "träge ✓", ""]))
    return Tokens(torch.from_numpy(ids), sizes, name, torch.tensor(lengths), draw(st.sampled_from(nested)))


def some(b=2, n=8, sizes=(16,), nested=True, lengths=None):
    """Tokens that differ from place to place."""
    grid = torch.arange(b * n * len(sizes)).reshape(b, n, len(sizes)) % torch.tensor(sizes)
    if lengths is not None:
        grid[torch.arange(n) >= torch.tensor(lengths)[:, None]] = -1
        lengths = torch.tensor(lengths)
    return Tokens(grid, sizes, "mini", lengths, nested)


def quietly(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Tokens.from_bytes(data)


@QUICK
@given(batches())
def test_a_file_holds_what_was_saved(tokens):
    back = Tokens.from_bytes(tokens.to_bytes())
    assert back == tokens
    assert back.nested == tokens.nested
    assert back.ids.dtype == torch.int64 and back.ids.is_contiguous()
    if tokens.lengths is None:
        assert back.lengths is None and torch.equal(back.ids, tokens.ids)


@QUICK
@given(batches(), st.data())
def test_a_flipped_bit_never_passes(tokens, data):
    content = bytearray(tokens.to_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TokenFileError):
        Tokens.from_bytes(content)


@QUICK
@given(batches(nested=[True]))
def test_every_cut_of_a_nested_file_is_an_error_or_exact_prefixes(tokens):
    content = tokens.to_bytes()
    full = [part.ids[0] for part in tokens]
    bits, total = tokens.bits_per_token, sum(map(len, full))
    payload = -(-total * bits // 8)
    for end in range(len(content)):
        arrived = (end - (len(content) - payload)) * 8 // bits
        if arrived < len(tokens):
            with pytest.raises(TokenFileError):
                Tokens.from_bytes(content[:end])
            continue
        with pytest.warns(UserWarning, match=f"{arrived} of {total} tokens"):
            cut = Tokens.from_bytes(content[:end])
        prefixes = [part.ids[0] for part in cut]
        assert sum(map(len, prefixes)) == arrived < total  # all that arrived whole, and no more
        assert all(torch.equal(part, whole[: len(part)]) for part, whole in zip(prefixes, full, strict=True))
        # No image waits for another: who has not ended has as many tokens as the longest, or one fewer.
        waiting = [len(part) for part, whole in zip(prefixes, full, strict=True) if len(part) < len(whole)]
        assert min(waiting) >= cut.n_tokens - 1


@QUICK
@given(batches(nested=[None, False]), st.data())
def test_a_cut_file_of_a_plain_tokenizer_is_refused(tokens, data):
    content = tokens.to_bytes()
    with pytest.raises(TokenFileError):
        Tokens.from_bytes(content[: data.draw(st.integers(0, len(content) - 1))])


@QUICK
@given(batches(), st.binary(min_size=1, max_size=40))
def test_trailing_and_foreign_bytes_are_refused(tokens, extra):
    with pytest.raises(TokenFileError, match="follow"):
        Tokens.from_bytes(tokens.to_bytes() + extra)
    with pytest.raises(TokenFileError):
        Tokens.from_bytes(extra)


def test_the_file_is_what_its_description_says():
    tokens = Tokens(torch.tensor([[[5, 1], [6, 2]], [[7, 0], [-1, -1]]]), (8, 3), "t", torch.tensor([2, 1]), True)
    # 3 + 2 bits a token: (5 1) and (7 0), then (6 2).
    payload = int("101_01" + "111_00" + "110_10" + "0", 2).to_bytes(2, "big")
    header = b"\x89TOK" + bytes([1, 1 | 2 | 4, 2, 2, 2, 8, 3, 1]) + b"t" + bytes([2, 1])
    header += zlib.crc32(payload).to_bytes(4, "big")
    assert tokens.to_bytes() == header + zlib.crc32(header).to_bytes(4, "big") + payload


def resealed(content, **changes):
    """A file whose header is changed and its checksum made right again: a writer's mistake, not damage."""
    content = bytearray(content)
    for place, value in changes.items():
        content[int(place[1:])] = value
    end = len(content) - 4 - 2  # the payload of the file below is 2 bytes
    content[end : end + 4] = zlib.crc32(content[:end]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_4": 3}, "version 3"),
        ({"_0": 0}, "no .tok file"),
        ({"_5": 8}, "header is wrong"),
        ({"_5": 2}, "header is wrong"),  # nested, yet not known
        ({"_6": 0}, "header is wrong"),  # no image
        ({"_9": 1}, "sizes"),
        ({"_9": 9}, "codebook 0 run from 0 to 8"),  # ids up to 15 in a codebook of 9, which also takes 4 bits
        ({"_9": 64}, "cut short"),
    ],
)
def test_a_header_that_was_written_wrongly_is_named(changes, message):
    content = Tokens(torch.tensor([[15, 1, 2]]), (16,), "t", nested=False).to_bytes()
    assert resealed(content) == content
    with pytest.raises(TokenFileError, match=message):
        Tokens.from_bytes(resealed(content, **changes))


def test_a_promise_of_endless_tokens_takes_no_memory():
    endless = b"\xff" * 7 + b"\x3f"
    header = b"\x89TOK" + bytes([1, 3, 1]) + endless + bytes([1, 16, 1]) + b"t" + bytes(4)
    tokens = quietly(header + zlib.crc32(header).to_bytes(4, "big") + b"\x12\x34")
    assert tokens.ids.flatten().tolist() == [1, 2, 3, 4]


def test_a_million_ids_are_quick_and_the_header_is_small():
    tokens = Tokens(torch.randint(0, 4096, (1000, 1000, 1)), (4096,), "mini", nested=True)
    start = time.perf_counter()
    content = tokens.to_bytes()
    assert Tokens.from_bytes(content) == tokens
    assert time.perf_counter() - start < 5
    assert sum(tokens.nbytes) == 1_500_000 < len(content) < 1_500_040
    assert len(Tokens(tokens.ids[:1, :256], (64000,), "flextok-d18-d28.dfn").to_bytes()) - 512 < 50
    assert len(some(b=1).to_bytes()) - 4 < 30


def test_save_and_load(tmp_path):
    path = tmp_path / "cat.tok"
    tokens = some()
    tokens.save(path)
    assert Tokens.load(path) == tokens == Tokens.load(str(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"cat\.tok.*14 of 16 tokens"):
        assert Tokens.load(path) == tokens[:, :7]
    path.write_bytes(b"")
    with pytest.raises(TokenFileError, match=r"cat\.tok.*header"):
        Tokens.load(path)
    for wrong in (tmp_path, tmp_path / "dog.tok"):
        with pytest.raises(TokenFileError, match=wrong.name):
            Tokens.load(wrong)


@pytest.mark.parametrize("broken", ["replace", "fsync"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken, existing):
    path = tmp_path / "cat.tok"
    if existing:
        some(b=1).save(path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        with pytest.raises(OSError, match="space"):
            some(b=3).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cat.tok"] * existing
    if existing:
        assert Tokens.load(path) == some(b=1)


def test_write_atomically_with_a_function(tmp_path):
    path = tmp_path / "a.png"

    def fails(aside):
        assert aside.parent == tmp_path and aside.suffix == ".png" and aside != path
        aside.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails)
    assert not list(tmp_path.iterdir())
    write_atomically(path, lambda aside: aside.write_bytes(b"whole"))
    assert path.read_bytes() == b"whole"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(OSError):
        write_atomically(tmp_path / "missing" / "a", b"")


@pytest.mark.skipif(os.name != "posix", reason="links and modes are posix")
def test_write_atomically_keeps_links_and_modes(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_atomically(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and real.stat().st_mode & 0o777 == 0o600

    def private(aside):
        aside.unlink(missing_ok=True)
        os.close(os.open(aside, os.O_CREAT | os.O_WRONLY, 0o600))

    write_atomically(tmp_path / "new", private)
    (tmp_path / "plain").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@QUICK
@given(batches())
def test_a_sequence_goes_both_ways(tokens):
    pad = tokens.vocab_size
    if pad >= 2**63:
        return
    sequence = tokens.to_sequence(pad)
    k = len(tokens.codebook_sizes)
    assert sequence.dtype == torch.int64 and sequence.shape == (len(tokens), tokens.n_tokens * k)
    back = Tokens.from_sequence(sequence, tokens.codebook_sizes, tokens.tokenizer, pad)
    assert back == tokens and back.n_tokens == tokens.n_tokens
    for part in tokens:
        assert Tokens.from_sequence(part.to_sequence()[0], tokens.codebook_sizes, tokens.tokenizer) == part


def test_sequences_are_token_major_with_offset_codebooks():
    tokens = Tokens(torch.tensor([[[1, 2], [3, 0]]]), (4, 3), "t")
    assert tokens.to_sequence().tolist() == [[1, 6, 3, 4]]
    ragged = Tokens.stack([tokens, tokens[:, :1]])
    assert ragged.to_sequence(pad=7).tolist() == [[1, 6, 3, 4], [1, 6, 7, 7]]
    with pytest.raises(ValueError, match="give pad"):
        ragged.to_sequence()
    with pytest.raises(ValueError, match="from 7 on"):
        ragged.to_sequence(pad=6)


@pytest.mark.parametrize(
    ("sequence", "pad", "message"),
    [
        ([0, 4, 1], None, "multiple"),
        ([0.0, 4.0], None, "integers"),
        ([0, 3], None, "id 3 at place 1, where codebook 1 takes 4 to 6"),
        ([4, 4], None, "id 4 at place 0"),
        ([0, 7], None, "id 7"),
        ([-1, 4], None, "id -1"),
        ([-(2**63), 4], None, "id -9"),
        ([0, 4, 7, 4], 7, "id 4 at place 3"),
        ([0, 4, 1, 7], 7, "whole tokens"),
        ([7, 7], 7, "at least one"),
        ([], None, "at least one"),
        ([[[0, 4]]], None, r"b \(n 2\)"),
    ],
)
def test_wrong_sequences_are_refused(sequence, pad, message):
    dtype = torch.float32 if message == "integers" else torch.int64
    with pytest.raises(ValueError, match=message):
        Tokens.from_sequence(torch.tensor(sequence, dtype=dtype), (4, 3), "t", pad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, "integers"),
        ({"ids": torch.zeros(2, 3, 2, dtype=torch.int64)}, "b n 1"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "b n 1"),
        ({"ids": torch.zeros(0, 3, dtype=torch.int64)}, "at least one"),
        ({"ids": torch.full((2, 3), 16)}, "0 to 15"),
        ({"ids": torch.full((2, 3), -1)}, "0 to 15"),
        ({"ids": [[1, 2]]}, "torch.as_tensor"),
        ({"codebook_sizes": ()}, "sizes"),
        ({"codebook_sizes": (1,)}, "sizes"),
        ({"codebook_sizes": 16}, "sizes"),
        ({"codebook_sizes": (2**62 + 1,)}, "sizes"),
        ({"tokenizer": None}, "name"),
        ({"nested": 1}, "nested"),
        ({"lengths": torch.tensor([3, 2])}, "are -1"),
        ({"lengths": torch.tensor([3, 4])}, "1 to 3"),
        ({"lengths": torch.tensor([0, 3])}, "1 to 3"),
        ({"lengths": torch.tensor([3])}, "each of 2"),
        ({"lengths": torch.tensor([3.0, 3.0])}, "whole number"),
        ({"lengths": torch.tensor([3, 3]), "ids": torch.zeros(3, dtype=torch.int64)}, "b n 1"),
        (
            {"lengths": torch.tensor([3, 2]), "ids": torch.tensor([[1, 2, 3], [1, -1, -1]])},
            "values from -1",
        ),
    ],
)
def test_wrong_tokens_are_refused(change, message):
    right = {"ids": torch.ones(2, 3, dtype=torch.int64), "codebook_sizes": (16,), "tokenizer": "t"}
    Tokens(**right)
    with pytest.raises(ValueError, match=message):
        Tokens(**right | change)


def test_tokens_are_made_uniform():
    tokens = Tokens(torch.ones(2, 3, dtype=torch.int32), [16], "t", [3, 3])
    assert tokens.ids.shape == (2, 3, 1) and tokens.ids.dtype == torch.int64
    assert tokens.codebook_sizes == (16,) and tokens.lengths is None
    ragged = Tokens(torch.tensor([[1, -1, -1], [2, 3, -1]]), (16,), "t", [1, 2])
    assert ragged.lengths.dtype == torch.int64 and ragged.n_tokens == 3
    assert ragged == Tokens(ragged.ids[:, :2], (16,), "t", [1, 2])  # room for padding does not count
    assert copy.deepcopy(ragged) == ragged == pickle.loads(pickle.dumps(ragged))


def test_equality_is_of_content():
    tokens = some(lengths=[3, 8])
    assert tokens == some(lengths=[3, 8]) == tokens.to("cpu") == tokens.cpu()
    others = [some(), some(sizes=(17,)), tokens[:1], Tokens(some().ids, (16,), "other"), tokens.ids, None]
    assert all(tokens != other for other in others)
    with pytest.raises(TypeError, match="hashable"):
        hash(tokens)


@QUICK
@given(batches(nested=[None, True]), st.data())
def test_parts_of_the_batch_and_prefixes(tokens, data):
    b, n = len(tokens), tokens.n_tokens
    assert Tokens.stack(tokens) == tokens and Tokens.stack(tokens).nested == tokens.nested
    i = data.draw(st.integers(-b, b - 1))
    assert tokens[i] == list(tokens)[i] and len(tokens[i]) == 1
    order = data.draw(st.lists(st.integers(0, b - 1), min_size=1, max_size=4))
    assert tokens[order] == Tokens.stack(list(tokens)[i] for i in order) == tokens[torch.tensor(order)]
    assert tokens[::-1] == Tokens.stack(list(tokens)[::-1])
    mask = torch.zeros(b, dtype=torch.bool)
    mask[i] = True
    assert tokens[mask] == tokens[i]
    m = data.draw(st.integers(1, n + 2))
    prefix = tokens[:, :m]
    assert prefix.n_tokens == min(m, n)
    assert [p.ids.tolist() for p in prefix] == [t.ids[:, :m].tolist() for t in tokens]
    assert tokens[i, :m] == prefix[i]
    assert tokens.nbytes == [-(-part.n_tokens * tokens.bits_per_token // 8) for part in tokens]


def test_wrong_indices_are_refused():
    tokens = some()
    for index in [(0, 3), (0, slice(1, 4)), (0, slice(0, 8, 2)), (0, slice(0, 0)), slice(2, 2), 1.5, (0, 0, 0), "a"]:
        with pytest.raises(ValueError):
            tokens[index]
    for index in (2, -3, [0, 2]):
        with pytest.raises(IndexError, match="0 to 1"):
            tokens[index]
    with pytest.raises(ValueError, match="nested tokenizer"):
        some(nested=False)[:, :7]
    assert some(nested=False)[:1, :8] == some(nested=False)[0] == some(nested=False)[0, :]


def test_stack_refuses_strangers():
    for parts in ([], [some(), some(sizes=(17,))], [some(), Tokens(some().ids, (16,), "other")]):
        with pytest.raises(ValueError, match="stack"):
            Tokens.stack(parts)
    assert Tokens.stack([some(nested=True), some(nested=None)]).nested is None


def test_numbers_and_texts():
    tokens = some(b=2, n=64, sizes=(4096,))
    assert repr(tokens) == "Tokens(2 x 64 of mini, 1 codebook of 4096, 96 bytes an image)"
    assert repr(some(n=4, sizes=(4, 3), lengths=[1, 4])) == (
        "Tokens(2 x 1 to 4 of mini, 2 codebooks of 3 to 4, 1 to 2 bytes an image)"
    )
    mixed = some(sizes=(4096, 3, 2))
    assert (mixed.bits_per_token, mixed.vocab_size, mixed.n_tokens, len(mixed)) == (15, 4101, 8, 2)
    assert Tokens(torch.tensor([[2**62 - 1]]), (2**62,), "t").bits_per_token == 62


def test_html_shows_each_id_and_escapes():
    page = some(b=2, n=4, sizes=(16, 5), lengths=[2, 4])._repr_html_()
    assert page.count("title=") == (2 + 4) * 2 and "-1" not in page
    assert "title='4'" in page and "and" not in page
    assert "<script>" not in Tokens(torch.tensor([[1]]), (2,), "<script>")._repr_html_()
    page = Tokens(torch.zeros(10, 300, dtype=torch.int64), (2,), "t")._repr_html_()
    assert page.count("title=") == 8 * 256 and "44 more" in page and "2 more images" in page


@pytest.mark.gpu
def test_on_a_gpu():
    tokens = some(lengths=[3, 8])
    there = tokens.to("cuda")
    assert there.ids.is_cuda and there.lengths.is_cuda and there == tokens
    assert there[:, :5] == tokens[:, :5] and Tokens.from_bytes(there.to_bytes()) == tokens
    assert (
        Tokens.from_sequence(there.to_sequence(16), (16,), "mini", 16) == tokens == Tokens.stack([there[0], tokens[1]])
    )
