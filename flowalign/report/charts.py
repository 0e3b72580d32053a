"""How charts are drawn: metrics of a run as SVG, text as outlines. Which charts a report has is said in html.py."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowalign.picture_style import INK, LINE, RULE, STYLE
from flowalign.storage.metrics_log import Row


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
    """A picture of its own, so that a page can lay charts out by its width."""

    title: str
    svg: str


def curves(rows: Sequence[Row], panels: Sequence[Panel]) -> list[Chart]:
    """A chart for each panel that has a value in `rows`."""
    return [_chart(rows, panel) for panel in panels if any(_is_number(row.get(panel.key)) for row in rows)]


def _chart(rows: Sequence[Row], panel: Panel) -> Chart:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3, 2.15), layout="constrained")
        _curve(figure.subplots(), rows, panel)
        return Chart(panel.title, svg(figure))


def bars(labels: Sequence[str], values: Sequence[float], unit: str) -> str:
    """An SVG of horizontal bars, first on top, each with its value and its share of the sum."""
    total = sum(values) or 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 0.5 + 0.3 * len(labels)), layout="constrained")
        axis = figure.subplots()
        drawn = axis.barh(range(len(labels)), values, color=LINE, height=0.62)
        texts = [f" {value:.3g} {unit}  ({100 * value / total:.0f} %)" for value in values]
        axis.bar_label(drawn, labels=texts, padding=2)
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.4 * max([*values, 1e-9]))
        axis.tick_params(length=0)
        axis.set_xticks([])
        axis.spines[["bottom", "left"]].set_visible(False)
        return svg(figure)


def _curve(axis: Axes, rows: Sequence[Row], panel: Panel) -> None:
    known = [row for row in rows if panel.key in row]  # few rows hold held-out values: a line joins them
    steps = [row["step"] for row in known]
    values = [_or_nan(row[panel.key]) for row in known]  # a null is a gap in the line
    axis.plot(steps, values, color=LINE, linewidth=1.4, marker="o" if len(steps) <= 25 else None, markersize=2.5)
    if panel.spread is not None:
        spread = [_or_nan(row.get(panel.spread)) for row in known]
        low, high = ([v + sign * s for v, s in zip(values, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=LINE, alpha=0.15, linewidth=0)
    positive = [value for value in values if value > 0]
    if panel.log and len(positive) == len(values) and max(positive) > 30 * min(positive):
        axis.set_yscale("log")
    else:
        axis.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.set_title(panel.title, loc="left", fontsize=9, color=INK, parse_math=False)  # names of rewards
    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.margins(x=0.02)
    axis.grid(axis="y", color=RULE, linewidth=0.6)
    axis.tick_params(which="both", length=0)


def svg(figure: Figure) -> str:
    """The picture, the same bytes for the same content."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
