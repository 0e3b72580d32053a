"""Previews in a rollout of a policy: whom the reward chooses, what is counted, and that only regenerated images train."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowalign.advantage import SignalContext
from flowalign.rollouts.previews import correlation
from rewards import RewardBatch, RewardOutput
from samplers import Chain, Deterministic, Fixed, FlowSDE, KeyedNoise, Selected, Tree, Window
from tests.helpers.plain_rewards import Plain, brightness
from tests.helpers.policy_gradient import PROMPTS, gradients, make, run_updates
from tests.helpers.trees import grown

SHARED = Window(size=1, position=Fixed(1))


@pytest.mark.parametrize(
    ("plan", "index", "rows"),
    [(Chain(), 0, 6 * 3 + 2 * 5), (SHARED, 2, 2 + 6 * 3 + 2 * 3), (Deterministic(), 0, 6 * 3 + 2 * 5)],
    ids=["starts", "shared prefix", "ODE"],
)
def test_all_that_previews_cost_is_counted(tiny_pipeline: Path, plan, index: int, rows: int) -> None:
    """Of six candidates of each prompt two stay, by previews of three steps out of six."""
    chosen, reward = Selected(plan, {index: 2}, preview_steps=3, keep="extremes"), Plain(brightness)
    policy, trainer = make(tiny_pipeline, chosen, group_size=6, steps=6, reward=reward)
    before, cost = policy.evaluations, chosen.forecast(6, 6)
    batch = trainer.collect(PROMPTS, 0)
    assert policy.evaluations - before == batch.forest.evaluations == 2 * cost.rollout == 2 * rows
    assert batch.forest.previews == 2 * cost.previews == 12 and batch.images == 4
    assert batch.metrics["cost/rollout_per_image"] == rows / 2 and batch.metrics["cost/previews_per_image"] == 3
    assert sum(len(asked) for asked in reward.seen) == 12 + 4
    assert batch.metrics["cost/decodes_per_image"] == batch.metrics["cost/reward_calls_per_image"] == 4
    assert "cost/previews_per_image" not in make(tiny_pipeline, plan, steps=6)[1].collect(PROMPTS, 0).metrics


def test_how_well_previews_predict_is_measured() -> None:
    """Two prompts; of each candidate after the first step the preview's score, and two samples below it."""
    tree = Tree.from_parents([-1, 0, 0, 0, *(node for node in (1, 2, 3) for _ in range(2))], [0, 1, 1, 1, *[2] * 6],
                             [0, 1, 1, 1, *[1.0] * 6], 2)  # fmt: skip
    forest, scores = grown(Tree.cat([tree, tree])), torch.tensor([1.0, 3, 4, 4, 0, 0, 30, 10, 70, 90, 40, 40])
    valid = torch.ones(12, dtype=torch.bool)
    assert math.isnan(correlation(forest, scores, valid))
    preview = torch.full((20,), torch.nan)
    preview[forest.tree.index == 1] = torch.tensor([0.2, 0.4, 0.1, 5.0, 8.0, math.nan])
    forest = forest.with_scores("preview", preview)
    below = ([2.0, 4.0, 0.0], [20.0, 80.0])  # the last candidate has no preview
    x = [a - m for row in ([0.2, 0.4, 0.1], [5.0, 8.0]) for m in [sum(row) / len(row)] for a in row]
    y = [a - m for row in below for m in [sum(row) / len(row)] for a in row]
    expected = sum(a * b for a, b in zip(x, y, strict=True)) / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
    assert correlation(forest, scores, valid) == pytest.approx(expected, rel=1e-6)
    valid[3] = False  # one of the two samples of a candidate: the other stands for both
    assert correlation(forest, scores, valid) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(correlation(forest, torch.ones(12), valid))


def test_the_extremes_of_the_previews_are_trained_by_their_own_rewards(tiny_pipeline: Path) -> None:
    """Two starts of five: the brightest and the darkest after three ODE steps; their rewards are those of the chains."""
    policy, trainer = make(
        tiny_pipeline, Selected(Chain(), {0: 2}, preview_steps=3, keep="extremes"), group_size=5, steps=6
    )
    batch = trainer.collect(PROMPTS, 0)
    whole = make(tiny_pipeline, Chain(), group_size=5, steps=6)[1].collect(PROMPTS, 0)
    tree, shape = whole.forest.tree, whole.forest.states.shape[1:]
    start = KeyedNoise(0, 0, [0, 1], shape).start(tree)
    few, sigmas = start, policy.sigmas(6, shape)[[0, 2, 4, 6]]
    rows = batch.conditions.rows(tree.group[:10])
    for sigma, following in pairwise(sigmas):
        with torch.no_grad():
            few = few + (following - sigma) * policy.velocity(few, sigma.expand(10), rows)
    light = policy.decode(few).mean((1, 2, 3)).reshape(2, 5)
    ends = torch.stack([light.argmax(1), light.argmin(1)], 1).sort(1).values
    left = batch.forest.tree
    alive = left.root[left.leaves].reshape(2, 2)
    assert torch.equal(alive, ends + torch.tensor([[0], [5]]))
    assert torch.equal(batch.scores[:, 0], whole.scores[torch.isin(tree.root[tree.leaves], alive), 0])
    values = trainer.signal.edges(
        batch.forest, batch.scores, batch.valid, batch.channels, SignalContext()
    ).advantages.values
    assert sorted(values[:, 0].sign().tolist()) == [-1.0] * 10 + [1.0] * 10
    assert batch.metrics["reward/preview_correlation"] > 0.5
    run_updates(trainer, batch)
    assert float(torch.cat([grad.flatten() for grad in gradients(policy).values()]).norm()) > 0


def test_what_the_reward_cannot_score_is_never_chosen_as_bad(tiny_pipeline: Path) -> None:
    """The reward fails on the darkest preview of each prompt, and says that it is far worse than all others."""
    dark: list[list[int]] = []

    def fails_in_the_dark(batch: RewardBatch) -> RewardOutput:
        light, seen = batch.images.mean((1, 2, 3)), torch.ones(len(batch), dtype=torch.bool)
        if len(light) == 12:  # the previews, those of the first prompt first
            worst = light.reshape(2, 6).argsort(1)
            dark.append(worst[:, 0].tolist())
            dark.append(worst[:, 1].tolist())
            seen[worst[:, 0] + torch.tensor([0, 6])] = False
        return RewardOutput(torch.where(seen, light, -1e9), seen)

    plan = Selected(SHARED, {2: 2}, preview_steps=2, keep="extremes")
    _, trainer = make(tiny_pipeline, plan, group_size=6, steps=6, reward=Plain(fails_in_the_dark))
    tree = trainer.collect(PROMPTS, 0).forest.tree
    first_candidate = 2  # `local` counts the root and the state before the stochastic step
    stayed = (tree.local[tree.edges] - first_candidate).reshape(2, 2)
    for group in range(2):
        assert dark[0][group] not in stayed[group] and dark[1][group] in stayed[group]


def test_keeping_all_is_the_plan_without_selection(tiny_pipeline: Path) -> None:
    plain, all_kept = (
        make(tiny_pipeline, plan, FlowSDE(), group_size=4, steps=6)[1].collect(PROMPTS, 0)
        for plan in (SHARED, Selected(SHARED, {2: 4}, preview_steps=3, keep="extremes"))
    )
    assert torch.equal(plain.forest.states, all_kept.forest.states) and torch.equal(plain.scores, all_kept.scores)
    timing = {name for name in plain.metrics if name.startswith("time/")}
    assert {k: v for k, v in plain.metrics.items() if k not in timing} == {
        k: v for k, v in all_kept.metrics.items() if k not in timing
    }
