"""Gains over seeds and prompts, their intervals, and mean curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowalign.compare.record import COSTS, Point, Record
from flowalign.errors import ConfigError
from samplers import generator


@dataclass(frozen=True)
class Curve:
    """The mean of several runs at each of E evaluations. costs {name: [E]}: means over the seeds. score [E]: the mean of the
    base plus the paired gain; low [E], high [E]: the same with the bounds of the gain's 95 % interval."""

    costs: dict[str, list[float]]
    score: list[float]
    low: list[float]
    high: list[float]


def hierarchical_interval(scores: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the mean of scores [S, P] of S seeds and P prompts.

    Seeds are drawn with replacement, then prompts: the same prompts for all seeds of a draw, since they are the same in the
    data (Owen 2007, "The pigeonhole bootstrap"). With one seed it is the interval over prompts alone. The draws are keyed: the
    same scores give the same interval.
    Not kept: 95 % with few seeds. The drawn variance of S seeds is (S − 1)/S of theirs, and no draw leaves their range: where
    seeds differ more than prompts do, three give the interval from the worst to the best of them, which holds the true mean
    in 75 of 100 comparisons, 1 − 2·(1/2)³, and five give at most 94."""
    rng = generator(seed, "select", "hierarchical_interval")
    seeds, prompts = scores.shape
    means = []
    for first in range(0, resamples, 500):  # in parts: 500·P numbers at a time
        count = min(500, resamples - first)
        times_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        times_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=count)
        means.append(((times_seed @ scores) * times_prompt).sum(1) / (seeds * prompts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Change:
    """Means of a score over seeds and prompts, before and after; gain and its 95 % interval: paired."""

    base: float
    tuned: float
    gain: float
    interval: tuple[float, float]


def changes(records: Sequence[Record]) -> dict[str, Change]:
    """Of every other label that all records have, over the prompts that are valid in all of them; labels without one are left
    out."""
    found = {}
    for label in records[0].others:
        if not all(label in record.others for record in records):
            continue
        base, tuned = (np.stack([record.others[label][place] for record in records]) for place in (0, 1))
        valid = ~np.isnan(tuned - base).any(0)
        if valid.any():
            paired = (tuned - base)[:, valid]
            start, gain = float(base[:, valid].mean()), float(paired.mean())
            found[label] = Change(start, start + gain, gain, hierarchical_interval(paired))
    return found


def gains(records: Sequence[Record]) -> np.ndarray:
    """[S, P] tuned − base of the first reward, of the prompts that are valid in all records. ConfigError if they were not
    evaluated on the same prompts, or no prompt is valid."""
    check_same(records)
    found = np.stack([record.curve[-1].scores - record.curve[0].scores for record in records])
    valid = ~np.isnan(found).any(0)
    if not valid.any():
        raise ConfigError(f"got no prompt with valid scores in all runs of {records[0].method}: check the reward")
    return found[:, valid]


def check_same(records: Sequence[Record]) -> None:
    """ConfigError for records that do not pair."""
    first = records[0]
    for record in records:
        if (record.prompts, record.reward) != (first.prompts, first.reward):
            raise ConfigError(
                f"{record.method} seed {record.seed} and {first.method} seed {first.seed} were evaluated on other prompts or by "
                "other rewards; expected the same: remove the record that is out of date"
            )


def mean_curve(records: Sequence[Record]) -> Curve:
    """Over the iterations at which all runs were evaluated, and over the end of each; without those at which no prompt has a
    valid score in all of them."""
    common = set.intersection(*({point.iteration for point in record.curve[:-1]} for record in records))
    rows = [
        [point for point in record.curve[:-1] if point.iteration in common] + [record.curve[-1]] for record in records
    ]
    base = np.stack([record.curve[0].scores for record in records])
    start = float(np.nanmean(base))
    columns, paired = list[tuple[Point, ...]](), list[np.ndarray]()
    for column in zip(*rows, strict=True):
        found = np.stack([point.scores for point in column]) - base
        valid = ~np.isnan(found).any(0)
        if valid.any():
            columns.append(column)
            paired.append(found[:, valid])
    costs = {name: [float(np.mean([point.costs[name] for point in column])) for column in columns] for name in COSTS}
    intervals = [hierarchical_interval(each, resamples=2000) for each in paired]
    low, high = ([start + bounds[place] for bounds in intervals] for place in (0, 1))
    return Curve(costs, [start + float(each.mean()) for each in paired], low, high)


def cost_to_reach(curve: Curve, target: float, cost: str) -> float | None:
    """Where the mean curve, joined by lines, first reaches `target`; None if it does not. Not kept: an evaluation has noise, so
    the first crossing comes early, and of a coarse curve late."""
    x, y = curve.costs[cost], curve.score
    if y[0] >= target:
        return x[0]
    for place in range(1, len(y)):
        if y[place] >= target:
            share = (target - y[place - 1]) / (y[place] - y[place - 1])
            return x[place - 1] + share * (x[place] - x[place - 1])
    return None
