"""Margins are what they say, and the doctor tells a sound tokenizer from one that is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.config import build
from tokenizers_vis.eval.doctor import examine
from tokenizers_vis.eval.margins import margins
from tokenizers_vis.eval.metrics import CodebookUsage
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.tokenizer import Tokenizer

# Two numbers a vector, so that a circle of directions holds the worst one.
EXACT = {
    "vq": {"kind": "vq", "dim": 2, "codebook_size": 24},
    "cosine": {"kind": "vq", "dim": 2, "codebook_size": 9, "distance": "cosine"},
    "sim_vq": {"kind": "sim_vq", "dim": 2, "codebook_size": 16},
    "vqgan_lc": {"kind": "vqgan_lc", "dim": 2, "codebook_size": 16, "table_dim": 5},
    "fsq": {"kind": "fsq", "levels": [8, 5]},
    "fsq symmetric": {"kind": "fsq", "levels": [8, 5], "form": "symmetric"},
    "ifsq": {"kind": "fsq", "levels": [7, 5], "form": "ifsq"},
    "lfq": {"kind": "lfq", "bits": 2},
    "lfq spherical": {"kind": "lfq", "bits": 2, "spherical": True},
    "gfq": {"kind": "gfq", "groups": 2, "bits": 1},
    "bsq": {"kind": "bsq", "bits": 2, "group": 1},
    "product": {"kind": "product", "parts": [{"kind": "fsq", "levels": [4]}, {"kind": "lfq", "bits": 1}]},
}
# Ids of two bundled photographs whose margins are wide; in float32 they are these on every machine.
GOLDEN = {
    "cat": """
        1398 1334 2477 1901 1957 1899 1390 1428 1658 1898 2454 443 1946 1260 2965 1388 602 2459 2276 1972 1930
        1945 2342 1454 1391 2413 2476 757 1459 1436 1396 2477 1973 884 818 2549 789 1840 2979 1217 2985 1429
        2418 1454 1460 2918 1196 2317 2450 2420 1917 2908 3287 762 1892 1947 2398 2972 803 2446 1371 2379 1362
        3478 1836 1051 2923 1380 1981 2453 1837 2405 1949 2995 2365 3486 956 1459 1438 1260 2422 793 821 1196
        2486 1930 1840 2421 1454 3441 2461 2869 766 1974 2476 1845 2420 1974 1962 755 3036 1309 2750 2979 2195
        2421 2981 749 2862 2342 1391 1819 3357 2962 2877 1389 2853 3231 2397 2358 2331 3302 2107 1900 3367 380
        3445 2228
    """,
    "flower": """
        265 529 90 1544 1011 553 1155 1492 576 78 1057 981 2612 601 40 2161 1482 2098 1351 1585 1502 55 2626
        3067 2106 2005 1065 3242 1526 49 2108 1587 498 3114 1073 633 3208 1486 609 3578 3121 2821 617 1588 961
        3124 3123 544 1995 943 562 1145 1074 1000 1049 1487 830 1494 572 1066 971 3122 67 608 2162 1482 2082
        2167 1066 1014 88 1932 1996 2089 1485 16 2012 1974 2757 1075 1075 400 3106 3115 105 1510 1484 97 3579
        3113 2013 136 3169 1931 49 2605 1060 948 47 561 3002 3136 2523 593 1943 2165 1502 562 2114 1428 2097 66
        16 1995 934 2172 1083 554 443 576 975 894 576 550 129 1965 3106 217
    """,
}


def built(table: dict[str, Any]) -> Quantizer:
    quantizer = build(Quantizer, table).eval()
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter)
    return quantizer


@pytest.mark.parametrize("name", EXACT)
def test_no_shorter_move_changes_an_id_and_one_as_long_does(name: str) -> None:
    quantizer = built(EXACT[name])
    z = torch.randn(2, 10, 2)
    found = margins(quantizer, z)
    assert found.exact and found.values.shape == (2, 10) and (found.values > 0).all()
    way = (found.values * z.double().norm(dim=-1))[..., None]
    angles = torch.arange(0, 2 * math.pi, 0.04, dtype=torch.float64)
    here, changed = quantizer(z).ids, torch.zeros(2, 10, dtype=torch.bool)
    for direction in torch.stack([angles.cos(), angles.sin()], dim=-1):
        assert torch.equal(quantizer((z + 0.999 * way * direction).float()).ids, here)
        changed |= (quantizer((z + 1.001 * way * direction).float()).ids != here).any(dim=-1)
    assert changed.all()


def test_an_id_has_no_room_on_its_boundary_and_a_code_that_is_there_twice_is_one() -> None:
    quantizer = built(EXACT["vq"])
    with torch.no_grad():
        quantizer.codebook[:] = torch.tensor([1.0, 0.0])
        quantizer.codebook[1:3] = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    values = margins(quantizer, torch.tensor([[[0.5, 0.5], [2.0, 0.0]]])).values[0]
    torch.testing.assert_close(values, torch.tensor([0.0, 2**-0.5], dtype=torch.float64))


def test_where_there_is_no_formula_a_nudge_finds_no_less_than_the_shortest_way() -> None:
    """optimal transport's quantizer chooses the nearest code in eval, as a vq does."""
    vq = built({"kind": "vq", "dim": 2, "codebook_size": 24})
    nudged = built({"kind": "opt_vq", "dim": 2, "codebook_size": 24, "projection": False})
    nudged.codebook.data = vq.codebook.data
    z = torch.randn(2, 50, 2)
    exact, found = margins(vq, z), margins(nudged, z)
    assert exact.exact and not found.exact and torch.equal(margins(nudged, z).values, found.values)
    assert (found.values >= exact.values).all() and (found.values[found.values.isfinite()].log2() % 1 == 0).all()
    assert found.values.isfinite().float().mean() > 0.3


def test_several_ids_along_an_image_have_margins_of_their_own() -> None:
    part = {"kind": "vq", "dim": 2, "codebook_size": 16}
    quantizer = built({"kind": "multi_scale", "part": part, "scales": [1, 2], "share": 1})
    assert margins(quantizer, torch.randn(3, 4, 2)).values.shape == (3, 5)


@pytest.fixture(scope="module")
def mini() -> Tokenizer:
    return tv.load(device="cpu")


@pytest.mark.parametrize(("threads", "batch_size"), [(1, 1), (1, 4), (1, 32), (2, 2), (2, 32)])
def test_golden_ids(mini: Tokenizer, photos: list[Path], threads: int, batch_size: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for order in (photos, photos[::-1]):
            ids = dict(zip(order, mini.encode(order, batch_size=batch_size).ids[..., 0].tolist(), strict=True))
            for path in photos:
                if path.stem in GOLDEN:
                    assert ids[path] == list(map(int, GOLDEN[path.stem].split()))
    finally:
        torch.set_num_threads(before)


def test_the_bundled_tokenizer_is_sound(mini: Tokenizer, photos: list[Path]) -> None:
    threads = torch.get_num_threads()
    report = examine(mini, photos, batch_size=4)
    assert torch.get_num_threads() == threads and report.sound and report.exact
    assert (report.tokenizer, report.images, report.tokens, report.ids) == ("mini", 6, 768, 768)
    changes = {change.condition: change for change in report.changes}
    assert sum(change.sound for change in report.changes) == 3
    assert changes["another batch split"].moved < 1e-5 < 1e-4 < changes["a bfloat16 encoder"].moved < 1
    half = tv.load(device="cpu", dtype=torch.bfloat16).encode(photos, batch_size=4).ids
    assert changes["a bfloat16 encoder"].ids == (half != mini.encode(photos).ids).sum() > 0
    usage = CodebookUsage(mini.codebook_sizes)
    usage.update(mini.encode(photos).ids)
    assert report.usage[0][:5] == usage.compute()[0][:5]
    smallest, hundredth, middle = report.margins
    assert 0 < smallest < hundredth < middle < 1 and report.near == 0 and report.rounding < 1e-5
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["margins"]["middle"] == middle and len(told["usage"][0]["position_entropy"]) == 128 and told["sound"]
    text = str(report)
    assert f"{report.usage[0].dead:,} not" in text and f"half below {middle:.1e}" in text and "768 ids" in text


def test_ids_that_hang_on_their_batch_are_told(tiny: Callable[..., dict[str, Any]]) -> None:
    """In a transport plan over the batch every image has a say in the ids of the others."""
    table = tiny("titok", "vq", "vit")
    table["quantizer"] = {"kind": "opt_vq", "dim": 4, "codebook_size": 32, "eval_assignment": "sinkhorn"}
    report = examine(Tokenizer.from_config(table).eval(), list(torch.rand(8, 3, 16, 16)))
    split = report.changes[0]
    assert not report.sound and split.ids > 0 and split.moved < 1e-5 and "nudged" in str(report)
    assert report.to_dict()["sound"] is False


def test_what_has_no_ids_is_refused(tiny: Callable[..., dict[str, Any]], mini: Tokenizer) -> None:
    table = tiny("titok", "vq", "vit") | {"name": "vae"}
    table["encoder"]["dim"], table["quantizer"] = 8, {"kind": "gaussian", "dim": 4}
    with pytest.raises(ValueError, match="vae has continuous tokens"):
        examine(Tokenizer.from_config(table).eval(), [Tensor(3, 16, 16).zero_()])
    with pytest.raises(ValueError, match="no images"):
        examine(mini, [])
