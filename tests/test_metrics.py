"""Metrics against closed forms and reference libraries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenizers_vis.eval import metrics
from tokenizers_vis.eval.metrics import (
    CodebookUsage,
    decibels,
    feature_cosine,
    gradient_energy,
    ms_ssim,
    mse,
    pooled_psnr,
    psnr,
    ssim,
)
from tokenizers_vis.eval.thumbnail import thumbnail, thumbnail_size


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    x = torch.rand(3, 3, 64, 64)
    return x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1)


# Pixels


@given(st.floats(1e-4, 0.9), st.integers(1, 4))
def test_psnr_of_a_constant_error(error: float, b: int) -> None:
    x = torch.zeros(b, 3, 5, 7)
    torch.testing.assert_close(psnr(x, x + error), torch.full((b,), -20 * math.log10(error)), rtol=1e-4, atol=1e-4)


def test_psnr_is_per_picture_and_capped(pair: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = pair
    expected = torch.stack([peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(psnr(x, y), expected)
    torch.testing.assert_close(psnr(y, x), expected)
    assert psnr(x, x).tolist() == [100.0] * 3


def test_errors_pool_before_or_after_the_logarithm(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    y = torch.stack([y[0], (x[1] + 3 * (y[1] - x[1])), x[2]])
    errors = mse(x, y)
    torch.testing.assert_close(errors[:2], ((x - y) ** 2).mean(dim=(1, 2, 3))[:2].double())
    assert errors.dtype == torch.float64 and errors[2] == 0
    torch.testing.assert_close(decibels(errors)[:2].float(), psnr(x, y)[:2])
    assert decibels(errors)[2] == math.inf  # psnr stops at its cap
    assert pooled_psnr(errors) == pytest.approx(-10 * math.log10(errors.mean().item()))
    assert pooled_psnr(errors[:2]) < decibels(errors[:2]).mean()
    assert pooled_psnr(errors[2:]) == math.inf
    with pytest.raises(ValueError, match="1 or more"):
        pooled_psnr(torch.zeros(0))


def test_ms_ssim_is_that_of_torchmetrics_and_needs_room_for_its_scales() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    x = torch.rand(2, 3, 176, 190)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    expected = multiscale_structural_similarity_index_measure(y, x, data_range=1.0, reduction="none")
    torch.testing.assert_close(ms_ssim(x, y), expected)
    torch.testing.assert_close(ms_ssim(x, x), torch.ones(2))
    assert (ms_ssim(x, y) > ssim(x, y)).all()  # noise goes as the scales get smaller
    assert ms_ssim(x, 1 - x).tolist() == [0, 0]
    with pytest.raises(ValueError, match="at least 176 by 176 pixels"):
        ms_ssim(x[..., :175], x[..., :175])


def test_feature_cosine() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0], [-2.0, -2.0]])
    assert feature_cosine(x, y).tolist() == pytest.approx([1, 0, 1, 0, -1])
    assert feature_cosine(torch.rand(9, 7).float(), torch.rand(9, 7)).dtype == torch.float64
    with pytest.raises(ValueError, match="b d twice"):
        feature_cosine(x, y[:3])


def test_ssim(pair: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = pair
    expected = structural_similarity_index_measure(y, x, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(x, y), expected)
    torch.testing.assert_close(ssim(y, x), expected)
    torch.testing.assert_close(ssim(x, x), torch.ones(3))
    assert ssim(x[:1], y[:1]).shape == (1,)
    # Two flat pictures: only the luminance term is left.
    a, b, c1 = 0.2, 0.6, 0.01**2
    flat = ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    torch.testing.assert_close(flat, torch.tensor([(2 * a * b + c1) / (a * a + b * b + c1)]), rtol=1e-3, atol=1e-3)


def test_ssim_needs_its_window() -> None:
    assert ssim(torch.rand(1, 3, 11, 11), torch.rand(1, 3, 11, 11)).isfinite().all()
    with pytest.raises(ValueError, match="11 by 11"):
        ssim(torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40))


def test_gradient_energy_in_closed_form() -> None:
    ramp = torch.linspace(0, 1, 11).expand(1, 3, 6, 11)
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().expand(1, 3, 8, 8)
    energy = torch.cat([gradient_energy(x) for x in (torch.full((1, 3, 8, 8), 0.3), ramp, ramp.mT, board)])
    torch.testing.assert_close(energy, torch.tensor([0.0, 0.005, 0.005, 1.0]))
    red = board * torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    torch.testing.assert_close(gradient_energy(red), torch.tensor([0.299**2]))


@pytest.mark.parametrize("metric", [psnr, ssim, mse, ms_ssim])
def test_pictures_of_another_kind_are_refused(metric) -> None:
    x = torch.rand(2, 3, 16, 16)
    for bad in (x[0], x[:1], x[..., :12], (x * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match="pictures"):
            metric(x, bad)


# Codebooks


def test_usage_of_hand_made_ids() -> None:
    usage = CodebookUsage((4, 8))
    usage.update(torch.tensor([[[0, 7], [1, 7]], [[0, 7], [2, 7]]]))
    first, second = usage.compute()
    assert first.tokens == second.tokens == 4
    assert first.used == 0.75
    assert first.entropy == pytest.approx(1.5)
    assert first.perplexity == pytest.approx(2**1.5)
    assert first.position_entropy.tolist() == pytest.approx([0.0, 1.0])
    assert (first.dead, second.dead) == (1, 7)
    assert (second.used, second.entropy, second.perplexity) == (0.125, 0.0, 1.0)


def test_usage_is_ragged_and_does_not_depend_on_the_batches() -> None:
    ids = torch.randint(0, 5, (30, 6, 2))
    lengths = torch.randint(1, 7, (30,))
    ids[torch.arange(6) >= lengths[:, None]] = -1
    together, apart, lists = CodebookUsage((5, 9)), CodebookUsage((5, 9)), CodebookUsage((5, 9))
    together.update(ids)
    for part in ids.split(7):
        apart.update(part)
    for row, length in zip(ids, lengths, strict=True):
        lists.update(row[None, :length])
    for a, b, c in zip(together.compute(), apart.compute(), lists.compute(), strict=True):
        assert a.tokens == lengths.sum()
        assert a[:4] == b[:4] == c[:4]
        n = len(c.position_entropy)
        assert torch.equal(a.position_entropy, b.position_entropy)
        assert torch.equal(a.position_entropy[:n], c.position_entropy)
    assert together.compute()[1].used <= 5 / 9


def test_a_uniform_codebook_has_full_perplexity() -> None:
    usage = CodebookUsage((16,))
    usage.update(torch.arange(16).reshape(16, 1, 1))
    (result,) = usage.compute()
    assert result.used == 1.0
    assert result.entropy == pytest.approx(4.0)
    assert result.perplexity == pytest.approx(16.0)


@pytest.mark.parametrize("merge", [0, 10, 2**20])
def test_usage_is_exact_at_any_codebook_size(merge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MERGE", merge)
    size = 2**62
    usage = CodebookUsage((size, 7))
    few = torch.tensor([0, 1, size - 1, size // 3])
    ids = torch.stack([few[torch.randint(0, 4, (40, 6))], torch.randint(0, 7, (40, 6))], dim=-1)
    for part in ids.split(9):
        usage.update(part)
    large, small = usage.compute()
    assert large.dead == size - 4 and large.tokens == 240 and large.used == 4 / size
    for result, column in ((large, ids[..., 0]), (small, ids[..., 1])):
        share = column.unique(return_counts=True)[1].double() / 240
        assert result.entropy == pytest.approx(-(share * share.log2()).sum().item())
        for n in range(6):
            share = column[:, n].unique(return_counts=True)[1].double() / 40
            assert result.position_entropy[n].item() == pytest.approx(-(share * share.log2()).sum().item())


def test_wrong_ids_are_refused_and_count_nothing() -> None:
    usage = CodebookUsage((4, 4))
    for bad in (torch.tensor([[[0, 4]]]), torch.tensor([[[-2, 0]]]), torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 2)):
        with pytest.raises(ValueError, match="ids"):
            usage.update(bad)
    with pytest.raises(ValueError, match="no ids were counted"):
        usage.compute()
    with pytest.raises(ValueError, match="codebook_sizes"):
        CodebookUsage(())


# Thumbnails


@given(st.integers(1, 300), st.integers(1, 300), st.integers(3, 4000))
def test_a_thumbnail_keeps_to_its_bytes(width: int, height: int, n_bytes: int) -> None:
    w, h = thumbnail_size(width, height, n_bytes)
    assert 1 <= w <= width
    assert 1 <= h <= height
    assert 3 * w * h <= n_bytes
    more_w, more_h = thumbnail_size(width, height, n_bytes, no_fewer=True)
    assert more_w <= width
    assert more_h <= height
    assert 3 * more_w * more_h >= min(n_bytes, 3 * width * height)
    diagonal, more_diagonal = ((width / a) ** 2 + (height / b) ** 2 for a, b in ((w, h), (more_w, more_h)))
    assert more_diagonal <= diagonal * (1 + 1e-6)


@pytest.mark.parametrize(
    ("picture", "n_bytes", "size", "no_fewer_size"),
    [
        ((128, 128), 192, (8, 8), (8, 8)),
        ((128, 128), 96, (5, 6), (5, 7)),
        ((128, 128), 3, (1, 1), (1, 1)),
        ((256, 64), 192, (16, 4), (16, 4)),
        ((4, 4), 1000, (4, 4), (4, 4)),
    ],
)
def test_the_size_of_a_thumbnail(
    picture: tuple[int, int], n_bytes: int, size: tuple[int, int], no_fewer_size: tuple[int, int]
) -> None:
    assert thumbnail_size(*picture, n_bytes) == size
    assert thumbnail_size(*picture, n_bytes, no_fewer=True) == no_fewer_size


def test_a_thumbnail_of_a_constant_picture_is_exact() -> None:
    x = torch.tensor([0, 3, 128, 255]).reshape(4, 1, 1, 1).expand(4, 3, 20, 30) / 255
    reconstruction, size = thumbnail(x, 96)
    assert size == (8, 4)
    torch.testing.assert_close(reconstruction, x, rtol=0, atol=1e-6)


def test_a_thumbnail_is_what_pillow_makes() -> None:
    import numpy as np
    from PIL import Image

    x = torch.rand(1, 3, 64, 64).round(decimals=1)
    x = (x * 255).round() / 255
    reconstruction, (w, h) = thumbnail(x, 3 * 16 * 16)
    picture = Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC))
    assert np.abs(reconstruction[0].permute(1, 2, 0).numpy() * 255 - expected).max() <= 2.5


def test_more_bytes_are_a_better_thumbnail_and_all_bytes_the_picture() -> None:
    base = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), size=(32, 32), mode="bilinear")
    x = (base * 255).round() / 255
    quality = torch.stack([psnr(x, thumbnail(x, n).reconstruction) for n in (3, 48, 192, 768)])
    assert (quality.diff(dim=0) > 0).all()
    torch.testing.assert_close(thumbnail(x, 3 * 32 * 32).reconstruction, x, rtol=0, atol=1e-6)


def test_too_few_bytes_or_other_pictures_are_refused() -> None:
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="one pixel takes 3 bytes"):
        thumbnail(x, 2)
    assert thumbnail(x, 2, no_fewer=True).size == (1, 1)
    with pytest.raises(ValueError, match="n_bytes is 1 or more"):
        thumbnail(x, 0, no_fewer=True)
    with pytest.raises(ValueError, match="b 3 h w"):
        thumbnail(x[0], 96)
    with pytest.raises(ValueError, match="b 3 h w"):
        thumbnail((x * 255).byte(), 96)
