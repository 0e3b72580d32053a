"""Methods that are combinations of parts: MixGRPO-Flash, Stepwise-Flow-GRPO, Flash-GRPO, previews. Goldens, and one
rollout with its update on a tiny pipeline: ratio 1, counted rows, a gradient."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.advantage import Normalized, SignalContext
from flowalign.credit import Gain
from flowalign.objectives import ClippedRatio, MeanOne
from samplers import (
    Chain,
    Compressed,
    DPMSolver,
    FlowSDE,
    LinearSDE,
    Probed,
    Selected,
    Sliding,
    StepwiseSDE,
    Window,
    generator,
)
from tests.helpers.policy_gradient import PROMPTS, gradients, make, run_updates
from tests.helpers.trees import grown

# ---------------------------------------------------------------------------------------------- Stepwise-Flow-GRPO

VALUES = torch.tensor([[0.2, 0.5, 0.4, 0.9], [0.2, 0.3, 0.6, 0.7]], dtype=torch.float64)  # of the states 0 .. 3


def gains(within: str) -> Tensor:
    """The advantages [2, 3] of two samples of three steps, whose states are worth VALUES."""
    tree = Probed(Chain(train_last=True), steps=5).tree(3, 2, 0, generator(0))
    forest, scores = grown(tree), torch.zeros(len(tree.leaves), 1, dtype=torch.float64)
    states = (~tree.probe).nonzero().flatten()
    place = torch.full((len(tree),), -1)
    place[tree.leaves] = torch.arange(len(tree.leaves))
    scores[place[tree.completion(states)], 0] = VALUES[tree.root[states], tree.index[states]]
    credit = Gain().assign(forest, scores, torch.ones_like(scores, dtype=torch.bool), ("r",))
    found = Normalized(within=within, std="set", delta=0.0).compare(forest, credit, SignalContext()).values[:, 0]
    out = torch.zeros(2, 3)
    out[tree.root[tree.edges], tree.index[tree.edges] - 1] = found
    return out


def test_stepwise_gains_are_normalized_over_all_steps_of_a_prompt() -> None:
    """Gains (.3, -.1, .5) and (.1, .3, .1): mean .2, std .191485. Step by step they would be ±1."""
    expected = torch.tensor([[0.5222, -1.5667, 1.5667], [-0.5222, 0.5222, -0.5222]])
    torch.testing.assert_close(gains("prompt"), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(gains("prompt_step"), torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]))


def test_stepwise_probes_are_five_steps_of_the_ones_that_are_left() -> None:
    """Ten steps, of which the first and the last have no density: probes of the states 1 .. 8, state 9 has one step left."""
    tree = Probed(Window(size=8, low=1, high=9, shared_start=False), steps=5).tree(10, 2, 0, generator(0))
    assert sorted(set(tree.index[tree.edges].tolist())) == list(range(2, 10)) and len(tree.edges) == 16
    assert len(tree.leaves) == 2 + 2 * 8
    steps = [min(5, 10 - k) - 1 for k in range(1, 9)]  # further rows of each probe: the first velocity is shared
    assert tree.cost().rollout == 2 * (10 + sum(steps))
    ends = tree.completion(torch.cat([tree.edges, tree.parents_of_edges]))
    assert bool((ends >= 0).all())


# ---------------------------------------------------------------------------------------------- on a policy

RECIPES = {
    "MixGRPO-Flash": (
        Compressed(Window(2, position=Sliding(every=1)), 0.5), DPMSolver(FlowSDE()), {"objective": ClippedRatio(1e-2)},
    ),
    "Stepwise-Flow-GRPO": (
        Probed(Window(size=4, low=1, high=5, shared_start=False), steps=5), StepwiseSDE(), {"credit": Gain()},
    ),
    "Flash-GRPO": (
        Window(1, low=0, high=3, shared_start=False), LinearSDE(sigma_max=0.9), {"step_weight": MeanOne()},
    ),
    "starts by preview": (Selected(Chain(), {0: 4}, preview_steps=3, keep="extremes"), FlowSDE(), {}),
    "shared prefix, by preview": (
        Selected(Window(1, low=1, high=2), {2: 4}, preview_steps=2, keep="extremes"), DPMSolver(FlowSDE()), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_rolls_out_and_trains(tiny_pipeline: Path, name: str) -> None:
    plan, kernel, parts = RECIPES[name]
    policy, trainer = make(tiny_pipeline, plan, kernel, group_size=6, steps=6, **parts)
    for iteration in (0, 2):
        before = policy.evaluations
        batch = trainer.collect(PROMPTS, iteration)
        forest, limit = batch.forest, plan.forecast(6, 6)
        assert policy.evaluations - before == forest.evaluations <= 2 * limit.rollout
        assert forest.previews == 2 * limit.previews
        parents, position = forest.tree.distinct_parents(forest.tree.edges)
        with torch.no_grad():
            rows = batch.conditions.rows(forest.tree.group[parents])
            v = policy.velocity(forest.at(parents), forest.sigma(parents), rows)
        log_prob = forest.edge_steps(forest.tree.edges, v, position).log_prob(forest.at(forest.tree.edges))
        torch.testing.assert_close(log_prob, forest.log_prob[forest.tree.edges], rtol=0, atol=2e-5)
        run_updates(trainer, batch)
        assert float(torch.cat([grad.flatten() for grad in gradients(policy).values()]).norm()) > 0
