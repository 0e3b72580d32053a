"""What a credit rule is, and what all of them ask of a tree: completions, and the lines its stochastic steps form."""

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
    """V(node), the score of the leaf reached from each of `nodes` by deterministic steps alone: ([n, C], valid [n, C]).

    Not valid where there is no such leaf. ValueError if there is none for any node: the plan has no completions."""
    leaf = tree.completion(nodes)
    if len(nodes) and not bool((leaf >= 0).any()):
        raise ValueError(
            "no state is completed by deterministic steps, so nothing scores it: wrap the plan in samplers.Probed, or take "
            "a credit that needs leaves only (Broadcast, SubtreeFusion)"
        )
    place = torch.zeros(len(tree), dtype=torch.int64)
    place[tree.leaves] = torch.arange(len(tree.leaves))
    row = place[leaf.clamp(min=0)]
    ok = (leaf >= 0)[:, None] & valid[row]
    return torch.where(ok, scores[row].double(), 0.0), ok


@dataclass(frozen=True, eq=False)
class Lines:
    """The stochastic steps of a tree as lines, in positions of `tree.edges` [E]: one line per sample of a chain.

    above: the stochastic step before this one, -1 for none. heir: the first that follows, -1 for none. first: where the
    way from the root begins. last: where the way along heirs ends; edges with one `last` form a line, so lines part the
    edges: where a state branches, its first child goes on with the line and each other child begins its own."""

    above: Tensor
    heir: Tensor
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
    heir = torch.full((count,), count).scatter_reduce(0, above[inner], torch.arange(count)[inner], "amin")
    first, last = torch.arange(count), torch.arange(count)
    by_generation = [position[nodes][position[nodes] >= 0] for nodes in tree.generations]
    for here in by_generation:
        first[here] = torch.where(above[here] >= 0, first[above[here]], here)
    for here in reversed(by_generation):
        has = heir[here] < count
        last[here[has]] = last[heir[here[has]]]
    return Lines(above, torch.where(heir < count, heir, -1), first, last)


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
