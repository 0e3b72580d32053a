"""Step weights at the first step of a grid, which is known by its index and not by σ = 1."""

import pytest
import torch

from flowalign.objectives import LongCat, StdOverMean
from samplers import FlowSDE, Forest, KeyedNoise, chain, plain_sigmas, rollout


@pytest.mark.parametrize("weight", [LongCat(), StdOverMean()], ids=["LongCat", "StdOverMean"])
def test_weights_of_a_grid_that_starts_just_below_one(weight: LongCat | StdOverMean) -> None:
    """UniPC's grids start at 0.99999: the weights are nearly those of the grid from 1."""

    def weights(top: float) -> torch.Tensor:
        grid, tree, noise = plain_sigmas(10), chain(10, 1), KeyedNoise(0, 0, [0], (3,))
        grid[0] = top
        forest: Forest = rollout(lambda x, s, r: -0.3 * x, noise.start(tree), grid, tree, FlowSDE(0.7), noise.step)
        parents, position = tree.distinct_parents(tree.edges)
        step = forest.edge_steps(tree.edges, -0.3 * forest.at(parents), position)
        return weight.weigh(step, forest, tree.edges)

    torch.testing.assert_close(weights(0.99999), weights(1.0), rtol=1e-3, atol=0)


def test_a_grid_of_one_step_has_no_mean_of_others() -> None:
    tree, noise = chain(1, 2, train_last=True), KeyedNoise(0, 0, [0], (3,))
    forest = rollout(lambda x, s, r: -0.3 * x, noise.start(tree), plain_sigmas(1), tree, FlowSDE(0.7), noise.step)
    parents, position = tree.distinct_parents(tree.edges)
    step = forest.edge_steps(tree.edges, -0.3 * forest.at(parents), position)
    with pytest.raises(ValueError, match="two steps or more"):
        StdOverMean().weigh(step, forest, tree.edges)
