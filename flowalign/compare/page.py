"""The plots of a comparison, and its page: one HTML file with everything inside, readable on a telephone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from flowalign.compare.record import COSTS
from flowalign.compare.results import HEAD, OTHERS, MethodResult, Results, lines, notes, other_lines
from flowalign.picture_style import INK, RULE, SOFT, STYLE, svg
from flowalign.report.page import template
from flowalign.storage.files import write_atomic

# Okabe and Ito, less yellow; then again with dashes
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", ":", "-.")
TITLES = {
    "evaluations": "network evaluations",
    "decodes": "decoded images",
    "reward_calls": "reward calls",
    "seconds": "seconds of training",
}


@dataclass(frozen=True)
class Key:
    """How a method is drawn."""

    name: str
    color: str
    dash: str


@dataclass(frozen=True)
class Plot:
    """A picture of its own, so that a page can lay plots out by its width."""

    title: str
    svg: str


def plots(results: Results) -> list[Plot]:
    """The mean reward of all methods against each of COSTS, with the 95 % interval of the gain as a band."""
    return [_chart(results, results.shown, cost, f"against {TITLES[cost]}") for cost in COSTS]


def one_by_one(results: Results) -> list[Plot]:
    """Each method against the network evaluations, beside the baseline."""
    baseline = [method for method in results.shown if method.name == results.comparison.baseline]
    others = [method for method in results.shown if method not in baseline]
    return [_chart(results, [*baseline, method], "evaluations", method.name, (3.3, 2.15)) for method in others]


def keys(results: Results) -> list[Key]:
    return [
        Key(method.name, COLORS[place % len(COLORS)], DASHES[place // len(COLORS) % len(DASHES)])
        for place, method in enumerate(results.shown)
    ]


def _chart(
    results: Results, methods: Sequence[MethodResult], cost: str, title: str, size: tuple[float, float] = (4.4, 2.9)
) -> Plot:
    drawn = {key.name: key for key in keys(results)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        _levels(axis, results)
        for method in methods:
            x, curve, key = method.curve.costs[cost], method.curve, drawn[method.name]
            axis.fill_between(x, curve.low, curve.high, color=key.color, alpha=0.1, linewidth=0)
            axis.plot(x, curve.score, color=key.color, linestyle=key.dash, linewidth=1.5, marker="o", markersize=2.5)
            if len(methods) < 4:  # with more the page's legend names them
                right = x[-1] > max(each.curve.costs[cost][-1] for each in methods) / 2
                axis.annotate(
                    method.name, (x[-1], curve.score[-1]), xytext=(0 if right else 4, -4), textcoords="offset points",
                    ha="right" if right else "left", va="top", fontsize=7.5, color=key.color, parse_math=False,
                )  # fmt: skip
        axis.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
        axis.set_xlabel(TITLES[cost])
        axis.set_ylabel(results.reward, parse_math=False)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.margins(x=0.02)
        axis.grid(axis="y", color=RULE, linewidth=0.6)
        axis.tick_params(which="both", length=0)
        return Plot(title, svg(figure))


def _levels(axis: Axes, results: Results) -> None:
    """Lines at the target and at the references, each named at its right end."""
    target = {} if results.target is None else {"target": results.target}
    for name, level in (dict(results.comparison.references) | target).items():
        axis.axhline(level, color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        axis.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points", ha="right",
            va="bottom", fontsize=7.5, color=SOFT, parse_math=False,
        )  # fmt: skip


def write_page(results: Results, path: Path) -> Path:
    """Writes the page, and beside it a folder of its plots as SVG, with one per method in methods/."""
    charts, singles = plots(results), one_by_one(results)
    for cost, chart in zip(COSTS, charts, strict=True):
        write_atomic(path.with_suffix("") / f"{cost}.svg", chart.svg.encode())
    for chart in singles:
        write_atomic(path.with_suffix("") / "methods" / f"{chart.title}.svg", chart.svg.encode())
    tables = {"": lines(results, apart=False), "Listed apart": lines(results, apart=True)}
    others = other_lines(results)
    page = template("flowalign.compare", "compare.html").render(
        other_head=others[0] if others else (), others=others[1:], others_note=OTHERS, name=results.comparison.name, command=results.comparison.command, notes=notes(results), head=HEAD, charts=charts,
        tables={title: table for title, table in tables.items() if table}, keys=keys(results),
        best=best(results), singles=singles, baseline=results.comparison.baseline,
    )  # fmt: skip
    write_atomic(path, page.encode())
    return path


def best(results: Results) -> str | None:
    """The headline: which method reaches the target at the fewest evaluations; None without a target."""
    if results.target is None or results.denominator is None:
        return None
    reached = {}
    for method in results.methods:
        value = method.to_target.get("evaluations")
        if value is not None and not method.apart and method.name != results.comparison.baseline:
            reached[method.name] = value / results.denominator["evaluations"]
    if not reached:
        return f"No other method reaches the target of {results.target:.3f} within its budget."
    name = min(reached, key=reached.__getitem__)
    return (
        f"{name} reaches the final mean of {results.comparison.baseline} ({results.target:.3f}) at {reached[name]:.2f} × its "
        "evaluations."
    )
