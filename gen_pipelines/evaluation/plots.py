"""Scatter plots with lines as SVG text: readable on a phone, in light and dark, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 52

# Okabe & Ito's colours, which the colour-blind tell apart; the first is drawn in the text's colour
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f6bd1", "#8c564b")
MARKS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Series:
    """Points of one thing, joined by a line where there are several.

    Attributes:
        name: in the tip that a point shows.
        points: (x, y, what the tip says).
        style: a number: things of one style have one colour and mark in every plot.
        label: written at the first point.
    """

    name: str
    points: Sequence[tuple[float, float, str]]
    style: int
    label: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis: its label, whether it is logarithmic, and limits where they do not follow from the points."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None

    def span(self, values: Sequence[float]) -> tuple[float, float]:
        """Limits around values: a little room on both sides; at least half a decade on a logarithmic axis."""
        low, high = min(values), max(values)
        if self.log:
            a, b = math.log10(low), math.log10(high)
            room = max(0.06 * (b - a), (0.5 - (b - a)) / 2, 0.04)
            return 10 ** (a - room), 10 ** (b + room)
        room = 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
        return (low - room if self.low is None else self.low), (high + room if self.high is None else self.high)

    def place(self, value: float, span: tuple[float, float]) -> float:
        """Where a value lies between the limits, 0 to 1."""
        f = math.log10 if self.log else float
        return (f(value) - f(span[0])) / (f(span[1]) - f(span[0]))

    def ticks(self, span: tuple[float, float]) -> list[float]:
        """Round numbers inside the limits, three to eight of them."""
        low, high = span
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
                if len(found) >= 3:
                    return found if len(found) <= 8 else found[:: -(-len(found) // 8)]
            return found
        step = 10 ** math.floor(math.log10((high - low) / 3))
        step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3 or factor == 1)
        return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def labels(ticks: Sequence[float]) -> list[str]:
    """What is written at ticks: 0.05, 3, 200, 20k; with as many digits as tell them apart."""
    if max(map(abs, ticks), default=0.0) >= 10_000:
        return [f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}" for value in ticks]
    for digits in range(3, 16):
        found = [f"{round(value, 12):.{digits}g}" if abs(value) < 1000 else f"{value:.0f}" for value in ticks]
        if len(set(found)) == len(ticks):
            break
    return found


def scatter(series: Sequence[Series], x: Axis, y: Axis, lines: Sequence[tuple[float, str]] = (), title: str = "") -> str:
    """A plot as an `<svg>` element; colours of axes and text are CSS variables (--ink, --faint) of the page.

    Args:
        series: what is drawn; on a logarithmic axis points must be positive.
        lines: dashed horizontal lines, (y, label).
        title: for those who cannot see it.
    Raises:
        ValueError: no points, or one that has no place.
    """
    xs = [point[0] for one in series for point in one.points]
    ys = [point[1] for one in series for point in one.points] + [value for value, _ in lines]
    if not xs:
        raise ValueError("scatter: no points.")
    for axis, values in ((x, xs), (y, ys)):
        if bad := [value for value in values if not math.isfinite(value) or (axis.log and value <= 0)]:
            raise ValueError(f"scatter: {bad[0]} has no place on the axis {axis.label!r}.")
    wide, high = x.span(xs), y.span(ys)
    at_x = lambda value: LEFT + (WIDTH - LEFT - RIGHT) * x.place(value, wide)
    at_y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y.place(value, high)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, written in zip(x.ticks(wide), labels(x.ticks(wide)), strict=True):
        place = f"{at_x(tick):.1f}"
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{place}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{written}</text>')
    for tick, written in zip(y.ticks(high), labels(y.ticks(high)), strict=True):
        place = at_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{place + 4:.1f}" text-anchor="end">{written}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(
        f'<text class="label" x="15" y="{middle}" text-anchor="middle" transform="rotate(-90 15 {middle})">{escape(y.label)}</text>'
    )
    for value, label in lines:
        place = at_y(value)
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="mark" x="{WIDTH - RIGHT - 4}" y="{place - 5:.1f}" text-anchor="end">{escape(label)}</text>')
    taken: list[tuple[float, float, float]] = []
    names: list[str] = []
    for one in series:
        places = [(at_x(px), at_y(py)) for px, py, _ in one.points]
        colour = colour_of(one.style)
        if len(places) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" opacity="0.75"/>')
        for (px, py), (_, _, tip) in zip(places, one.points, strict=True):
            parts.append(f"<g>{mark(one.style, px, py)}<title>{escape(one.name)}: {escape(tip)}</title></g>")
        if one.label:
            (px, py), room = places[0], 8 * len(one.label)  # to the left of the point, unless the axis is there
            start = px - 9 - room if px - LEFT > room else px + 9
            while any(abs(py - y) < 14 and start < x + other and x < start + room for x, y, other in taken):
                py += 7  # below a label that is there
            taken.append((start, py, room))
            at = f'x="{start + room:.1f}" text-anchor="end"' if start < px else f'x="{start:.1f}"'
            names.append(f'<text class="name" {at} y="{py + 4:.1f}" style="fill: {colour}">{escape(one.label)}</text>')
    return "".join([*parts, *names, "</svg>"])


def colour_of(style: int) -> str:
    """The colour of a style; -1 is that of the text."""
    return "var(--ink)" if style < 0 else COLOURS[style % len(COLOURS)]


def mark(style: int, x: float, y: float, size: float = 5.5) -> str:
    """The mark of a style at a place, outlined in the page's colour so that marks on top of each other are told apart."""
    look = f'fill="{colour_of(style)}" stroke="var(--paper)" stroke-width="1.2"'
    kind = "star" if style < 0 else MARKS[(style // len(COLOURS) + style) % len(MARKS)]
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {look}/>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "star": [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i in range(10) for r in [1.6 if i % 2 == 0 else 0.7]],
    }[kind]
    return '<polygon points="{}" {}/>'.format(" ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners), look)
