"""Reward-difference prediction on a chain whose tilted optimum is known, and against other ways to its gradient."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.config import load_config
from flowalign.errors import RunError
from flowalign.loop import train
from flowalign.objectives.reward_difference import clip_steps, pair_loss, pairs_of
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.task import Rollout
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time
from flowalign.trainers import AdamWConfig, RewardDifference, Setup, reward_difference
from samplers import CPS, DDIM, Branch, Chain, DanceSDE, FlowSDE, Probed, SplitTree, Window
from tests.helpers.affine_chain import Affine, AffinePolicy, LinearReward, chain_task
from tests.helpers.bed import save_pipeline
from tests.helpers.bed_run import CONFIG, Bed
from tests.helpers.thread_processes import on_processes

F64 = torch.float64
BETA = 0.8
LAW = Affine()
GAIN = float(LAW.moments()[2] / BETA)  # how far the optimum moves the mean of x_T, for a reward of x_T
FLOOR = 2 * float(LAW.sensitivities()[0] / BETA) ** 2  # 2·Var(log Z(start))
SHARED, APART = Chain(shared_start=True, train_last=True), Chain(train_last=True)
NO_CLIP = 1e9


def made(plan=SHARED, *, group_size=8, groups=2, kernel=None, elements=1, steps=10, reward=None, seed=0, **arguments):
    """(policy, trainer prepared on the chain)."""
    kernel = kernel or FlowSDE(0.7, reduce="sum")
    policy = AffinePolicy(Affine(kernel, steps), elements)
    arguments = {"beta": BETA, "clip_range": NO_CLIP, "over_steps": "sum", "micro_batch": 64, **arguments}
    trainer = RewardDifference(**arguments)
    rollout = Rollout(plan, kernel, groups, group_size, steps, micro_batch=4096)
    trainer.prepare(chain_task(policy, rollout, reward, seed), None)
    return policy, trainer


def collected(trainer: RewardDifference, iteration: int = 0) -> ScoredRollout:
    return trainer.collect(trainer.task.prompts, iteration)


def gradients(trainer: RewardDifference, batch: ScoredRollout, move: Tensor | None = None) -> list[Tensor]:
    """[T] of each update; before every later one the shifts are moved by `move`."""
    policy, found = trainer.task.policy, []
    for update in trainer.updates(batch):
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        update.after()
        (theta,) = (parameter for _, parameter in policy.parameters_of("policy"))
        found.append(torch.zeros_like(theta) if theta.grad is None else theta.grad.clone())
        theta.grad = None
        if move is not None:
            theta.data += move
    return found


def metrics_of(trainer: RewardDifference, batch: ScoredRollout) -> dict[str, float]:
    """Of the last update; no weight is stepped."""
    found: dict[str, float] = {}
    for update in trainer.updates(batch):
        for micro_batch in update.micro_batches:
            micro_batch()
        found = update.after()
    return batch.metrics | found


def one_graph(policy: AffinePolicy, batch: ScoredRollout, trainer: RewardDifference, old: Tensor | None) -> Tensor:
    """The loss as a function of policy.theta, of one graph over all steps; old [E]: by the rollout, None: as it is now."""
    forest, tree = batch.forest, batch.forest.tree
    parents, position = tree.distinct_parents(tree.edges)
    x, sigma, arrived = forest.at(parents), forest.sigma(parents), forest.at(tree.edges)
    with policy.role("reference"):
        reference = forest.edge_steps(tree.edges, policy.velocity(x, sigma, batch.conditions), position)
    here = forest.edge_steps(tree.edges, policy.velocity(x, sigma, batch.conditions), position)
    ratio = here.log_prob(arrived) - reference.log_prob(arrived)
    old = ratio.detach() if old is None else old

    def along(values: Tensor) -> Tensor:
        total = forest.path_sum(torch.zeros(len(tree), dtype=F64).index_copy(0, tree.edges, values))
        steps = tree.path_sum(torch.ones(len(tree))).max()
        return total if trainer.over_steps == "sum" else total / steps

    pairs = pairs_of(batch.scores[:, 0], batch.valid[:, 0], tree.group[tree.leaves])
    return pair_loss(along(ratio), along(clip_steps(ratio, old, trainer.clip_range)), pairs, trainer.beta)


# ------------------------------------------------------------------------------------------ the optimum


def test_the_closed_forms_of_the_chain() -> None:
    """The optimum moves the mean by Var(x_T | start)·w/β, not by Var(x_T)·w/β: no policy chooses its start."""
    mean, variance, given = LAW.moments()
    assert float(given / BETA) == pytest.approx(0.27277, abs=1e-5)
    assert float(variance / BETA) == pytest.approx(0.28745, abs=1e-5)
    assert float(LAW.moments(LAW.optimum(1.0, BETA))[0] - mean) == pytest.approx(GAIN, rel=1e-12)
    assert pytest.approx(0.0367, abs=1e-4) == FLOOR
    policy = AffinePolicy(LAW)
    x = torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    a, b, s = LAW.coefficients()
    for step in range(10):
        v = policy.velocity(x, LAW.sigmas[step].expand(len(x)), None).detach()
        x = a[step] * x + b[step] * v + s[step] * torch.randn(x.shape, generator=generator, dtype=F64)
    assert float(x.mean()) == pytest.approx(float(mean), abs=4 * math.sqrt(float(variance) / 200_000))
    assert float(x.var()) == pytest.approx(float(variance), rel=0.02)


@pytest.mark.parametrize("plan", [SHARED, SplitTree((0, 3), 4, train_last=True)], ids=["shared start", "tree"])
def test_at_the_optimum_the_loss_of_samples_that_share_their_start_is_zero(plan) -> None:
    """To the rounding of fp32 rewards and velocities of the reference; 0.72 without training."""
    policy, trainer = made(plan, group_size=16)
    before = metrics_of(trainer, collected(trainer))["loss/policy"]
    policy.set(LAW.optimum(1.0, BETA))
    found = metrics_of(trainer, collected(trainer))
    assert before > 0.1 and found["loss/policy"] < 1e-11
    assert found["pair/floor"] == 0.0 and found["pair/error"] < 1e-5


def test_without_a_shared_start_the_loss_has_a_floor_and_the_optimum_is_stationary() -> None:
    """The error of a pair is then that of log Z, which is linear in the start."""
    policy, trainer = made(APART, group_size=20, groups=40, micro_batch=10**6)
    start = gradients(trainer, collected(trainer))[0]
    policy.set(LAW.optimum(1.0, BETA))
    batch = collected(trainer)
    found = metrics_of(trainer, batch)
    forest = batch.forest
    starts = forest.at(forest.tree.root[forest.tree.leaves]).flatten().double().reshape(40, 20)
    exact = 2 * float((LAW.sensitivities()[0] / BETA).square() * starts.var(1).mean())
    assert found["loss/policy"] == pytest.approx(exact, rel=1e-4)
    assert exact == pytest.approx(FLOOR, rel=0.15)
    assert "pair/floor" not in found  # one sample of each start does not tell
    assert float(gradients(trainer, batch)[0].norm()) < 0.1 * float(start.norm())


def test_training_on_one_rollout_finds_the_optimum() -> None:
    """A shared start makes it a linear least-squares problem without noise."""
    optimizer = AdamWConfig(lr=0.3, weight_decay=0.0, max_grad_norm=1e9, half_life=15)
    policy, trainer = made(
        steps=4, group_size=12, groups=1, updates_per_rollout=120, optimizer=optimizer, micro_batch=10**6
    )
    losses, law = [], policy.law
    for update in trainer.updates(collected(trainer)):
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        update.optimizer.step()
        update.optimizer.zero_grad()
        losses.append(update.after()["loss/policy"])
    assert losses[-1] < 1e-4 * losses[0]
    torch.testing.assert_close(policy.theta.detach(), law.optimum(1.0, BETA), rtol=0.02, atol=0.0)
    moved = law.moments(policy.theta.detach())[0] - law.moments()[0]
    assert float(moved) == pytest.approx(float(law.moments()[2] / BETA), rel=0.01)


def test_a_single_step_is_tilted_as_a_gaussian() -> None:
    """reference N(μ, s²), reward w·x: the optimum is N(μ + w·s²/β, s²)."""
    law = Affine(FlowSDE(0.7, reduce="sum"), 1)
    policy, trainer = made(SHARED, group_size=32, steps=1)
    _, b, s = law.coefficients()
    policy.set(s.square() / (BETA * b))
    assert metrics_of(trainer, collected(trainer))["loss/policy"] < 1e-11
    torch.testing.assert_close(law.moments(policy.theta.detach())[0] - law.moments()[0], (s.square() / BETA)[0])


@pytest.mark.parametrize("kernel", [DanceSDE(0.4, reduce="sum"), CPS(0.7, reduce="sum", constants="full")], ids=str)
def test_other_kernels_have_their_own_optimum(kernel) -> None:
    """The last step of CPS has no density and is left out."""
    law = Affine(kernel, 6, noisy=range(5))
    policy, trainer = made(Chain(shared_start=True), group_size=12, steps=6, kernel=kernel)
    policy.law = law
    before = metrics_of(trainer, collected(trainer))["loss/policy"]
    policy.set(law.optimum(1.0, BETA))
    assert before > 1e-2 and metrics_of(trainer, collected(trainer))["loss/policy"] < 1e-9


def test_means_over_elements_and_steps_change_the_unit_of_beta_alone() -> None:
    """beta/(T·D) is the coefficient of the KL in nats: sums of T·D times a mean."""
    elements, steps = 5, 10
    policy, trainer = made(
        kernel=FlowSDE(0.7), elements=elements, beta=BETA * elements * steps, over_steps="mean", group_size=12
    )
    policy.set(LAW.optimum(1.0, BETA))
    assert metrics_of(trainer, collected(trainer))["loss/policy"] * (elements * steps) ** 2 < 1e-9


# ------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("plan", [APART, SHARED], ids=["independent starts", "shared start"])
def test_one_update_per_rollout_is_reinforce_with_the_kl_in_its_reward(plan) -> None:
    """−(2/β)·B/pairs·Σ (r̃ − mean r̃)·∇log π(path), r̃ = r − β·R̂, mean over prompts."""
    policy, trainer = made(plan, group_size=6, groups=3, micro_batch=7)
    policy.set(torch.linspace(-0.4, 0.3, 10))
    batch = collected(trainer)
    forest, tree = batch.forest, batch.forest.tree
    parents, position = tree.distinct_parents(tree.edges)
    x, sigma, arrived = forest.at(parents), forest.sigma(parents), forest.at(tree.edges)
    with policy.role("reference"):
        reference = forest.edge_steps(tree.edges, policy.velocity(x, sigma, batch.conditions), position)
    step = forest.edge_steps(tree.edges, policy.velocity(x, sigma, batch.conditions), position)
    log_prob = step.log_prob(arrived)
    at_nodes = torch.zeros(len(tree), dtype=F64)
    ratio = forest.path_sum(at_nodes.index_copy(0, tree.edges, (log_prob - reference.log_prob(arrived)).detach()))
    shaped = (batch.scores[:, 0] - BETA * ratio).reshape(3, 6)
    advantage = (shaped - shaped.mean(1, keepdim=True)).flatten()
    paths = forest.path_sum(at_nodes.index_copy(0, tree.edges, log_prob))
    (expected,) = torch.autograd.grad(-(2 / BETA) * 6 / 15 * (advantage * paths).sum() / 3, policy.theta)
    (found,) = gradients(trainer, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("over_steps", ["sum", "mean"])
@pytest.mark.parametrize("plan", [APART, SHARED, SplitTree((0, 2), 3)], ids=["chain", "shared", "tree"])
def test_two_passes_have_the_gradient_of_one_graph(plan, over_steps: str) -> None:
    """In micro-batches of five states, also where clipping acts: the second update is away from the rollout."""
    move = torch.linspace(0.3, -0.2, 10)
    policy, trainer = made(
        plan, group_size=9, micro_batch=5, clip_range=0.02, over_steps=over_steps, updates_per_rollout=2
    )
    policy.set(torch.linspace(-0.4, 0.3, 10))
    batch = collected(trainer)
    first, second = gradients(trainer, batch, move)
    assert bool(((first - second).abs() > 1e-3 * first.abs()).any())
    policy.set(torch.linspace(-0.4, 0.3, 10))
    tree = batch.forest.tree
    with torch.no_grad(), policy.role("reference"):
        parents, position = tree.distinct_parents(tree.edges)
        v = policy.velocity(batch.forest.at(parents), batch.forest.sigma(parents), batch.conditions)
        reference = batch.forest.edge_steps(tree.edges, v, position).log_prob(batch.forest.at(tree.edges))
    old = batch.forest.log_prob[tree.edges].double() - reference
    for found in (first, second):
        (expected,) = torch.autograd.grad(one_graph(policy, batch, trainer, old), policy.theta)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        policy.set(policy.theta.detach() + move)


def test_what_is_clipped_is_not_evaluated_again() -> None:
    """A policy far beyond its range on the way to the target: the first pass only, no step, and the loss is still logged."""
    policy, trainer = made(group_size=2, groups=1, clip_range=1e-3, updates_per_rollout=2, beta=1e-3)
    batch = collected(trainer)
    updates = list(itertools.islice(trainer.updates(batch), 1))
    for micro_batch in updates[0].micro_batches:
        micro_batch()
    states = len(batch.forest.tree.parents_of_edges)
    trained = iter(trainer.updates(batch))
    next(trained)
    policy.set(0.2 * LAW.optimum(1.0, 1.0))  # both samples of a pair move towards r/β, every step or few against it
    before = policy.evaluations
    update = next(trained)
    assert policy.evaluations - before == states
    evaluated = policy.evaluations
    for micro_batch in update.micro_batches:
        micro_batch()
    assert policy.evaluations - evaluated < states
    assert update.after()["cost/frozen_per_image"] == states / batch.images


# ------------------------------------------------------------------------------------------ subsets of steps


class Chosen:
    """In place of a keyed generator: these steps first."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def permutation(self, count: int) -> np.ndarray:
        return np.array([*self.steps, *(step for step in range(count) if step not in self.steps)])


@pytest.mark.parametrize("updates", [1, 2])
def test_the_gradient_of_a_subset_is_that_of_all_steps_in_expectation(
    monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    """All six subsets of two of four steps. The square of a subset's own residual would add its variance."""
    move = torch.linspace(0.3, -0.2, 5)

    def run(**arguments) -> Tensor:
        policy, trainer = made(Chain(shared_start=True), steps=5, group_size=5, clip_range=0.05,
                               updates_per_rollout=updates, **arguments)  # fmt: skip
        policy.set(torch.linspace(-0.2, 0.4, 5))
        return gradients(trainer, collected(trainer), move)[-1]

    full, found = run(), []
    for steps in itertools.combinations(range(4), 2):
        monkeypatch.setattr(reward_difference, "generator", lambda *key, steps=steps: Chosen(steps))
        found.append(run(steps_per_update=2))
        assert torch.equal(found[-1] != 0, torch.tensor([step in steps for step in range(5)]))
    torch.testing.assert_close(torch.stack(found).mean(0), full, rtol=1e-10, atol=1e-12)


def test_the_subset_is_keyed_common_to_a_prompt_and_new_for_each_update() -> None:
    def trained(seed: int, iteration: int) -> list[list[set[int]]]:
        _, trainer = made(APART, groups=3, group_size=4, steps_per_update=3, updates_per_rollout=2, seed=seed)
        batch = collected(trainer, iteration)
        tree = batch.forest.tree
        found = []
        for number in range(2):
            weight = trainer._weight(batch, tree.edges, number)
            assert weight is not None and weight.unique().tolist() == [0.0, 10 / 3]
            steps = tree.index[tree.parent[tree.edges]]
            per_sample = [set(steps[(tree.root[tree.edges] == root) & (weight > 0)].tolist()) for root in range(12)]
            assert all(len(one) == 3 for one in per_sample)
            groups = [per_sample[4 * group] for group in range(3)]
            assert per_sample == [one for one in groups for _ in range(4)]
            found.append(groups)
        return found

    one = trained(0, 0)
    assert trained(0, 0) == one and trained(0, 1) != one and trained(1, 0) != one
    assert one[0] != one[1] and one[0][0] != one[0][1]


# ------------------------------------------------------------------------------------------ guards and metrics


def test_a_drift_beyond_a_tenth_of_the_clip_range_stops_where_it_would_act() -> None:
    """The rollout's velocities are off by 1e-4 of a standard deviation: rounding for max_drift, not for a clip range of 1e-5."""

    def drifted(**arguments) -> ScoredRollout:
        _, trainer = made(group_size=4, **arguments)
        batch = collected(trainer)
        old = batch.forest.velocities["old"]
        moved = replace(old, values=old.values + 1e-4)
        forest = replace(batch.forest, velocities={"old": moved})
        return metrics_of(trainer, replace(batch, forest=forest))

    with pytest.raises(RunError, match=r"a tenth of the clip range.*anchor=rescore"):
        drifted(clip_range=1e-5, updates_per_rollout=2, anchor="detach")
    assert drifted(clip_range=1e-5, updates_per_rollout=2)["ratio/clip_fraction"] == 0
    assert 1e-6 < drifted(clip_range=1e-5)["ratio/drift_max"] < 1e-3
    with pytest.raises(RunError, match=r"trainer\.max_drift=1e-06, more than rounding"):
        drifted(max_drift=1e-6)


def test_the_metrics_of_an_update_by_hand() -> None:
    policy, trainer = made(SHARED, group_size=6, groups=2, updates_per_rollout=2, clip_range=0.05)
    shifts, move = torch.linspace(-0.3, 0.2, 10).double(), torch.full((10,), 0.1).double()
    policy.set(shifts)
    batch = collected(trainer)
    updates = trainer.updates(batch)
    first = next(updates)
    for micro_batch in first.micro_batches:
        micro_batch()
    told = first.after()
    assert told["ratio/approx_kl"] == told["ratio/clip_fraction"] == 0 and told["ratio/drift_max"] < 1e-6
    policy.set(shifts + move)
    second = next(updates)
    for micro_batch in second.micro_batches:
        micro_batch()
    found = second.after()
    assert batch.metrics["pair/kl"] == pytest.approx(float(LAW.kl(shifts)), rel=1e-5)
    assert batch.metrics["pair/kept_ratio"] == 1 and batch.metrics["group/zero_std_ratio"] == 0
    loss = float(one_graph(policy, batch, replace(trainer, clip_range=NO_CLIP), None).detach())
    assert found["pair/error"] >= BETA * math.sqrt(loss) * (1 - 1e-6)
    assert found["loss/policy"] == pytest.approx((found["pair/error"] / BETA) ** 2, rel=1e-9)
    assert 0 < found["ratio/clip_fraction"] <= 1 and found["pair/implicit_reward_std"] > 0
    assert "ratio/drift_max" not in found


def test_the_floor_is_estimated_where_starts_have_several_samples() -> None:
    """Six seeds of eight samples that part at one step: log Z of the state there varies with the start."""
    steps, at, beta = 4, 1, 0.3
    plan = Branch(branches=8, count=1, candidates=(at,))
    kernel = FlowSDE(0.7, reduce="sum")
    policy, trainer = made(plan, group_size=48, groups=40, steps=steps, kernel=kernel, beta=beta)
    policy.law = law = Affine(kernel, steps, noisy=(at,))
    policy.set(law.optimum(1.0, beta))
    found = metrics_of(trainer, collected(trainer))
    tilt = float(law.sensitivities()[0] / beta)  # log Z is linear in the start
    apart = 1 - 7 / 47  # pairs of different seeds
    assert found["pair/floor"] == pytest.approx(beta * math.sqrt(2 * apart) * tilt, rel=0.15)
    assert found["pair/error"] == pytest.approx(found["pair/floor"], rel=1e-3)  # there is no other error here
    policy.set(0 * law.optimum(1.0, beta))
    untrained = metrics_of(trainer, collected(trainer))  # R̂ = 0: r/β varies inside a start too, which is not its floor
    assert untrained["pair/floor"] < 0.5 * untrained["pair/error"]


def test_samples_without_a_score_and_prompts_without_a_pair_cost_nothing() -> None:
    policy, trainer = made(APART, group_size=4, groups=3, reward=LinearReward(invalid_above=0.9))
    batch = collected(trainer)
    tree, valid = batch.forest.tree, batch.valid[:, 0]
    assert 0 < int(valid.sum()) < len(valid)
    group = tree.group[tree.leaves]
    count = group[valid].bincount(minlength=3)
    used = valid & (count[group] > 1)
    before = policy.evaluations
    (update,) = list(trainer.updates(batch))
    for micro_batch in update.micro_batches:
        micro_batch()
    assert policy.evaluations - before == 2 * 10 * int(used.sum())  # the reference, and the update
    assert batch.metrics["group/trained_edges"] == 10 * int(used.sum())
    assert batch.metrics["group/zero_std_ratio"] == float((count < 2).double().mean())


# ------------------------------------------------------------------------------------------ refusals

SETUP = Setup(Rollout(Chain(), FlowSDE(), groups=2, group_size=4, num_inference_steps=5), AffinePolicy().path, ("r",))


@pytest.mark.parametrize(
    ("changes", "trainer", "message"),
    [
        ({"kernel": CPS()}, {}, "constants=full"),
        ({"plan": Probed(Chain())}, {}, "a rollout.plan with probes"),
        ({"group_size": 1}, {}, "group_size=1; expected at least 2"),
        ({"sources": {"teacher": "t"}}, {}, "got rollout.sources"),
        ({}, {"steps_per_update": 5}, "with 4 stochastic steps"),
        ({"guidance_scale": 2.0, "plan": Window(2, 0, 3)}, {}, "allow_cfg_update"),
    ],
)
def test_what_would_do_something_else_is_refused(changes, trainer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardDifference(**trainer).check(replace(SETUP, rollout=replace(SETUP.rollout, **changes)))


def test_several_channels_and_process_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards\.Mix"):
        RewardDifference().check(replace(SETUP, channels=("a", "b")))
    with pytest.raises(ValueError, match="got process_rewards"):
        RewardDifference().check(replace(SETUP, state_channels=("p",)))
    RewardDifference(steps_per_update=4).check(SETUP)


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"clip_range": -1.0}, {"updates_per_rollout": 0}, {"over_steps": "max"}, {"anchor": "stored"},
              {"steps_per_update": 0}, {"elements": 0}, {"max_drift": math.nan}],
)  # fmt: skip
def test_bad_values_say_what_was_expected(wrong) -> None:
    with pytest.raises(ValueError, match="expected"):
        RewardDifference(**wrong)


def test_the_forecast_tells_of_the_floor() -> None:
    apart, shared = (replace(SETUP.rollout, plan=Chain(shared_start=flag)) for flag in (False, True))
    assert "shared_start=true" in RewardDifference().forecast(apart).notes[0]
    assert not RewardDifference().forecast(shared).notes


# ------------------------------------------------------------------------------------------ the real loop


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed"))


LAYERS = ["configs/methods/prdp.yaml"]
CASES = {
    "K = 1": ([], 1.0, 1),
    "K = 3": (["trainer.updates_per_rollout=3"], 3.0, 4),
    "K = 3, detach": (["trainer.updates_per_rollout=3", "trainer.anchor=detach"], 3.0, 3),
    "3 of 9 steps": (["trainer.steps_per_update=3", "rollout.plan.shared_start=false"], 1 / 3, 1),
}


@pytest.mark.parametrize(("overrides", "trained", "frozen"), CASES.values(), ids=CASES)
def test_it_costs_what_is_forecast(pipeline: Path, overrides: list[str], trained: float, frozen: int) -> None:
    """trained, frozen: network rows of the updates over the states with a stochastic step."""
    bed = Bed.of(pipeline, LAYERS, *overrides, "rollout.group_size=6", "trainer.clip_range=1e3")
    rollout = bed.task.rollout
    group, update = (
        rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size),
        bed.trainer.forecast(rollout),
    )
    states = rollout.groups * group.train
    assert (update.trained, update.frozen) == (trained * states, frozen * states)
    found = bed.iteration(0)
    assert found.evaluations == rollout.groups * group.rollout + update.trained + update.frozen
    assert len(found.updates) == update.updates
    frozen_rows = found.batch.metrics["cost/frozen_per_image"] + sum(
        row["cost/frozen_per_image"] for row in found.updates
    )
    trained_rows = sum(row["cost/trained_per_image"] for row in found.updates)
    assert frozen_rows * found.batch.images == pytest.approx(update.frozen)
    assert trained_rows * found.batch.images == pytest.approx(update.trained)
    assert all(row["norm"] > 0 for row in found.updates)


def test_the_layer_costs_what_its_page_says(tiny_pipeline: Path) -> None:
    """On Glyphs, eight prompts: 73 evaluations, 65 states with backward and 65 of the reference, 8 images each."""
    files = [*LAYERS, "configs/models/glyphs.yaml", "configs/rewards/ocr_glyphs.yaml"]
    config, _ = load_config(files, [f"policy.path={tiny_pipeline}"])
    cost = config.rollout.plan.forecast(10, 8)
    assert (cost.rollout, cost.train, cost.edges, cost.leaves) == (73, 65, 72, 8)
    update = config.trainer.forecast(config.rollout)
    assert (update.updates, update.trained, update.frozen, update.notes) == (1, 8 * 65, 8 * 65, ())


def test_the_layer_runs_with_ddim(tiny_sd15_pipeline: Path) -> None:
    """Stable Diffusion's kernel over the method's: the layers load together."""
    files = [*LAYERS, "configs/models/sd15.yaml", "configs/rewards/jpeg.yaml"]
    config, _ = load_config(files, [f"policy.path={tiny_sd15_pipeline}"])
    assert isinstance(config.rollout.kernel, DDIM) and config.rollout.num_inference_steps == 50


def test_several_processes_do_what_one_does(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, and one for each of four prompts; a second update that clips; three of nine steps."""
    overrides = (
        "rollout.group_size=5",
        "trainer.updates_per_rollout=2",
        "trainer.steps_per_update=3",
        "trainer.micro_batch=7",
    )
    beds = [Bed.of(pipeline, LAYERS, *overrides) for _ in range(7)]

    def work(processes) -> tuple[list[Tensor], list[dict[str, float]]]:
        bed = beds.pop()
        task = replace(bed.task, processes=processes)
        bed.trainer.prepare(task, None)
        batch, parameters = (
            bed.trainer.collect(list(task.prompts)[:4], 0),
            [p for _, p in bed.policy.trainable_parameters()],
        )
        found, told = [], []
        for update in bed.trainer.updates(batch):
            for micro_batch in update.micro_batches:
                micro_batch().backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            found.append(processes.gather(torch.cat([grad.flatten() for grad in grads])[None]).sum(0))
            for parameter, grad in zip(parameters, found[-1].split([p.numel() for p in parameters]), strict=True):
                parameter.grad = grad.view_as(parameter).clone()
            update.optimizer.step()
            update.optimizer.zero_grad()
            told.append({**batch.metrics, **update.after()})
        return found, told

    expected, metrics = on_processes(1, work, monkeypatch)[0]
    for count in (2, 4):
        for found, told in on_processes(count, work, monkeypatch):
            for one, other in zip(found, expected, strict=True):
                assert float((one - other).norm()) < 1e-3 * float(other.norm())
            for row, reference in zip(told, metrics, strict=True):
                assert row.keys() == reference.keys()
                for name in ("loss/policy", "pair/error", "pair/kl", "pair/implicit_reward_std", "ratio/clip_fraction"):
                    assert row[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-9), name


def test_a_stopped_run_goes_on_where_it_was(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(output: Path) -> tuple[dict[str, Tensor], list]:
        small = ["rollout.group_size=4", "trainer.updates_per_rollout=2", "evaluation.samples_per_prompt=1", "run.iterations=3",
                 "run.checkpoint_every=1", f"policy.path={pipeline}", f"run.output={output}"]  # fmt: skip
        train(*load_config([*LAYERS, CONFIG], small))
        tensors, _ = checkpoint.load(checkpoint.latest(output / "bed"))
        rows = [without_time(row) for row in read_rows(output / "bed" / "metrics.jsonl")]
        return tensors["role_policy"], rows

    expected, expected_rows = run(tmp_path / "whole")
    original, steps = Run.step, []

    def dies(self: Run, update) -> None:
        steps.append(1)
        if len(steps) == 4:  # between the two updates of the second iteration
            raise KeyError("killed")
        original(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", dies)
        with pytest.raises(KeyError):
            run(tmp_path / "stopped")
    found, rows = run(tmp_path / "stopped")
    assert rows == expected_rows
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
