"""Trajectories through a tree: their share of each state, means over those that pass a state, and trees that stop on the way."""

from dataclasses import replace

import torch
from torch import Tensor

from samplers.tree_rules import COLUMNS
from samplers.trees import Tree


def stopped_at(tree: Tree, index: Tensor) -> Tree:
    """`tree` whose roots go no further than grid index `index` [R], with the same `local`, hence the same noise: trajectories
    that stop on the way, where a state is wanted and no sample."""
    if index.shape != (tree.num_roots,):
        raise ValueError(f"got index {list(index.shape)}; expected one per root, [{tree.num_roots}]")
    stays = tree.index <= index[tree.root]
    columns = {name: vars(tree)[name][stays] for name in COLUMNS}
    parent, number = columns.pop("parent"), stays.cumsum(0) - 1
    return replace(tree, parent=torch.where(parent >= 0, number[parent.clamp(min=0)], -1), **columns)


def trajectory_share(tree: Tree) -> Tensor:
    """[N] float64 the share of its group's trajectories that pass each node, so that sums over the nodes of one step are means
    over trajectories: 1 / number of roots, and below a state that of the state / number of its children."""
    share = 1.0 / torch.bincount(tree.group[: tree.num_roots]).double()[tree.group]
    children = _children(tree).double()
    for nodes in tree.generations[1:]:
        above = tree.parent[nodes]
        share[nodes] = share[above] / children[above]
    return share


def mean_below(tree: Tree, ends: Tensor) -> Tensor:
    """[N] float64 the mean of `ends` [N], which is read at nodes without children, over the trajectories that pass each node."""
    share = trajectory_share(tree)
    total = torch.where(_children(tree) == 0, ends.double(), 0.0) * share
    for nodes in reversed(tree.generations[1:]):
        total.index_add_(0, tree.parent[nodes], total[nodes])
    return total / share


def cost_to_go(tree: Tree, cost: Tensor) -> Tensor:
    """[N] float64 the sum of `cost` [N] over each node and what follows it, the mean over the trajectories that pass it."""
    children, total = _children(tree).double(), cost.double().clone()
    for nodes in reversed(tree.generations[1:]):
        above = tree.parent[nodes]
        total.index_add_(0, above, total[nodes] / children[above])
    return total


def _children(tree: Tree) -> Tensor:
    """[N] how many steps leave each node."""
    return torch.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
