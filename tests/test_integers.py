"""Ids as one integer, as bits and as words, against Python's own integers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tokenizers_vis.quantizers.integers import IdFormat

SIZES = {
    "one": (4096,),
    "one of 62 bits": (2**62,),
    "mixed": (5, 3, 7),
    "FQGAN": (16384, 16384, 16384),
    "UniTok": (4096,) * 8,
    "WeTok": (256,) * 16,
    "Instella": (2,) * 128,
    "across words": (2**40, 3, 2**60, 2**33),
    "a codebook of one": (1, 9, 1),
}


def draw(sizes: tuple[int, ...]) -> torch.Tensor:
    rows = [[random.randrange(size) for size in sizes] for _ in range(20)]
    return torch.tensor([[0] * len(sizes), [size - 1 for size in sizes], *rows])[:, None]  # b 1 k


@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("name", SIZES)
class TestRoundTrip:
    def test_bits_and_words_are_one_number(self, name: str, order: str):
        form = IdFormat(SIZES[name], order)
        ids = draw(form.sizes)
        bits, words = form.to_bits(ids), form.pack(ids)
        assert bits.dtype == torch.uint8 and bits.shape == (22, 1, form.bits)
        assert words.dtype == torch.int64 and words.shape == (22, 1, form.words)
        for row, word_row in zip(bits[:, 0].tolist(), words[:, 0].tolist(), strict=True):
            number = 0
            for word in word_row:
                number = number << 64 | word % 2**64
            row = row if order == "msb" else row[::-1]
            assert number == int("".join(map(str, row)), 2)
        assert torch.equal(form.from_bits(bits), ids) and torch.equal(form.from_bits(bits.bool()), ids)
        assert torch.equal(form.unpack(words), ids)

    def test_the_bits_of_each_id_are_its_own(self, name: str, order: str):
        form = IdFormat(SIZES[name], order)
        ids = draw(form.sizes)
        for row, bits in zip(ids[:, 0].tolist(), form.to_bits(ids)[:, 0].tolist(), strict=True):
            text = "".join(f"{i:0{width}b}" if width else "" for i, width in _in_order(row, form))
            assert "".join(map(str, bits)) == (text if order == "msb" else text[::-1])

    def test_one_integer(self, name: str, order: str):
        form = IdFormat(SIZES[name], order)
        ids = draw(form.sizes)
        if form.total >= 2**63:
            with pytest.raises(ValueError, match="use pack"):
                form.join(ids)
            return
        joined = form.join(ids)
        for row, number in zip(ids[:, 0].tolist(), joined[:, 0].tolist(), strict=True):
            digits = list(zip(row, form.sizes, strict=True))
            digits = digits if order == "msb" else digits[::-1]
            expected = 0
            for digit, size in digits:
                expected = expected * size + digit
            assert number == expected
        assert torch.equal(form.split(joined), ids)


def _in_order(row: list[int], form: IdFormat) -> list[tuple[int, int]]:
    pairs = list(zip(row, form.widths, strict=True))
    return pairs if form.order == "msb" else pairs[::-1]


def test_all_tokens_of_a_small_vocabulary_are_different():
    form = IdFormat((3, 4, 5), "lsb")
    ids = form.split(torch.arange(60))
    assert len(ids.unique(dim=0)) == 60 and ids[1].tolist() == [1, 0, 0]
    assert IdFormat((3, 4, 5)).split(torch.tensor(1)).tolist() == [0, 0, 1]
    assert form.total == math.prod((3, 4, 5)) and form.bits == 2 + 2 + 3


def test_what_no_token_is_says_why():
    form = IdFormat((3, 5))
    for call, wrong in [
        (form.join, torch.tensor([3, 0])),
        (form.join, torch.tensor([0, -1])),
        (form.pack, torch.tensor([0, 5])),
        (form.to_bits, torch.tensor([0, 0, 0])),
        (form.to_bits, torch.tensor([0.0, 1.0])),
        (form.split, torch.tensor(15)),
        (form.split, torch.tensor(-1)),
        (form.split, torch.tensor(1.0)),
        (form.from_bits, torch.tensor([1, 1, 0, 0, 0])),  # 3 in a codebook of 3
        (form.from_bits, torch.tensor([1, 1, 0])),
        (form.unpack, torch.tensor([1], dtype=torch.int32)),
        (form.unpack, torch.tensor([0, 0])),
    ]:
        with pytest.raises(ValueError, match="ids|bits|packed"):
            call(wrong)
    for sizes in ((), (0,), (2**64,), (2.5,)):
        with pytest.raises(ValueError, match="sizes"):
            IdFormat(sizes)
    with pytest.raises(ValueError, match="order"):
        IdFormat((2,), "little")
