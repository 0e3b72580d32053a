"""What a credit rule is, and what several of them need: values of states by their ODE completions, lines of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers import Forest, Tree


@dataclass(frozen=True)
class EdgeValues:
    """`values` [E, C] float64 and `valid` [E, C] bool, rows in the order of `forest.tree.edges`, a channel a column."""

    values: Tensor
    valid: Tensor
    channels: tuple[str, ...]


class Credit(Protocol):
    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        """`scores` [L, C] and `valid` [L, C] are in the order of `forest.tree.leaves`.

        An edge is valid in a channel only if every score that its value needs is."""
        ...


def completed(tree: Tree, nodes: Tensor, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """V of the states `nodes` [n]: the score of the leaf that deterministic steps alone lead to. (values, valid), [n, C].

    Not valid where a state has no such leaf, or the leaf no score. ValueError if none of them has one."""
    leaf = tree.completion(nodes)
    if len(nodes) and not bool((leaf >= 0).any()):
        raise ValueError(
            "no state of this plan is followed by deterministic steps alone to a leaf, so none has a score of its own: wrap "
            "the plan in samplers.Probed, or take a credit that needs samples only (Broadcast, SubtreeFusion)"
        )
    place = torch.zeros(len(tree), dtype=torch.int64)
    place[tree.leaves] = torch.arange(len(tree.leaves))
    row = place[leaf.clamp(min=0)]
    ok = (leaf >= 0)[:, None] & valid[row]
    return torch.where(ok, scores[row].double(), 0.0), ok


def uncertainty_of(channel: str) -> str:
    """The name in Forest.scores of the uncertainty of the leaves' scores in a channel."""
    return f"uncertainty/{channel}"


@dataclass(frozen=True, eq=False)
class Lines:
    """The stochastic steps of a tree divided into lines, as positions in `tree.edges` [E].

    A line is a run of consecutive stochastic steps: in a chain, all those of one sample. Where a state branches, its first
    child continues the line and every other child begins a new one.

    above: the stochastic step before this one, -1 for none. first: the first stochastic step on the way from the root.
    last: the last step of this one's line, so that steps of one line have one `last`."""

    above: Tensor
    first: Tensor
    last: Tensor


def lines(tree: Tree) -> Lines:
    """The lines of `tree`; deterministic steps in between do not count."""
    edges, count = tree.edges, len(tree.edges)
    position = torch.full((len(tree),), -1)
    position[edges] = torch.arange(count)
    nearest = position.clone()  # the stochastic step at or above each node
    for nodes in tree.generations[1:]:
        nearest[nodes] = torch.where(position[nodes] >= 0, position[nodes], nearest[tree.parent[nodes]])
    above = nearest[tree.parent[edges]]
    inner = above >= 0
    # the step that continues the line; `count` where none does
    following = torch.full((count,), count).scatter_reduce(0, above[inner], torch.arange(count)[inner], "amin")
    first, last = torch.arange(count), torch.arange(count)
    by_generation = [position[nodes][position[nodes] >= 0] for nodes in tree.generations]
    for here in by_generation:
        first[here] = torch.where(above[here] >= 0, first[above[here]], here)
    for here in reversed(by_generation):
        goes_on = following[here] < count
        last[here[goes_on]] = last[following[here[goes_on]]]
    return Lines(above, first, last)


def largest_of_each_sign(values: Tensor, candidates: Tensor) -> Tensor:
    """Of `candidates` [E]: as many positive as negative `values` [E], those of largest magnitude (TP-GRPO, 2602.06422).

    All of them if only one sign occurs; exact zeros have no sign and are left out."""
    positive, negative = candidates & (values > 0), candidates & (values < 0)
    keep = min(int(positive.sum()), int(negative.sum()))
    if keep == 0:
        return positive | negative
    chosen = torch.zeros_like(candidates)
    for side in (positive, negative):
        rows = side.nonzero().flatten()
        chosen[rows[values[rows].abs().argsort(descending=True, stable=True)[:keep]]] = True
    return chosen
