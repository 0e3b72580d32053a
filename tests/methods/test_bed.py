"""Every shipped method improves a model in two dimensions: exact velocities, a small trained correction, a smooth reward.

The reward is measured with the deterministic sampler, from start noise of its own: what noise SDE steps leave in a sample is
neither punished nor rewarded. Kernels, steps, clip ranges and weights are the method's own."""

import copy
import math
from pathlib import Path

import pytest
import torch

from flowalign.config import load_config
from flowalign.loop import train
from flowalign.storage import checkpoint
from rewards import Reward
from samplers import Cost, unscored
from tests.helpers.bed import Nearness, Potential
from tests.helpers.bed_run import CONFIG, Bed, Iteration
from tests.helpers.method_layers import BY_REWARD_GRADIENT, METHODS, OFFLINE, POLICY_GRADIENTS, TAUGHT

ON_BED = [method for method in METHODS if method not in (*OFFLINE, *TAUGHT)]

# a smaller group will do for most; more samples for the method that trains one step of each
SMALLER = (
    "flow_cps", "flow_grpo", "flow_grpo_fast", "grpo_guard", "tempflow_grpo", "tp_grpo", "dance_grpo_best_of_n",
    "stepwise_flow_grpo",
)  # fmt: skip
CHANGES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SMALLER, ("rollout.group_size=12",)),
    "densegrpo": ("rollout.group_size=12", "trainer.calibration.sweeps=2"),
    "flash_grpo": ("rollout.group_size=32",),
    **dict.fromkeys(BY_REWARD_GRADIENT, ("rollout.group_size=12", "rollout.num_inference_steps=10")),
    # the bed's reward knows no words, so that the half of the updates which takes away the unwanted ones would undo the other
    "srpo": ("rollout.group_size=12", "rollout.num_inference_steps=10", "trainer.truncation.inversion=0"),
    # its four steps lie above σ = 0.94 and reach .75 in five iterations; at the bed's rate the next ten lead far away
    "mixgrpo_flash_star": ("trainer.optimizer.lr=5e-3",),
    # where the generator is much faster than its fake score and its surrogate, it leaves both behind after ten iterations
    "tdm_r1": (
        "rollout.group_size=12",
        "trainer.optimizer.lr=1e-2",
        "trainer.fake_optimizer.lr=3e-3",
        "trainer.surrogate_optimizer.lr=3e-3",
    ),
    "euphonium": ("process_rewards=[{class_path: tests.helpers.bed.Potential, init_args: {name: process}}]",),
}
# Iterations of the quick test and of the one with ten seeds; others need 6 and 10.
ITERATIONS: dict[str, tuple[int, int]] = {}
# Weights move though all samples are equally good: method -> why.
MOVED_BY_OTHER_THAN_REWARD: dict[str, str] = {"tdm_r1": "it goes on being distilled"}
# An iteration of other trainers costs what is forecast, or less: method -> what is random in it.
CHEAPER_AT_TIMES: dict[str, str] = {
    **dict.fromkeys(("refl", "drtune"), "the step at which the chain stops"),
    **dict.fromkeys(("raft", "raft_offline"), "a group whose best is hardly better than its mean trains no sample"),
}
BASE = 0.321  # reward without training; it is between 0 and 1


def bed_of(pipeline: Path, method: str, *overrides: str) -> Bed:
    return Bed.of(pipeline, [f"configs/methods/{method}.yaml"], *CHANGES.get(method, ()), *overrides)


@pytest.mark.parametrize("method", ON_BED)
def test_it_improves_and_costs_what_is_forecast(pipeline: Path, method: str) -> None:
    moves, bed = method in MOVED_BY_OTHER_THAN_REWARD, bed_of(pipeline, method)
    check_constant_reward(bed, moves=moves)
    check_it_improves(bed_of(pipeline, method) if moves else bed, method, ITERATIONS.get(method, (6, 10))[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("method", ON_BED)
def test_it_improves_with_every_seed(pipeline: Path, method: str, seed: int) -> None:
    check_it_improves(bed_of(pipeline, method, f"run.seed={seed}"), method, ITERATIONS.get(method, (6, 10))[1])


def check_it_improves(bed: Bed, method: str, iterations: int, margin: float = 0.07) -> None:
    for number in range(iterations):
        found = bed.iteration(number)
        check_cost(bed, found, method)
        measured = [value for row in found.updates for key, value in row.items() if key.startswith(("loss/", "ratio/"))]
        assert measured and all(map(math.isfinite, measured))
        if number == 0 and method in POLICY_GRADIENTS:  # the replay of an unchanged policy
            assert found.updates[0]["ratio/drift_max"] < 1e-6 and found.updates[0]["ratio/approx_kl"] == 0
    assert bed.reward() > BASE + margin


def check_cost(bed: Bed, found: Iteration, method: str) -> None:
    """Counted network rows and scores are those of the metrics, and never above the forecast of a group and of the updates."""
    rollout, update = bed.task.rollout, bed.trainer.forecast(bed.task.rollout)
    group = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size)
    rolled = rollout.groups * group.rollout if update.rolled is None else update.rolled
    most = rolled + update.trained + update.frozen
    assert found.evaluations <= most
    assert sum(map(found.cost, ("rollout", "trained", "frozen"))) == pytest.approx(found.evaluations)
    assert found.cost("reward_calls") == pytest.approx(found.reward_calls)
    rows = (found.batch.metrics, *found.updates)
    assert any("cost/decodes_per_image" in row for row in rows)  # a comparison reads it
    if method in POLICY_GRADIENTS:
        assert len(found.updates) == update.updates
        check_topology(bed, found, group, most)
    elif method in CHEAPER_AT_TIMES:
        assert len(found.updates) <= update.updates
    else:
        assert (len(found.updates), found.evaluations) == (update.updates, most)


def check_topology(bed: Bed, found: Iteration, group: Cost, most: int) -> None:
    """Counted network rows and scores are those of the iteration's topology; they are the forecast where the topology is the
    most expensive one and all its steps are trained."""
    groups, tree = bed.task.rollout.groups, found.batch.forest.tree.cost()
    if bed.task.rollout.plan.select(unscored) is None:
        assert found.rolled == tree.rollout
        scored = len(bed.task.process_rewards) * (tree.edges + tree.train + tree.rollout)  # and where they guide
        assert tree.leaves <= found.reward_calls <= tree.leaves + scored
        costliest = all(vars(tree)[key] == groups * value for key, value in vars(group).items())
        if costliest and found.batch.metrics["group/trained_edges"] == tree.edges:
            assert found.evaluations == most


def check_constant_reward(bed: Bed, *, moves: bool) -> None:
    """Where all samples are equally good, no weight moves, unless something else moves them."""
    before, state = bed.weights(), copy.deepcopy(bed.trainer.state())
    constant: list[Reward] = [Potential(reward.name, constant=True) for reward in bed.task.process_rewards]
    bed.rewarded(Nearness(constant=True), constant).iteration(0)
    assert torch.equal(bed.weights(), before) != moves
    bed.trainer.prepare(bed.task, state)


def test_the_base_is_the_same_for_all(pipeline: Path) -> None:
    assert bed_of(pipeline, "flow_grpo").reward() == pytest.approx(BASE, abs=0.005)


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
