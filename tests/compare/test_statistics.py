"""Gains, intervals and curves against closed forms."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from flowalign.compare.record import COSTS, Point, Record
from flowalign.compare.statistics import changes, cost_to_reach, gains, hierarchical_interval, mean_curve
from flowalign.errors import ConfigError
from flowalign.evaluation.paired_gain import paired_gain

Z = NormalDist().inv_cdf(0.975)


def record(scores: list[list[float]], iterations: list[int] | None = None, seed: int = 1, uids: tuple[int, ...] = ()) -> Record:  # fmt: skip
    """A run whose evaluations gave `scores`, each by prompt; iteration i has cost 10·i evaluations, 2·i of all else."""
    at = list(range(len(scores))) if iterations is None else iterations
    points = [
        Point(i, {name: float(10 * i if name == "evaluations" else 2 * i) for name in COSTS}, np.array(values))
        for i, values in zip(at, scores, strict=True)
    ]
    prompts = uids or tuple(range(len(scores[0])))
    return Record("m", seed, "ocr", prompts, tuple(points), points[-1].costs)


def test_the_interval_of_one_seed_is_that_of_the_paired_gain() -> None:
    rng = np.random.default_rng(0)
    base, tuned = rng.random(200), rng.random(200) + 0.1
    low, high = hierarchical_interval((tuned - base)[None])
    ours = paired_gain(torch.tensor(base), torch.tensor(tuned)).interval
    assert ours is not None and low == pytest.approx(ours[0], abs=2e-3) and high == pytest.approx(ours[1], abs=2e-3)


def test_the_interval_adds_the_variance_over_seeds_to_that_over_prompts() -> None:
    """scores[s, p] = a_s + b_p: the bootstrap variance of the mean is var(a)/S + var(b)/P, of the population variances."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=40), rng.normal(size=300)
    for scores, variance in (
        (a[:, None] + 0 * b, a.var() / 40),
        (0 * a[:, None] + b, b.var() / 300),
        (a[:, None] + b, a.var() / 40 + b.var() / 300),
    ):
        low, high = hierarchical_interval(scores)
        assert (low + high) / 2 == pytest.approx(scores.mean(), abs=0.05 * np.sqrt(variance) * Z)
        assert (high - low) / 2 == pytest.approx(Z * np.sqrt(variance), rel=0.04)


def test_three_seeds_that_differ_give_their_range_which_seldom_holds_the_mean() -> None:
    """A draw is one seed thrice with probability 1/27 > .025; all three lie on one side of the mean in 2 of 8 cases."""
    seeds = np.random.default_rng(3).normal(size=(400, 3))
    found = [hierarchical_interval(np.repeat(each[:, None], 2, 1), resamples=2000) for each in seeds]
    assert found[0] == pytest.approx((seeds[0].min(), seeds[0].max()))
    assert np.mean([low < 0 < high for low, high in found]) == pytest.approx(0.75, abs=3 * np.sqrt(0.75 * 0.25 / 400))


def test_equal_scores_have_an_interval_of_no_width_and_draws_are_keyed() -> None:
    assert hierarchical_interval(np.full((3, 5), 0.25)) == pytest.approx((0.25, 0.25))
    scores = np.random.default_rng(2).random((3, 50))
    assert hierarchical_interval(scores) == hierarchical_interval(scores.copy())
    assert hierarchical_interval(scores) != hierarchical_interval(scores, seed=1)


def test_gains_pair_prompts_and_drop_those_without_a_score_in_some_run() -> None:
    nan = float("nan")
    runs = [record([[0, 1, nan], [1, 1, 1]]), record([[0, 1, 0.5], [0.5, 2, 1]], seed=2)]
    assert gains(runs).tolist() == [[1, 0], [0.5, 1]]
    with pytest.raises(ConfigError, match="no prompt with valid scores"):
        gains([record([[nan], [1.0]])])
    with pytest.raises(ConfigError, match="m seed 2 and m seed 1 were evaluated on other prompts"):
        gains([record([[0.0], [1.0]]), record([[0.0], [1.0]], seed=2, uids=(7,))])


def test_other_labels_are_paired_over_what_all_runs_have() -> None:
    nan = float("nan")
    one, two = record([[0.0], [1.0]]), record([[0.0], [1.0]], seed=2)
    color = (np.array([0, 1, nan]), np.array([1.0, 1, 1]))
    one = replace(one, others={"color": color, "mine": color})
    two = replace(two, others={"color": (np.array([0, 1, 0.5]), np.array([0.5, 2, 9]))})
    (label, found), *more = changes([one, two]).items()
    assert (label, more) == ("color", [])  # `mine` is not in both
    assert (found.base, found.tuned, found.gain) == pytest.approx((0.5, 1.125, 0.625))  # of the first two prompts
    assert found.interval == hierarchical_interval(np.array([[1, 0], [0.5, 1]]))
    assert changes([record([[0.0], [1.0]])]) == {}


def test_a_mean_curve_joins_equal_iterations_and_the_ends() -> None:
    runs = [
        record([[0, 0], [0.2, 0.4], [0.9, 0.9], [0.6, 0.8]], [0, 4, 7, 9]),
        record([[0, 0], [0.4, 0.6], [0.8, 1.0]], [0, 4, 11], seed=2),  # ends later, and was not evaluated at 7
    ]
    curve = mean_curve(runs)
    assert curve.score == pytest.approx([0, 0.4, 0.8])
    assert curve.costs["evaluations"] == [0, 40, 100] and curve.costs["decodes"] == [0, 8, 20]
    assert curve.low[0] == curve.high[0] == 0  # the band is of the gain
    assert all(low <= score <= high for low, score, high in zip(curve.low, curve.score, curve.high, strict=True))
    # it ends in the interval of the table, up to the draws
    low, high = hierarchical_interval(gains(runs))
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((low, high), abs=0.02)


def test_an_evaluation_without_a_valid_score_is_left_out_of_the_curve() -> None:
    curve = mean_curve([record([[0, 0], [np.nan, np.nan], [0.6, 0.8]], [0, 4, 9])])
    assert curve.score == pytest.approx([0, 0.7]) and curve.costs["evaluations"] == [0, 90]


@pytest.mark.parametrize(
    ("target", "evaluations"), [(0.2, 5.0), (0.4, 10.0), (0.6, 15.0), (0.9, None), (0.1, 2.5), (0.0, 0.0)]
)
def test_the_target_is_reached_between_two_evaluations(target: float, evaluations: float | None) -> None:
    curve = mean_curve([record([[0.0], [0.4], [0.8], [0.3]])])  # falls again: the first crossing counts
    reached = cost_to_reach(curve, target, "evaluations")
    assert reached is None if evaluations is None else reached == pytest.approx(evaluations)
