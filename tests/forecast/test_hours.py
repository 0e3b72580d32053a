"""Hours from timings: arithmetic by hand, and the counts that a run really has."""

from pathlib import Path

import pytest

from flowalign.config import load_config
from flowalign.forecast.counts import RunCounts
from flowalign.forecast.hours import Timing, device_seconds

TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")


def test_seconds_are_counts_times_timings() -> None:
    counts = RunCounts(
        iterations=10, images=6, sampled=14, trained=4, frozen=4, decodes=8, before=5, before_scored=2, evaluation_rows=16,
        evaluated=8,
    )  # fmt: skip
    timing = Timing(row=0.1, decode=1.0, reward=10.0, update=100.0)
    assert device_seconds(counts, timing) == pytest.approx(
        {
            "rollout": 145 * 0.1 + 82 * 1.0,
            "reward": 82 * 10.0,
            "update": 60 * 100.0,
            "evaluation": 16 * 0.1 + 8 * 11.0,
        }
    )


def test_counts_of_a_configuration() -> None:
    """3 iterations × 2 prompts × 3 samples of 3 steps, one of them branching: 7 rows a prompt. 4 images of 2 steps are evaluated
    before, after each iteration but the last, and after the run; guidance doubles their rows."""
    config, _ = load_config(
        TINY, ["evaluation.every=1", "evaluation.guidance_scale=3", "rollout.plan.init_args.high=1"]
    )
    counts = RunCounts.of(config)
    assert (counts.iterations, counts.images, counts.sampled, counts.decodes) == (3, 6, 2 * 7, 6)
    assert (counts.trained, counts.frozen, counts.before) == (2, 2, 0)
    assert (counts.evaluated, counts.evaluation_rows) == (4 * 4, 4 * 4 * 2 * 2)
    again = RunCounts.of(load_config(TINY, ["rollout.refill=1", "rollout.plan.init_args.high=1"])[0])
    assert (again.sampled, again.decodes, again.trained) == (2 * 14, 12, 2)
