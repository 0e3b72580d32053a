"""What code without sharing computes: the same rollout with states copied, to count and to time against."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from samplers.forest import Forest
from samplers.kernels.base import Kernel
from samplers.rollout import Noise, Velocity, rollout
from samplers.trees import Tree


@dataclass(frozen=True, eq=False)
class UnsharedTree:
    """`tree`: `shared` with states copied, a topology like any other. origin [M]: which state each node is a copy of."""

    shared: Tree
    tree: Tree
    origin: Tensor

    def rollout(
        self,
        velocity: Velocity,
        x_start: Tensor,
        sigmas: Tensor,
        kernel: Kernel,
        noise: Noise,
        *,
        micro_batch: int | None = None,
    ) -> Forest:
        """`rollout` of the shared tree, paying for every copy; all arguments are those of the shared tree.

        The forest is that of the shared tree (of each state one copy), so credit and updates go on as ever; only
        `evaluations` tells. UnsharedTree are equal bit for bit where the velocity of a row does not depend on its batch.
        """
        row_of_root = self.origin[: self.tree.num_roots]
        forest = rollout(
            lambda x, sigma, root: velocity(x, sigma, row_of_root[root]),
            x_start[row_of_root.to(x_start.device)],
            sigmas,
            self.tree,
            kernel,
            lambda tree, nodes: noise(self.shared, self.origin[nodes]),
            micro_batch=micro_batch,
        )
        return self._folded(forest)

    def _folded(self, forest: Forest) -> Forest:
        """One copy of each state, a stored one if there is any."""
        copies = torch.arange(len(self.origin))
        chosen = torch.full((len(self.shared),), len(copies))
        chosen.scatter_reduce_(0, self.origin, torch.where(forest.kept, copies, len(copies)), "amin")
        first = torch.full((len(self.shared),), len(copies)).scatter_reduce_(0, self.origin, copies, "amin")
        chosen = torch.where(chosen < len(copies), chosen, first)
        kept = forest.kept[chosen]
        return replace(
            forest,
            tree=self.shared,
            states=forest.states[forest.row[chosen[kept]].to(forest.states.device)],
            row=torch.where(kept, kept.cumsum(0) - 1, -1),
            log_prob=forest.log_prob[chosen.to(forest.log_prob.device)],
        )


def unshared(tree: Tree, per: Literal["trajectory", "step"] = "trajectory") -> UnsharedTree:
    """`tree` with every state copied for all that use it.

    "trajectory": each leaf has its own states all the way from its own start: per-sample code.
    "step": each step evaluates its own copy of the state it leaves, as code does that stores a state and comes back to
    it, for each branch and each probe anew. Rows = steps; trained rows = stochastic steps.
    """
    if per not in ("trajectory", "step"):
        raise ValueError(f"got per={per!r}; expected 'trajectory' or 'step'")
    parent, origin = _by_trajectory(tree) if per == "trajectory" else _by_step(tree)
    source = torch.tensor(origin, dtype=torch.int64)
    root: list[int] = []
    number = 0
    for up in parent:
        root.append(root[up] if up >= 0 else number)
        number += up < 0
    order = tree.generation[source].argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    ups = torch.tensor(parent, dtype=torch.int64)[order]
    source = source[order]
    copied = Tree(
        parent=torch.where(ups >= 0, place[ups.clamp(min=0)], -1),
        root=torch.tensor(root, dtype=torch.int64)[order],
        group=tree.group[source],
        local=torch.arange(len(source)),
        index=tree.index[source],
        level=tree.level[source],
        source=tree.source[source],
        num_steps=tree.num_steps,
    )
    return UnsharedTree(tree, copied, source)


def _by_trajectory(tree: Tree) -> tuple[list[int], list[int]]:
    """(parents among the copies, originals)."""
    up = tree.parent.tolist()
    parent: list[int] = []
    origin: list[int] = []
    for leaf in tree.leaves.tolist():
        way = [leaf]
        while up[way[-1]] >= 0:
            way.append(up[way[-1]])
        parent += [-1, *range(len(parent), len(parent) + len(way) - 1)]
        origin += reversed(way)
    return parent, origin


def _by_step(tree: Tree) -> tuple[list[int], list[int]]:
    """(parents among the copies, originals): as many copies of a state as it has children, all after one step."""
    up = tree.parent.tolist()
    children = torch.bincount(tree.parent[tree.parent >= 0], minlength=len(tree)).tolist()
    free: list[list[int]] = []  # per state, its copies that no child has taken
    parent: list[int] = []
    origin: list[int] = []
    for node in range(len(tree)):
        above = free[up[node]].pop(0) if up[node] >= 0 else -1
        copies = max(1, children[node])
        free.append(list(range(len(parent), len(parent) + copies)))
        parent += [above] * copies
        origin += [node] * copies
    return parent, origin
