"""Credit from the samples below an edge: their mean, their weighted mean, or the one leaf of a one-step branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.credit.base import EdgeValues, completed
from samplers import Forest, Tree, sampled


@dataclass(frozen=True)
class Broadcast:
    """Every edge gets the mean score of the samples below it: in a chain the terminal reward (Flow-GRPO 2505.05470,
    DanceGRPO 2505.07818), in a tree the uniform subtree mean. ODE probes do not count. An edge is valid only if every
    sample below it is."""

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        edge, leaf = _samples_below(forest.tree)
        return _fuse(forest.tree, edge, leaf, torch.ones(len(edge), dtype=torch.float64), scores, valid, channels)


@dataclass(frozen=True)
class SubtreeFusion:
    """The mean over the samples ℓ below an edge, weighted by softmax(beta · log p(ℓ | edge)) (BranchGRPO, 2509.06040).

    log p is the sum of the rollout's log-probs from the edge's arrival to the leaf, as the kernel reduces them: per
    element with "mean", where weights are almost uniform, in nats with "sum", where one sample takes all.
    beta 0 (default) is the uniform mean, 1 the paper's path-probability weighting."""

    beta: float = 0.0

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        tree = forest.tree
        edge, leaf = _samples_below(tree)
        # summed from the root: what lies above an edge is common to its samples and cancels in the softmax
        logits = self.beta * tree.path_sum(forest.log_prob.double().cpu())[leaf]
        top = torch.full((len(tree.edges),), -torch.inf, dtype=torch.float64).scatter_reduce(0, edge, logits, "amax")
        return _fuse(tree, edge, leaf, (logits - top[edge]).exp(), scores, valid, channels)


@dataclass(frozen=True)
class BranchLocal:
    """The score of the one leaf that follows an edge by deterministic steps: all randomness of a one-step branch lies
    in its edge (TempFlow-GRPO, 2508.04324). Not valid where another stochastic step comes before every leaf."""

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        return EdgeValues(*completed(forest.tree, forest.tree.edges, scores, valid), channels)


def _samples_below(tree: Tree) -> tuple[Tensor, Tensor]:
    """All pairs of an edge and a sample below it, as tree.leaf_of_edge without the leaves of probes."""
    edge, leaf = tree.leaf_of_edge
    of_sample = sampled(tree)[leaf]
    return edge[of_sample], leaf[of_sample]


def _fuse(
    tree: Tree, edge: Tensor, leaf: Tensor, weight: Tensor, scores: Tensor, valid: Tensor, channels: tuple[str, ...]
) -> EdgeValues:
    """The mean over the pairs (edge, leaf) [M], weighted by `weight` [M]; an edge without a leaf is not valid."""
    total = torch.zeros(len(tree.edges), scores.shape[1], dtype=torch.float64)
    mass, count, scored = torch.zeros(len(total), dtype=torch.float64), torch.zeros(len(total)), torch.zeros_like(total)
    total.index_add_(0, edge, torch.where(valid, scores.double(), 0.0)[leaf] * weight[:, None])
    mass.index_add_(0, edge, weight)
    count.index_add_(0, edge, torch.ones(len(edge)))
    scored.index_add_(0, edge, valid[leaf].double())
    complete = (scored == count[:, None]) & (count > 0)[:, None]
    return EdgeValues(torch.where(complete, total / mass[:, None], 0.0), complete, channels)
