"""What code without sharing computes: the same rollout with states copied, to count and to time against."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samplers.forest import Forest
from samplers.kernels.base import Kernel
from samplers.rollout import Noise, Velocity, rollout
from samplers.trees import Tree


@dataclass(frozen=True, eq=False)
class Copies:
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
        `evaluations` tells. Copies are equal bit for bit where the velocity of a row does not depend on its batch.
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


def unshared(tree: Tree) -> Copies:
    """`tree` with every leaf's states its own, all the way from its own start: what code computes that samples image by
    image."""
    parent, origin = _by_trajectory(tree)
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
    return Copies(tree, copied, source)


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
