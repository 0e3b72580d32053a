"""The static topology of a rollout: which states there are, which state each comes from, which steps are stochastic.

Chains, windows, trunks with branches, trees, ODE probes and compressed tails are all the same thing here: a forest of
nodes on one grid of noise levels. Tensors on the CPU; no latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from samplers.tree_rules import COLUMNS, check_columns, generation_of

SOURCES = ("student", "hinted", "teacher")


@dataclass(frozen=True)
class Cost:
    """What a topology costs, in network rows (one row = one velocity of one state; guidance doubles it).

    rollout: states evaluated without gradient. train: distinct states whose velocity an update needs.
    edges: stochastic steps. leaves: clean latents, each decoded and scored. previews: states completed for a selection,
    decoded and scored too; their rows are in `rollout`.
    """

    rollout: int
    train: int
    edges: int
    leaves: int
    previews: int = 0


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
    source [N] int64  which network rolls the node's root out: its index in SOURCES (further teachers follow); 0 = the
                      student. Row r of `x_start` is node r, so a velocity callback reads source[root]
    probe  [N] bool   whether the node belongs to a probe: a completion that scores a state and is no sample
    """

    parent: Tensor
    root: Tensor
    group: Tensor
    local: Tensor
    index: Tensor
    level: Tensor
    source: Tensor
    probe: Tensor
    num_steps: int

    def __post_init__(self) -> None:
        check_columns({name: vars(self)[name] for name in COLUMNS}, self.num_steps)

    @staticmethod
    def from_parents(
        parent: Sequence[int],
        index: Sequence[int],
        level: Sequence[float],
        num_steps: int,
        probe: Sequence[bool] | None = None,
    ) -> "Tree":
        """The tree of ONE group from plain lists: what a plan writes. A parent must stand before its children.
        probe: None stands for a tree without probes.

        Nodes are re-ordered by generation (stable); `local` counts them in that order.
        """
        depth: list[int] = []
        for node, parent_of_node in enumerate(parent):
            if not -1 <= parent_of_node < node:
                raise ValueError(f"got parent {parent_of_node} of node {node}; expected -1 or an earlier node: list parents "
                                 "first")  # fmt: skip
            depth.append(0 if parent_of_node < 0 else depth[parent_of_node] + 1)
        order = sorted(range(len(depth)), key=depth.__getitem__)
        new_number = {old: new for new, old in enumerate(order)}
        parents = [new_number[parent[old]] if parent[old] >= 0 else -1 for old in order]
        root: list[int] = []
        for node, parent_of_node in enumerate(parents):
            root.append(node if parent_of_node < 0 else root[parent_of_node])
        return Tree(
            parent=torch.tensor(parents, dtype=torch.int64),
            root=torch.tensor(root, dtype=torch.int64),
            group=torch.zeros(len(order), dtype=torch.int64),
            local=torch.arange(len(order)),
            index=torch.tensor([index[old] for old in order], dtype=torch.int64),
            level=torch.tensor([level[old] for old in order], dtype=torch.float64),
            source=torch.zeros(len(order), dtype=torch.int64),
            probe=torch.tensor([probe is not None and probe[old] for old in order], dtype=torch.bool),
            num_steps=num_steps,
        )

    @staticmethod
    def cat(trees: Sequence["Tree"]) -> "Tree":
        """One tree holding all groups of all `trees`, re-sorted by generation; roots and groups keep their order."""
        if not trees:
            raise ValueError("got no trees; expected at least one: pass the trees of the groups to roll out together")
        steps = {tree.num_steps for tree in trees}
        if len(steps) > 1:
            raise ValueError(f"got trees with num_steps {sorted(steps)}; expected one grid: roll them out separately")
        columns = {
            name: torch.cat([vars(tree)[name] for tree in trees])
            for name in ("local", "index", "level", "source", "probe")
        }
        sizes = {
            "parent": [len(tree) for tree in trees],
            "root": [tree.num_roots for tree in trees],
            "group": [tree.num_groups for tree in trees],
        }
        numbers = {name: _offset_cat([vars(tree)[name] for tree in trees], size) for name, size in sizes.items()}
        return _in_order({**columns, **numbers}, trees[0].num_steps)

    def extended(self, parent: Sequence[int], index: Sequence[int], *, probe: bool) -> "Tree":
        """This tree with more nodes, all reached by deterministic steps; `probe` says what they are.

        A parent is a node of this tree, or len(self) + j for the j-th new one (an earlier one). The nodes of this tree
        keep their `local`, hence their noise; only their numbers change.
        """
        if not len(parent):
            return self
        parents, count = torch.tensor(parent, dtype=torch.int64), len(self)
        ancestor = parents.clone()  # each new node's nearest ancestor in this tree
        while bool((ancestor >= count).any()):
            ancestor = torch.where(ancestor >= count, parents[(ancestor - count).clamp(min=0)], ancestor)
        new = {
            "parent": parents,
            "root": self.root[ancestor],
            "group": self.group[ancestor],
            "local": int(self.local.max()) + 1 + torch.arange(len(parents)),
            "index": torch.tensor(index, dtype=torch.int64),
            "level": torch.zeros(len(parents), dtype=torch.float64),
            "source": self.source[ancestor],
            "probe": self.probe[ancestor] | probe,
        }
        return _in_order({name: torch.cat([vars(self)[name], added]) for name, added in new.items()}, self.num_steps)

    def keep(self, mask: Tensor) -> "Tree":
        """The tree of the nodes that are `alive(mask)`, in the same order, with the same `local`, hence the same noise."""
        alive = self.alive(mask)
        new_number = torch.where(alive, alive.cumsum(0) - 1, -1)
        columns = {name: vars(self)[name][alive] for name in COLUMNS}
        parent = columns.pop("parent")
        return replace(self, parent=torch.where(parent >= 0, new_number[parent.clamp(min=0)], -1), **columns)

    def alive(self, mask: Tensor) -> Tensor:
        """[N] the nodes left when those outside `mask` [N] are dropped with all their descendants, and then every node
        that no longer leads to a leaf.

        Roots stay, with children or without, so that rows of `x_start` and of the conditions keep their numbers.
        ValueError if a group loses all its leaves.
        """
        if mask.shape != (len(self),) or mask.dtype != torch.bool:
            raise ValueError(f"got mask {mask.dtype}{list(mask.shape)}; expected torch.bool[{len(self)}], one per node")
        reached = mask.clone()
        for nodes in self.generations[1:]:
            reached[nodes] &= reached[self.parent[nodes]]
        useful = torch.zeros_like(reached)
        useful[self.leaves] = reached[self.leaves]
        for nodes in reversed(self.generations[1:]):
            useful[self.parent[nodes[useful[nodes]]]] = True
        empty = sorted(set(range(self.num_groups)) - set(self.group[useful].tolist()))
        if empty:
            raise ValueError(
                f"got a mask that leaves no leaf of groups {empty[:8]}; expected at least one leaf in every group"
            )
        useful[: self.num_roots] = True
        return useful

    def with_source(self, source: Tensor) -> "Tree":
        """This tree with the network that rolls each root out: `source` [R], indices in SOURCES."""
        if source.shape != (self.num_roots,):
            raise ValueError(f"got source {list(source.shape)}; expected one per root, [{self.num_roots}]")
        return replace(self, source=source.to(torch.int64)[self.root])

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def generation(self) -> Tensor:
        """[N] number of steps from the root (not the grid index: an edge may jump)."""
        return generation_of(self.parent)

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
        if values.shape != (len(self),):
            raise ValueError(
                f"got values of shape {tuple(values.shape)}; expected one per node, [{len(self)}]: "
                "scatter per-edge values into zeros(len(tree)) at tree.edges first"
            )
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

    def completion(self, nodes: Tensor) -> Tensor:
        """[n] the leaf that each of `nodes` reaches by deterministic steps alone (the first if several); -1 for none."""
        return self._completions[nodes]

    @cached_property
    def _completions(self) -> Tensor:
        no_leaf = len(self)
        reached = torch.full((len(self),), no_leaf)
        reached[self.leaves] = self.leaves
        for nodes in reversed(self.generations[1:]):
            deterministic = nodes[self.level[nodes] == 0]
            reached.scatter_reduce_(0, self.parent[deterministic], reached[deterministic], "amin")
        return torch.where(reached < no_leaf, reached, -1)


def _in_order(columns: dict[str, Tensor], num_steps: int) -> Tree:
    """The tree of nodes in any order: sorts them by generation (stable) and renumbers the parents."""
    order = generation_of(columns["parent"]).argsort(stable=True)
    new_number = torch.empty_like(order)
    new_number[order] = torch.arange(len(order))
    sorted_columns = {name: column[order] for name, column in columns.items()}
    parent = sorted_columns.pop("parent")
    parent = torch.where(parent >= 0, new_number[parent.clamp(min=0)], -1)
    return Tree(parent=parent, **sorted_columns, num_steps=num_steps)


def _offset_cat(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Concatenates numberings, each offset by the sizes before it; -1 stays -1."""
    start, offset = 0, []
    for part, size in zip(parts, sizes, strict=True):
        offset.append(torch.where(part >= 0, part + start, -1))
        start += size
    return torch.cat(offset)
