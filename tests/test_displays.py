"""What a notebook shows of tokens."""

from __future__ import annotations

import re

import torch

from tokenizers_vis.tokens import Tokens


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page).replace("&middot;", "·")).strip()


def test_counts_bytes_and_prefixes():
    ids = torch.tensor([[7, 7, 3, 9, 1], [4, 4, -1, -1, -1]])
    text = words(Tokens(ids, (4096,), "t", torch.tensor([5, 2]), nested=True)._repr_html_())
    assert (
        "image 0 · 5 tokens · 8 bytes · 4 distinct ids 7 7 3 9 1 the first 1, 2, 4, 5 tokens: 2, 3, 6, 8 bytes" in text
    )
    assert "image 1 · 2 tokens · 3 bytes · 1 distinct id 4 4 the first 1, 2 tokens: 2, 3 bytes" in text


def test_tokens_without_prefixes_say_nothing_of_them():
    text = words(Tokens(torch.tensor([[1, 2]]), (4,), "t", nested=False)._repr_html_())
    assert "the first" not in text and "image 0 · 2 tokens · 1 byte · 2 distinct ids 1 2" in text


def test_bits_are_dots_and_their_page_stays_small():
    page = Tokens(torch.randint(2, (1, 128, 64)), (2,) * 64, "t")._repr_html_()
    assert page.count("title='") == 128 * 64 and ">1<" not in page and len(page) < 900_000
    assert "2 distinct ids in each codebook" in words(page)


def test_the_first_and_the_last_id_look_unlike():
    page = Tokens(torch.tensor([[0, 1]]), (2,), "t")._repr_html_()
    first, last = map(int, re.findall(r"hsl\((\d+)", page))
    assert 90 < (last - first) % 360 < 270  # far apart round the circle of hues
