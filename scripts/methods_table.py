"""One table and one plot of the methods of several comparisons that have one target.

`flowalign compare` of each, then
`python scripts/methods_table.py docs/results/glyphs_grpo.json docs/results/glyphs_trainers.json --output docs/results/glyphs_methods`

Writes OUTPUT.md and OUTPUT.svg: those that reach the target first, by the evaluations that took, then the others by gain. The
comparisons must agree in reward, prompts, baseline and target, as one does whose baseline is that of the other's results.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from flowalign.compare.page import COLORS, DASHES
from flowalign.compare.record import COSTS
from flowalign.compare.results import signed
from flowalign.errors import ConfigError
from flowalign.picture_style import INK, RULE, SOFT, STYLE, svg
from flowalign.storage.files import write_atomic

SAME = ("reward", "prompts", "baseline", "target", "denominator_evaluations")
HEAD = ("method", "seeds", "evaluations to target", "decodes", "reward calls", "seconds", "gain", "95 % interval")
NAMED = 12  # methods in color; all others are gray
Row = tuple[str, dict[str, Any]]  # a method and its results


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="without ending")
    given = parser.parse_args(arguments)
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in given.results}
    rows, first = joined(found), next(iter(found.values()))
    write_atomic(given.output.with_suffix(".svg"), plot(rows, first).encode())
    write_atomic(given.output.with_suffix(".md"), page(rows, first, given.output.name, list(found)).encode())


def joined(found: dict[Path, dict[str, Any]]) -> list[Row]:
    """All methods, sorted. ConfigError for comparisons that do not belong together."""
    (one, first), *others = found.items()
    for path, results in others:
        for key in SAME:
            if results[key] != first[key]:
                raise ConfigError(
                    f"{one} and {path} differ in {key}: {first[key]!r} and {results[key]!r}; expected the same"
                )
    rows: dict[str, dict[str, Any]] = {}
    for path, results in found.items():
        for name, method in results["methods"].items():
            if name in rows:
                raise ConfigError(
                    f"got {name} in several comparisons, {path} among them; expected names of one method each"
                )
            if "curve" not in method:
                raise ConfigError(f"{path} has no curves: write it again with `{results['command']} --only-report`")
            rows[name] = method
    return sorted(rows.items(), key=_place)


def _place(row: Row) -> tuple[bool, float, float]:
    reached = row[1]["evaluations_to_target"]
    return reached is None, reached or 0, -row[1]["gain"]


def page(rows: Sequence[Row], first: dict[str, Any], name: str, sources: Sequence[Path]) -> str:
    """The Markdown."""
    text = [
        f"# {name}", "",
        f"Mean {first['reward']} on {first['prompts']} held-out prompts. Target: the final mean of {first['baseline']}, "
        f"{_number(first['target'])}, at {first['denominator_evaluations']:,} evaluations. What a method had cost where its mean curve "
        "reached it, then its gain at the end of its budget. Those that reach the target first; –: not reached. Seconds are those "
        "of the machine of each comparison.", "",
        f"![score against evaluations]({name}.svg)", "",
        f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * (len(HEAD) - 1), *(_line(*row) for row in rows), "",
        f"Written by `scripts/methods_table.py` from {', '.join(path.name for path in sources)}.", "",
    ]  # fmt: skip
    return "\n".join(text)


def _line(name: str, method: dict[str, Any]) -> str:
    mark = " (guided)" if method.get("guided") else " (apart)" if method.get("apart") else ""
    reached = (method[f"{cost}_to_target"] for cost in COSTS)
    low, high = method["gain_ci95"]
    cells = (
        f"{name}{mark}", str(len(method["seeds"])), *("–" if value is None else f"{value:,}" for value in reached),
        signed(method["gain"]), f"{signed(low)} to {signed(high)}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def plot(rows: Sequence[Row], first: dict[str, Any]) -> str:
    """Score against evaluations: the first NAMED of the table and the baseline in color, all others in gray."""
    named = [name for name, _ in rows if name != first["baseline"]][:NAMED]
    ends = [method["curve"]["evaluations"][-1] for name, method in rows if name != first["baseline"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 4.4), layout="constrained")
        axis = figure.subplots()
        for name, method in reversed(rows):
            curve, look = method["curve"], dict[str, Any](color=RULE, linewidth=1.0, zorder=1.0)
            if name == first["baseline"]:
                look = {"color": INK, "linewidth": 1.8, "linestyle": "--", "label": name}
            elif name in named:
                place = named.index(name)
                dash = DASHES[place // len(COLORS) % len(DASHES)]
                look = {"color": COLORS[place % len(COLORS)], "linewidth": 1.5, "linestyle": dash, "label": name}
            axis.plot(curve["evaluations"], curve["score"], **look)
        if first["target"] is not None:
            axis.axhline(first["target"], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        if ends:
            axis.set_xlim(0, 1.02 * max(ends))  # the baseline may go on for much longer
        axis.set_xlabel("network evaluations")
        axis.set_ylabel(first["reward"], parse_math=False)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(axis="y", color=RULE, linewidth=0.6)
        axis.tick_params(which="both", length=0)
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(
            handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7.5
        )
        return svg(figure)


if __name__ == "__main__":
    main()
