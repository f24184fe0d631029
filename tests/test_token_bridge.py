"""Post-training quantization of continuous latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch

from tokenizers_vis.config import build
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.token_bridge import TokenBridge, gaussian_values


class TestOfficial:
    @pytest.mark.parametrize("case", ["6bit", "4bit", "9bit", "3bit"])
    def test_values_ids_and_codes(self, recorded: Callable, case: str):
        tensors, metadata = recorded("token_bridge")
        z, ids, codes, values = (tensors[f"{case}.{name}"] for name in ("z", "ids", "codes", "values"))
        options = json.loads(metadata["options"])[case]
        quantizer = TokenBridge(dim=4, bits=options["bits"], reach=options["range"], clip=options["std_range"]).eval()
        every = torch.arange(2 ** options["bits"])[None, :, None].expand(1, -1, 4)
        # Theirs are made in float32, where the small differences of 9 bits lose most of their digits.
        fine = options["bits"] == 9
        close = {"rtol": 2e-5, "atol": 2e-4 if fine else 2e-6}
        torch.testing.assert_close(quantizer.lookup(every)[0, :, 0], values, **close)
        out = quantizer(z)
        same = out.ids == ids
        assert same.float().mean() > 0.98 and (out.ids - ids).abs().max() <= 1 if fine else same.all()
        torch.testing.assert_close(out.codes[same], codes[same], **close)

    def test_the_published_setting_is_the_default(self, recorded: Callable):
        tensors, _ = recorded("token_bridge")
        quantizer = build(Quantizer, {"kind": "token_bridge", "dim": 4}).eval()
        assert quantizer.codebook_sizes == (64,) * 4
        assert torch.equal(quantizer(tensors["6bit.z"]).ids, tensors["6bit.ids"].long())


class TestValues:
    @pytest.mark.parametrize("bits", [1, 2, 6, 9])
    def test_each_is_the_mean_of_its_bin(self, bits: int):
        values, edges = gaussian_values(bits, 3.0)
        normal, n = NormalDist(), 2**bits
        for i in (0, n // 2, n - 1):
            a = -3.0 if i == 0 else normal.inv_cdf(i / n)
            b = 3.0 if i == n - 1 else normal.inv_cdf((i + 1) / n)
            x = torch.linspace(a, b, 20001, dtype=torch.float64)
            weight = (-x.square() / 2).exp()
            assert values[i].item() == pytest.approx((torch.trapezoid(x * weight) / torch.trapezoid(weight)).item())
        torch.testing.assert_close(values, -values.flip(0))
        assert (values.diff() > 0).all() and (edges > values[:-1]).all() and (edges < values[1:]).all()

    def test_the_nearest_value_is_taken_and_of_two_the_lower(self):
        quantizer = TokenBridge(dim=1, bits=4, reach=3.0, clip=3.0).eval()
        z = torch.cat([4 * torch.randn(500), quantizer.edges])[None, :, None]
        distance = (z[0].double() - quantizer.values.double()).abs()
        assert torch.equal(quantizer(z[:, :500]).ids[0, :, 0], distance[:500].argmin(dim=1))
        assert quantizer(z[:, 500:]).ids.flatten().tolist() == list(range(15))

    def test_bins_beyond_the_clip_are_refused(self):
        assert TokenBridge(dim=2, bits=9).eval().lookup(torch.zeros(1, 1, 2).long()).max() < 0
        with pytest.raises(ValueError, match="fewer bits, or a larger clip"):
            TokenBridge(dim=2, bits=10)
        assert gaussian_values(10, 3.5)[0].diff().min() > 0 and TokenBridge(dim=2, bits=10, clip=3.5)

    def test_the_more_bits_the_nearer(self):
        z = torch.randn(2, 500, 3)
        errors = [(TokenBridge(dim=3, bits=bits).eval()(z).codes - z).square().mean().item() for bits in range(1, 10)]
        assert errors == sorted(errors, reverse=True) and errors[5] < 0.01

    def test_the_gradient_passes_straight_through(self):
        z, weights = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
        (TokenBridge(dim=3)(z).codes * weights).sum().backward()
        assert torch.equal(z.grad, weights)

    @pytest.mark.parametrize(
        "options",
        [{"dim": 0}, {"bits": 0}, {"bits": 17, "clip": 9.0}, {"reach": 0.0}, {"clip": -1.0}, {"std": 0.0}]
        + [{"mean": (0.0, 0.0)}, {"std": (1.0, -1.0, 1.0)}, {"mean": float("nan")}],
    )
    def test_impossible_options_are_refused(self, options: dict):
        with pytest.raises(ValueError, match="dim|bits|reach|clip|std|mean"):
            TokenBridge(**{"dim": 3} | options)


class TestFit:
    def test_a_fitted_latent_is_quantized_as_a_standard_one(self):
        z, mean, std = torch.randn(8, 50, 3), torch.tensor([5.0, -1.0, 0.0]), torch.tensor([0.1, 1.0, 30.0])
        fitted = TokenBridge(dim=3).eval()
        fitted.fit(z * std + mean)
        torch.testing.assert_close(fitted.mean, (z * std + mean).mean(dim=(0, 1)))
        torch.testing.assert_close(fitted.std, (z * std).std(dim=(0, 1), correction=0))
        given = TokenBridge(dim=3, mean=tuple(fitted.mean.tolist()), std=tuple(fitted.std.tolist())).eval()
        assert torch.equal(given(z * std + mean).ids, fitted(z * std + mean).ids)
        error = ((fitted(z * std + mean).codes - z * std - mean) / std).square().mean(dim=(0, 1))
        assert (error < 0.01).all()

    def test_batch_by_batch_is_all_at_once(self):
        z = 3 + torch.randn(9, 7, 4) * torch.arange(1.0, 5.0)
        at_once, streamed = TokenBridge(dim=4), TokenBridge(dim=4, mean=7.0, std=2.0)
        at_once.fit(z)
        for batch in (z[:1], z[1:6], z[6:]):
            streamed.fit(batch)
        assert at_once.count == streamed.count == 63
        torch.testing.assert_close(streamed.mean, at_once.mean)
        torch.testing.assert_close(streamed.std, at_once.std)

    def test_the_state_carries_it(self):
        fitted, other = TokenBridge(dim=2).eval(), TokenBridge(dim=2).eval()
        fitted.fit(10 * torch.randn(2, 20, 2))
        other.load_state_dict(fitted.state_dict())
        z = 10 * torch.randn(1, 20, 2)
        assert torch.equal(other(z).ids, fitted(z).ids) and other.count == 40
        fitted.fit(z), other.fit(z)
        assert torch.equal(other.std, fitted.std)

    def test_a_channel_that_never_changes(self):
        quantizer = TokenBridge(dim=2).eval()
        z = torch.stack([torch.full((3, 5), 4.0), torch.randn(3, 5)], dim=-1)
        quantizer.fit(z)
        out = quantizer(z)
        torch.testing.assert_close(out.codes[..., 0], z[..., 0])
        assert torch.equal(quantizer.lookup(out.ids), out.codes)

    @pytest.mark.parametrize("training", [True, False])
    def test_wrong_latents_change_nothing(self, training: bool):
        quantizer = TokenBridge(dim=2).train(training)
        for wrong in (torch.full((1, 2, 2), float("nan")), torch.ones(1, 2, 3), torch.ones(0, 2, 2)):
            with pytest.raises(ValueError):
                quantizer.fit(wrong)
        assert quantizer.count == 0 and torch.equal(quantizer.std, torch.ones(2))
