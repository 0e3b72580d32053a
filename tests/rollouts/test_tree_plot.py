"""The picture of a tree: its layout by hand, and that it shows what it is given."""

import io

import pytest
import torch
from PIL import Image

from flowalign.rollouts.tree_plot import LABELLED, node_heights, plot_tree
from samplers import Tree, chain, window
from tests.helpers.trees import grown, probed, split_tree


def test_ends_stand_in_depth_first_order_and_parents_in_the_middle() -> None:
    tree = Tree.cat([split_tree(3, (0, 1)), window(3, 2, 1, 1)])
    height = node_heights(tree, 0)
    nodes = (tree.group == 0).nonzero().flatten()
    by_local = {int(tree.local[n]): float(height[n]) for n in nodes}
    assert [by_local[n] for n in range(11)] == [-1.5, -0.5, -2.5, 0, -1, -2, -3, 0, -1, -2, -3]


def test_the_picture_depends_on_rewards_validity_and_edge_values() -> None:
    forest = grown(Tree.cat([split_tree(4, (0, 2)), probed(4, 2)]))
    count = len(forest.tree.leaves)
    scores, valid = torch.arange(float(count)), torch.ones(count, dtype=torch.bool)
    invalid = valid.clone()
    invalid[0] = False
    edges = torch.linspace(-1, 1, len(forest.tree.edges))
    pictures = [
        plot_tree(forest, scores, valid),
        plot_tree(forest, scores.flip(0), valid),
        plot_tree(forest, torch.where(invalid, scores, torch.nan), invalid),
        plot_tree(forest, scores, valid, edge_values=edges),
        plot_tree(forest, scores, valid, group=1),
    ]
    assert len(set(pictures)) == 5
    assert plot_tree(forest, scores) == pictures[0]
    for picture in pictures:
        image = Image.open(io.BytesIO(picture))
        assert image.format == "PNG" and image.width >= 800


def test_what_is_not_there_is_said() -> None:
    forest = grown(split_tree(3, (0,)))
    with pytest.raises(ValueError, match=r"expected 0\.\.0"):
        plot_tree(forest, torch.zeros(2), group=1)
    with pytest.raises(ValueError, match="one per edge"):
        plot_tree(forest, torch.zeros(2), edge_values=torch.zeros(3))
    assert plot_tree(forest, torch.zeros(2), torch.zeros(2, dtype=torch.bool))  # nothing valid: drawn all the same


def test_a_picture_of_many_leaves_stays_a_picture() -> None:
    """matplotlib refuses 65,536 pixels, which 3,000 rows would need: a run would stop after its first iteration."""
    heights = [
        Image.open(io.BytesIO(plot_tree(grown(chain(1, rows, train_last=True)), torch.zeros(rows)))).height
        for rows in (LABELLED, 3100)
    ]
    assert heights[0] == heights[1] < 8000
