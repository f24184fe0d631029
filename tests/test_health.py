"""A run's health: codebook numbers against exact counts, alarms when they should and not else, arithmetic counted."""

from __future__ import annotations

import math
import time

import pytest
import torch

from tokenizers_vis.eval.metrics import CodebookUsage
from tokenizers_vis.train.health import CodeHealth, alarms, peak_flops, peak_of, training_flops


def draw(sizes: tuple[int, ...], images: int, n: int) -> torch.Tensor:
    return torch.stack([torch.randint(0, size, (images, n)) for size in sizes], dim=-1)


@pytest.mark.parametrize("sizes", [(37,), (16, 5, 1), (2**40, 3)])
def test_numbers_are_those_of_exact_counts(sizes: tuple[int, ...]) -> None:
    health, exact = CodeHealth(sizes, 6), CodebookUsage(sizes)
    for images in (3, 1, 40):
        ids = (draw(sizes, images, 6) // 2).clamp_min(0)
        health.update(ids)
        exact.update(ids)
    scalars = health.compute()
    for j, (use, size) in enumerate(zip(exact.compute(), sizes, strict=True)):
        assert scalars[f"perplexity/{j}"] == pytest.approx(use.perplexity)
        even = size * (1 - (1 - 1 / size) ** use.tokens) if size < 100 else use.tokens
        assert scalars[f"usage/{j}"] == pytest.approx((size - use.dead) / even, rel=1e-6)
        assert scalars.get(f"dead/{j}", use.dead) == use.dead
        assert (f"dead/{j}" in scalars) == (use.tokens >= 8 * size)
        assert scalars[f"entropy_first/{j}"] == pytest.approx(use.position_entropy[0].item())
        assert scalars[f"entropy_last/{j}"] == pytest.approx(use.position_entropy[-1].item())
        assert scalars[f"entropy_mean/{j}"] == pytest.approx(use.position_entropy.mean().item())


def test_the_window_rolls_and_computing_empties_nothing() -> None:
    health = CodeHealth((1024,), 8)  # 16 ids for each code: 2,048 images
    for _ in range(9):
        health.update(torch.randint(0, 512, (256, 8, 1)))
    half = health.compute()
    assert half == health.compute()
    assert half["usage/0"] == pytest.approx(0.5) and half["dead/0"] == 512
    health.update(torch.full((1024, 8, 1), 700))
    assert health.compute()["dead/0"] == 511
    health.update(torch.full((5000, 8, 1), 700))  # more than the window holds, at once
    assert health.compute()["perplexity/0"] == 1 and health.compute()["dead/0"] == 1023


def test_padding_and_lengths_do_not_count() -> None:
    ids = torch.randint(0, 9, (30, 6, 1))
    lengths = torch.randint(1, 5, (30,))
    given, padded = CodeHealth((9,), 6), CodeHealth((9,), 6)
    given.update(torch.full((30, 6, 1), 8))
    padded.update(torch.full((30, 6, 1), 8))
    given.update(ids[:, :5], lengths)
    padded.update(ids[:, :5].masked_fill((torch.arange(5) >= lengths[:, None])[..., None], -1))
    assert given.compute() == padded.compute()
    alone = CodeHealth((9,), 6)
    alone.update(ids, lengths)
    assert "entropy_last/0" not in alone.compute()  # no image had so many tokens
    with pytest.raises(ValueError, match="n up to 6"):
        alone.update(torch.zeros(1, 7, 1, dtype=torch.int64))
    assert CodeHealth((9,), 6).compute() == {}


@pytest.mark.parametrize(("sizes", "n", "most"), [((2**18,), 256, 17e6), ((2**62,), 128, 3e6), ((2,) * 64, 128, 5e6)])
def test_memory_stays_and_even_ids_are_full_use(sizes: tuple[int, ...], n: int, most: float) -> None:
    health = CodeHealth(sizes, n)
    assert health._ring.nbytes < most
    for _ in range(2):
        health.update(draw(sizes, 64, n))
        assert health._ring.nbytes < most
    scalars = health.compute()
    usage = scalars["usage/0" if len(sizes) == 1 else "usage/least"]
    assert usage == pytest.approx(1, abs=0.02)  # although most codes of the first two cannot have come up yet
    if len(sizes) > 8:
        assert scalars["perplexity/least"] == pytest.approx(2, abs=0.01) and scalars["dead/most"] == 0
        assert len(scalars) == 6


def test_it_costs_little() -> None:
    health = CodeHealth((4096,), 64)
    ids = torch.randint(0, 4096, (48, 64, 1))
    health.update(ids)
    began = time.process_time()
    for _ in range(20):
        health.update(ids)
    health.compute()
    # Twenty steps of the recipe mini take some ten seconds.
    assert time.process_time() - began < 0.1


def calm(count: int = 20) -> list[dict[str, float]]:
    # A loss that falls, so that nothing is a plateau.
    return [
        {"loss": 2 - 0.01 * i, "gradient_norm": 1 + 0.1 * (i % 3), "usage/0": 0.9, "perplexity/0": 900.0}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"usage/0": 0.12}, ["usage of codebook 0 fell below 20 %", "revive_after"]),
        ({"usage/0": 0.4, "dead/0": 612.0}, ["codebook 0 is dead", "612 codes", "revive_after"]),
        ({"perplexity/0": 100.0}, ["perplexity of codebook 0 collapsed to 100.0, from 900", "optim.lr"]),
        ({"gradient_norm": 20.0}, ["ten times", "optim.clip"]),
        ({"gradient_norm": 5.0}, []),
        ({"loss": 9.0}, ["four times", "optim.warmup"]),
        ({"loss": math.nan}, ["the loss is nan", "precision"]),
        ({"gradient_norm": math.inf}, ["norm inf", "optim.lr"]),
    ],
)
def test_alarms_say_what_is_wrong_and_what_to_try(change: dict[str, float], words: list[str]) -> None:
    history = calm()
    now = history[-1] | change
    said = " ".join(alarms(now, history))
    assert all(word in said for word in words) and bool(said) == bool(words)
    # Said once: at the next entry of the same kind it is known. What is not finite is said as long as it lasts.
    if all(map(math.isfinite, change.values())):
        assert alarms(now, [*history, now]) == []


def test_alarms_of_a_run_that_begins() -> None:
    assert alarms({"loss": 1.0, "gradient_norm": 50.0}, []) == []
    assert "below 20 %" in alarms({"usage/1": 0.1, "loss": 1.0}, [])[0]
    assert alarms({"loss": 30.0, "gradient_norm": 50.0}, calm(5)) == []  # too few to say what is usual


def test_plateau_is_told_every_fifty_entries() -> None:
    flat = [{"loss": 1.0 + 0.001 * (i % 7)} for i in range(120)]
    told = [i for i in range(120) if alarms(flat[i], flat[:i])]
    assert told == [49, 99] and "has not fallen" in alarms(flat[49], flat[:49])[0]
    falling = [{"loss": 1.0 - 0.002 * i} for i in range(120)]
    assert not any(alarms(falling[i], falling[:i]) for i in range(120))


def test_flops_of_a_linear_layer_and_of_attention() -> None:
    layer, x = torch.nn.Linear(32, 48), torch.randn(10, 32, requires_grad=True)
    assert training_flops(lambda: layer(x)) == 2 * 10 * 32 * 48
    assert training_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 10 * 32 * 48
    q = torch.randn(1, 2, 16, 8)
    attended = training_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attended == 2 * 2 * 2 * 16 * 16 * 8


def test_peak_is_known_only_where_it_is() -> None:
    assert peak_flops("cpu", torch.float32) is None
    assert peak_of("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_of("NVIDIA A100-SXM4-40GB", torch.float16) == 312e12
    assert peak_of("NVIDIA L40S", torch.bfloat16) == 362e12 and peak_of("NVIDIA L4", torch.bfloat16) == 121e12
    assert peak_of("NVIDIA GeForce RTX 4090", torch.float32) == 82.6e12
    assert peak_of("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Some GPU"):
        assert peak_of(other, torch.bfloat16) is None
    assert peak_of("NVIDIA H200", torch.int8) is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_of("NVIDIA A100-PCIE-40GB", torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_on_a_gpu_the_numbers_are_the_same() -> None:
    ids = draw((64, 9), 500, 12)
    here, there = CodeHealth((64, 9), 12), CodeHealth((64, 9), 12)
    for part in ids.split(90):
        here.update(part)
        there.update(part.cuda())
    assert here.compute() == there.compute()
