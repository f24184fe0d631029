"""Rate against quality: curves, interpolation, and the average difference of two of them (Bjontegaard, VCEG-M33).

The rate is what a picture costs (bytes, bits, bits per pixel), and is looked at as a logarithm. Nothing is ever read
off outside of what was measured: a comparison is over the range that both curves cover, or it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Method = Literal["pchip", "cubic"]
_Function = Callable[[np.ndarray], np.ndarray]

MIN_POINTS = 4  # of a curve that is compared: VCEG-M33 has four


class RateError(ValueError):
    """Curves that cannot be read off or compared; the message is the reason."""


class Point(NamedTuple):
    """One setting of a method: its mean rate, above 0, its mean quality, and its label."""

    rate: float
    quality: float
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """The points of one method, kept in order of rate.

    name: of the method. rate, quality: what the two numbers are, "nbytes" and "psnr" say.
    higher_is_better: False for distances such as LPIPS and FID.

    Raises ``RateError`` for no points, a rate that is not above 0, a number that is not finite, or one rate twice.
    """

    name: str
    points: tuple[Point, ...]
    rate: str = "nbytes"
    quality: str = "psnr"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        points = tuple(sorted(Point(*point) for point in self.points))
        if not points:
            raise RateError(f"the curve of {self.name} has no points")
        for point in points:
            if not (math.isfinite(point.rate) and point.rate > 0 and math.isfinite(point.quality)):
                raise RateError(
                    f"{_said(self, point)} has {self.rate} {point.rate} and {self.quality} {point.quality}; a point "
                    "has a rate above 0, and both are finite: leave it out"
                )
        for a, b in zip(points[:-1], points[1:], strict=True):
            if a.rate == b.rate:
                raise RateError(f"{_said(self, a)} and {_said(self, b)} both have {self.rate} {a.rate:g}; keep one")
        object.__setattr__(self, "points", points)


class Difference(NamedTuple):
    """The average difference of a curve to an anchor.

    value: see ``bd_rate`` and ``bd_quality``.
    low, high: the range that it is averaged over, of quality for BD-rate and of rate for BD-quality.
    covered: the length of that range against all that the two curves cover together, 0 to 1 (rates as logarithms). A
        value over a small part says little.
    """

    value: float
    low: float
    high: float
    covered: float


class Comparison(NamedTuple):
    """A curve against an anchor; where a number is None, its reason says why."""

    name: str
    bd_rate: Difference | None
    bd_quality: Difference | None
    rate_reason: str
    quality_reason: str


def curve_name(label: str) -> str:
    """The curve that a method is a point of: "mini@16" -> "mini", "jpeg@64:q5" -> "jpeg@64", "jpeg@q5" -> "jpeg"."""
    if label.startswith("folder:") or "@" not in label:
        return label
    name, _, setting = label.rpartition("@")
    side, colon, _ = setting.partition(":")
    return f"{name}@{side}" if colon else name


def curves(
    rows: Iterable[Mapping[str, Any]],
    *,
    quality: str = "psnr",
    rate: str = "nbytes",
    method: str = "method",
    higher_is_better: bool = True,
) -> list[Curve]:
    """One curve for each family of methods (``curve_name``), in the order in which they come.

    rows: of images or of methods, each with the method's label, its rate and its quality under these keys. Rows of one
        label are averaged, each of the two numbers by its arithmetic mean. A label that stores nothing (a rate of None
        or 0) has no point, and neither has one with a quality that is None or not finite: its mean would not be either.
    """
    found: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        found.setdefault(str(row[method]), []).append((row[rate], row[quality]))
    families: dict[str, list[Point]] = {}
    for label, pairs in found.items():
        numbers = [number for pair in pairs for number in pair]
        if all(number is not None and math.isfinite(number) for number in numbers) and all(r > 0 for r, _ in pairs):
            rates, qualities = zip(*pairs, strict=True)
            # fsum: the same mean in whatever order the rows come.
            point = Point(math.fsum(rates) / len(pairs), math.fsum(qualities) / len(pairs), label)
            families.setdefault(curve_name(label), []).append(point)
    return [Curve(name, tuple(points), rate, quality, higher_is_better) for name, points in families.items()]


def quality_at(curve: Curve, rate: float, method: Method = "pchip") -> float:
    """The quality at a rate between the curve's own. Raises ``RateError`` for a rate outside of them."""
    rates, qualities = _arrays(curve)
    _check_inside(curve, curve.rate, rate, math.exp(rates[0]), math.exp(rates[-1]))
    return float(_through(rates, qualities, method, curve)(np.array([math.log(rate)]).clip(rates[0], rates[-1]))[0])


def rate_at(curve: Curve, quality: float, method: Method = "pchip") -> float:
    """The rate that a quality takes. Raises ``RateError`` for one outside of the curve, or one that does not rise."""
    goods, rates = _by_quality(curve)
    sign = _sign(curve)
    _check_inside(curve, curve.quality, quality, *sorted((sign * goods[0], sign * goods[-1])))
    return float(np.exp(_through(goods, rates, method, curve)(np.array([sign * quality]).clip(goods[0], goods[-1]))[0]))


def bd_rate(anchor: Curve, other: Curve, method: Method = "pchip") -> Difference:
    """How much more, in percent, ``other`` costs than ``anchor`` at equal quality; below 0 is cheaper.

    100 (exp(mean of ln r_other(q) - ln r_anchor(q)) - 1), the mean over the qualities q that both curves reach.
    method: "pchip" is what JCT-VC and JVET use: monotone, and through the points. "cubic" is the original one of
        VCEG-M33, a polynomial of degree 3; with more than four points it is fitted to them by least squares.

    Raises ``RateError``: fewer than 4 points (which curve), no common range, quality that does not rise with rate.
    """
    _check_pair(anchor, other)
    (goods, rates), (other_goods, other_rates) = _by_quality(anchor), _by_quality(other)
    mean, low, high, covered = _mean_difference(anchor, other, goods, rates, other_goods, other_rates, method)
    ends = sorted((_sign(anchor) * low, _sign(anchor) * high))
    return Difference(100 * math.expm1(mean), *ends, covered)


def bd_quality(anchor: Curve, other: Curve, method: Method = "pchip") -> Difference:
    """How much more quality ``other`` has than ``anchor`` at equal rate, in the quality's own unit (dB for PSNR).

    The mean of q_other(r) - q_anchor(r) over ln r, for the rates r that both curves cover. For a distance, such as
    LPIPS, below 0 is better. method, errors: as for ``bd_rate``, but quality need not rise with rate.
    """
    _check_pair(anchor, other)
    mean, low, high, covered = _mean_difference(anchor, other, *_arrays(anchor), *_arrays(other), method)
    return Difference(mean, math.exp(low), math.exp(high), covered)


def against(anchor: Curve, others: Sequence[Curve], method: Method = "pchip") -> list[Comparison]:
    """``bd_rate`` and ``bd_quality`` of each curve, with the reason where there is none."""
    rows = []
    for other in others:
        values: list[Difference | None] = []
        reasons = []
        for compare in (bd_rate, bd_quality):
            try:
                values.append(compare(anchor, other, method))
                reasons.append("")
            except RateError as error:
                values.append(None)
                reasons.append(str(error))
        rows.append(Comparison(other.name, *values, *reasons))
    return rows


# Curves as arrays


def _arrays(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """ln rate, rising, and quality."""
    return np.log([point.rate for point in curve.points]), np.array([point.quality for point in curve.points])


def _by_quality(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Quality, its sign changed for a distance, so that it rises; and ln rate. ``RateError`` if it does not rise."""
    rates, qualities = _arrays(curve)
    goods = _sign(curve) * qualities
    for a, b, rises in zip(curve.points[:-1], curve.points[1:], np.diff(goods) > 0, strict=True):
        if not rises:
            raise RateError(
                f"{curve.quality} of {curve.name} does not get better from {_said(curve, a)} ({a.quality:g} at "
                f"{curve.rate} {a.rate:g}) to {_said(curve, b)} ({b.quality:g} at {b.rate:g}), so that a quality has "
                "no one rate; leave a point out, or compare quality at equal rate"
            )
    return goods, rates


def _mean_difference(
    anchor: Curve, other: Curve, x: np.ndarray, y: np.ndarray, other_x: np.ndarray, other_y: np.ndarray, method: Method
) -> tuple[float, float, float, float]:
    """The mean of other_y - y over the common range of x; that range; its share of all that both cover."""
    low, high = max(x[0], other_x[0]), min(x[-1], other_x[-1])
    if low >= high:
        raise RateError(
            f"{anchor.name} and {other.name} have no range in common: {_range(anchor)}, and {_range(other)}; "
            "measure settings of the one that reach the other"
        )
    knots = np.concatenate([x, other_x])
    knots = np.unique(np.concatenate([[low, high], knots[(knots > low) & (knots < high)]]))
    mine, theirs = _through(x, y, method, anchor), _through(other_x, other_y, method, other)
    # Between knots both are cubic, and Gauss's rule with two places is exact for those.
    middle, half = (knots[1:] + knots[:-1]) / 2, np.diff(knots) / 2
    places = np.concatenate([middle - half / math.sqrt(3), middle + half / math.sqrt(3)])
    area = np.sum(np.tile(half, 2) * (theirs(places) - mine(places)))
    covered = (high - low) / (max(x[-1], other_x[-1]) - min(x[0], other_x[0]))
    return float(area / (high - low)), float(low), float(high), float(covered)


def _through(x: np.ndarray, y: np.ndarray, method: Method, curve: Curve) -> _Function:
    if method not in ("pchip", "cubic"):
        raise ValueError(f"method is 'pchip' or 'cubic', got {method!r}")
    least = 2 if method == "pchip" else 4
    if len(x) < least:
        raise RateError(
            f"{curve.name} has {len(x)} points; {method} goes through {least} or more: measure more settings"
        )
    return _pchip(x, y) if method == "pchip" else _cubic(x, y)


def _pchip(x: np.ndarray, y: np.ndarray) -> _Function:
    """The monotone piecewise cubic through x (rising) and y (Fritsch and Butland 1984, as scipy and JCT-VC have it)."""
    step = np.diff(x)
    slope = np.diff(y) / step
    if len(x) == 2:
        tangent = np.repeat(slope, 2)
    else:
        a, b = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
        same = slope[:-1] * slope[1:] > 0
        first, second = (np.where(same, s, 1.0) for s in (slope[:-1], slope[1:]))
        inner = np.where(same, (a + b) / (a / first + b / second), 0.0)
        ends = (_end(step[0], step[1], slope[0], slope[1]), _end(step[-1], step[-2], slope[-1], slope[-2]))
        tangent = np.concatenate([[ends[0]], inner, [ends[1]]])

    def function(at: np.ndarray) -> np.ndarray:
        i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(step) - 1)
        h, t = step[i], (at - x[i]) / step[i]
        left = y[i] * (1 + 2 * t) * (1 - t) ** 2 + tangent[i] * h * t * (1 - t) ** 2
        return left + y[i + 1] * t**2 * (3 - 2 * t) + tangent[i + 1] * h * t**2 * (t - 1)

    return function


def _end(near: float, far: float, slope: float, next_slope: float) -> float:
    """The tangent at an end: of the parabola through three points, held back so that the curve stays monotone."""
    tangent = ((2 * near + far) * slope - near * next_slope) / (near + far)
    if np.sign(tangent) != np.sign(slope):
        return 0.0
    return 3 * slope if np.sign(slope) != np.sign(next_slope) and abs(tangent) > abs(3 * slope) else tangent


def _cubic(x: np.ndarray, y: np.ndarray) -> _Function:
    """The polynomial of degree 3 nearest to the points."""
    centre, width = x.mean(), x[-1] - x[0]  # a well-conditioned fit
    powers = np.polyfit((x - centre) / width, y, 3)
    return lambda at: np.polyval(powers, (at - centre) / width)


# Checks and words


def _check_pair(anchor: Curve, other: Curve) -> None:
    for what in ("rate", "quality", "higher_is_better"):
        mine, theirs = getattr(anchor, what), getattr(other, what)
        if mine != theirs:
            raise RateError(f"{anchor.name} has {what} {mine!r} and {other.name} {theirs!r}: compare like with like")
    few = [curve for curve in (anchor, other) if len(curve.points) < MIN_POINTS]
    if few:
        counts = " and ".join(f"{curve.name} has {len(curve.points)}" for curve in few)
        raise RateError(f"{counts} of the {MIN_POINTS} points that a comparison of curves takes: measure more settings")


def _check_inside(curve: Curve, what: str, value: float, low: float, high: float) -> None:
    slack = 1e-12 * max(abs(low), abs(high))  # the ends come back from a logarithm
    if not low - slack <= value <= high + slack:
        raise RateError(f"{curve.name} was measured from {what} {low:g} to {high:g}, not at {value:g}")


def _sign(curve: Curve) -> int:
    return 1 if curve.higher_is_better else -1


def _said(curve: Curve, point: Point) -> str:
    return point.label or f"a point of {curve.name}"


def _range(curve: Curve) -> str:
    qualities = [point.quality for point in curve.points]
    return (
        f"{curve.name} has {curve.rate} {curve.points[0].rate:g} to {curve.points[-1].rate:g} and {curve.quality} "
        f"{min(qualities):g} to {max(qualities):g}"
    )
