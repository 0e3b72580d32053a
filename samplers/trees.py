"""The static topology of a rollout: which states there are, which state each comes from, which steps are stochastic.

Chains, windows, trunks with branches, trees, ODE probes and compressed tails are all the same thing here: a forest of
nodes on one grid of noise levels. Tensors on the CPU; no latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What a topology costs, in network rows (one row = one velocity of one state; guidance doubles it).

    rollout: states evaluated without gradient. train: distinct states whose velocity an update needs.
    edges: stochastic steps. leaves: clean latents, each decoded and scored.
    """

    rollout: int
    train: int
    edges: int
    leaves: int


@dataclass(frozen=True, eq=False)
class Tree:
    """The nodes of every group of a rollout, sorted by generation, so that all parents stand before all children.

    An edge is named by the node it arrives at. It may jump grid indices: a sub-grid or a compressed tail is a run of
    jumps on a finer grid. `local` is the node's number inside its own group's tree; it keys the node's noise and does
    not change when groups are batched together (`Tree.cat`).

    parent [N] int64  the node this one is stepped from, -1 for a root
    root   [N] int64  row of `x_start` (and of the conditions) the node descends from; roots come first, in row order
    group  [N] int64  prompt group
    local  [N] int64  number of the node inside its group
    index  [N] int64  the node sits at noise level sigmas[index], 0 <= index <= num_steps
    level  [N] float64  noise level of the arriving step, a factor of the kernel's own; 0 = deterministic, roots have 0
    """

    parent: Tensor
    root: Tensor
    group: Tensor
    local: Tensor
    index: Tensor
    level: Tensor
    num_steps: int

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def from_parents(parent: Sequence[int], index: Sequence[int], level: Sequence[float], num_steps: int) -> "Tree":
        """The tree of ONE group from plain lists: what a plan writes. A parent must stand before its children.

        Nodes are re-ordered by generation (stable); `local` counts them in that order.
        """
        depth: list[int] = []
        for node, up in enumerate(parent):
            if not -1 <= up < node:
                raise ValueError(f"node {node} has parent {up}; expected -1 or an earlier node: list parents first")
            depth.append(0 if up < 0 else depth[up] + 1)
        order = sorted(range(len(depth)), key=depth.__getitem__)
        place = {old: new for new, old in enumerate(order)}
        parents = [place[parent[old]] if parent[old] >= 0 else -1 for old in order]
        root: list[int] = []
        for node, up in enumerate(parents):
            root.append(node if up < 0 else root[up])
        return Tree(
            parent=torch.tensor(parents, dtype=torch.int64),
            root=torch.tensor(root, dtype=torch.int64),
            group=torch.zeros(len(order), dtype=torch.int64),
            local=torch.arange(len(order)),
            index=torch.tensor([index[old] for old in order], dtype=torch.int64),
            level=torch.tensor([level[old] for old in order], dtype=torch.float64),
            num_steps=num_steps,
        )

    @staticmethod
    def cat(trees: Sequence["Tree"]) -> "Tree":
        """One tree holding all groups of all `trees`, re-sorted by generation; roots and groups keep their order."""
        if not trees:
            raise ValueError("no trees came; expected at least one: pass the trees of the groups to roll out together")
        steps = {tree.num_steps for tree in trees}
        if len(steps) > 1:
            raise ValueError(f"trees with num_steps {sorted(steps)} came; expected one grid: roll them out separately")
        order = torch.cat([tree.generation for tree in trees]).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        parent = _offset_cat([tree.parent for tree in trees], [len(tree) for tree in trees])[order]
        return Tree(
            parent=torch.where(parent >= 0, place[parent], -1),
            root=_offset_cat([tree.root for tree in trees], [tree.num_roots for tree in trees])[order],
            group=_offset_cat([tree.group for tree in trees], [tree.num_groups for tree in trees])[order],
            local=torch.cat([tree.local for tree in trees])[order],
            index=torch.cat([tree.index for tree in trees])[order],
            level=torch.cat([tree.level for tree in trees])[order],
            num_steps=trees[0].num_steps,
        )

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def generation(self) -> Tensor:
        """[N] number of steps from the root (not the grid index: an edge may jump)."""
        depth = torch.zeros(len(self), dtype=torch.int64)
        ahead = self.parent.clone()
        while bool((ahead >= 0).any()):
            depth += ahead >= 0
            ahead = torch.where(ahead >= 0, self.parent[ahead], -1)
        return depth

    @cached_property
    def generations(self) -> tuple[Tensor, ...]:
        """The nodes of each generation, oldest first."""
        return torch.arange(len(self)).split(self.generation.bincount().tolist())

    @property
    def num_roots(self) -> int:
        return int((self.parent < 0).sum())

    @property
    def num_groups(self) -> int:
        return int(self.group.max()) + 1

    @cached_property
    def edges(self) -> Tensor:
        """[E] nodes that a stochastic step arrives at: what has a log-probability and can be trained."""
        return (self.level > 0).nonzero().flatten()

    @cached_property
    def leaves(self) -> Tensor:
        """[L] nodes on the last grid point: what is decoded and scored."""
        return (self.index == self.num_steps).nonzero().flatten()

    @cached_property
    def evaluated(self) -> Tensor:
        """[M] nodes with at least one child: each costs exactly one velocity, however many children it has."""
        return self.parent[self.parent >= 0].unique()

    @cached_property
    def parents_of_edges(self) -> Tensor:
        """[P] distinct nodes that a stochastic step leaves: each costs an update exactly one velocity."""
        return self.parent[self.edges].unique()

    def distinct_parents(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """For `edges` [E]: their distinct parents [P], and where each edge's parent stands among them [E]."""
        return self.parent[edges].unique(return_inverse=True)

    def cost(self) -> Cost:
        """Network rows, counted on this very topology."""
        return Cost(len(self.evaluated), len(self.parents_of_edges), len(self.edges), len(self.leaves))

    def path_sum(self, values: Tensor) -> Tensor:
        """Sum `values` [N] over the edges from the root to each leaf: [L], in the order of `leaves`.

        Only stochastic steps count, so per-node log-probabilities (nan where a step is deterministic) sum correctly.
        """
        self._check_values(values)
        total = torch.where(self.level.to(values.device) > 0, values, torch.zeros_like(values))
        for nodes in self.generations[1:]:
            total[nodes] += total[self.parent[nodes]]
        return total[self.leaves]

    @cached_property
    def leaf_of_edge(self) -> tuple[Tensor, Tensor]:
        """All pairs (edge, leaf below it): positions in `edges` [M] and in `leaves` [M], sorted by edge, then leaf."""
        position = torch.full((len(self),), -1)
        position[self.edges] = torch.arange(len(self.edges))
        node, leaf = self.leaves, torch.arange(len(self.leaves))
        edge_parts, leaf_parts = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        while len(node):
            on_edge = position[node] >= 0
            edge_parts.append(position[node[on_edge]])
            leaf_parts.append(leaf[on_edge])
            inner = self.parent[node] >= 0
            node, leaf = self.parent[node[inner]], leaf[inner]
        edge, below = torch.cat(edge_parts), torch.cat(leaf_parts)
        order = (edge * max(len(self.leaves), 1) + below).argsort()
        return edge[order], below[order]

    def leaves_under(self, node: int) -> Tensor:
        """The leaves (node numbers) that descend from `node`; a leaf is under itself."""
        under = torch.zeros(len(self), dtype=torch.bool)
        under[node] = True
        for nodes in self.generations[1:]:
            under[nodes] |= under[self.parent[nodes]]
        return self.leaves[under[self.leaves]]

    def _check_values(self, values: Tensor) -> None:
        if values.shape != (len(self),):
            raise ValueError(
                f"values of shape {tuple(values.shape)} came; expected one per node, [{len(self)}]: "
                "scatter per-edge values into zeros(len(tree)) at tree.edges first"
            )


def _offset_cat(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Concatenate numberings, moving each past the ones before it; -1 stays -1."""
    start, moved = 0, []
    for part, size in zip(parts, sizes, strict=True):
        moved.append(torch.where(part >= 0, part + start, -1))
        start += size
    return torch.cat(moved)


def _check(tree: Tree) -> None:
    """Say what is wrong with a topology before anything is computed on it."""
    n = len(tree.parent)
    columns = {name: t for name, t in vars(tree).items() if isinstance(t, Tensor)}
    for name, column in columns.items():
        kind = torch.float64 if name == "level" else torch.int64
        if column.shape != (n,) or column.dtype != kind:
            raise ValueError(f"Tree.{name} is {column.dtype}{list(column.shape)}; expected {kind}[{n}]: one per node")
    if n == 0 or tree.num_steps < 1:
        raise ValueError(f"a tree of {n} nodes and {tree.num_steps} steps came; expected at least one of each")
    inner = (tree.parent >= 0).nonzero().flatten()
    roots = n - len(inner)
    up = tree.parent[inner]
    rules = {
        "the roots come first and are numbered by row": bool((tree.root[:roots] == torch.arange(roots)).all())
        and bool((inner >= roots).all())
        and bool((tree.parent >= -1).all()),
        "a parent stands before its children": bool((up < inner).all()),
        "a child has its parent's root and group": bool((tree.root[inner] == tree.root[up]).all())
        and bool((tree.group[inner] == tree.group[up]).all()),
        "a step goes to a later grid index, within 0..num_steps": bool((tree.index[inner] > tree.index[up]).all())
        and bool((tree.index >= 0).all())
        and bool((tree.index <= tree.num_steps).all()),
        "a level is finite, not negative, and 0 at a root": bool((tree.level >= 0).all())
        and bool(tree.level.isfinite().all())
        and not bool(tree.level[:roots].any()),
        "groups are numbered from 0 without a gap": bool((tree.group >= 0).all())
        and len(tree.group.unique()) == int(tree.group.max()) + 1,
        "`local` is unique inside a group": len(torch.stack([tree.group, tree.local]).unique(dim=1)[0]) == n,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"not a tree: it breaks the rule '{rule}'; build trees with Tree.from_parents or a plan")
    if bool((tree.generation.diff() < 0).any()):
        raise ValueError("nodes are not sorted by generation; build trees with Tree.from_parents, join with Tree.cat")
