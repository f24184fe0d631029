"""Plots as inline SVG: metric against rate, score against scale. The page's style sheet has their colours (``.s0``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 118, 14, 44
_SERIES = 8  # colours of the style sheet; more series begin anew


class Point(NamedTuple):
    """low, high: of the interval around y, or None. label: for the tooltip."""

    x: float
    y: float
    label: str
    low: float | None = None
    high: float | None = None


def rate_plot(
    series: Mapping[str, Sequence[Point]],
    levels: Mapping[str, float],
    colours: Mapping[str, int],
    *,
    x_title: str,
    y_title: str,
) -> str:
    """Lines over a logarithmic rate, one a name, and levels that have no rate as dashed lines; "" without a point.

    colours: a number for each name, so that one is of one colour in all plots of a page.
    """
    lines = {name: sorted(points) for name, points in series.items() if points}
    xs = [math.log10(point.x) for points in lines.values() for point in points]
    ys = [y for points in lines.values() for p in points for y in (p.y, p.low, p.high) if y is not None]
    if not xs:
        return ""
    # A level far from all lines, as that of the originals, would press them flat.
    low, high = min(ys), max(ys)
    room = 0.5 * (high - low or abs(high) or 1)
    levels = {name: y for name, y in levels.items() if low - room <= y <= high + room}
    x_axis = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis(min([low, *levels.values()]), max([high, *levels.values()]), HEIGHT - _BOTTOM, _TOP)
    decades = range(math.floor(x_axis.start), math.ceil(x_axis.stop) + 1)
    marks = [(math.log10(m * 10.0**d), m * 10.0**d) for d in decades for m in (1, 2, 5)]
    inside = [(at, value) for at, value in marks if x_axis.start <= at <= x_axis.stop]
    shown = [one for one in inside if round(math.log10(one[1]), 9) % 1 == 0] if len(inside) > 7 else inside
    parts = [_grid(y_axis, x_title, y_title)]
    parts += [_tick(x_axis.at(at), f"{value:g}") for at, value in shown]
    placed = _Labels()
    for name, y in levels.items():
        parts.append(
            f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_axis.at(y)}" y2="{y_axis.at(y)}"/>'
        )
        parts.append(placed.add(name, WIDTH - _RIGHT + 6, y_axis.at(y), "quiet"))
    for name, points in lines.items():
        parts.append(_line(colours[name], [(x_axis.at(math.log10(p.x)), y_axis.at(p.y), p) for p in points], y_axis))
        end = points[-1]
        parts.append(placed.add(name, x_axis.at(math.log10(end.x)) + 8, y_axis.at(end.y), _colour(colours[name])))
    return _svg(parts, f"{y_title} against {x_title}")


def scale_plot(
    series: Mapping[str, Sequence[float | None]],
    spans: Sequence[tuple[float, float]],
    colours: Mapping[str, int],
    *,
    y_title: str,
) -> str:
    """A score from 0 to 1 for each bin of scales, a line a name; empty bins leave gaps. "" without any number."""
    if not any(value is not None for values in series.values() for value in values):
        return ""
    lowest = min(0.0, *(value for values in series.values() for value in values if value is not None))
    y_axis = _Axis(lowest, 1.0, HEIGHT - _BOTTOM, _TOP)
    x_axis = _Axis(0, len(spans) - 1 or 1, _LEFT, WIDTH - _RIGHT)
    parts = [_grid(y_axis, "relative scale", y_title)]
    parts += [_tick(x_axis.at(i), f"{start:g}–{stop:g}") for i, (start, stop) in enumerate(spans)]
    placed = _Labels()
    for name, values in series.items():
        found = [(i, value) for i, value in enumerate(values) if value is not None]
        points = [Point(i, value, f"{name}, {spans[i][0]:g} to {spans[i][1]:g}") for i, value in found]
        parts.append(_line(colours[name], [(x_axis.at(p.x), y_axis.at(p.y), p) for p in points], y_axis))
        if points:
            parts.append(placed.add(name, x_axis.at(points[-1].x) + 8, y_axis.at(points[-1].y), _colour(colours[name])))
    return _svg(parts, f"{y_title} by scale")


def curve_plot(
    series: Mapping[str, Sequence[Point]], *, x_title: str, y_title: str, log_x: bool = False, log_y: bool = False
) -> str:
    """Lines without dots, of many points each; "" with fewer than two. Logarithmic axes take numbers above 0."""
    lines = {name: sorted(points) for name, points in series.items() if len(points) > 1}
    if not lines:
        return ""
    x_of, y_of = (math.log10 if log else float for log in (log_x, log_y))
    points = [point for some in lines.values() for point in some]
    x_axis = _Axis(min(x_of(p.x) for p in points), max(x_of(p.x) for p in points), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis(min(y_of(p.y) for p in points), max(y_of(p.y) for p in points), HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(y_axis, x_title, y_title, log_y)]
    parts += [_tick(x_axis.at(at), _label(at, log_x)) for at in x_axis.ticks(log_x)]
    placed = _Labels()
    for number, (name, some) in enumerate(lines.items()):
        path = " ".join(f"{x_axis.at(x_of(p.x))},{y_axis.at(y_of(p.y))}" for p in some)
        parts.append(f'<g class="{_colour(number)}"><polyline points="{path}"/></g>')
        end = some[-1]
        parts.append(placed.add(name, x_axis.at(x_of(end.x)) + 8, y_axis.at(y_of(end.y)), _colour(number)))
    # Without names there is nothing to the right of the lines.
    return _svg(parts, f"{y_title} by {x_title}", WIDTH if any(lines) else WIDTH - _RIGHT + _TOP)


class _Axis:
    """Numbers from start to stop, with a margin, onto pixels."""

    def __init__(self, start: float, stop: float, first: float, last: float) -> None:
        margin = 0.06 * (stop - start) or 0.5 * abs(start) or 0.5
        self.start, self.stop, self._first, self._last = start - margin, stop + margin, first, last

    def at(self, value: float) -> float:
        share = (value - self.start) / (self.stop - self.start)
        return round(self._first + share * (self._last - self._first), 1)

    def ticks(self, log: bool = False) -> list[float]:
        """Four or five round numbers; of logarithms whole ones, where there are two or more."""
        whole = list(range(math.ceil(self.start), math.floor(self.stop) + 1))
        if log and len(whole) > 1:
            return [float(at) for at in whole]
        step = 10.0 ** math.floor(math.log10((self.stop - self.start) / 4))
        step = next(step * m for m in (1, 2, 2.5, 5, 10) if (self.stop - self.start) / (step * m) <= 5)
        first = math.ceil(self.start / step)
        return [k * step for k in range(first, math.floor(self.stop / step) + 1)]


class _Labels:
    """Texts at the ends of lines, moved apart so that they can be read."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float]] = []

    def add(self, text: str, x: float, y: float, kind: str) -> str:
        x = min(x, WIDTH - 6 * len(text[:18]) - 2)
        step = 0
        while any(abs(y + step - other) < 12 and abs(x - place) < 110 for place, other in self._taken):
            step = -step if step > 0 else 12 - step
        y = min(max(y + step, _TOP + 4), HEIGHT - _BOTTOM - 2)
        self._taken.append((x, y))
        return f'<text class="name {kind}" x="{x:.1f}" y="{y + 4:.1f}">{escape(text[:18])}</text>'


def _line(number: int, places: Sequence[tuple[float, float, Point]], y_axis: _Axis) -> str:
    path = " ".join(f"{x},{y}" for x, y, _ in places)
    parts = [f'<g class="{_colour(number)}"><polyline points="{path}"/>']
    for x, y, point in places:
        if point.low is not None and point.high is not None:
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y_axis.at(point.low)}" y2="{y_axis.at(point.high)}"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{escape(point.label)}: {point.y:.4g}</title></circle>')
    return "".join(parts) + "</g>"


def _colour(number: int) -> str:
    return f"s{number % _SERIES}"


def _label(at: float, log: bool) -> str:
    return f"{at:g}" if not log else f"{10**at:,.0f}" if at >= 0 and at == round(at) else f"{10**at:.3g}"


def _grid(y_axis: _Axis, x_title: str, y_title: str, log: bool = False) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in y_axis.ticks(log):
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{_label(value, log)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="title" x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>'
    )
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 12 {middle})" text-anchor="middle"'
    parts.append(f'<text class="title" x="12" y="{middle}" {turned}>{escape(y_title)}</text>')
    return "".join(parts)


def _tick(x: float, text: str) -> str:
    bottom = HEIGHT - _BOTTOM
    return (
        f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>'
    )


def _svg(parts: Sequence[str], title: str, width: int = WIDTH) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
