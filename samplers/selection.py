"""Selection during a rollout: at declared grid indices some states are continued and the others dropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from samplers.trees import Cost, Tree

VelocityLookup = Callable[[], Tensor]  # the velocities [n, *] at the candidates; evaluated when first called
Score = Callable[[Tree, Tensor, Tensor, VelocityLookup], Tensor]
Within = Literal["group", "root", "parent"]


def unscored(tree: Tree, nodes: Tensor, states: Tensor, velocities: VelocityLookup) -> Tensor:
    """The same score for all candidates: enough to read from a plan's `select` which counts it keeps."""
    return torch.zeros(len(nodes))


class Select(Protocol):
    """Which candidates are continued. A candidate is a state that a stochastic step arrives at or follows later.

    Probes and deterministic tails are no candidates: they are kept or dropped with the state that they leave.
    """

    @property
    def counts(self) -> Mapping[int, int | None]:
        """Grid index -> how many candidates stay in each group; None: as many as `keep` says, at least one."""
        ...

    @property
    def uses_velocity(self) -> bool:
        """Whether `keep` may call `velocities`; the plan's forecast then counts those of the dropped states too."""
        ...

    def keep(self, tree: Tree, nodes: Tensor, states: Tensor, velocities: VelocityLookup) -> Tensor:
        """[n] bool: which of the candidates `nodes` [n] stay. states [n, *]: theirs, in the storage dtype.

        velocities() gives their velocities [n, *]: an extra cost for the candidates that are dropped only, since the
        rollout needs those of the others anyway.
        """
        ...


@dataclass(frozen=True)
class Best:
    """The highest-scored candidates stay: best-of-n, path search, potential assessment.

    counts: grid index -> how many stay in each group. within: the best of the "group", or of each "root" or "parent",
    equally many of each. score(tree, nodes, states, velocities) -> [n]; ties go to the earlier node.
    """

    counts: Mapping[int, int]
    score: Score
    within: Within = "group"
    uses_velocity: bool = True

    def __post_init__(self) -> None:
        check_counts(self.counts, self.within)

    def keep(self, tree: Tree, nodes: Tensor, states: Tensor, velocities: VelocityLookup) -> Tensor:
        """The best of each set. ValueError for a set with fewer candidates than stay, or a score that is not finite."""
        scores = self.score(tree, nodes, states, velocities).cpu()
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
                    f"got counts={dict(self.counts)} in a group of {len(members)} {self.within}s; expected a multiple of "
                    f"{len(members)} in place of {count}, since each {self.within} keeps equally many"
                )
            for member in members:
                rows = (sets == member).nonzero().flatten()
                if len(rows) < share:
                    raise ValueError(
                        f"got counts={dict(self.counts)}, {share} states per {self.within} at grid index "
                        f"{int(tree.index[nodes[0]])}; expected at most {len(rows)}, as many as there are"
                    )
                keep[rows[scores[rows].argsort(descending=True, stable=True)[:share]]] = True
        return keep


def candidates(tree: Tree) -> Tensor:
    """[N] the states on the trained part: a stochastic step arrives at them or at a descendant."""
    trained_part = tree.level > 0
    for nodes in reversed(tree.generations[1:]):
        trained_part[tree.parent[nodes[trained_part[nodes]]]] = True
    return trained_part


def sampled(tree: Tree) -> Tensor:
    """[L] the leaves, in the order of tree.leaves, that end a sample; the others end a probe of an earlier state."""
    return ~tree.probe[tree.leaves]


def check_frontiers(tree: Tree, select: Select) -> None:
    """ValueError unless each declared index has candidates, all of one generation, so that they are compared at once."""
    trained_part = candidates(tree)
    for index in select.counts:
        generations = tree.generation[trained_part & (tree.index == index)].unique().tolist()
        if len(generations) != 1:
            raise ValueError(
                f"got a selection at grid index {index}, whose candidates are of the generations {generations}; expected "
                "one generation: choose an index that every trained trajectory visits after equally many steps"
            )


def choose(
    select: Select,
    tree: Tree,
    nodes: Tensor,
    states: Tensor,
    trained_part: Tensor,
    velocities: Callable[[Tensor], Tensor],
) -> Tensor:
    """[n] bool: which of `nodes` [n], one generation, are continued: all but the candidates that `select` drops.

    trained_part [N]: candidates(tree). velocities: rows [m] of `nodes` -> their velocities [m, *].
    """
    continued = torch.ones(len(nodes), dtype=torch.bool)
    for index, count in select.counts.items():
        rows = (trained_part[nodes] & (tree.index[nodes] == index)).nonzero().flatten()
        if not len(rows):
            continue
        kept = select.keep(tree, nodes[rows], states[rows.to(states.device)], partial(velocities, rows)).cpu()
        if kept.shape != rows.shape or kept.dtype != torch.bool:
            raise ValueError(f"got {kept.dtype}{list(kept.shape)} from keep; expected torch.bool[{len(rows)}]")
        groups = tree.group[nodes[rows]]
        numbers = {group: int(kept[groups == group].sum()) for group in groups.unique().tolist()}
        if any(number != count if count is not None else number < 1 for number in numbers.values()):
            raise ValueError(
                f"got {numbers} states kept at grid index {index}, by group; expected "
                f"{'at least one' if count is None else count} in each"
            )
        continued[rows] = kept
    return continued


def selected_cost(tree: Tree, counts: Mapping[int, int], within: Within, *, uses_velocity: bool = False) -> Cost:
    """What `tree` costs when `Best` selects on it, whichever states stay.

    `rollout` counts every state evaluated: also those whose descendants are all dropped later and, with
    `uses_velocity`, the dropped candidates. ValueError where candidates of one index lead to subtrees of different
    cost: the cost would then depend on the scores.
    """
    evaluated_for_score = torch.zeros(len(tree), dtype=torch.bool)

    def equal_scores(tree: Tree, nodes: Tensor, states: Tensor, velocities: VelocityLookup) -> Tensor:
        evaluated_for_score[nodes] = uses_velocity
        return torch.zeros(len(nodes))

    best = Best(counts, equal_scores, within)
    check_frontiers(tree, best)
    trained_part, subtree_costs = candidates(tree), _subtree_costs(tree)
    for index in counts:
        distinct = subtree_costs[trained_part & (tree.index == index)].unique(dim=0)
        if len(distinct) > 1:
            raise ValueError(
                f"got a selection at grid index {index}, whose states lead to unequal subtrees, (rows, trained states, "
                f"edges, leaves) = {distinct.tolist()[:4]}; expected equal ones, or the cost depends on which stay: select "
                "at another index"
            )
    continued = torch.zeros(len(tree), dtype=torch.bool)
    for generation in tree.generations:
        parents = tree.parent[generation]
        nodes = generation[(parents < 0) | continued[parents.clamp(min=0)]]
        continued[nodes] = choose(best, tree, nodes, nodes, trained_part, torch.clone)
    rest = tree.keep(continued).cost()
    rollout = int((continued | evaluated_for_score)[tree.evaluated].sum())
    return Cost(rollout, rest.train, rest.edges, rest.leaves)


def _subtree_costs(tree: Tree) -> Tensor:
    """[N, 4] evaluated rows, trained states, edges and leaves from each node down, without the step that arrives at it."""
    costs = torch.zeros(len(tree), 4, dtype=torch.int64)
    costs[tree.evaluated, 0] = 1
    costs[tree.parents_of_edges, 1] = 1
    costs[tree.leaves, 3] = 1
    for nodes in reversed(tree.generations[1:]):
        with_arrival = costs[nodes]
        with_arrival[:, 2] += tree.level[nodes] > 0
        costs.index_add_(0, tree.parent[nodes], with_arrival)
    return costs


def check_counts(counts: Mapping[int, int], within: str) -> None:
    """ValueError unless at least one state stays at each index."""
    if within not in ("group", "root", "parent"):
        raise ValueError(f"got within={within!r}; expected 'group', 'root' or 'parent'")
    if not counts or any(index < 0 or count < 1 for index, count in counts.items()):
        raise ValueError(f"got counts={dict(counts)}; expected grid index >= 0 -> how many stay, at least one")
