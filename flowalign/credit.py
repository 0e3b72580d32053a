"""Credit: scores of leaves (or probes, or states) -> one scalar per edge and channel, with a validity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers import Forest


@dataclass(frozen=True)
class EdgeValues:
    """`values` [E, C] float64 and `valid` [E, C] bool, rows in the order of `forest.tree.edges`, a channel a column."""

    values: Tensor
    valid: Tensor
    channels: tuple[str, ...]


class Credit(Protocol):
    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        """`scores` [L, C] and `valid` [L, C] are in the order of `forest.tree.leaves`."""
        ...


@dataclass(frozen=True)
class Broadcast:
    """Every edge gets the mean score of the leaves below it: in a chain the terminal reward of its sample (Flow-GRPO,
    DanceGRPO), in a tree the uniform subtree mean. An edge is valid only if every leaf below it is."""

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        tree = forest.tree
        nodes = len(tree.parent)
        total = torch.zeros(nodes, scores.shape[1], dtype=torch.float64)
        count = torch.zeros(nodes, dtype=torch.float64)
        bad = torch.zeros(nodes, scores.shape[1], dtype=torch.float64)
        total[tree.leaves] = torch.where(valid, scores.double(), 0.0)
        bad[tree.leaves] = (~valid).double()
        count[tree.leaves] = 1.0
        for generation in range(int(tree.generation.max()), 0, -1):  # children before their parents
            nodes_here = (tree.generation == generation).nonzero().flatten()
            for summed in (total, count, bad):
                summed.index_add_(0, tree.parent[nodes_here], summed[nodes_here])
        edges = tree.edges
        return EdgeValues(total[edges] / count[edges, None], bad[edges] == 0, channels)
