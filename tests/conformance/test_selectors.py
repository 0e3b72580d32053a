"""What every selector of flowalign.selectors keeps, whatever it chooses."""

import pytest
import torch

import flowalign.selectors
from flowalign.advantage import Advantages, Normalized, SignalContext
from flowalign.selectors import All, AllEdges, DepthWindow, NonZeroAdvantage, Selector
from flowalign.trainers import Signal
from samplers import Forest, Tree, chain
from tests.helpers.parts import check_all_found, check_final, classes_with, example
from tests.helpers.trees import everywhere, grown, split_tree

EXAMPLES = {
    "All": All([AllEdges(), NonZeroAdvantage()]),
    "DepthWindow": DepthWindow(size=2, start=4, stop=1, every=1),  # inside the six steps here
}
FOUND = classes_with(flowalign.selectors, "choose")
every_selector = pytest.mark.parametrize("cls", FOUND, ids=lambda cls: cls.__name__)
of_each_shape = pytest.mark.parametrize(
    "trees", [(chain(6, 12), chain(6, 10)), (split_tree(6, (0, 2)), split_tree(6, (1, 3), 3))], ids=["chains", "trees"]
)
UIDS = (7, 4)


def built(cls: type) -> Selector:
    return example(cls, EXAMPLES, "tests/conformance/test_selectors.py")


def forest_of(trees: tuple[Tree, ...], order: tuple[int, ...]) -> tuple[Forest, Advantages, torch.Tensor]:
    """(the groups in that order, advantages that differ at every edge, what names each edge in any order [E])."""
    forest = grown(Tree.cat([trees[number] for number in order]))
    name = (torch.tensor(order)[forest.tree.group] * 1000 + forest.tree.local)[forest.tree.edges]
    values = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))[name]
    return forest, Advantages(values, everywhere(values), 0.0), name


def test_all_are_found() -> None:
    assert FOUND
    check_all_found(flowalign.selectors, FOUND)


@every_selector
def test_it_is_a_final_selector(cls: type) -> None:
    check_final(cls, Selector, flowalign.selectors)


@of_each_shape
@every_selector
def test_it_says_yes_or_no_to_every_edge(cls: type, trees: tuple[Tree, ...]) -> None:
    forest, advantages, _ = forest_of(trees, (0, 1))
    before = advantages.values.clone()
    chosen = built(cls).choose(forest, advantages, SignalContext(0, 3, UIDS))
    assert chosen.dtype == torch.bool and chosen.shape == (len(forest.tree.edges),) and bool(chosen.any())
    assert torch.equal(chosen, built(cls).choose(forest, advantages, SignalContext(0, 3, UIDS)))
    assert torch.equal(advantages.values, before)
    assert built(cls).choose(forest, advantages).shape == chosen.shape  # without a context too


@of_each_shape
@every_selector
def test_groups_may_stand_in_any_order(cls: type, trees: tuple[Tree, ...]) -> None:
    found = []
    for order in ((0, 1), (1, 0)):
        forest, advantages, names = forest_of(trees, order)
        context = SignalContext(0, 3, [UIDS[number] for number in order])
        found.append(built(cls).choose(forest, advantages, context)[names.argsort()])
    assert torch.equal(*found)


@of_each_shape
@every_selector
def test_no_invalid_edge_is_trained(cls: type, trees: tuple[Tree, ...]) -> None:
    forest, _, _ = forest_of(trees, (0, 1))
    scores = torch.randn(len(forest.tree.leaves), 1, generator=torch.Generator().manual_seed(1)).double()
    valid = everywhere(scores)
    valid[::3] = False
    edges = Signal(Normalized(), select=built(cls)).edges(forest, scores, valid, ("r",), SignalContext(0, 3, UIDS))
    assert not bool(edges.advantages.valid.all()) and bool(edges.chosen.any())
    assert not bool((edges.chosen & ~edges.advantages.valid.any(1)).any())
