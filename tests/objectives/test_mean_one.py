"""Flash-GRPO's weights: 1/c of its kernel on its grid, divided by their mean over the batch."""

import numpy as np
import pytest
import torch

from flowalign.objectives import FlatGradient, MeanOne, Uniform
from samplers import Forest, KeyedNoise, LinearSDE, Tree, Window, plain_sigmas, rollout, window

GRID = plain_sigmas(20)  # shift 3
KERNEL = LinearSDE(sigma_max=float(GRID[1]))  # g = σ_1·σ
FIRST_AND_LAST = [7.4845, 3.7787]  # 1/c
WEIGHTS = [1.3382, 1.2602, 1.1832, 1.1072, 1.0323, 0.9585, 0.8859, 0.8145, 0.7444, 0.6756]
HARD_CODED = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]  # of the authors' code


def grown(tree: Tree) -> Forest:
    noise = KeyedNoise(0, 0, list(range(tree.num_groups)), (3,))
    return rollout(lambda x, s, r: -0.3 * x, noise.start(tree), GRID, tree, KERNEL, noise.step)


def weigh(weight, forest: Forest, edges: torch.Tensor) -> torch.Tensor:
    parents, position = forest.tree.distinct_parents(edges)
    return weight.weigh(forest.edge_steps(edges, torch.zeros(len(parents), 3), position), forest, edges)


def test_golden_weights_of_the_first_ten_of_twenty_steps() -> None:
    forest = grown(Tree.cat([window(20, 4, step, 1, shared_start=False) for step in range(10)]))
    edges = forest.tree.edges[forest.tree.index[forest.tree.edges].argsort(stable=True)]
    plain, even = (weigh(weight, forest, edges).reshape(10, 4) for weight in (FlatGradient(), MeanOne()))
    assert torch.equal(plain.std(1), torch.zeros(10)) and torch.equal(even.std(1), torch.zeros(10))
    assert plain[[0, 9], 0].tolist() == pytest.approx(FIRST_AND_LAST, abs=1e-4)
    assert plain[:, 0].tolist() == pytest.approx(HARD_CODED, rel=2e-3)
    assert even[:, 0].tolist() == pytest.approx(WEIGHTS, abs=1e-4)


def test_one_over_c_is_the_formula() -> None:
    """c = √h/g + g√h(1-σ)/(2σ)."""
    forest = grown(Tree.cat([window(20, 2, step, 1) for step in range(10)]))
    sigma, h = GRID[:10].double(), (GRID[:10] - GRID[1:11]).double()
    g = float(GRID[1]) * sigma
    c = h.sqrt() / g + g * h.sqrt() * (1 - sigma) / (2 * sigma)
    first_of_each = forest.tree.edges[forest.tree.index[forest.tree.edges].argsort(stable=True)][::2]
    torch.testing.assert_close(weigh(FlatGradient(), forest, first_of_each).double(), 1 / c, rtol=1e-5, atol=0)


def test_the_mean_is_that_of_the_batch_whatever_the_micro_batch() -> None:
    forest = grown(Tree.cat([window(20, 3, step, 1) for step in (0, 0, 4, 9)]))
    edges = forest.tree.edges
    whole = weigh(MeanOne(), forest, edges)
    parts = torch.cat([weigh(MeanOne(), forest, part) for part in edges.split(5)])
    assert torch.equal(whole, parts) and float(whole.mean()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        whole / weigh(FlatGradient(), forest, edges), whole[:1].expand(12) / weigh(FlatGradient(), forest, edges[:1])
    )
    assert torch.equal(weigh(MeanOne(Uniform()), forest, edges), torch.ones(12))


def test_one_step_of_each_prompt_uniform_over_the_first_half() -> None:
    """The same in a group, and all ten alike often."""
    plan, random = Window(1, low=0, high=10, shared_start=False), np.random.default_rng(0)
    trees = [plan.tree(20, 2, 0, random) for _ in range(300)]
    steps = [tree.index[tree.parent[tree.edges]].unique() for tree in trees]
    assert all(len(step) == 1 and len(tree.edges) == 2 for step, tree in zip(steps, trees, strict=True))
    counts = torch.cat(steps).bincount(minlength=10)
    assert len(counts) == 10 and float(((counts - 30) ** 2 / 30).sum()) < 27.9  # χ² of 9 degrees: one in a thousand
