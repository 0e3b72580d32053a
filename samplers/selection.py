"""Selection on the way: at declared grid indices some states stay and the others are never continued."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from samplers.trees import Cost, Tree

Look = Callable[[], Tensor]
Score = Callable[[Tree, Tensor, Tensor, Look], Tensor]
Within = Literal["group", "root", "parent"]


def unscored(tree: Tree, nodes: Tensor, states: Tensor, look: Look) -> Tensor:
    """A score by which all candidates are alike: enough to ask a plan what it selects."""
    return torch.zeros(len(nodes))


class Select(Protocol):
    """Which candidates stay. A candidate is a state that a stochastic step arrives at, or from which one follows later.

    Probes and deterministic tails are no candidates: they stay or go with the state that they leave.
    """

    @property
    def counts(self) -> Mapping[int, int | None]:
        """Grid index -> how many candidates stay in each group; None: as many as `keep` says, at least one."""
        ...

    @property
    def uses_velocity(self) -> bool:
        """Whether `keep` may ask for velocities; the cost of those of dropped states is then in the plan's forecast."""
        ...

    def keep(self, tree: Tree, nodes: Tensor, states: Tensor, look: Look) -> Tensor:
        """[n] bool: which of the candidates `nodes` [n] stay. states [n, *]: theirs, in the storage dtype. look() gives
        their velocities [n, *]: those of the candidates that go are extra cost, the others are needed anyway."""
        ...


@dataclass(frozen=True)
class Best:
    """The highest-scored candidates stay: best-of-n, path search, potential assessment.

    counts: grid index -> how many stay in each group. within: they are the best of the "group", or shared out equally
    among its roots, or among the parents. score(tree, nodes, states, look) -> [n]; ties go to the earlier node.
    """

    counts: Mapping[int, int]
    score: Score
    within: Within = "group"
    uses_velocity: bool = True

    def __post_init__(self) -> None:
        check_counts(self.counts, self.within)

    def keep(self, tree: Tree, nodes: Tensor, states: Tensor, look: Look) -> Tensor:
        """The best of each set. ValueError for a set with fewer candidates than stay, or a score that is not finite."""
        scores = self.score(tree, nodes, states, look).cpu()
        if scores.shape != nodes.shape or not bool(scores.isfinite().all()):
            raise ValueError(f"got scores {list(scores.shape)} for {len(nodes)} states; expected a finite one for each")
        count = self.counts[int(tree.index[nodes[0]])]
        sets = {"group": tree.group, "root": tree.root, "parent": tree.parent}[self.within][nodes]
        keep = torch.zeros(len(nodes), dtype=torch.bool)
        for group in tree.group[nodes].unique():
            members = sets[tree.group[nodes] == group].unique()
            share, rest = divmod(count, len(members))
            if rest:
                raise ValueError(
                    f"{count} states are to stay in a group of {len(members)} {self.within}s; expected a multiple: the "
                    "numbers are to be equal"
                )
            for member in members:
                rows = (sets == member).nonzero().flatten()
                if len(rows) < share:
                    raise ValueError(
                        f"counts={dict(self.counts)} keeps {share} states per {self.within} at grid index "
                        f"{int(tree.index[nodes[0]])}, where there are {len(rows)}; expected at most as many"
                    )
                keep[rows[scores[rows].argsort(descending=True, stable=True)[:share]]] = True
        return keep


def candidates(tree: Tree) -> Tensor:
    """[N] the states on the trained part: a stochastic step arrives at them, or follows somewhere below."""
    hot = tree.level > 0
    for nodes in reversed(tree.generations[1:]):
        hot[tree.parent[nodes[hot[nodes]]]] = True
    return hot


def sampled(tree: Tree) -> Tensor:
    """[L] the leaves, in the order of tree.leaves, that end a sample; the others end a probe of a state on its way.

    A probe leaves a state whose samples go on by other steps, and no stochastic step follows."""
    hot = candidates(tree)
    goes_on = torch.zeros(len(tree), dtype=torch.bool)
    goes_on[tree.parent[hot & (tree.parent >= 0)]] = True
    probe = torch.zeros(len(tree), dtype=torch.bool)
    for nodes in tree.generations[1:]:
        up = tree.parent[nodes]
        probe[nodes] = probe[up] | (goes_on[up] & ~hot[nodes])
    return ~probe[tree.leaves]


def check_frontiers(tree: Tree, select: Select) -> None:
    """ValueError unless the candidates of each declared index exist, and are of one generation: on hand together."""
    able = candidates(tree)
    for index in select.counts:
        generations = tree.generation[able & (tree.index == index)].unique().tolist()
        if len(generations) != 1:
            raise ValueError(
                f"got selection at grid index {index}; its candidates are of the generations {generations}, expected "
                "one: choose an index that every trained trajectory visits after equally many steps"
            )


def choose(
    select: Select, tree: Tree, nodes: Tensor, states: Tensor, able: Tensor, velocities: Callable[[Tensor], Tensor]
) -> Tensor:
    """[n] bool: which of `nodes` [n], one generation, are continued: all but the candidates that `select` drops."""
    stays = torch.ones(len(nodes), dtype=torch.bool)
    for index, count in select.counts.items():
        here = (able[nodes] & (tree.index[nodes] == index)).nonzero().flatten()
        if not len(here):
            continue
        kept = select.keep(tree, nodes[here], states[here.to(states.device)], partial(velocities, here)).cpu()
        if kept.shape != here.shape or kept.dtype != torch.bool:
            raise ValueError(f"keep gave {kept.dtype}{list(kept.shape)}; expected torch.bool[{len(here)}]")
        groups = tree.group[nodes[here]]
        numbers = {group: int(kept[groups == group].sum()) for group in groups.unique().tolist()}
        if any(number != count if count is not None else number < 1 for number in numbers.values()):
            raise ValueError(
                f"at grid index {index} {numbers} states stay (by group); expected "
                f"{'at least one' if count is None else count} in each"
            )
        stays[here] = kept
    return stays


def selected_cost(tree: Tree, counts: Mapping[int, int], within: Within, *, uses_velocity: bool = False) -> Cost:
    """What `tree` costs when `Best` selects on it, whichever states win.

    rollout counts every state evaluated, also those that then turn out to lead nowhere, and if the score uses velocities (`uses_velocity`) those that it
    drops. ValueError where candidates of one index lead to subtrees of different cost: then it
    depends on who wins.
    """
    seen = torch.zeros(len(tree), dtype=torch.bool)

    def any_will_do(tree: Tree, nodes: Tensor, states: Tensor, look: Look) -> Tensor:
        seen[nodes] = uses_velocity
        return torch.zeros(len(nodes))

    best = Best(counts, any_will_do, within)
    check_frontiers(tree, best)
    able, below = candidates(tree), _below(tree)
    for index in counts:
        kinds = below[able & (tree.index == index)].unique(dim=0)
        if len(kinds) > 1:
            raise ValueError(
                f"the states at grid index {index} lead to unequal subtrees, (rows, trained states, edges, leaves) = "
                f"{kinds.tolist()[:4]}; the cost would depend on which stay: select at another index"
            )
    stays = torch.zeros(len(tree), dtype=torch.bool)
    for generation in tree.generations:
        ups = tree.parent[generation]
        nodes = generation[(ups < 0) | stays[ups.clamp(min=0)]]
        stays[nodes] = choose(best, tree, nodes, nodes, able, torch.clone)
    rest = tree.keep(stays).cost()
    return Cost(int((stays | seen)[tree.evaluated].sum()), rest.train, rest.edges, rest.leaves)


def _below(tree: Tree) -> Tensor:
    """[N, 4] evaluated rows, trained states, edges and leaves in the subtree of each node; its own arrival not counted."""
    own = torch.zeros(len(tree), 4, dtype=torch.int64)
    own[tree.evaluated, 0] = 1
    own[tree.parents_of_edges, 1] = 1
    own[tree.leaves, 3] = 1
    for nodes in reversed(tree.generations[1:]):
        arriving = own[nodes]
        arriving[:, 2] += tree.level[nodes] > 0
        own.index_add_(0, tree.parent[nodes], arriving)
    return own


def check_counts(counts: Mapping[int, int], within: str) -> None:
    """ValueError unless at least one state stays at each index."""
    if within not in ("group", "root", "parent"):
        raise ValueError(f"got within={within!r}; expected 'group', 'root' or 'parent'")
    if not counts or any(index < 0 or count < 1 for index, count in counts.items()):
        raise ValueError(f"got counts={dict(counts)}; expected grid index >= 0 -> how many stay, at least one")
