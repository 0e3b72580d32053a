"""Every shipped method improves a model in two dimensions: exact velocities, a small trained correction, a smooth reward.

The reward is measured with the deterministic sampler, from start noise of its own: what noise SDE steps leave in a sample is
neither punished nor rewarded. Kernels, steps, clip ranges and weights are the method's own."""

import math
from pathlib import Path

import pytest
import torch

from flowalign.loop import train
from flowalign.config import load_config
from flowalign.rollouts.collect import grow
from flowalign.storage import checkpoint
from rewards import Reward
from samplers import unscored
from tests.helpers.bed import Nearness, Potential, save_pipeline
from tests.helpers.bed_run import CONFIG, Bed

METHODS = sorted(path.stem for path in Path("configs/methods").glob("*.yaml"))
# more samples for the method that trains one step of each, fewer where a smaller group will do
SIZES = {
    "flash_grpo": 32, "densegrpo": 12, "flow_cps": 12, "flow_grpo": 12, "flow_grpo_fast": 12, "grpo_guard": 12,
    "tempflow_grpo": 12, "tp_grpo": 12, "dance_grpo_best_of_n": 12,
}  # fmt: skip
BASE = 0.321  # reward without training; it is between 0 and 1


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed"))


def bed_of(pipeline: Path, method: str, *overrides: str) -> Bed:
    size = [f"rollout.group_size={SIZES[method]}"] if method in SIZES else []
    return Bed.of(pipeline, [f"configs/methods/{method}.yaml"], *size, *overrides)


@pytest.mark.parametrize("method", METHODS)
def test_it_improves_and_costs_what_is_forecast(pipeline: Path, method: str) -> None:
    bed = bed_of(pipeline, method)
    check_constant_reward(bed)
    check_it_improves(bed, iterations=6, margin=0.07)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("method", METHODS)
def test_it_improves_with_every_seed(pipeline: Path, method: str, seed: int) -> None:
    check_it_improves(bed_of(pipeline, method, f"run.seed={seed}"), iterations=20, margin=0.2)


def check_it_improves(bed: Bed, iterations: int, margin: float) -> None:
    assert bed.reward() == pytest.approx(BASE, abs=0.005)
    for number in range(iterations):
        found = check_cost(bed, number)
        measured = {key: value for row in found for key, value in row.items() if key.startswith(("loss/", "ratio/"))}
        assert all(math.isfinite(value) for value in measured.values()), measured
        if number == 0:  # the replay of an unchanged policy
            assert found[0]["ratio/drift_max"] < 1e-6 and found[0]["ratio/approx_kl"] == 0
    assert bed.reward() > BASE + margin


def check_cost(bed: Bed, number: int) -> list[dict[str, float]]:
    """Runs an iteration. Counted network rows and scores are those of the iteration's topology, never above the forecast, and
    the forecast exactly where the topology is the most expensive one and all its steps are trained."""
    rollout = bed.task.rollout
    forecast, update = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size), bed.trainer.forecast(rollout)
    planned = grow(rollout, bed.task.seed, number, range(rollout.groups)).cost()
    found, most = bed.iteration(number), rollout.groups * forecast.rollout + update.trained + update.frozen
    assert len(found.updates) == update.updates and found.evaluations <= most
    if rollout.plan.select(unscored) is None:
        assert found.rolled == planned.rollout
        scored = len(bed.task.process_rewards) * (planned.edges + planned.train)
        assert planned.leaves <= found.reward_calls <= planned.leaves + scored
        costliest = all(vars(planned)[key] == rollout.groups * value for key, value in vars(forecast).items())
        if costliest and found.metrics["group/trained_edges"] == planned.edges:
            assert found.evaluations == most
    return found.updates


def check_constant_reward(bed: Bed) -> None:
    """Where all samples are equally good, no weight moves."""
    before = bed.weights()
    constant: list[Reward] = [Potential(reward.name, constant=True) for reward in bed.task.process_rewards]
    plain = bed.rewarded(Nearness(constant=True), constant)
    plain.iteration(0)
    assert torch.equal(plain.weights(), before)
    bed.trainer.prepare(bed.task, None)


def test_the_loop_of_these_tests_is_the_main_loop(pipeline: Path, tmp_path: Path) -> None:
    layers = ["configs/methods/flow_grpo.yaml"]
    small = ["rollout.group_size=4", "evaluation.samples_per_prompt=1"]
    config, plain = load_config([*layers, CONFIG], [f"policy.path={pipeline}", f"run.output={tmp_path}", *small])
    train(config, plain)
    tensors, _ = checkpoint.load(checkpoint.latest(tmp_path / "bed"))
    bed = Bed.of(pipeline, layers, *small)
    for number in range(config.run.iterations):
        bed.iteration(number)
    for name, parameter in bed.policy.trainable_parameters():
        assert torch.equal(tensors["role_policy"][name], parameter)
