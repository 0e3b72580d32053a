"""What every advantage of flowalign.advantage keeps, whatever it computes."""

import pytest
import torch

import flowalign.advantage
from flowalign.advantage import Advantage, Mixed, Normalized, PerChannel, SignalContext, SoftClipped
from flowalign.credit import EdgeValues
from samplers import Forest, Tree, chain
from tests.helpers.parts import check_all_found, check_final, classes_with, example
from tests.helpers.trees import everywhere, grown

EXAMPLES = {
    "Mixed": Mixed(Normalized()),
    "SoftClipped": SoftClipped(Normalized()),
    "PerChannel": PerChannel({"a": Normalized(), "b": Normalized(std="batch")}),
}
FOUND = classes_with(flowalign.advantage, "compare")
NOT_NEGATIVE = ("Best", "Constant")  # shares of samples
COMPARING = [cls for cls in FOUND if cls.__name__ != "Constant"]  # which says so: it compares nothing
comparing_advantage = pytest.mark.parametrize("cls", COMPARING, ids=lambda cls: cls.__name__)
every_advantage = pytest.mark.parametrize("cls", FOUND, ids=lambda cls: cls.__name__)

TREES = (chain(4, 5), chain(4, 3), chain(4, 4))  # groups of unequal size; three stochastic steps a sample


def built(cls: type) -> Advantage:
    return example(cls, EXAMPLES, "tests/conformance/test_advantage.py")


def forest_of(order: tuple[int, ...] = (0, 1, 2)) -> tuple[Forest, EdgeValues, torch.Tensor]:
    """(the groups TREES in that order, two channels of rewards in [0, 1], the same at every step of a sample, what names
    each edge in any order [E])."""
    forest = grown(Tree.cat([TREES[number] for number in order]))
    tree = forest.tree
    group = torch.tensor(order)[tree.group]
    table = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = table[(group * 1000 + tree.local)[tree.root[tree.edges]]]
    return forest, EdgeValues(values, everywhere(values), ("a", "b")), (group * 1000 + tree.local)[tree.edges]


def test_all_are_found() -> None:
    assert FOUND
    check_all_found(flowalign.advantage, FOUND)


@every_advantage
def test_it_is_a_final_advantage(cls: type) -> None:
    check_final(cls, Advantage, flowalign.advantage)


@every_advantage
def test_a_row_per_edge(cls: type) -> None:
    forest, credit, _ = forest_of()
    got = built(cls).compare(forest, credit, SignalContext())
    assert got.values.shape == got.valid.shape and got.values.shape in (credit.values.shape, (len(credit.values), 1))
    assert got.values.dtype == torch.float32 and got.valid.dtype == torch.bool
    assert bool(got.valid.all()) and bool(got.values.isfinite().all()) and bool(got.values.any())
    assert got.zero_std_ratio == 0


@comparing_advantage
def test_equal_rewards_have_no_advantage(cls: type) -> None:
    forest, credit, _ = forest_of()
    equal = EdgeValues(torch.full_like(credit.values, 0.6), credit.valid, credit.channels)
    got = built(cls).compare(forest, equal, SignalContext())
    assert not bool(got.values.any()) and bool(got.valid.all()) and got.zero_std_ratio == 1


@every_advantage
def test_groups_may_stand_in_any_order(cls: type) -> None:
    (one, credit, names), (other, other_credit, other_names) = forest_of((0, 1, 2)), forest_of((2, 0, 1))
    first, second = (
        built(cls).compare(one, credit, SignalContext()),
        built(cls).compare(other, other_credit, SignalContext()),
    )
    assert names.tolist() != other_names.tolist()
    torch.testing.assert_close(first.values[names.argsort()], second.values[other_names.argsort()])
    assert first.zero_std_ratio == second.zero_std_ratio


@every_advantage
def test_an_invalid_edge_reaches_no_other(cls: type) -> None:
    """Its value is never read, and it stays invalid with advantage 0: in its channel, or in the sum of the channels."""
    forest, credit, _ = forest_of()
    root = forest.tree.root[forest.tree.edges]
    valid = credit.valid.clone()
    valid[root == 1, 0] = False  # in one channel
    valid[root == 6] = False  # in both
    found = [
        built(cls).compare(
            forest, EdgeValues(torch.where(valid, credit.values, lost), valid, credit.channels), SignalContext()
        )
        for lost in (0.0, 1e6, torch.nan)
    ]
    got = found[0]
    allowed = valid if got.values.shape[1] == 2 else valid.all(1, keepdim=True)
    assert torch.equal(got.valid, allowed)
    assert not bool(got.values[~got.valid].any()) and bool(got.values.isfinite().all())
    assert all(torch.equal(one.values, got.values) for one in found)


@comparing_advantage
def test_the_better_of_a_prompt_has_no_smaller_advantage(cls: type) -> None:
    forest, credit, _ = forest_of()
    both = EdgeValues(credit.values[:, [0, 0]], credit.valid, credit.channels)  # the channels agree
    got = built(cls).compare(forest, both, SignalContext()).values.double()
    group = forest.tree.group[forest.tree.edges]
    for number in range(3):
        order = both.values[group == number, 0].argsort()
        ranked = got[group == number][order]
        assert bool((ranked.diff(dim=0) >= -1e-6).all())
    best, worst = both.values[:, 0].argmax(), both.values[:, 0].argmin()  # of all: their prompts differ most
    assert bool((got[best] > 0).all())
    assert bool((got[worst] < (1e-6 if cls.__name__ in NOT_NEGATIVE else 0)).all())
