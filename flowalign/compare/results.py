"""The results of a comparison as data, and as a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flowalign.compare.former import check_same_base
from flowalign.compare.record import COSTS, Record
from flowalign.compare.spec import Comparison
from flowalign.compare.statistics import (
    Change,
    Curve,
    changes,
    check_same,
    cost_to_reach,
    gains,
    hierarchical_interval,
    mean_curve,
)


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Of one method, over its seeds. base, score: means at the start and at the end of its curve; gain and interval: paired,
    over the prompts that are valid in all its runs. costs: means per run. to_target: the cost of each kind until the mean curve
    reaches the target, None where it does not, {} without a target. others: by label, of other rewards and of looks, as far as
    all its runs have them."""

    name: str
    seeds: tuple[int, ...]
    base: float
    score: float
    gain: float
    interval: tuple[float, float]
    costs: Mapping[str, float]
    curve: Curve
    to_target: Mapping[str, float | None]
    others: Mapping[str, Change] = field(default_factory=dict)
    apart: bool = False
    guided: bool = False


@dataclass(frozen=True, eq=False)
class Results:
    """Of all methods that have a finished run. denominator: of the baseline; None without one that is finished. target: its
    final mean, if that is above its base. former: the baseline, where it is of other results."""

    comparison: Comparison
    reward: str
    prompts: int
    target: float | None
    denominator: Mapping[str, float] | None
    methods: tuple[MethodResult, ...]
    former: MethodResult | None = None

    @property
    def shown(self) -> tuple[MethodResult, ...]:
        """The methods, after the baseline of other results if there is one."""
        return self.methods if self.former is None else (self.former, *self.methods)

    @property
    def labels(self) -> list[str]:
        """Of all that is measured beside the reward."""
        return list(dict.fromkeys(label for method in self.shown for label in method.others))


def results_of(
    comparison: Comparison, records: Mapping[str, Sequence[Record]], former: Sequence[Record] = ()
) -> Results:  # fmt: skip
    """records: the finished runs of each method, at least one in all. former: those of a baseline of other results. ConfigError
    for records that do not pair."""
    done = {name: list(found) for name, found in records.items() if found}
    everything = [record for found in done.values() for record in found]
    check_same([*former, *everything])
    if former:
        check_same_base(former, everything)
    baseline = former or done.get(comparison.baseline or "", [])
    reached = mean_curve(baseline).score if baseline else [0.0]
    target = reached[-1] if reached[-1] > reached[0] else None
    found = []
    for name, runs in done.items():
        method = comparison.methods[name]
        found.append(replace(_method(name, runs, target), apart=method.apart, guided=method.guided))
    return Results(
        comparison, everything[0].reward, len(everything[0].prompts), target, mean_totals(baseline) if baseline else None,
        tuple(found), _method(former[0].method, former, target) if former else None,
    )  # fmt: skip


def mean_totals(records: Sequence[Record]) -> dict[str, float]:
    """What a run of them cost on average."""
    return {name: float(np.mean([record.totals[name] for record in records])) for name in COSTS}


def _method(name: str, records: Sequence[Record], target: float | None) -> MethodResult:
    paired, curve = gains(records), mean_curve(records)
    reached = {} if target is None else {cost: cost_to_reach(curve, target, cost) for cost in COSTS}
    return MethodResult(
        name, tuple(record.seed for record in records), curve.score[0], curve.score[-1], float(paired.mean()),
        hierarchical_interval(paired), mean_totals(records), curve, reached, changes(records),
    )  # fmt: skip


def as_json(results: Results) -> dict[str, Any]:
    """evaluations, decodes, reward_calls and seconds are means per run, without those of held-out evaluations."""
    denominator = results.denominator
    return {
        "command": results.comparison.command,
        "reward": results.reward,
        "prompts": results.prompts,
        "baseline": results.comparison.baseline,
        **({} if results.comparison.former is None else {"baseline_results": str(results.comparison.former)}),
        "target": _round(results.target, 5),
        "denominator_evaluations": None if denominator is None else round(denominator["evaluations"]),
        "denominator_seconds": None if denominator is None else round(denominator["seconds"], 1),
        "references": dict(results.comparison.references),
        "methods": {method.name: _method_json(method) for method in results.methods},
    }


def _method_json(method: MethodResult) -> dict[str, Any]:
    kinds = {key: True for key in ("apart", "guided") if vars(method)[key]}
    reached = {f"{cost}_to_target": _round(method.to_target.get(cost), 0) for cost in COSTS}
    others = {label: _change_json(change) for label, change in method.others.items()}
    curve = {"evaluations": [round(each) for each in method.curve.costs["evaluations"]]}
    return {
        "gain": _round(method.gain, 5),
        "gain_ci95": [_round(bound, 5) for bound in method.interval],
        "base": _round(method.base, 5),
        "tuned": _round(method.score, 5),
        "seeds": list(method.seeds),
        **{cost: _round(method.costs[cost], 0) for cost in COSTS},
        **reached,
        **kinds,
        "others": others,
        "curve": {**curve, "score": [_round(each, 5) for each in method.curve.score]},
    }


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "base": _round(change.base, 5),
        "tuned": _round(change.tuned, 5),
        "gain": _round(change.gain, 5),
        "gain_ci95": [_round(bound, 5) for bound in change.interval],
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
    for method in results.shown:
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


def other_lines(results: Results) -> list[tuple[str, ...]]:
    """A head and a line of texts per method of what is measured beside the reward: the tuned mean, its gain and the interval; – where
    a run does not have it. [] where there is nothing."""
    if not results.labels:
        return []
    found = [("method", *results.labels)]
    for method in results.shown:
        others = (method.others.get(label) for label in results.labels)
        found.append((method.name, *("–" if change is None else _told(change) for change in others)))
    return found


def _told(change: Change) -> str:
    low, high = change.interval
    return f"{change.tuned:.3f} ({signed(change.gain)}, {signed(low)} to {signed(high)})"


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
            f"Target: the final mean of {results.comparison.baseline}{_source(results)}, {results.target:.3f}; shares (×) are of its total, "
            f"{results.denominator['evaluations']:,.0f} evaluations and {results.denominator['seconds']:,.0f} seconds. Where a "
            "mean curve reaches the target is read between its evaluations."
        )
    if results.target is None and results.denominator is not None:
        said.append(f"{results.comparison.baseline} ends no higher than it began, so there is no target to reach.")
    said += [f"For comparison: {name}: {score:.3f}." for name, score in results.comparison.references.items()]
    return said


def _source(results: Results) -> str:
    return "" if results.comparison.former is None else f" of {results.comparison.former.name}, which was not run again"


OTHERS = (
    "Beside the reward: the tuned mean, in brackets its paired gain over the base and the 95 % interval. image/contrast and "
    "image/saturation: of the pictures; prompts/distance: how far the pictures of two prompts lie apart. –: the runs do not have it."
)


def as_markdown(results: Results) -> str:
    told = [f"{note}\n" for note in notes(results)]
    text = [f"# {results.comparison.name}", "", *told, *_table(HEAD, lines(results, apart=False))]
    if lines(results, apart=True):
        title = "Listed apart (a guided rollout or teacher, or not to be compared):"
        text += ["", title, "", *_table(HEAD, lines(results, apart=True))]
    if others := other_lines(results):
        text += ["", OTHERS, "", *_table(others[0], others[1:])]
    return "\n".join([*text, "", f"`{results.comparison.command}`", ""])


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in body)]


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
