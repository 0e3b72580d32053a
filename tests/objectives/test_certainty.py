"""Certainty: the mean of exp(−u/scale) over the scored leaves below a step, times another weight."""

import pytest
import torch

from flowalign.objectives import Agreement, Certainty, FlatGradient, Uniform
from samplers import Forest, SplitTree, generator
from tests.helpers.trees import grown

NAN = float("nan")


def weights(weight, forest: Forest, edges: torch.Tensor) -> torch.Tensor:
    parents, position = forest.tree.distinct_parents(edges)
    return weight.weigh(forest.edge_steps(edges, torch.zeros(len(parents), 3), position), forest, edges)


def split(**uncertainty: list[float]) -> Forest:
    """One start, two children by a stochastic step, two more of each by the next: four leaves, by channel their u."""
    forest = grown(SplitTree((0, 1), 2).tree(3, 4, 0, generator(0, "select", 0)))
    assert len(forest.tree.edges) == 6 and len(forest.tree.leaves) == 4
    for channel, values in uncertainty.items():
        of_nodes = torch.full((len(forest.tree),), NAN)
        of_nodes[forest.tree.leaves] = torch.tensor(values)
        forest = forest.with_scores(f"uncertainty/{channel}", of_nodes)
    return forest


def test_it_is_the_mean_over_the_leaves_below() -> None:
    forest = split(r=[0.0, 1.0, 3.0, NAN])
    sure = torch.exp(-torch.tensor([0.0, 0.5, 1.5]))
    expected = torch.stack([sure[:2].mean(), sure[2], sure[0], sure[1], sure[2], torch.tensor(0.0)])
    torch.testing.assert_close(weights(Certainty(scale=2.0), forest, forest.tree.edges), expected)
    half = weights(FlatGradient(), forest, forest.tree.edges)
    torch.testing.assert_close(
        weights(Certainty(2.0, weight=FlatGradient()), forest, forest.tree.edges), half * expected
    )
    some = forest.tree.edges[[5, 0, 3]]
    torch.testing.assert_close(weights(Certainty(scale=2.0), forest, some), expected[[5, 0, 3]])


def test_a_reward_that_is_certain_changes_nothing() -> None:
    forest = split(r=[0.0] * 4)
    assert torch.equal(weights(Certainty(), forest, forest.tree.edges), weights(Uniform(), forest, forest.tree.edges))


def test_of_several_channels_one_is_named() -> None:
    forest = split(a=[0.0] * 4, b=[1.0] * 4)
    assert weights(Certainty(channel="b"), forest, forest.tree.edges).tolist() == pytest.approx([0.36788] * 6, rel=1e-4)
    for certainty in (Certainty(), Certainty(channel="c")):
        with pytest.raises(ValueError, match=r"uncertainty/a', 'uncertainty/b.*set `channel`"):
            weights(certainty, forest, forest.tree.edges)
    with pytest.raises(ValueError, match="states no uncertainty"):
        weights(Certainty(), split(), split().tree.edges)
    with pytest.raises(ValueError, match=r"Certainty\.scale=0"):
        Certainty(scale=0)


def test_agreement_is_how_little_a_prediction_changes_in_the_step() -> None:
    """s = 0 at the start; 2 and -1 after the first step; below the first child 2, 5, below the other one nothing."""
    forest = split()
    tree = forest.tree
    known = torch.full((len(tree),), NAN)
    known[0], known[tree.edges] = 0.0, torch.tensor([2.0, -1.0, 2.0, 5.0, NAN, NAN])
    forest = forest.with_scores("x0_r", known)
    expected = torch.exp(-torch.tensor([2.0, 1.0, 0.0, 3.0, torch.inf, torch.inf]) / 2)
    torch.testing.assert_close(weights(Agreement("x0_r", 2.0), forest, tree.edges), expected)
    times = weights(FlatGradient(), forest, tree.edges)
    torch.testing.assert_close(weights(Agreement("x0_r", 2.0, FlatGradient()), forest, tree.edges), times * expected)
    with pytest.raises(
        ValueError, match=r"got Agreement\.score='x0_q' and process_rewards with the channels \['x0_r'\]"
    ):
        weights(Agreement("x0_q"), forest, tree.edges)
    with pytest.raises(ValueError, match=r"Agreement\.scale=0"):
        Agreement("x0_r", scale=0)
