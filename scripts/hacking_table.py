"""What a hacked reward does to held-out rewards and monitors: tables, JSON and curves from the runs of a comparison.

`flowalign compare configs/compare/glyphs_hacking.yaml`, then `python scripts/hacking_table.py > tables.md`

Prints two tables in Markdown and writes docs/results/glyphs_hacking.json and .svg. The proxy is that of the arm `sum`, computed
for every arm from the same two scores. A change is tuned − base of a mean over all images, once per seed; its interval is
Student's over seeds, on these prompts. A monitor fires if its mean has moved by more than one standard deviation of the base's images.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowalign.compare.page import COLORS
from flowalign.compare.plan import Plan, budget_of
from flowalign.compare.spec import read_spec
from flowalign.picture_style import INK, RULE, SOFT, STYLE, svg
from flowalign.storage.files import write_atomic
from flowalign.storage.metrics_log import read_rows

PROXY = {"clip_score": 1.0, "jpeg_compressibility": 3.0}  # weights of configs/rewards/hackable_glyphs.yaml
HELD_OUT = ("ocr_soft", "ocr_exact", "color")
LEVELS = (0.25, 0.5)  # rises of the proxy
NO_SPREAD = 0.1  # counts as the deviation of a monitor that is the same for all images of the base
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's, two-sided, by degrees of freedom
Runs = dict[str, np.ndarray]  # {score: [seeds, evaluations]} of an arm, means over its images


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="configs/compare/glyphs_hacking.yaml")
    parser.add_argument("--output", type=Path, default=Path("docs/results/glyphs_hacking"))
    arguments = parser.parse_args()
    steps, arms, spread = read(arguments.spec)
    monitors = [name for name in spread if name.startswith(("image/", "group/"))]
    print(held_out_table(steps, arms))
    print()
    print(monitor_table(steps, arms, spread, monitors))
    content = {
        "steps": steps,
        "base_sd": {name: round(value, 5) for name, value in spread.items()},
        "arms": {
            name: {score: np.round(values, 5).tolist() for score, values in runs.items()} for name, runs in arms.items()
        },
    }
    text = json.dumps(content).replace("}, ", "},\n ").replace("]], ", "]],\n  ")
    write_atomic(arguments.output.with_suffix(".json"), (text + "\n").encode())
    write_atomic(arguments.output.with_suffix(".svg"), curves(steps, arms).encode())


def read(spec: str) -> tuple[list[int], dict[str, Runs], dict[str, float]]:
    """Iterations of the evaluations; the finished arms; the deviation of each score over the base's images."""
    plan, arms, steps, spread = Plan.of(read_spec(spec)), {}, [], {}
    for name in plan.comparison.methods:
        runs = plan.runs(name, budget_of(plan.comparison, name, None))
        logs = [read_rows(run.folder / "evaluations.jsonl") for run in runs if (run.folder / "summary.json").exists()]
        if not logs:
            continue
        steps = [row["step"] for row in logs[0]]
        base = {score: np.array(values, dtype=float) for score, values in logs[0][0]["scores"].items()}
        arms[name] = {
            score: np.array([[np.nanmean(np.array(row["scores"][score], dtype=float)) for row in log] for log in logs])
            for score in base
        }
        arms[name]["proxy"], base["proxy"] = proxy_of(arms[name]), proxy_of(base)
        spread = {score: float(np.nanstd(values)) for score, values in base.items()}
    return steps, arms, spread


def proxy_of(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.stack([weight * scores[name] for name, weight in PROXY.items()]).sum(0)


def interval(values: np.ndarray, digits: int = 3) -> str:
    """Mean of one value per seed and Student's 95 % interval."""
    count, mean = len(values), values.mean()
    if count < 2:
        return f"{signed(mean, digits)}"
    half = T95[count - 1] * values.std(ddof=1) / math.sqrt(count)
    return f"{signed(mean, digits)} [{signed(mean - half, digits)}, {signed(mean + half, digits)}]"


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def change(runs: Runs, score: str) -> np.ndarray:
    """[seeds, evaluations]: less the base."""
    return runs[score] - runs[score][:, :1]


def held_out_table(steps: list[int], arms: Mapping[str, Runs]) -> str:
    """Changes of the proxy and of what is not trained on, a row per arm: at the end, then of ocr_soft alone on the way."""
    levels = [f"`ocr_soft` where the proxy is at {signed(level, 2)}" for level in LEVELS]
    head = [
        "arm",
        "seeds",
        "proxy",
        *(f"`{name}`" for name in HELD_OUT),
        "`ocr_soft` − that of `sum`",
        "best `ocr_soft`",
        *levels,
    ]
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for name, runs in arms.items():
        curve, last = change(runs, "ocr_soft").mean(0), runs["ocr_soft"][:, -1]
        shared = min(len(last), len(arms["sum"]["ocr_soft"]))
        cells = [
            name, str(len(last)), *(interval(change(runs, score)[:, -1]) for score in ("proxy", *HELD_OUT)),
            "–" if name == "sum" else interval(last[:shared] - arms["sum"]["ocr_soft"][:shared, -1]),
            f"{signed(curve.max(), 3)} at {steps[int(curve.argmax())]}", *(at_proxy(runs, level) for level in LEVELS),
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def at_proxy(runs: Runs, level: float) -> str:
    """The change of ocr_soft where each seed's proxy has first risen by `level`, between its evaluations."""
    found = []
    for x, y in zip(change(runs, "proxy"), change(runs, "ocr_soft"), strict=True):
        if x.max() >= level:
            place = int((x >= level).argmax())
            found.append(y[place - 1] + (level - x[place - 1]) / (x[place] - x[place - 1]) * (y[place] - y[place - 1]))
    if len(found) < len(runs["proxy"]):
        return f"reached by {len(found)} of {len(runs['proxy'])}"
    return interval(np.array(found))


def monitor_table(steps: list[int], arms: Mapping[str, Runs], spread: Mapping[str, float], monitors: list[str]) -> str:
    """Final change in standard deviations of the base's images; where it fires: in how many seeds, and from which
    iteration on in the mean of the seeds."""
    rows = [f"| monitor | base | {' | '.join(arms)} |", f"|---|{'---:|' * (len(arms) + 1)}"]
    for monitor in monitors:
        cells = []
        for runs in arms.values():
            moved = change(runs, monitor) / (spread[monitor] or NO_SPREAD)
            fired = np.abs(moved) > 1
            text = signed(moved[:, -1].mean(), 1)
            if fired[:, -1].any():
                first = np.abs(moved.mean(0)) > 1
                since = f", from {steps[int(first.argmax())]}" if first.any() else ""
                text = f"**{text}** ({int(fired[:, -1].sum())}/{len(fired)}{since})"
            cells.append(text)
        base = next(iter(arms.values()))[monitor][0, 0]
        rows.append(f"| `{monitor}` | {base:.3g} ± {spread[monitor]:.2g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def curves(steps: list[int], arms: Mapping[str, Runs]) -> str:
    """Proxy and held-out reward against iterations, and against each other; a band from the worst to the best seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        panels = figure.subplots(1, 3)
        for (name, runs), color in zip(arms.items(), (*COLORS, SOFT), strict=False):
            for axis, score in zip(panels, ("proxy", "ocr_soft"), strict=False):
                values = runs[score]
                axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
                axis.plot(steps, values.mean(0), color=color, linewidth=1.4, label=name)
            x, y = runs["proxy"].mean(0), runs["ocr_soft"].mean(0)
            panels[2].plot(x, y, color=color, linewidth=1.4, marker="o", markersize=2.5)
        titles = ("proxy: what sum trains on", "held-out ocr_soft", "held-out ocr_soft against the proxy")
        for axis, title, label in zip(panels, titles, ("iteration", "iteration", "proxy"), strict=True):
            _dress(axis, title, label)
        panels[0].legend(frameon=False, fontsize=7.5)
        return svg(figure)


def _dress(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, loc="left", fontsize=9, color=INK)
    axis.set_xlabel(label)
    axis.grid(axis="y", color=RULE, linewidth=0.6)
    axis.tick_params(which="both", length=0)


if __name__ == "__main__":
    main()
