"""The same rollout without sharing: every state copied for each use, to count and to time sharing against."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from samplers.forest import Forest
from samplers.frontier import Noise, Velocity
from samplers.kernels.base import Kernel
from samplers.rollout import rollout
from samplers.trees import Tree


@dataclass(frozen=True, eq=False)
class UnsharedTree:
    """`tree` is `shared` with its states copied. origin [M]: the node of `shared` that each node of `tree` is a copy of."""

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

        The forest is that of the shared tree (one copy of each state), so credit and updates use it as usual; only its
        `evaluations` count the copies. The copies of a state are equal bit for bit where the velocity of a row does not
        depend on its batch.
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
        """The forest of `shared`: of each state the first stored copy, or the first copy if none is stored."""
        copies = torch.arange(len(self.origin))
        chosen = torch.full((len(self.shared),), len(copies))
        chosen.scatter_reduce_(0, self.origin, torch.where(forest.kept, copies, len(copies)), "amin")
        first = torch.full((len(self.shared),), len(copies)).scatter_reduce_(0, self.origin, copies, "amin")
        chosen = torch.where(chosen < len(copies), chosen, first)
        kept = forest.kept[chosen]
        return replace(
            forest,
            tree=self.shared,
            states=forest.states[forest.row[chosen[kept]]],
            row=torch.where(kept, kept.cumsum(0) - 1, -1),
            log_prob=forest.log_prob[chosen],
        )


def unshared(tree: Tree, per: Literal["trajectory", "step"] = "trajectory") -> UnsharedTree:
    """`tree` with every state copied for each use.

    "trajectory": each leaf has its own states from its own start on, as in code that rolls samples out one by one.
    "step": each step evaluates its own copy of the state it leaves, as in code that stores a state and evaluates it
    again for each branch and each probe. Network rows = steps; trained rows = stochastic steps.
    """
    if per not in ("trajectory", "step"):
        raise ValueError(f"got per={per!r}; expected 'trajectory' or 'step'")
    parent, origin = _by_trajectory(tree) if per == "trajectory" else _by_step(tree)
    origins = torch.tensor(origin, dtype=torch.int64)
    root: list[int] = []
    number = 0
    for copy_of_parent in parent:
        root.append(root[copy_of_parent] if copy_of_parent >= 0 else number)
        number += copy_of_parent < 0
    order = tree.generation[origins].argsort(stable=True)
    new_number = torch.empty_like(order)
    new_number[order] = torch.arange(len(order))
    parents = torch.tensor(parent, dtype=torch.int64)[order]
    origins = origins[order]
    copied = Tree(
        parent=torch.where(parents >= 0, new_number[parents.clamp(min=0)], -1),
        root=torch.tensor(root, dtype=torch.int64)[order],
        group=tree.group[origins],
        local=torch.arange(len(origins)),
        index=tree.index[origins],
        level=tree.level[origins],
        source=tree.source[origins],
        probe=tree.probe[origins],
        num_steps=tree.num_steps,
    )
    return UnsharedTree(tree, copied, origins)


def _by_trajectory(tree: Tree) -> tuple[list[int], list[int]]:
    """(parent of each copy among the copies, node that it is a copy of)."""
    parent_of = tree.parent.tolist()
    parent: list[int] = []
    origin: list[int] = []
    for leaf in tree.leaves.tolist():
        path = [leaf]
        while parent_of[path[-1]] >= 0:
            path.append(parent_of[path[-1]])
        parent += [-1, *range(len(parent), len(parent) + len(path) - 1)]
        origin += reversed(path)
    return parent, origin


def _by_step(tree: Tree) -> tuple[list[int], list[int]]:
    """As `_by_trajectory`, with as many copies of a state as it has children, all reached by the same step."""
    parent_of = tree.parent.tolist()
    children = torch.bincount(tree.parent[tree.parent >= 0], minlength=len(tree)).tolist()
    unused: list[list[int]] = []  # per state, its copies that have no child yet
    parent: list[int] = []
    origin: list[int] = []
    for node in range(len(tree)):
        copy_of_parent = unused[parent_of[node]].pop(0) if parent_of[node] >= 0 else -1
        copies = max(1, children[node])
        unused.append(list(range(len(parent), len(parent) + copies)))
        parent += [copy_of_parent] * copies
        origin += [node] * copies
    return parent, origin
