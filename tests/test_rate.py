"""Rate-distortion curves: the published numbers, closed forms, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenizers_vis.eval.rate import (
    Curve,
    Point,
    RateError,
    against,
    bd_quality,
    bd_rate,
    curve_name,
    curves,
    quality_at,
    rate_at,
)

# Two pairs that implementations of the metric are tried on, and what the package bjontegaard 1.3.0 gives for them: rate
# in percent and PSNR in dB. Its authors found its pchip equal to JVET's Excel sheet to ten digits.
CLASSIC = [
    (
        ([85.95, 157.11, 309.58, 686.76], [31.42, 34.24, 37.18, 40.28]),
        ([112.75, 204.93, 407.8, 893.34], [31.24, 34.17, 37.21, 40.39]),
        {"cubic": (31.3973740549095, -1.1848979217703506), "pchip": (31.379878202397627, -1.1834724046224592)},
    ),
    (
        ([1358.24, 2486.44, 4593.60, 9487.76], [34.851, 36.845, 38.615, 40.037]),
        ([1356.24, 2451.52, 4469.00, 9787.80], [34.987, 36.970, 38.651, 40.121]),
        {"cubic": (-4.420462706125383, 0.12040941911451103), "pchip": (-4.417485350589045, 0.11969278542479489)},
    ),
]


def curve(rates, qualities, name: str = "a", **options) -> Curve:
    return Curve(name, tuple(map(Point, rates, qualities)), **options)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
@pytest.mark.parametrize(("anchor", "other", "expected"), CLASSIC)
def test_the_classic_numbers(anchor, other, expected, method: str):
    anchor, other = curve(*anchor), curve(*other, name="b")
    rate, quality = bd_rate(anchor, other, method), bd_quality(anchor, other, method)
    assert (rate.value, quality.value) == pytest.approx(expected[method], rel=1e-9)
    goods = [[point.quality for point in c.points] for c in (anchor, other)]
    assert (rate.low, rate.high) == (max(map(min, goods)), min(map(max, goods)))
    costs = [[point.rate for point in c.points] for c in (anchor, other)]
    assert (quality.low, quality.high) == pytest.approx((max(map(min, costs)), min(map(max, costs))))
    assert 0.7 < rate.covered < 1 and 0.7 < quality.covered < 1


@pytest.mark.parametrize("method", ["cubic", "pchip"])
class TestClosedForms:
    def test_a_constant_factor_and_a_line(self, method: str):
        """Quality 3 log2 r: 25 % more rate for the same is 25 %, and 3 log2 1.25 less at the same rate."""
        rates = np.array([8.0, 16.0, 40.0, 64.0, 200.0])
        anchor, other = curve(rates, 3 * np.log2(rates)), curve(1.25 * rates, 3 * np.log2(rates), "b")
        assert bd_rate(anchor, other, method).value == pytest.approx(25)
        assert bd_quality(anchor, other, method).value == pytest.approx(-3 * math.log2(1.25))
        assert bd_rate(other, anchor, method).value == pytest.approx(-20)
        assert bd_rate(anchor, anchor, method)[0] == bd_quality(anchor, anchor, method)[0] == 0

    def test_only_the_common_range_counts(self, method: str):
        """What one curve does where the other was not measured changes nothing, on lines."""
        line = lambda rates: curve(rates, np.log(rates))  # noqa: E731
        short, long = [10.0, 20.0, 40.0, 80.0], [1.0, 10.0, 20.0, 40.0, 80.0, 700.0]
        shifted = curve(long, np.log(long) + 0.5, "b")
        result = bd_quality(line(short), shifted, method)
        assert result.value == pytest.approx(0.5)
        assert (result.low, result.high) == pytest.approx((10, 80))
        assert result.covered == pytest.approx(math.log(8) / math.log(700))

    def test_lower_is_better(self, method: str):
        rates = np.array([8.0, 16.0, 40.0, 64.0])
        options = {"quality": "lpips", "higher_is_better": False}
        anchor = curve(rates, 1 - 0.1 * np.log(rates), **options)
        other = curve(rates * 1.5, 1 - 0.1 * np.log(rates), "b", **options)
        rate, quality = bd_rate(anchor, other, method), bd_quality(anchor, other, method)
        assert rate.value == pytest.approx(50) and rate.low < rate.high
        assert quality.value == pytest.approx(0.1 * math.log(1.5))  # more distance: worse

    def test_order_of_the_points_does_not_count(self, method: str):
        (rates, goods), other, _ = CLASSIC[0]
        turned = curve(rates[::-1], goods[::-1])
        assert bd_rate(turned, curve(*other), method) == bd_rate(curve(rates, goods), curve(*other), method)


class TestReadingOff:
    def test_pchip_is_scipys(self):
        interpolate = pytest.importorskip("scipy.interpolate")
        rng = np.random.default_rng(0)
        for n in (2, 3, 4, 9):
            rates, goods = np.exp(np.sort(rng.uniform(0, 5, n))), rng.normal(size=n)  # not monotone
            theirs = interpolate.PchipInterpolator(np.log(rates), goods)
            at = np.linspace(np.log(rates[0]), np.log(rates[-1]), 41)[1:-1]
            ours = [quality_at(curve(rates, goods), rate) for rate in np.exp(at)]
            np.testing.assert_allclose(ours, theirs(at), rtol=1e-9, atol=1e-12)

    def test_points_are_met_and_the_two_are_inverse(self):
        c = curve(*CLASSIC[0][0])
        for rate, quality, _ in c.points:
            assert quality_at(c, rate) == pytest.approx(quality) and rate_at(c, quality) == pytest.approx(rate)
        distances = curve([1.0, 2.0, 4.0], [3.0, 2.0, 1.0], higher_is_better=False)
        assert rate_at(distances, 1.5) == pytest.approx(2 * math.sqrt(2))

    def test_nothing_is_extrapolated(self):
        c = curve(*CLASSIC[0][0])
        with pytest.raises(RateError, match="measured from nbytes 85.95 to 686.76, not at 700"):
            quality_at(c, 700)
        with pytest.raises(RateError, match="measured from psnr 31.42 to 40.28, not at 31"):
            rate_at(c, 31)


class TestRefusals:
    a = curve(*CLASSIC[0][0], name="jpeg")

    def test_too_few_points_says_which_curve(self):
        short = curve([100, 200, 300], [32, 33, 34], "mini")
        for compare in (bd_rate, bd_quality):
            with pytest.raises(RateError, match="^mini has 3 of the 4 points"):
                compare(self.a, short)
        with pytest.raises(RateError, match="mini has 3 and mini has 3"):
            bd_rate(short, short)

    def test_no_common_range_says_both(self):
        far = curve([1, 2, 3, 4], [10, 11, 12, 13], "mini")
        message = "jpeg has nbytes 85.95 to 686.76 .* mini has nbytes 1 to 4 and psnr 10"
        for compare in (bd_rate, bd_quality):
            with pytest.raises(RateError, match=message):
                compare(self.a, far)

    def test_quality_that_falls_has_no_rate_but_can_be_compared_at_equal_rate(self):
        uneven = curve([100, 200, 300, 400], [32, 34, 33.9, 36], "mini")
        with pytest.raises(RateError, match="psnr of mini does not get better .*34 at nbytes 200"):
            bd_rate(self.a, uneven)
        (row,) = against(self.a, [uneven])
        assert row.bd_rate is None and "does not get better" in row.rate_reason
        assert row.bd_quality is not None and row.quality_reason == "" and row.name == "mini"

    def test_unlike_curves_are_not_compared(self):
        for options in ({"rate": "bits"}, {"quality": "ssim"}, {"higher_is_better": False}):
            with pytest.raises(RateError, match=next(iter(options))):
                bd_rate(self.a, curve(*CLASSIC[0][1], **options))

    @pytest.mark.parametrize(
        ("rates", "goods", "message"),
        [
            ([], [], "no points"),
            ([0.0], [30.0], "above 0"),
            ([10.0], [math.inf], "finite"),
            ([10.0], [math.nan], "finite"),
            ([10.0, 10.0], [30.0, 31.0], "keep one"),
        ],
    )
    def test_points_that_are_none(self, rates, goods, message: str):
        with pytest.raises(RateError, match=message):
            curve(rates, goods)

    def test_an_unknown_method(self):
        with pytest.raises(ValueError, match="'pchip' or 'cubic'"):
            bd_rate(self.a, self.a, "akima")


def test_rows_become_curves_in_any_order():
    rows = [
        {"method": "jpeg@q5", "nbytes": 1000, "psnr": 20.0},
        {"method": "jpeg@64:q5", "nbytes": 400, "psnr": 18.0},
        {"method": "jpeg@q10", "nbytes": 1700, "psnr": 24.0},
        {"method": "jpeg@q5", "nbytes": 1100, "psnr": 23.0},
        {"method": "mini@16", "nbytes": 24, "psnr": 15.0},
        {"method": "resize@64", "nbytes": None, "psnr": 30.0},
        {"method": "identity", "nbytes": 5000, "psnr": math.inf},
    ]
    found = {c.name: c for c in curves(rows)}
    assert found == {c.name: c for c in curves(rows[::-1])}
    assert list(found) == ["jpeg", "jpeg@64", "mini"]
    assert found["jpeg"].points == (Point(1050, 21.5, "jpeg@q5"), Point(1700, 24.0, "jpeg@q10"))
    names = {"mini": "mini", "flextok-d18-d28@256": "flextok-d18-d28", "webp@128:q1": "webp@128", "folder:a@b": None}
    assert {label: curve_name(label) for label in names} == {k: v or k for k, v in names.items()}
