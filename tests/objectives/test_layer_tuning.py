"""State targets: the supervised loss by finite differences, LayerTuning by hand."""

import pytest
import torch

from flowalign.objectives import LayerTuning, Targets
from samplers import Forest, Held, Tree, sampled
from samplers import probed as add_probes
from tests.helpers.trees import grown, leaves_under, split_tree


def old(forest: Forest) -> Forest:
    nodes = forest.tree.parents_of_edges
    return forest.with_velocities("old", nodes, -0.3 * forest.at(nodes))


def all_valid(forest: Forest) -> torch.Tensor:
    return torch.ones(len(forest.tree.leaves), dtype=torch.bool)


def test_the_loss_is_the_weighted_mean_square_where_there_is_a_target() -> None:
    generator = torch.Generator().manual_seed(0)
    target, v = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    targets = Targets(
        torch.tensor([5, 3]), Held(torch.arange(2), target), torch.tensor([0.5, 2.0], dtype=torch.float64)
    )
    nodes = torch.tensor([3, 9])
    got = targets.loss(nodes, v)
    torch.testing.assert_close(got[0], 2.0 * (v[0] - target[1]).square().mean())
    assert float(got[1]) == 0
    assert torch.autograd.gradcheck(lambda v: targets.loss(nodes, v), v.clone().requires_grad_())
    nothing = Targets(torch.tensor([], dtype=torch.int64), Held(torch.arange(0), target[:0]), torch.tensor([]))
    assert nothing.loss(nodes, v).tolist() == [0, 0]


def test_layer_tuning_by_hand() -> None:
    """Two splits: states 0 | 1 2 | 3..6; leaves 1, 4, 2, 10 make the last one's path the best: states 0, 2, 6."""
    forest = old(grown(split_tree(3, (0, 1))))
    assert forest.tree.parents_of_edges.tolist() == [0, 1, 2, 3, 4, 5, 6]
    scores = torch.tensor([1.0, 4.0, 2.0, 10.0])
    targets = LayerTuning().targets(forest, scores[:, None], all_valid(forest)[:, None])
    assert targets.nodes.tolist() == [1, 3, 4, 5]  # those of the best path are left alone
    torch.testing.assert_close(targets.velocity.at(torch.arange(4)), -0.3 * forest.at(torch.tensor([2, 6, 6, 6])))
    expected = torch.tensor([10 - 2.5, 10 - 1.0, 10 - 4.0, 10 - 2.0]) / (10 - 1 + 1e-6)
    torch.testing.assert_close(targets.weight.float(), expected)
    straight = LayerTuning("best_leaf_fm").targets(forest, scores[:, None], all_valid(forest)[:, None])
    here, end = forest.at(straight.nodes), forest.at(forest.tree.leaves[3:])
    torch.testing.assert_close(straight.velocity.values, (here - end) / forest.sigma(straight.nodes)[:, None])
    torch.testing.assert_close(
        here - forest.sigma(straight.nodes)[:, None] * straight.velocity.values, end.expand_as(here)
    )


def test_no_gradient_on_the_best_path() -> None:
    forest = old(grown(split_tree(3, (0, 1))))
    targets = LayerTuning().targets(forest, torch.tensor([1.0, 4.0, 2.0, 10.0])[:, None], all_valid(forest)[:, None])
    nodes = forest.tree.parents_of_edges
    velocity = (-0.3 * forest.at(nodes)).requires_grad_()
    targets.loss(nodes, velocity).sum().backward()
    assert velocity.grad is not None
    assert velocity.grad.abs().sum(1).bool().tolist() == [False, True, False, True, True, True, False]


def test_masked_leaves_give_no_targets_and_no_best_path() -> None:
    forest = old(grown(Tree.cat([split_tree(3, (0, 1)), split_tree(3, (0,))])))
    owner = forest.tree.root[forest.tree.leaves]
    scores, valid = torch.full((len(owner),), 3.0), torch.ones(len(owner), dtype=torch.bool)
    first = (owner == 0).nonzero().flatten()
    scores[first] = torch.tensor([1.0, 4.0, 2.0, float("nan")])
    valid[first[3]] = False
    valid[owner == 1] = False  # a tree without a valid leaf
    targets = LayerTuning().targets(forest, scores[:, None], valid[:, None])
    assert bool((forest.tree.root[targets.nodes] == 0).all()) and bool(targets.weight.isfinite().all())
    below = {int(n): {int(x) for x in leaves_under(forest.tree, int(n))} for n in targets.nodes}
    bad = int(forest.tree.leaves[first[3]])
    for node, weight in zip(targets.nodes.tolist(), targets.weight.tolist(), strict=True):
        assert (weight == 0) == (bad in below[node])
    assert float(targets.weight.max()) == pytest.approx(1.0, abs=1e-5)  # the worst leaf's own state


def test_the_scale_fades() -> None:
    assert [LayerTuning(scale=0.02, fade=4).scale_at(i) for i in (0, 1, 4, 9)] == [0.02, 0.015, 0, 0]
    assert LayerTuning().scale_at(10_000) == 0.01
    with pytest.raises(ValueError, match="without velocities"):
        forest = grown(split_tree(3, (0, 1)))
        LayerTuning().targets(forest, torch.tensor([1.0, 4.0, 2.0, 10.0])[:, None], all_valid(forest)[:, None])


def test_probes_are_no_leaves_to_follow() -> None:
    """Whatever probes score: the targets of a tree with probes are those of its samples."""
    plain = old(grown(split_tree(3, (0, 1))))
    tree = add_probes(split_tree(3, (0, 1)))
    forest, sample = old(grown(tree)), sampled(tree)
    scores = torch.full((len(sample),), 99.0)
    scores[sample] = torch.tensor([1.0, 4.0, 2.0, 10.0])
    found = LayerTuning().targets(forest, scores[:, None], all_valid(forest)[:, None])
    expected = LayerTuning().targets(plain, scores[sample][:, None], all_valid(plain)[:, None])
    assert not bool(sample.all()) and tree.local[found.nodes].tolist() == plain.tree.local[expected.nodes].tolist()
    torch.testing.assert_close(found.weight, expected.weight)
