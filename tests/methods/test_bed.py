"""Every shipped method improves a model in two dimensions: exact velocities, a small trained correction, a smooth reward.

The reward is measured with the deterministic sampler, on start noise of its own: the noise that SDE steps leave in a sample is
neither punished nor rewarded."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from flowalign.rollouts.collect import grow
from samplers import unscored
from tests.helpers.bed import Nearness, save_pipeline
from tests.helpers.bed_run import Bed

METHODS = sorted(path.stem for path in Path("configs/methods").glob("*.yaml"))
ITERATIONS = 8
MARGIN = 0.1  # of a reward between 0 and 1 that is .35 without training


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed"))


def bed_of(pipeline: Path, method: str, *overrides: str) -> Bed:
    return Bed.of(pipeline, [f"configs/methods/{method}.yaml"], *overrides)


@pytest.mark.parametrize("method", METHODS)
def test_it_improves(pipeline: Path, method: str) -> None:
    bed = bed_of(pipeline, method)
    check_that_it_improves(bed)


def check_that_it_improves(bed: Bed) -> None:
    before, rows = bed.reward(), []
    rollout = bed.task.rollout
    cost, forecast = (
        rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size),
        bed.trainer.forecast(rollout),
    )
    for number in range(ITERATIONS):
        updates = bed.iteration(number)
        tree = grow(rollout, bed.task.seed, number, range(rollout.groups))
        if rollout.plan.select(unscored) is None:
            assert updates[0]["rolled"] == tree.cost().rollout
        assert updates[0]["rolled"] <= rollout.groups * cost.rollout
        assert len(updates) == forecast.updates
        rows += updates
    print(before, bed.reward())
    print(rows[0])
    assert rows[0]["ratio/drift_max"] < 1e-5
    assert bed.reward() > before + MARGIN
    assert all(
        math.isfinite(value)
        for row in rows
        for name, value in row.items()
        if name.startswith(("loss/", "ratio/", "norm"))
    )
