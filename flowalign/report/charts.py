"""Metrics of runs as charts for a page: which values are drawn, how they are smoothed, what is said in words instead. How a
chart is drawn is in line_chart.py."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flowalign.report.line_chart import RANGE, Line, line_chart
from flowalign.storage.metrics_log import Row

DECAY = 0.9  # of the moving average
SMOOTHED_FROM = 20  # values; fewer are shown as they are
POINTS = 600  # of a line; longer ones are thinned
LINES = 20  # of the table of values


@dataclass(frozen=True)
class Panel:
    """One small chart: the metric `key` over the iterations with a band of ± the metric `spread`. log: a log axis if all
    values are positive and span more than a factor of 30."""

    title: str
    key: str
    spread: str | None = None
    log: bool = False


@dataclass(frozen=True)
class Chart:
    """points: JSON of the lines and of the plot's sides, read by the page's script. head, table: the values as texts, at most
    LINES of them, evenly spaced."""

    title: str
    svg: Markup
    points: str
    head: list[str]
    table: list[list[str]]
    log: bool


@dataclass(frozen=True)
class Charts:
    """drawn: the metrics that move. constant: a sentence for each that does not."""

    drawn: list[Chart]
    constant: list[str]

    def __bool__(self) -> bool:
        return bool(self.drawn or self.constant)


def curves(runs: Mapping[str, Sequence[Row]], panels: Sequence[Panel]) -> Charts:
    """runs {name: rows of its metrics.jsonl}, one line each in every chart. A panel without any value is left out.

    The thick line is an exponential moving average, m_t = DECAY m_{t−1} + (1 − DECAY) x_t, over 1 − DECAY^t (as in Adam,
    1412.6980), of the finite values (of their logarithms, where a Panel says log and all are positive); the thin line is x_t. Fewer than SMOOTHED_FROM values are not smoothed. Of more
    than POINTS values the smallest and largest of each stretch are drawn, and the first and last."""
    found = Charts([], [])
    for panel in panels:
        lines = [line for name, rows in runs.items() if (line := _line(name, rows, panel)) is not None]
        if not lines:
            continue
        sentences = [_constant(line) for line in lines]
        if all(sentences):
            names = [f"in {line.name}, " if len(lines) > 1 else "" for line in lines]
            parts = [name + sentence for name, sentence in zip(names, sentences, strict=True)]
            found.constant.append(f"{panel.title}: {'; '.join(parts)}")
        else:
            found.drawn.append(_chart(panel, lines))
    return found


def _line(name: str, rows: Sequence[Row], panel: Panel) -> Line | None:
    known = [row for row in rows if panel.key in row]  # few rows hold held-out values: a line joins them
    values = [_or_none(row[panel.key]) for row in known]  # a null is a gap in the line
    if all(value is None for value in values):
        return None
    spread = [None if panel.spread is None else _or_none(row.get(panel.spread)) for row in known]
    smooth = _smoothed(values, panel.log) if len(values) >= SMOOTHED_FROM else None
    kept = _thinned(values)
    return Line(
        name, [known[i]["step"] for i in kept], [values[i] for i in kept],
        None if smooth is None else [smooth[i] for i in kept], [spread[i] for i in kept],
        missing=values.count(None), count=len(values),
    )  # fmt: skip


def _smoothed(values: Sequence[float | None], log: bool) -> list[float | None]:
    """log: of the logarithms, if all values have one."""
    if not log or not all(value is None or value > 0 for value in values):
        return moving_average(values)
    averages = moving_average([None if value is None else math.log(value) for value in values])
    return [None if value is None else math.exp(value) for value in averages]


def moving_average(values: Sequence[float | None]) -> list[float | None]:
    """Bias-corrected, with DECAY; None where the value is None, which moves nothing."""
    mean, weight, averages = 0.0, 0.0, list[float | None]()
    for value in values:
        if value is None:
            averages.append(None)
            continue
        mean, weight = DECAY * mean + (1 - DECAY) * value, DECAY * weight + (1 - DECAY)
        averages.append(mean / weight)
    return averages


def _constant(line: Line) -> str:
    """ "0.3 in all 50 iterations" if the finite values are one; else ""."""
    finite = [value for value in line.values if value is not None]
    if max(finite) - min(finite) > 1e-9 * max(map(abs, finite)):
        return ""
    if line.missing:
        return (
            f"{number(finite[0])} in {line.count - line.missing} of {line.count} iterations, not a number in the others"
        )
    return f"{number(finite[0])} in {f'all {line.count} iterations' if line.count > 1 else 'the only iteration'}"


def _thinned(values: Sequence[float | None]) -> list[int]:
    """The places of at most POINTS values: all, or the smallest and largest of each stretch, and where the line begins and
    ends."""
    if len(values) <= POINTS:
        return list(range(len(values)))
    length = math.ceil(2 * len(values) / (POINTS - 2))
    known = [place for place, value in enumerate(values) if value is not None]
    kept = {known[0], known[-1]}
    for first in range(0, len(values), length):
        stretch = range(first, min(first + length, len(values)))
        finite = [place for place in stretch if values[place] is not None]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else {first}  # type: ignore[arg-type]
    return sorted(kept)


def _chart(panel: Panel, lines: Sequence[Line]) -> Chart:
    finite = [value for line in lines for value in line.values if value is not None]
    log = panel.log and min(finite) > 0 and max(finite) > 30 * min(finite)
    svg, left, right = line_chart(lines, log=log, label=f"{panel.title}: {_ends(lines)}", x_label="iteration")
    points = {
        "from": left, "to": right, "left": RANGE[0], "right": RANGE[1],
        "lines": [
            {"name": line.name if len(lines) > 1 else "", "x": line.steps, "y": list(map(_short, line.values)),
             "smooth": line.smooth and list(map(_short, line.smooth))}
            for line in lines
        ],
    }  # fmt: skip
    steps = sorted({step for line in lines for step in line.steps})
    spaced = sorted({steps[round(place * (len(steps) - 1) / (LINES - 1))] for place in range(LINES)})
    maps = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    table = [[str(step), *(number(values.get(step)) for values in maps)] for step in spaced]
    names = [line.name for line in lines] if len(lines) > 1 else [panel.title]
    return Chart(panel.title, svg, json.dumps(points, allow_nan=False), ["iteration", *names], table, log)


def _ends(lines: Sequence[Line]) -> str:
    """What a chart shows, for those who do not see it."""
    texts = []
    for line in lines:
        finite = [value for value in line.values if value is not None]
        prefix = f"{line.name} " if len(lines) > 1 else ""
        texts.append(
            f"{prefix}from {number(finite[0])} to {number(finite[-1])}, between {number(min(finite))} and {number(max(finite))}"
        )
    return "; ".join(texts)


def number(value: float | None, sign: str = "") -> str:
    """Four digits; sign "+" also shows that of positive ones."""
    return "–" if value is None or not math.isfinite(value) else re.sub("^-", "−", f"{value:{sign}.4g}")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _or_none(value: float | None) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
