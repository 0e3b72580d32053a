"""The trainer's arithmetic against brute force: counts, gradients, advantages, losses."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowalign.advantage import Normalized, SignalContext, set_keys
from flowalign.credit import Broadcast, EdgeValues
from flowalign.models import Size
from flowalign.objectives import ClippedRatio, FlatGradient, KLPenalty, RoleSteps, StdOverMean
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Rollout
from flowalign.selectors import AllEdges, NonZeroAdvantage
from flowalign.trainers import Setup
from rewards import RewardOutput
from samplers import (
    CPS,
    Branch,
    Chain,
    DanceSDE,
    Fixed,
    FlowSDE,
    KeyedNoise,
    RectifiedFlow,
    Selected,
    SplitTree,
    Tree,
    Window,
    diffusers_sigmas,
    rollout,
    window,
)
from tests.helpers.policy_gradient import PROMPTS, Brightness, gradients, make, run_updates

# ---------------------------------------------------------------------------------------------- the rollout's report


def test_reward_metrics_are_of_the_images_that_have_a_score(tiny_pipeline: Path) -> None:
    @dataclass(frozen=True)
    class Blind(Brightness):
        """Cannot score the second image of each batch."""

        def __call__(self, batch) -> RewardOutput:
            output = super().__call__(batch)
            output.valid[1] = False
            return replace(output, components={"twice": 2 * output.scores})

    _, trainer = make(tiny_pipeline, Window(), reward=Blind())
    began = time.perf_counter()
    batch = trainer.collect(PROMPTS, 0)
    total, metrics, seen = time.perf_counter() - began, batch.metrics, batch.scores[batch.valid].double()
    assert len(seen) == 5 and metrics["reward/invalid"] == 1
    assert metrics["reward/mean"] == metrics["reward/brightness_mean"] == pytest.approx(float(seen.mean()))
    assert metrics["reward/brightness_std"] == pytest.approx(float(seen.std(unbiased=False)))
    assert metrics["reward/brightness.twice_mean"] == pytest.approx(2 * float(seen.mean()))
    assert 0 < sum(metrics[f"time/{part}"] for part in ("rollout", "decode", "reward")) < total
    assert metrics["time/reward_ms_per_image"] == pytest.approx(1000 * metrics["time/reward"] / 6)


@pytest.mark.parametrize(("draw", "windows"), [("iteration", 1), ("group", 2)])
def test_a_random_window_is_drawn_once_per_iteration_or_per_group(draw, windows: int) -> None:
    settings = Rollout(Window(size=1, high=30), FlowSDE(), groups=2, group_size=3, num_inference_steps=40, draw=draw)
    trees = [grow(settings, 0, iteration, range(2)) for iteration in range(3)]
    starts = [{int(i) for i in tree.index[tree.parents_of_edges]} for tree in trees]
    assert [len(found) for found in starts] == [windows] * 3 and len(set.union(*starts)) > windows


# ---------------------------------------------------------------------------------------------- counts (I2)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_where_nothing_differs_there_is_no_update(tiny_pipeline: Path, kl: float) -> None:
    policy, trainer = make(
        tiny_pipeline, Window(), select=NonZeroAdvantage(), regularizers={"kl": KLPenalty(kl)}, updates_per_rollout=2
    )
    batch = trainer.collect(PROMPTS, 0)
    flat = torch.where(torch.arange(6)[:, None] < 3, batch.scores, 0.5)  # the second prompt's images score alike
    before = policy.evaluations
    first, second = trainer.updates(replace(batch, scores=flat))
    assert len(first.micro_batches) == 1 and second.micro_batches == []
    assert "loss/policy" not in second.after() and policy.evaluations - before == int(kl > 0)


def test_guidance_is_refused_in_a_window_but_not_where_all_steps_are_trained(tiny_pipeline: Path) -> None:
    _, trainer = make(tiny_pipeline, Chain())
    for plan in (Chain(), Chain(shared_start=True), SplitTree((0, 2), 2), Branch(branches=4)):
        full = Rollout(plan, FlowSDE(), groups=2, group_size=4, num_inference_steps=4, guidance_scale=4.5)
        trainer.check(Setup(full, RectifiedFlow(), ("jpeg",)))
    few = Rollout(Window(size=2), FlowSDE(), groups=2, group_size=4, num_inference_steps=4, guidance_scale=4.5)
    with pytest.raises(ValueError, match="window of few steps"):
        trainer.check(Setup(few, RectifiedFlow(), ("jpeg",)))
    trainer.check(Setup(replace(few, allow_cfg_update=True), RectifiedFlow(), ("jpeg",)))


def test_siblings_share_noise_where_the_rollout_says_so(tiny_pipeline: Path) -> None:
    drawn = []
    for scale in (None, 0.01):
        _, trainer = make(tiny_pipeline, Window(low=1, high=2, size=1), group_size=3)
        trainer.prepare(replace(trainer.task, rollout=replace(trainer.task.rollout, branch_scale=scale)), None)
        forest = trainer.collect(PROMPTS, 0).forest
        arrived = forest.at(forest.tree.edges).unflatten(0, (2, 3))
        drawn.append((arrived - arrived.mean(1, keepdim=True)).norm())
    assert drawn[1] < 0.02 * drawn[0]


def test_a_selected_plan_keeps_the_best_previews_and_looks_once(tiny_pipeline: Path) -> None:
    plan = Selected(Window(size=1, low=1, high=2), {2: 2})
    policy, trainer = make(tiny_pipeline, plan, group_size=5, steps=6)
    before = policy.evaluations
    batch = trainer.collect(PROMPTS, 0)
    rows = 2 * (2 + 5 + 3 * 2)  # the trunk; five branches, all looked at where they arrive; two go on
    assert policy.evaluations - before == rows == 2 * plan.forecast(6, 5).rollout
    assert batch.metrics["cost/rollout_per_image"] == rows / 4
    unselected = make(tiny_pipeline, plan.plan, group_size=5, steps=6)[1].collect(PROMPTS, 0)
    sigmas = policy.sigmas(6, policy.latent_shape(Size(24, 48)))
    for group in range(2):
        mine = unselected.forest.tree.group[unselected.forest.tree.edges] == group
        x = unselected.forest.at(unselected.forest.tree.edges[mine])  # after the stochastic step, at index 2
        rows = batch.conditions.rows(torch.full((5,), group))
        with torch.no_grad():
            x0 = x - sigmas[2] * policy.velocity(x, sigmas[2].expand(5), rows)
        best = policy.decode(x0).mean((1, 2, 3)).argsort(descending=True)[:2].sort().values
        expected = unselected.forest.tree.local[unselected.forest.tree.edges[mine]][best]
        edges = batch.forest.tree.edges
        assert torch.equal(batch.forest.tree.local[edges][batch.forest.tree.group[edges] == group], expected)
    run_updates(trainer, batch)


@pytest.mark.parametrize(
    ("shared", "rollout_rows", "update"), [(True, 125, 3 * 25), (False, 240, 3 * 48)], ids=["shared", "independent"]
)
def test_counted_evaluations_of_flow_grpo_fast(
    tiny_pipeline: Path, shared: bool, rollout_rows: int, update: int
) -> None:
    """Group 24, 10 steps, window 2 at step 4, no guidance, reference on: 8.3 and 16 forward equivalents per image."""
    plan = Window(size=2, low=4, high=6, position=Fixed(4), shared_start=shared)
    policy, trainer = make(tiny_pipeline, plan, group_size=24, steps=10, regularizers={"kl": KLPenalty(0.01)})
    batch = trainer.collect(PROMPTS[:1], 0)
    assert policy.evaluations == rollout_rows
    trainer.task = replace(trainer.task, rollout=replace(trainer.task.rollout, groups=1))
    run_updates(trainer, batch)
    forward = policy.evaluations - rollout_rows  # reference and trained rows, one each
    assert forward == 2 * update // 3
    per_image = (rollout_rows + update) / 24  # a trained row is a forward and a backward, a reference row a forward
    assert per_image == pytest.approx(8.33 if shared else 16.0, abs=0.01)


def test_guidance_counts_two(tiny_pipeline: Path) -> None:
    policy, trainer = make(tiny_pipeline, Chain(), guidance=3.0)
    trainer.collect(PROMPTS, 0)
    assert policy.evaluations == 2 * 2 * 3 * 4


def test_prompts_are_encoded_once(tiny_pipeline: Path) -> None:
    policy, trainer = make(tiny_pipeline, Chain())
    trainer.collect(PROMPTS, 0)
    trainer.collect(PROMPTS[::-1], 1)
    assert policy.encoded == 2


# ---------------------------------------------------------------------------------------------- replay and gradient


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS()], ids=["flow", "dance", "cps"])
def test_first_update_replays_and_merged_siblings_give_the_per_edge_gradient(tiny_pipeline: Path, kernel) -> None:
    policy, trainer = make(tiny_pipeline, Window(size=2, low=0, high=3, position=Fixed(0)), kernel)
    batch = trainer.collect(PROMPTS, 0)
    run_updates(trainer, batch)
    merged = gradients(policy)
    forest, tree = batch.forest, batch.forest.tree
    advantages = trainer.signal.advantage.compare(
        forest, trainer.signal.credit.assign(forest, batch.scores, batch.valid, ("r",)), SignalContext()
    )
    for row, edge in enumerate(tree.edges):  # one forward and backward per edge
        edges, parent = edge[None], tree.parent[edge][None]
        conditions = batch.conditions.rows(tree.group[parent])
        velocity = policy.velocity(forest.at(parent), forest.sigma(parent), conditions)
        log_prob = forest.edge_steps(edges, velocity, torch.tensor([0])).log_prob(forest.at(edges))
        log_ratio = log_prob - forest.log_prob[edges]
        assert float(log_ratio.detach().abs()) <= 1e-6
        (-(log_ratio.exp() * advantages.values[row, 0]).sum() / len(tree.edges)).backward()
    single = gradients(policy)
    assert merged.keys() == single.keys() and len(merged) > 0
    scale = max(float(g.abs().max()) for g in single.values())
    assert scale > 0
    for name, gradient in single.items():
        torch.testing.assert_close(merged[name], gradient, rtol=1e-3, atol=1e-5 * scale)


def test_a_role_pass_between_forward_and_backward_changes_no_gradient(tiny_pipeline: Path) -> None:
    policy, _ = make(tiny_pipeline, Chain())
    conditions = policy.encode(PROMPTS[:1])
    x, sigma = torch.randn(1, 3, 24, 48), torch.tensor([0.7])
    for checkpointing in (False, True):
        if checkpointing:
            policy.modules()[
                "transformer"
            ].train()  # diffusers checkpoints in training mode only; the model has no dropout
            policy.modules()["transformer"].enable_gradient_checkpointing()
        policy.velocity(x, sigma, conditions).square().mean().backward()
        plain = gradients(policy)
        out = policy.velocity(x, sigma, conditions)
        with policy.role("reference"), torch.no_grad():
            reference = policy.velocity(x, sigma, conditions)
        out.square().mean().backward()
        between = gradients(policy)
        assert not torch.allclose(reference, out)
        assert plain.keys() == between.keys() == {name for name, _ in policy.trainable_parameters()}
        assert all(torch.equal(plain[name], between[name]) for name in plain)
        assert all(p.requires_grad for _, p in policy.trainable_parameters())


def test_a_role_is_restored_after_an_exception(tiny_pipeline: Path) -> None:
    policy, _ = make(tiny_pipeline, Chain())
    conditions = policy.encode(PROMPTS[:1])
    x, sigma = torch.randn(1, 3, 24, 48), torch.tensor([0.7])
    before = policy.velocity(x, sigma, conditions)
    with pytest.raises(KeyError), policy.role("reference"), policy.role("reference"):
        raise KeyError
    assert torch.equal(policy.velocity(x, sigma, conditions), before)


def test_failing_replay_stops_the_run(tiny_pipeline: Path) -> None:
    policy, trainer = make(tiny_pipeline, Chain(), max_drift=1e-4)
    batch = trainer.collect(PROMPTS, 0)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.mul_(1.5)
    with pytest.raises(RuntimeError, match="max_drift"):
        run_updates(trainer, batch)


def test_masked_samples_leave_statistics_and_edges(tiny_pipeline: Path) -> None:
    _, trainer = make(tiny_pipeline, Chain())
    batch = trainer.collect(PROMPTS, 0)
    valid = batch.valid.clone()
    valid[0] = False
    forest = batch.forest
    values = trainer.signal.credit.assign(forest, torch.where(valid, batch.scores, torch.nan), valid, ("r",))
    advantages = trainer.signal.advantage.compare(forest, values, SignalContext())
    assert int((~advantages.valid).sum()) == 3  # the three trained steps of that one sample
    assert bool(advantages.values.isfinite().all())
    assert abs(float(advantages.values.sum())) < 1e-4


# ---------------------------------------------------------------------------------------------- pure parts


def forest_of(tree: Tree, steps: int):
    noise = KeyedNoise(0, 0, list(range(tree.num_groups)), (2,))
    return rollout(lambda x, s, r: -0.3 * x, noise.start(tree), diffusers_sigmas(steps), tree, FlowSDE(), noise.step)


def values(*rewards: float) -> EdgeValues:
    column = torch.tensor(rewards, dtype=torch.float64)[:, None]
    return EdgeValues(column, torch.ones_like(column, dtype=torch.bool), ("r",))


def test_advantage_golden() -> None:
    forest = forest_of(window(4, 4, 1, 1), 4)
    got = Normalized().compare(forest, values(1, 2, 3, 6), SignalContext()).values[:, 0]
    np.testing.assert_allclose(got, [-1.068988, -0.534494, 0, 1.603482], atol=1e-6)
    unbiased = Normalized(unbiased=True, delta=1e-8).compare(forest, values(1, 2, 3, 6), SignalContext()).values[:, 0]
    np.testing.assert_allclose(unbiased, (np.array([1, 2, 3, 6]) - 3) / np.std([1, 2, 3, 6], ddof=1), rtol=1e-5)
    assert float(Normalized(std="none").compare(forest, values(1, 2, 3, 6), SignalContext()).values[3, 0]) == 3.0
    flat = Normalized().compare(forest, values(2, 2, 2, 2), SignalContext())
    assert flat.zero_std_ratio == 1.0 and not bool(flat.values.any())


def test_advantage_sets_and_scales() -> None:
    forest = forest_of(Tree.cat([window(4, 2, 1, 1), window(4, 2, 2, 1)]), 4)
    edges = forest.tree.edges
    rewards = torch.where(forest.tree.group[edges] == 0, 10.0, 1.0) + torch.tensor([0.0, 1.0, 0.0, 1.0])
    per_prompt = Normalized(delta=0).compare(forest, values(*rewards.tolist()), SignalContext()).values[:, 0]
    assert sorted(per_prompt.tolist()) == pytest.approx([-1, -1, 1, 1])
    raw = rewards.double()
    batch = Normalized(std="batch", delta=0).compare(forest, values(*rewards.tolist()), SignalContext()).values[:, 0]
    assert float(batch.abs().max()) == pytest.approx(0.5 / float(raw.std(unbiased=False)))
    assert len(set_keys(forest, "batch").unique()) == 1
    assert len(set_keys(forest, "seed_step").unique()) == 2


def test_broadcast_is_the_mean_of_the_leaves_below() -> None:
    forest = forest_of(Tree.from_parents([-1, 0, 1, 1, 2, 3], [0, 1, 2, 2, 3, 3], [0, 1, 1, 1, 0, 0], 3), 3)
    got = Broadcast().assign(forest, torch.tensor([[1.0], [4.0]]), torch.ones(2, 1, dtype=torch.bool), ("r",))
    assert got.values[:, 0].tolist() == [2.5, 1.0, 4.0]


def test_clipped_ratio_gradient_stops_where_it_should() -> None:
    eps = 0.1
    for advantage, ratio, moves in (
        (1, 1 + 2 * eps, False),
        (1, 1 - 2 * eps, True),
        (-1, 1 + 2 * eps, True),
        (-1, 1 - 2 * eps, False),
    ):
        log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
        loss = ClippedRatio(eps).loss(log_prob, torch.zeros(1).double(), torch.tensor([[float(advantage)]]).double())
        loss.sum().backward()
        assert bool(log_prob.grad.abs() > 0) == moves


@pytest.mark.parametrize("form", ["exact", "exact_times_h", "velocity", "mean_sq"])
@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS()], ids=["flow", "dance", "cps"])
def test_loss_and_kl_gradients_equal_finite_differences(kernel, form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v0, reference, noise = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    old = kernel(x, v0, 0.7, 0.55)
    arrived, advantages = old.sample(noise), torch.tensor([[1.3], [-0.4]], dtype=torch.float64)

    def loss(v: torch.Tensor) -> torch.Tensor:
        step = kernel(x, v, 0.7, 0.55)
        surrogate = ClippedRatio(10.0).loss(step.log_prob(arrived), old.log_prob(arrived), advantages)
        other = RoleSteps(kernel(x, reference, 0.7, 0.55), reference)
        return (surrogate + KLPenalty(0.3, form).divergence(RoleSteps(step, v), other)).sum()

    assert torch.autograd.gradcheck(loss, (v0 + 0.01).requires_grad_())


def test_step_weights() -> None:
    forest = forest_of(Tree.cat([window(10, 2, start, 1) for start in range(9)]), 10)
    edges = forest.tree.edges
    parents, position = forest.tree.distinct_parents(edges)
    step = forest.edge_steps(edges, torch.zeros(len(parents), 2), position)
    order = forest.tree.index[forest.tree.parent[edges]]
    weights = torch.stack([StdOverMean().weigh(step, forest, edges)[order == i][0] for i in range(9)])
    golden = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]  # TempFlow, SD3 grid, a = 0.7
    np.testing.assert_allclose(weights, golden, atol=1e-3)
    flat = FlatGradient().weigh(step, forest, edges) * step.policy.velocity_coef.abs() / step.std
    np.testing.assert_allclose(flat, 1.0, rtol=1e-6)


def test_zero_advantage_edges_can_be_skipped() -> None:
    forest = forest_of(Tree.cat([window(4, 2, 1, 1)] * 2), 4)
    advantages = Normalized().compare(forest, values(1, 1, 0, 1), SignalContext())
    group = forest.tree.group[forest.tree.edges]
    flat = int(group[0])  # edges 0 and 1 are of one group
    assert NonZeroAdvantage().choose(forest, advantages)[group == flat].tolist() == [False, False]
    assert int(NonZeroAdvantage().choose(forest, advantages).sum()) == 2
    assert int(AllEdges().choose(forest, advantages).sum()) == 4
