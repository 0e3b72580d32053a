"""Deterministic completions: ODE probes that score any state, and tails with fewer steps. Both wrap another plan."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samplers.plans.base import Bounded, costliest, select_nothing
from samplers.schedules import subgrid
from samplers.trees import Tree


def probed(tree: Tree, steps: int | None = None, *, at: Collection[int] | None = None, duplicate: bool = False) -> Tree:
    """`tree` with a deterministic completion from every state on its trained part (DenseGRPO 2601.20218, TP-GRPO).

    The trained part is the states that a stochastic step leaves or arrives at; `at` names grid indices instead. steps:
    how many the completion takes, on a sub-grid of the remaining ones; None: all of them. A state that the tree itself
    continues deterministically has its completion already, in the tree's own steps: it gets none, unless `duplicate`.
    Completions (probes) share their state's velocity and are rolled out with all other states; Tree.completion(state)
    is the leaf of a state's completion. The other states keep their `local`, hence their noise.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"got steps={steps}; expected at least 1, or None for all remaining steps")
    if at is None:
        targets = torch.cat([tree.edges, tree.parents_of_edges]).unique()
    else:
        targets = torch.isin(tree.index, torch.tensor(sorted(at), dtype=torch.int64)).nonzero().flatten()
    continuation = torch.full((len(tree),), -1)  # of each node, its first deterministic child
    deterministic = ((tree.level == 0) & (tree.parent >= 0)).nonzero().flatten().flip(0)
    continuation[tree.parent[deterministic]] = deterministic
    probed_nodes = set()
    for node in targets.tolist():
        while not duplicate and int(continuation[node]) >= 0:
            node = int(continuation[node])
        probed_nodes.add(node)
    return _with_tails(tree, dict.fromkeys(probed_nodes, steps), probe=True)


def compressed(tree: Tree, ratio: float) -> Tree:
    """`tree` whose deterministic tails take ceil(ratio·n) steps instead of n (MixGRPO-Flash 2507.21802).

    A tail begins where a stochastic step arrives and only deterministic steps follow; it jumps along the grid.
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"got ratio={ratio}; expected a number inside (0, 1]")
    stochastic_below = torch.zeros(len(tree), dtype=torch.bool)
    for nodes in reversed(tree.generations[1:]):
        stochastic_below[tree.parent[nodes[stochastic_below[nodes] | (tree.level[nodes] > 0)]]] = True
    tail_start = (tree.level > 0) & ~stochastic_below & (tree.index < tree.num_steps)
    old_tail = torch.zeros(len(tree), dtype=torch.bool)
    for nodes in tree.generations[1:]:
        old_tail[nodes] = (tail_start | old_tail)[tree.parent[nodes]]
    # 1e-9: 0.28·25 is 7.000000000000001 in floating point, and meant to be 7
    counts: dict[int, int | None] = {
        node: math.ceil(ratio * (tree.num_steps - int(tree.index[node])) - 1e-9)
        for node in tail_start.nonzero().flatten().tolist()
    }
    extended = _with_tails(tree, counts, probe=False)
    span = int(extended.local.max()) + 1  # (group, local) as one number
    dropped = (tree.group * span + tree.local)[old_tail]
    return extended.keep(~torch.isin(extended.group * span + extended.local, dropped))


@dataclass(frozen=True)
class Probed:
    """`plan` with an ODE completion (probe) of every state that a stochastic step leaves or arrives at: `probed` as a
    plan.

    steps: of a completion; None, all remaining ones, is best (DenseGRPO), 1 is the single jump to x̂0. at: probe the
    states at these grid indices instead. duplicate: probe also states whose sample continues deterministically and so
    is their completion already; code that scores each state by itself does that (more images; no more network rows on a
    chain).
    """

    plan: Bounded
    steps: int | None = None
    at: tuple[int, ...] | None = None
    duplicate: bool = False

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The plan's tree with probes."""
        return self._probed(self.plan.tree(num_steps, group_size, iteration, rng))

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """The plan's, with probes."""
        return [self._probed(tree) for tree in self.plan.extremes(num_steps, group_size)]

    def _probed(self, tree: Tree) -> Tree:
        return probed(tree, self.steps, at=self.at, duplicate=self.duplicate)


@dataclass(frozen=True)
class Compressed:
    """`plan` with shorter deterministic tails: `compressed` as a plan (ratio 0.4: MixGRPO-Flash, 0.2: Flash*)."""

    plan: Bounded
    ratio: float = 0.4

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The plan's tree, compressed."""
        return compressed(self.plan.tree(num_steps, group_size, iteration, rng), self.ratio)

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """The plan's, compressed."""
        return [compressed(tree, self.ratio) for tree in self.plan.extremes(num_steps, group_size)]


def _with_tails(tree: Tree, counts: dict[int, int | None], *, probe: bool) -> Tree:
    """`tree` with a deterministic run from each node of `counts` to the end, in so many steps (None: in all)."""
    parent: list[int] = []
    index: list[int] = []
    for node, count in sorted(counts.items()):
        indices = subgrid(int(tree.index[node]), tree.num_steps, tree.num_steps if count is None else count)
        for number, grid_index in enumerate(indices):
            parent.append(node if number == 0 else len(tree) + len(parent) - 1)
            index.append(grid_index)
    return tree.extended(parent, index, probe=probe)
