"""Credit from the leaves below an edge: their mean, their weighted mean, or the one leaf of a one-step branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.credit.base import EdgeValues, completed
from samplers import Forest, Tree


@dataclass(frozen=True)
class Broadcast:
    """Every edge gets the mean score of the leaves below it: in a chain the terminal reward of its sample (Flow-GRPO,
    DanceGRPO), in a tree the uniform subtree mean. An edge is valid only if every leaf below it is. ODE probes count
    as leaves here: with them take Gain or BranchLocal."""

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        pairs = len(forest.tree.leaf_of_edge[0])
        return _fuse(forest.tree, torch.ones(pairs, dtype=torch.float64), scores, valid, channels)


@dataclass(frozen=True)
class SubtreeFusion:
    """The mean over the leaves ℓ below an edge, weighted by softmax(beta · log p(ℓ | edge)) (BranchGRPO 2509.06040).

    log p is the sum of the rollout's log-probs from the edge's arrival to the leaf, as the kernel reduces them: per
    element with "mean", where weights are almost uniform, in nats with "sum", where one leaf takes all.
    beta 0 (default) is the uniform mean, 1 the paper's path-probability weighting."""

    beta: float = 0.0

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        tree = forest.tree
        edge, leaf = tree.leaf_of_edge
        # summed from the root: what lies above an edge is common to its leaves and cancels in the softmax
        logits = self.beta * tree.path_sum(forest.log_prob.double().cpu())[leaf]
        top = torch.full((len(tree.edges),), -torch.inf, dtype=torch.float64).scatter_reduce(0, edge, logits, "amax")
        return _fuse(tree, (logits - top[edge]).exp(), scores, valid, channels)


@dataclass(frozen=True)
class BranchLocal:
    """The score of the one leaf that follows an edge by deterministic steps: all randomness of a one-step branch lies
    in its edge (TempFlow-GRPO 2508.04324). Not valid where another stochastic step comes before every leaf."""

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        return EdgeValues(*completed(forest.tree, forest.tree.edges, scores, valid), channels)


def _fuse(tree: Tree, weight: Tensor, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
    """The mean over the pairs of tree.leaf_of_edge, weighted by `weight` [M]; without a leaf below, not valid."""
    edge, leaf = tree.leaf_of_edge
    total = torch.zeros(len(tree.edges), scores.shape[1], dtype=torch.float64)
    mass, count, good = torch.zeros(len(total), dtype=torch.float64), torch.zeros(len(total)), torch.zeros_like(total)
    total.index_add_(0, edge, torch.where(valid, scores.double(), 0.0)[leaf] * weight[:, None])
    mass.index_add_(0, edge, weight)
    count.index_add_(0, edge, torch.ones(len(edge)))
    good.index_add_(0, edge, valid[leaf].double())
    known = (good == count[:, None]) & (count > 0)[:, None]
    return EdgeValues(torch.where(known, total / mass[:, None], 0.0), known, channels)
