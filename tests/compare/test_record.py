"""What a run cost, and its scores by prompt."""

import numpy as np
import pytest

from flowalign.compare.record import by_prompt, costs_by_iteration
from flowalign.errors import RunError


def test_costs_add_up_over_iterations() -> None:
    row = {
        "step": 1, "cost/images": 4, "cost/rollout_per_image": 5.0, "cost/update_per_image": 2.5, "time/iteration": 1.5,
        "cost/decodes_per_image": 3.0, "cost/reward_calls_per_image": 2.0,
    }  # fmt: skip
    untrained = {key: value for key, value in row.items() if key != "cost/update_per_image"}  # nothing to learn from
    prepared = {
        "cost/prepare_evaluations": 100.0,
        "cost/prepare_decodes": 10.0,
        "cost/prepare_reward_calls": 1.0,
        "time/prepare": 5,
    }
    assert costs_by_iteration([row | prepared])[1] == {
        "evaluations": 130,
        "decodes": 22,
        "reward_calls": 9,
        "seconds": 6.5,
    }
    assert costs_by_iteration([row, untrained]) == [
        {"evaluations": 0, "decodes": 0, "reward_calls": 0, "seconds": 0},
        {"evaluations": 30, "decodes": 12, "reward_calls": 8, "seconds": 1.5},
        {"evaluations": 50, "decodes": 24, "reward_calls": 16, "seconds": 3.0},
    ]


def test_rows_of_a_trainer_that_does_not_count_are_told() -> None:
    with pytest.raises(RunError, match=r"metrics without cost/decodes_per_image, cost/reward_calls_per_image, which"):
        costs_by_iteration([{"step": 1, "cost/images": 4, "cost/rollout_per_image": 5.0, "time/iteration": 1.5}])


def test_scores_by_prompt_are_means_over_valid_samples() -> None:
    found = by_prompt([7, 3, 7, 3, 9], (7, 3, 9), [1.0, 0.5, 0.0, None, None])
    assert found[:2] == pytest.approx([0.5, 0.5]) and np.isnan(found[2])
