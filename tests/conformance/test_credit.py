"""What every credit rule of flowalign.credit keeps, whatever it computes."""

import pytest
import torch

import flowalign.credit
from flowalign.credit import Broadcast, Credit, EdgeValues, Gain, Joined, Process, ReturnToGo
from samplers import Forest, Tree
from tests.helpers.parts import check_all_found, check_final, classes_with, example
from tests.helpers.trees import everywhere, grown, probed

EXAMPLES = {
    "Process": Process("prm"),
    "ReturnToGo": ReturnToGo(Gain()),
    "Joined": Joined({"outcome": Broadcast(), "gain": Gain()}),
}
FOUND = classes_with(flowalign.credit, "assign")
every_credit = pytest.mark.parametrize("cls", FOUND, ids=lambda cls: cls.__name__)

TREES = (probed(5, 3), probed(5, 2))  # two groups of unequal size


def built(cls: type) -> Credit:
    return example(cls, EXAMPLES, "tests/conformance/test_credit.py")


def forest_of(order: tuple[int, ...] = (0, 1)) -> tuple[Forest, torch.Tensor, torch.Tensor]:
    """(the groups TREES in that order with a score per state, scores [L, 2], what names each edge in any order [E])."""
    forest = grown(Tree.cat([TREES[number] for number in order]))
    tree = forest.tree
    name = torch.tensor(order)[tree.group] * 1000 + tree.local
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(2000, 3, generator=generator, dtype=torch.float64)[name]
    return forest.with_scores("prm", table[:, 2]), table[tree.leaves, :2], name[tree.edges]


def assigned(rule: Credit, forest: Forest, scores: torch.Tensor, valid: torch.Tensor | None = None) -> EdgeValues:
    return rule.assign(forest, scores, everywhere(scores) if valid is None else valid, ("a", "b"))


def test_all_are_found() -> None:
    assert FOUND
    check_all_found(flowalign.credit, FOUND)


@every_credit
def test_it_is_a_final_credit(cls: type) -> None:
    check_final(cls, Credit, flowalign.credit)


@every_credit
def test_a_row_per_edge_and_a_column_per_channel(cls: type) -> None:
    forest, scores, _ = forest_of()
    got = assigned(built(cls), forest, scores)
    assert got.values.shape == got.valid.shape == (len(forest.tree.edges), len(got.channels))
    assert got.values.dtype == torch.float64 and got.valid.dtype == torch.bool
    assert len(set(got.channels)) == len(got.channels) > 0 and bool(got.valid.any())
    assert bool(got.values.isfinite().all()) and not bool(got.values[~got.valid].any())


@every_credit
def test_groups_may_stand_in_any_order(cls: type) -> None:
    (one, scores, names), (other, other_scores, other_names) = forest_of((0, 1)), forest_of((1, 0))
    first, second = assigned(built(cls), one, scores), assigned(built(cls), other, other_scores)
    assert names.tolist() != other_names.tolist()
    here, there = names.argsort(), other_names.argsort()
    torch.testing.assert_close(first.values[here], second.values[there], rtol=1e-12, atol=1e-12)
    assert torch.equal(first.valid[here], second.valid[there])


@every_credit
def test_an_invalid_leaf_reaches_no_edge_that_needs_it(cls: type) -> None:
    """An edge needs a leaf if its value moves with the leaf's score: without the score it is not valid, and the score of
    an invalid leaf is never read."""
    rule, (forest, scores, _) = built(cls), forest_of()
    plain = assigned(rule, forest, scores)
    for leaf in range(len(forest.tree.leaves)):
        moved = scores.clone()
        moved[leaf] += 1e-9  # no sign and no rank changes
        needs = assigned(rule, forest, moved).values != plain.values
        valid = everywhere(scores)
        valid[leaf] = False
        masked = [
            assigned(rule, forest, torch.where(valid, scores, lost), valid) for lost in (torch.nan, 1e6, -torch.inf)
        ]
        assert not bool((masked[0].valid & needs).any())
        assert all(torch.equal(one.values, masked[0].values) for one in masked)
        assert bool(masked[0].values.isfinite().all())


@every_credit
def test_where_all_scores_are_one_reward_it_is_that_reward_or_a_whole_number_of_them(cls: type) -> None:
    """0 for a difference of scores, the reward for a mean of them, n of them for a sum over the n steps still to come."""
    forest, scores, _ = forest_of()
    forest = grown(forest.tree).with_scores("prm", torch.full((len(forest.tree),), 0.7, dtype=torch.float64))
    got = assigned(built(cls), forest, torch.full_like(scores, 0.7))
    count = got.values[got.valid] / 0.7
    torch.testing.assert_close(count, count.round(), rtol=0, atol=1e-12)
    assert bool((count > -0.5).all()) and bool((count <= forest.tree.num_steps).all())


@every_credit
def test_it_scales_with_the_reward(cls: type) -> None:
    rule, (forest, scores, _) = built(cls), forest_of()
    plain = assigned(rule, forest, scores)
    larger = grown(forest.tree).with_scores("prm", 3 * forest.scores["prm"])
    torch.testing.assert_close(assigned(rule, larger, 3 * scores).values, 3 * plain.values, rtol=1e-12, atol=1e-12)
