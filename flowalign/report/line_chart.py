"""A line chart as inline SVG: its colors are the page's, classes of parts/page.css, so that it follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 330, 190
RANGE = (46.0, 322.0)  # left and right side of the plot
BOTTOM, TOP = 158.0, 8.0


@dataclass(frozen=True)
class Line:
    """One line [n]: values (None is a gap), their moving average or None, and the half-width of a band where there is one.
    missing and count are those before thinning."""

    name: str
    steps: list[int]
    values: list[float | None]
    smooth: list[float | None] | None = None
    spread: list[float | None] = field(default_factory=list)
    missing: int = 0
    count: int = 0


@dataclass(frozen=True)
class _Scale:
    """Data to pixels: `low` is drawn at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def line_chart(lines: Sequence[Line], *, log: bool, label: str, x_label: str) -> tuple[Markup, int, int]:
    """The SVG, and the first and last step of its axis. A band is drawn if there is only one line."""
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    x = _Scale(first, max(last, first + 1), *RANGE)
    low, high = _limits(lines, log)
    y = _Scale(low, high, BOTTOM, TOP, log)
    drawn = [*_y_axis(y), *_x_axis(x, x_label)]
    for place, line in enumerate(lines):
        dash = ("", " dashed", " dotted")[place // 7 % 3]
        parts = [_band(line, x, y, log)] if len(lines) == 1 else []
        raw = "raw behind" if line.smooth else "raw"
        parts += [f'<path class="{raw}{dash}" d="{path}"/>' for path in _paths(line.steps, line.values, x, y)]
        if line.smooth:
            parts += [f'<path class="smooth{dash}" d="{path}"/>' for path in _paths(line.steps, line.smooth, x, y)]
        if len(line.steps) <= 25:
            parts += [
                f'<circle class="dot" cx="{x(step)}" cy="{y(value)}" r="2.2"/>'
                for step, value in zip(line.steps, line.values, strict=True)
                if value is not None
            ]
        drawn.append(f'<g class="c{place % 7}">{"".join(parts)}</g>')
    title = escape(label)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(drawn)}</svg>'
    return Markup(svg), first, max(last, first + 1)  # numbers, and an escaped label


def _limits(lines: Sequence[Line], log: bool) -> tuple[float, float]:
    values = [value for line in lines for value in line.values if value is not None]
    if log:
        return min(values) / 1.3, max(values) * 1.3
    if len(lines) == 1:
        pairs = zip(lines[0].values, lines[0].spread or [None] * len(lines[0].values), strict=True)
        values += [v + s * sign for v, s in pairs if v is not None and s is not None for sign in (-1, 1)]
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    return min(values) - margin, max(values) + margin


def _y_axis(y: _Scale) -> Iterator[str]:
    for value, text in log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, 4):
        yield f'<line class="rule" x1="{RANGE[0]}" x2="{RANGE[1]}" y1="{y(value)}" y2="{y(value)}"/>'
        yield f'<text x="{RANGE[0] - 6}" y="{y(value) + 3.5}" text-anchor="end">{text}</text>'


def _x_axis(x: _Scale, label: str) -> Iterator[str]:
    yield f'<line class="axis" x1="{RANGE[0]}" x2="{RANGE[1]}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
    for value, text in ticks(x.low, x.high, 5, whole=True):
        yield f'<text x="{x(value)}" y="{BOTTOM + 14}" text-anchor="middle">{text}</text>'
    yield f'<text x="{sum(RANGE) / 2}" y="{BOTTOM + 29}" text-anchor="middle">{escape(label)}</text>'


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[tuple[float, str]]:
    """Round values within [low, high] and their texts: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    largest = max(map(abs, values), default=0.0)
    far = digits > 4 or largest >= 1e5
    texts = (
        _power(f"{value:.{_digits(largest, step)}e}") if far and value else f"{value:.{digits}f}" for value in values
    )
    return [(value, text.replace("-", "−")) for value, text in zip(values, texts, strict=True)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten within [low, high], at most five of them."""
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    chosen = exponents[:: max(1, math.ceil(len(exponents) / 5))]
    return [(10.0**n, (f"{10.0**n:g}" if -4 < n < 5 else f"1e{n}").replace("-", "−")) for n in chosen]


def _digits(largest: float, step: float) -> int:
    """Behind the point, so that neighbors differ."""
    return max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9)) if largest else 0


def _power(text: str) -> str:
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"


def _paths(steps: Sequence[int], values: Sequence[float | None], x: _Scale, y: _Scale) -> Iterator[str]:
    """One path for each stretch without a gap."""
    points: list[str] = []
    for step, value in [*zip(steps, values, strict=True), (0, None)]:
        if value is not None:
            points.append(f"{x(step)},{y(value)}")
        elif points:
            yield "M" + "L".join(points if len(points) > 1 else points * 2)
            points = []


def _band(line: Line, x: _Scale, y: _Scale, log: bool) -> str:
    known = [
        (step, value, spread)
        for step, value, spread in zip(line.steps, line.values, line.spread, strict=True)
        if value is not None and spread is not None
    ]
    if log or len(known) < 2:
        return ""
    upper = [f"{x(step)},{y(value + spread)}" for step, value, spread in known]
    lower = [f"{x(step)},{y(value - spread)}" for step, value, spread in reversed(known)]
    return f'<polygon class="band" points="{" ".join(upper + lower)}"/>'
