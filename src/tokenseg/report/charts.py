"""Charts as inline SVG: one dot a case, volumes against each other, and curves over the steps of a training.

Colours come from the style of the page, so that charts follow light and dark; read-outs come from its script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokenseg.report.markup import Html, element, join

WIDTH, HEIGHT = 420.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 14.0, 10.0, 40.0
_STRIP_ROW = 56.0
_DOT = 3.5
_BINS = 200
_SMOOTHED_SHARE = 0.04


@dataclass(frozen=True)
class Axis:
    """A scale with a label; logarithmic ones need positive ends."""

    low: float
    high: float
    label: str
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within the ends, about five; powers of ten on a logarithmic scale."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        step = _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


class Line(NamedTuple):
    """A named sequence of values over steps; steps without a value are left out."""

    name: str
    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


class Dot(NamedTuple):
    """One case in a strip or a scatter."""

    x: float
    y: float
    """Of a scatter; a strip does not use it."""
    tip: str
    """Said when the pointer is on it."""
    failed: bool
    """Drawn as a cross in the colour of failures."""


class Strip(NamedTuple):
    """The dots of one row, and the mean with its interval below them; NaNs leave it out."""

    name: str
    dots: Sequence[Dot]
    mean: float
    low: float
    high: float


def axis_over(values: Sequence[float], label: str, *, log: bool = False, zero: bool = False) -> Axis:
    """An axis over all finite values, with a little air; from zero where asked, never of no length."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if log and low > 0:
        return Axis(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9), label, log=True)
    low = min(0.0, low) if zero else low
    air = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(low if low == 0 else low - air, high + air, label)


def line_chart(title: str, lines: Sequence[Line], y_label: str, *, log: bool = False, smooth: bool = True) -> Html:
    """Curves over steps: smoothed in front of the raw values, or with a mark a value where there are few.

    Args:
        title: Above the chart, and its name for screen readers.
        lines: At least one with values.
        y_label: Quantity, with its unit in brackets.
        log: Logarithmic, as long as all values are positive.
        smooth: False draws the values themselves, with marks.
    """
    values = np.concatenate([line.values for line in lines])
    steps = np.concatenate([line.steps for line in lines])
    x_axis = Axis(0.0, max(1.0, float(steps.max())), "step")
    y_axis = axis_over(values.tolist(), y_label, log=log and bool((values > 0).all()))
    drawn = [_curve(line, index, (x_axis, y_axis), smooth=smooth) for index, line in enumerate(lines)]
    ruler = element("line", class_="ruler", x1=0, x2=0, y1=_TOP, y2=HEIGHT - _BOTTOM, visibility="hidden")
    chart = _svg(title, HEIGHT, (_frame(x_axis, y_axis), *drawn, ruler), _readings(lines, x_axis, smooth=smooth))
    keys = [_key(f"s{index}", line.name) for index, line in enumerate(lines)] if len(lines) > 1 else []
    return _figure(title, chart, keys)


def strip_chart(title: str, strips: Sequence[Strip], axis: Axis) -> Html:
    """One row of dots a label, stacked where they would cover each other, over the mean and its interval."""
    rows, bottom = [], _TOP + _STRIP_ROW * len(strips)
    for index, strip in enumerate(strips):
        middle = _TOP + _STRIP_ROW * (index + 0.5)
        rows.append(element("text", _shortened(strip.name), class_="row", x=4, y=middle - 18))
        rows.append(_mean_bar(strip, axis, middle + 18))
        rows += [_dot(dot, _x(axis, dot.x), y) for dot, y in _stacked(strip.dots, axis, middle)]
    chart = _svg(title, bottom + _BOTTOM, (_x_axis(axis, bottom, _TOP), *rows), None)
    failed = [_key("failed", "missed or invented")] if any(dot.failed for strip in strips for dot in strip.dots) else []
    return _figure(title, chart, [_key("s0", "case"), *failed, _key("mean", "mean, 95 %")])


def scatter_chart(title: str, groups: Mapping[str, Sequence[Dot]], x_label: str, y_label: str) -> Html:
    """Two measurements of the same thing on equal axes from zero, with the line on which they agree."""
    dots = [dot for group in groups.values() for dot in group]
    reach = axis_over([value for dot in dots for value in (dot.x, dot.y)], "", zero=True)
    x_axis, y_axis = (Axis(0.0, reach.high, label) for label in (x_label, y_label))
    diagonal = element(
        "line", class_="agree", x1=_x(x_axis, 0.0), y1=_y(y_axis, 0.0), x2=_x(x_axis, reach.high), y2=_TOP
    )
    drawn = [
        element("g", *(_dot(dot, _x(x_axis, dot.x), _y(y_axis, dot.y)) for dot in group), class_=f"s{index % 6}")
        for index, group in enumerate(groups.values())
    ]
    chart = _svg(title, HEIGHT, (_frame(x_axis, y_axis), diagonal, *drawn), None)
    return _figure(title, chart, [_key(f"s{index % 6}", name) for index, name in enumerate(groups)])


def _figure(title: str, chart: Html, keys: Sequence[Html]) -> Html:
    return element("figure", element("figcaption", element("b", title), *keys), chart, class_="chart")


def _svg(title: str, height: float, children: Sequence[Html], readings: str | None) -> Html:
    box = f"0 0 {WIDTH:g} {height:g}"
    return element("svg", *children, viewBox=box, role="img", aria_label=title, class_="chart", data_lines=readings)


def _key(class_: str, name: str) -> Html:
    return element("span", element("i", class_=f"key {class_}"), f" {name}", class_="entry")


def _frame(x_axis: Axis, y_axis: Axis) -> Html:
    marks = []
    for tick in y_axis.ticks():
        y = _y(y_axis, tick)
        marks.append(element("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y))
        marks.append(element("text", _tick_text(tick), x=_LEFT - 6, y=y + 4, text_anchor="end"))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    turned = f"rotate(-90 10 {middle:g})"
    marks.append(element("text", y_axis.label, x=10, y=middle, text_anchor="middle", transform=turned, class_="name"))
    return join((_x_axis(x_axis, HEIGHT - _BOTTOM, None), *marks))


def _x_axis(axis: Axis, bottom: float, grid_top: float | None) -> Html:
    marks = [element("line", class_="axis", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom)]
    for tick in axis.ticks():
        x = _x(axis, tick)
        top = bottom - 4 if grid_top is None else grid_top
        marks.append(element("line", class_="axis" if grid_top is None else "grid", x1=x, x2=x, y1=top, y2=bottom))
        marks.append(element("text", _tick_text(tick), x=x, y=bottom + 15, text_anchor="middle"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return join((*marks, element("text", axis.label, x=middle, y=bottom + 32, text_anchor="middle", class_="name")))


def _curve(line: Line, index: int, axes: tuple[Axis, Axis], *, smooth: bool) -> Html:
    x_axis, y_axis = axes
    if not smooth:
        points = list(zip(line.steps.tolist(), line.values.tolist(), strict=True))
        marks = (element("circle", cx=_x(x_axis, x), cy=_y(y_axis, y), r=2.5) for x, y in points)
        return element("g", _polyline(points, axes, "smooth"), *marks, class_=f"s{index}")
    binned = _binned(line)
    raw = [(step, value) for step, low, _, high in binned for value in ((low, high) if high > low else (low,))]
    smoothed = [(step, mean) for step, _, mean, _ in binned]
    return element("g", _polyline(raw, axes, "raw"), _polyline(smoothed, axes, "smooth"), class_=f"s{index}")


def _polyline(points: Sequence[tuple[float, float]], axes: tuple[Axis, Axis], class_: str) -> Html:
    places = " ".join(f"{_x(axes[0], x):.1f},{_y(axes[1], y):.1f}" for x, y in points)
    return element("polyline", points=places, class_=class_)


def _binned(line: Line) -> list[tuple[float, float, float, float]]:
    """Step, least, smoothed mean and largest value of at most 200 runs of steps."""
    parts = np.array_split(np.arange(len(line.values)), min(_BINS, len(line.values)))
    means = np.array([line.values[part].mean() for part in parts])
    reach = round(len(parts) * _SMOOTHED_SHARE / 2)
    smoothed = [means[max(0, at - reach) : at + reach + 1].mean() for at in range(len(means))]
    return [
        (float(line.steps[part].mean()), float(line.values[part].min()), float(mean), float(line.values[part].max()))
        for part, mean in zip(parts, smoothed, strict=True)
    ]


def _readings(lines: Sequence[Line], x_axis: Axis, *, smooth: bool) -> str:
    """What the script reads out: pixel and step of each place, and the value of each line there or null."""
    points = [
        {round(step): mean for step, _, mean, _ in _binned(line)}
        if smooth
        else dict(zip(line.steps.round().astype(int).tolist(), line.values.tolist(), strict=True))
        for line in lines
    ]
    steps = sorted({step for values in points for step in values})
    series = [
        [line.name, [float(f"{values[step]:.4g}") if step in values else None for step in steps]]
        for line, values in zip(lines, points, strict=True)
    ]
    return json.dumps({"x": steps, "px": [round(_x(x_axis, float(step)), 1) for step in steps], "series": series})


def _stacked(dots: Sequence[Dot], axis: Axis, middle: float) -> list[tuple[Dot, float]]:
    """Dots in columns of a dot's width, alternately below and above the middle, closer where a column is full."""
    columns: dict[int, list[Dot]] = {}
    for dot in sorted(dots, key=lambda dot: (dot.x, dot.tip)):
        columns.setdefault(round(_x(axis, dot.x) / (2 * _DOT)), []).append(dot)
    fullest = max((len(column) for column in columns.values()), default=1)
    step = min(2 * _DOT, 26 / fullest)
    return [
        (dot, middle + step * ((number + 1) // 2) * (-1) ** number)
        for column in columns.values()
        for number, dot in enumerate(column)
    ]


def _dot(dot: Dot, x: float, y: float) -> Html:
    if dot.failed:
        cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return element("path", d=cross, class_="dot failed", data_tip=dot.tip)
    return element("circle", cx=round(x, 1), cy=round(y, 1), r=_DOT, class_="dot", data_tip=dot.tip)


def _mean_bar(strip: Strip, axis: Axis, y: float) -> Html:
    if math.isnan(strip.mean):
        return element("text", "no case scored", x=_LEFT, y=y)
    low, mean, high = (_x(axis, value) for value in (strip.low, strip.mean, strip.high))
    bar = element("line", x1=low, x2=high, y1=y, y2=y)
    ends = (element("line", x1=x, x2=x, y1=y - half, y2=y + half) for x, half in ((low, 3), (mean, 6), (high, 3)))
    tip = f"{strip.name}: mean {strip.mean:.3f}, 95 % interval {strip.low:.3f} to {strip.high:.3f}"
    return element("g", bar, *ends, class_="mean", data_tip=tip)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def _tick_text(value: float) -> str:
    if abs(value) < 1e-12:
        return "0"
    if 1e-2 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _shortened(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
