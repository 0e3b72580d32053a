"""Edge selectors: counts of the papers, hand-computed choices, draws that depend on their key alone."""

import pytest
import torch

from flowalign.advantage import Advantages, Normalized, SignalContext
from flowalign.credit import Broadcast, SubtreeFusion
from flowalign.selectors import (
    All,
    AllEdges,
    BestOfN,
    DepthWindow,
    ExtremeB,
    Fraction,
    NonZeroAdvantage,
    ParentTop1,
    PositiveNegativeBalance,
)
from samplers import Forest, Tree, chain
from tests.helpers.trees import everywhere, grown, leaves_under, probed, split_tree


def advantages_of(forest: Forest, values, valid=None) -> Advantages:
    """Advantages of one channel, given by edge."""
    column = torch.as_tensor(values, dtype=torch.float32)[:, None]
    return Advantages(column, everywhere(column) if valid is None else torch.as_tensor(valid)[:, None], 0.0)


def branch_grpo() -> tuple[Forest, Advantages]:
    """Dense splits (0, 3, 6, 9), T = 20, K = 2: 16 leaves, 218 edges."""
    forest = grown(split_tree(20, (0, 3, 6, 9)), width=1)
    rewards = torch.randn(16, 1, generator=torch.Generator().manual_seed(3)).double()
    credit = SubtreeFusion().assign(forest, rewards, everywhere(rewards), ("r",))
    return forest, Normalized(within="tree_depth", unbiased=True, delta=0).compare(forest, credit, SignalContext())


def test_the_trees_of_the_paper() -> None:
    for splits, width, rollout, edges in (
        ((0, 3, 6, 9), 2, 203, 218), ((0, 4, 8, 12), 2, 169, 184), ((0, 5, 10, 15), 2, 135, 150),
        ((0, 3, 6, 9), 3, 928, 1008), ((0, 3, 6, 9), 4, 2813, 3068),
    ):  # fmt: skip
        cost = split_tree(20, splits, width).cost()
        assert (cost.rollout, cost.edges) == (rollout, edges)


def test_width_pruning_leaves_138_edges() -> None:
    forest, advantages = branch_grpo()
    tree, edges = forest.tree, forest.tree.edges
    step = tree.index[tree.parent[edges]]
    for rule in (ParentTop1(), ExtremeB(4)):
        kept = rule.choose(forest, advantages)
        assert int(kept.sum()) == 138  # 8.625 per leaf
        assert bool(kept[step < 10].all()) and int(kept[step >= 10].sum()) == 80
    kept = ParentTop1().choose(forest, advantages)
    of_node = torch.zeros(len(tree)).index_put((edges,), advantages.values[:, 0])
    for parent in tree.parent[edges[step == 9]].unique().tolist():
        twins = (tree.parent == parent).nonzero().flatten()
        best = int(twins[of_node[twins].argmax()])
        below = {int(leaf) for leaf in leaves_under(tree, best)}
        assert {int(leaf) for leaf in leaves_under(tree, parent) if bool(kept[edges == leaf])} == below
    kept = ExtremeB(4).choose(forest, advantages)
    ranked = of_node[tree.leaves].argsort()
    chosen = torch.isin(tree.leaves, edges[kept])
    assert sorted(chosen.nonzero().flatten().tolist()) == sorted([*ranked[:4].tolist(), *ranked[-4:].tolist()])


def test_depth_pruning_moves_between_its_ends() -> None:
    forest, advantages = branch_grpo()
    step = forest.tree.index[forest.tree.parent[forest.tree.edges]]
    for iteration, first in ((0, 14), (29, 14), (30, 13), (179, 9), (180, 8), (9999, 8)):  # 0-based: depths 15 to 9
        kept = DepthWindow().choose(forest, advantages, SignalContext(iteration=iteration))
        assert sorted(step[~kept].unique().tolist()) == list(range(first, first + 4))
    assert int(DepthWindow(size=5).choose(forest, advantages).sum()) == 138  # 5 · 16 edges fewer
    assert int(DepthWindow(size=4).choose(forest, advantages).sum()) == 154
    with pytest.raises(
        ValueError, match="size=5 on a grid of 20 steps; expected windows inside it: both ends at most 15"
    ):
        DepthWindow(size=5, start=16).choose(forest, advantages)
    assert [DepthWindow(start=9, stop=15).first(30 * k) for k in (0, 1, 6, 7)] == [9, 10, 15, 15]


def test_a_masked_branch_is_never_the_best_one() -> None:
    forest = grown(split_tree(3, (0,)))  # two branches of three steps
    advantages = advantages_of(forest, [0.0, -1.0] * 3, [False, True] * 3)
    assert ParentTop1().choose(forest, advantages)[2:].tolist() == [False, True, False, True]
    assert ExtremeB(1).choose(forest, advantages)[2:].tolist() == [False, True, False, True]


@pytest.mark.parametrize("probes", [False, True])
def test_a_share_of_each_samples_steps(probes: bool) -> None:
    """DanceGRPO: 9 of the 15 trained transitions of T = 16."""
    tree = Tree.cat([probed(16, 3) if probes else chain(16, 3)] * 2)
    forest = grown(tree, width=1)
    edges = forest.tree.edges
    advantages = advantages_of(forest, torch.ones(len(edges)))
    draws = [
        Fraction(0.6).choose(forest, advantages, SignalContext(seed, iteration, uids))
        for seed, iteration, uids in ((0, 0, (7, 8)), (0, 1, (7, 8)), (1, 0, (7, 8)), (0, 0, (8, 7)), (0, 0, (7, 7)))
    ]
    for kept in draws:
        assert [int(kept[forest.tree.root[edges] == root].sum()) for root in range(6)] == [9] * 6
    assert len({tuple(kept.tolist()) for kept in draws}) == 5
    group = forest.tree.group[edges]
    assert draws[0][group == 0].tolist() == draws[3][group == 1].tolist()  # the prompt counts, not its place
    assert draws[4][group == 0].tolist() != draws[4][group == 1].tolist()  # a prompt seen twice draws twice
    alone = grown(Tree.cat([probed(16, 3) if probes else chain(16, 3)]), width=1)
    single = Fraction(0.6).choose(
        alone, advantages_of(alone, torch.ones(len(alone.tree.edges))), SignalContext(0, 0, (8,))
    )
    assert single.tolist() == draws[0][group == 1].tolist()
    assert bool(Fraction(1.0).choose(forest, advantages).all())


def test_best_and_worst_samples_of_each_group() -> None:
    forest = grown(Tree.cat([chain(4, 6), chain(4, 6)]), width=1)
    edges, root = forest.tree.edges, forest.tree.root[forest.tree.edges]
    rewards = torch.tensor([3.0, 1.0, 6.0, 2.0, 5.0, 4.0, 13.0, 11.0, 16.0, 12.0, 15.0, 14.0])[:, None]
    credit = Broadcast().assign(forest, rewards, everywhere(rewards), ("r",))
    advantages = Normalized().compare(forest, credit, SignalContext())
    kept = BestOfN(4).choose(forest, advantages)
    assert root[kept].unique().tolist() == [1, 2, 3, 4, 7, 8, 9, 10]
    assert int(kept.sum()) == 8 * 3  # whole samples
    assert bool(BestOfN(6).choose(forest, advantages).all())
    valid = root != 1  # a masked sample is no candidate: the next worst takes its place
    kept = BestOfN(4).choose(forest, advantages_of(forest, advantages.values[:, 0] * valid, valid))
    assert root[kept].unique().tolist()[:4] == [0, 2, 3, 4]
    masked = (root != 2) | (edges == edges[root == 2][0])  # a sample is as good as its mean step, however many count
    kept = BestOfN(2).choose(forest, advantages_of(forest, advantages.values[:, 0] * masked, masked))
    assert root[kept].unique().tolist()[:2] == [1, 2]
    with pytest.raises(ValueError, match="even number"):
        BestOfN(3)
    assert len(edges) == 36


def test_as_many_positive_as_negative_edges() -> None:
    forest = grown(chain(4, 2), width=1)
    advantages = advantages_of(forest, [3.0, -1.0, 2.0, -5.0, 1.0, 0.0])
    assert PositiveNegativeBalance().choose(forest, advantages).tolist() == [True, True, True, True, False, False]
    one_sign = advantages_of(forest, [3.0, 1.0, 2.0, 0.0, 1.0, 0.0])
    assert PositiveNegativeBalance().choose(forest, one_sign).tolist() == [True, True, True, False, True, False]


def test_selectors_compose() -> None:
    forest, advantages = branch_grpo()
    both = All([ParentTop1(), DepthWindow(size=5)]).choose(forest, advantages)
    expected = ParentTop1().choose(forest, advantages) & DepthWindow(size=5).choose(forest, advantages)
    assert torch.equal(both, expected) and int(both.sum()) == 138 - 40
    everything = All([AllEdges(), NonZeroAdvantage()]).choose(forest, advantages_of(forest, [0.0, 1.0] * 109))
    assert int(everything.sum()) == 109
