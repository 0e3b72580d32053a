"""The results of a comparison as data, and as a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowalign.compare.record import COSTS, Record
from flowalign.compare.spec import Comparison
from flowalign.compare.statistics import Curve, check_same, cost_to_reach, gains, hierarchical_interval, mean_curve


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Of one method, over its seeds. base, score: means at the start and at the end of its curve; gain and interval: paired,
    over the prompts that are valid in all its runs. costs: means per run. to_target: evaluations and seconds until the mean
    curve reaches the target, None where it does not, {} without a target."""

    name: str
    seeds: tuple[int, ...]
    base: float
    score: float
    gain: float
    interval: tuple[float, float]
    costs: Mapping[str, float]
    curve: Curve
    to_target: Mapping[str, float | None]
    apart: bool
    guided: bool


@dataclass(frozen=True, eq=False)
class Results:
    """Of all methods that have a finished run. denominator: of the baseline; None without one that is finished. target: its
    final mean, if that is above its base."""

    comparison: Comparison
    reward: str
    prompts: int
    target: float | None
    denominator: Mapping[str, float] | None
    methods: tuple[MethodResult, ...]


def results_of(comparison: Comparison, records: Mapping[str, Sequence[Record]]) -> Results:
    """records: the finished runs of each method, at least one in all. ConfigError for records that do not pair."""
    done = {name: list(found) for name, found in records.items() if found}
    check_same([record for found in done.values() for record in found])
    baseline = done.get(comparison.baseline or "", [])
    reached = mean_curve(baseline).score if baseline else [0.0]
    target = reached[-1] if reached[-1] > reached[0] else None
    first = next(iter(done.values()))[0]
    return Results(
        comparison, first.reward, len(first.prompts), target, mean_totals(baseline) if baseline else None,
        tuple(_method(comparison, name, found, target) for name, found in done.items()),
    )  # fmt: skip


def mean_totals(records: Sequence[Record]) -> dict[str, float]:
    """What a run of them cost on average."""
    return {name: float(np.mean([record.totals[name] for record in records])) for name in COSTS}


def _method(comparison: Comparison, name: str, records: Sequence[Record], target: float | None) -> MethodResult:
    paired, curve, method = gains(records), mean_curve(records), comparison.methods[name]
    reached = {}
    if target is not None:
        reached = {cost: cost_to_reach(curve, target, cost) for cost in ("evaluations", "seconds")}
    return MethodResult(
        name, tuple(record.seed for record in records), curve.score[0], curve.score[-1], float(paired.mean()),
        hierarchical_interval(paired), mean_totals(records), curve, reached, method.apart, method.guided,
    )  # fmt: skip


def as_json(results: Results) -> dict[str, Any]:
    """evaluations, decodes, reward_calls and seconds are means per run, without those of held-out evaluations."""
    denominator = results.denominator
    return {
        "command": results.comparison.command,
        "reward": results.reward,
        "prompts": results.prompts,
        "baseline": results.comparison.baseline,
        "target": _round(results.target, 5),
        "denominator_evaluations": None if denominator is None else round(denominator["evaluations"]),
        "denominator_seconds": None if denominator is None else round(denominator["seconds"], 1),
        "references": dict(results.comparison.references),
        "methods": {method.name: _method_json(method) for method in results.methods},
    }


def _method_json(method: MethodResult) -> dict[str, Any]:
    kinds = {key: True for key in ("apart", "guided") if vars(method)[key]}
    reached = {f"{cost}_to_target": _round(method.to_target.get(cost), 0) for cost in ("evaluations", "seconds")}
    return {
        "gain": _round(method.gain, 5),
        "gain_ci95": [_round(bound, 5) for bound in method.interval],
        "base": _round(method.base, 5),
        "tuned": _round(method.score, 5),
        "seeds": list(method.seeds),
        **{cost: _round(method.costs[cost], 0) for cost in COSTS},
        **reached,
        **kinds,
    }


def _round(value: float | None, digits: int) -> float | int | None:
    return None if value is None else round(value, digits or None)


HEAD = (
    "method", "seeds", "base", "tuned", "gain", "95 % interval", "evaluations", "decodes", "reward calls", "seconds",
    "evaluations to target", "seconds to target",
)  # fmt: skip


def lines(results: Results, *, apart: bool) -> list[tuple[str, ...]]:
    """A line of texts per method, as HEAD names them: those that count, or those that are listed apart."""
    found = []
    for method in results.methods:
        if method.apart != apart:
            continue
        low, high = method.interval
        found.append(
            (
                f"{method.name}{' (guided)' if method.guided else ''}", str(len(method.seeds)), f"{method.base:.3f}",
                f"{method.score:.3f}", signed(method.gain), f"{signed(low)} to {signed(high)}",
                *(f"{method.costs[cost]:,.0f}" for cost in COSTS),
                *(_reached(results, method, cost) for cost in ("evaluations", "seconds")),
            )
        )  # fmt: skip
    return found


def _reached(results: Results, method: MethodResult, cost: str) -> str:
    """With its share of the denominator."""
    value = method.to_target.get(cost)
    if results.denominator is None or results.target is None:
        return "–"
    return "not reached" if value is None else f"{value:,.0f} ({value / results.denominator[cost]:.2f}×)"


def notes(results: Results) -> list[str]:
    """What has to be said beside the table, in a sentence each."""
    said = [
        f"Mean {results.reward} on {results.prompts} held-out prompts, the same prompts and start noise for the base and for all "
        "methods and seeds; 95 % interval of the gain: bootstrap over seeds, then prompts. Costs are means per run, without "
        "the evaluations on held-out prompts; evaluations are forwards of the network, where a backward counts 1 (LoRA) or 2 "
        "(full weights) and guidance doubles."
    ]
    if results.target is not None and results.denominator is not None:
        said.append(
            f"Target: the final mean of {results.comparison.baseline}, {results.target:.3f}; shares (×) are of its total, "
            f"{results.denominator['evaluations']:,.0f} evaluations and {results.denominator['seconds']:,.0f} seconds. Where a "
            "mean curve reaches the target is read between its evaluations."
        )
    if results.target is None and results.denominator is not None:
        said.append(f"{results.comparison.baseline} ends no higher than it began, so there is no target to reach.")
    said += [f"For comparison: {name}: {score:.3f}." for name, score in results.comparison.references.items()]
    return said


def as_markdown(results: Results) -> str:
    told = [f"{note}\n" for note in notes(results)]
    text = [f"# {results.comparison.name}", "", *told, *_table(results, apart=False)]
    if lines(results, apart=True):
        title = "Listed apart (a guided rollout or teacher, or not to be compared):"
        text += ["", title, "", *_table(results, apart=True)]
    return "\n".join([*text, "", f"`{results.comparison.command}`", ""])


def _table(results: Results, *, apart: bool) -> list[str]:
    rule = "|---|" + "---:|" * (len(HEAD) - 1)
    body = [f"| {' | '.join(line)} |" for line in lines(results, apart=apart)]
    return [f"| {' | '.join(HEAD)} |", rule, *body]


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
