"""Selection during a rollout: at declared grid indices some states are continued and the others dropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from samplers.schedules import subgrid
from samplers.trees import Cost, Tree

Score = Callable[[Tree, Tensor, Tensor], Tensor]  # (tree, nodes [n], their previews [n, *]) -> [n]
Preview = Callable[[Tensor, Tensor, int], Tensor]  # (nodes of one generation, rows [n] of them, steps) -> [n, *]
Within = Literal["group", "root", "parent"]
Keep = Literal["best", "extremes"]


def unscored(tree: Tree, nodes: Tensor, previews: Tensor) -> Tensor:
    """The same score for all candidates: enough to read from a plan's `select` which counts it keeps."""
    return torch.zeros(len(nodes))


class Select(Protocol):
    """Which candidates are continued. A candidate is a state that a stochastic step arrives at or follows later; where
    no step of the tree is stochastic, any state of a sample.

    Probes and deterministic tails are no candidates: they are kept or dropped with the state that they leave.
    """

    @property
    def counts(self) -> Mapping[int, int | None]:
        """Grid index -> how many candidates stay in each group; None: as many as `keep` says, at least one."""
        ...

    @property
    def preview_steps(self) -> int:
        """How many network steps complete a candidate to the preview that `keep` reads; 0: it reads the state itself."""
        ...

    def keep(self, tree: Tree, nodes: Tensor, previews: Tensor) -> Tensor:
        """[n] bool: which of the candidates `nodes` [n], all of one grid index, stay. previews [n, *]: theirs.

        Not asked where all candidates of every group stay; then there are no previews either.
        """
        ...


@dataclass(frozen=True)
class Best:
    """The highest-scored candidates stay: best-of-n, path search, potential assessment; or the extremes (Sol-RL).

    counts: grid index -> how many stay in each group. score(tree, nodes, previews) -> [n]; -inf for a preview that
    cannot be scored. within: the best of the "group", or of each "root" or "parent", equally many of each.
    pick: "best", or "extremes": half of them the best, half the worst, an even number. preview_steps: see Select.
    What cannot be scored comes last, and is never taken for one of the worst: it stays only in a set with fewer scored
    candidates than stay. Of equal scores the earlier node is the better one.
    """

    counts: Mapping[int, int]
    score: Score
    within: Within = "group"
    preview_steps: int = 1
    pick: Keep = "best"

    def __post_init__(self) -> None:
        check_counts(self.counts, self.within, self.preview_steps, self.pick)

    def keep(self, tree: Tree, nodes: Tensor, previews: Tensor) -> Tensor:
        """The best of each set. ValueError for a set with fewer candidates than stay, or a score that is nan or +inf."""
        scores = self.score(tree, nodes, previews).cpu()
        if scores.shape != nodes.shape or not bool((scores < torch.inf).all()):
            raise ValueError(
                f"got scores {list(scores.shape)} for {len(nodes)} states, {int((~(scores < torch.inf)).sum())} of them nan or "
                "inf; expected one number for each: -inf where a state cannot be scored"
            )
        sets = {"group": tree.group, "root": tree.root, "parent": tree.parent}[self.within][nodes]
        keep = torch.zeros(len(nodes), dtype=torch.bool)
        for group in tree.group[nodes].unique():
            members = sets[tree.group[nodes] == group].unique()
            share = self._share(int(tree.index[nodes[0]]), len(members))
            for member in members:
                rows = (sets == member).nonzero().flatten()
                if len(rows) < share:
                    raise ValueError(
                        f"got counts={dict(self.counts)}, {share} states per {self.within} at grid index "
                        f"{int(tree.index[nodes[0]])}; expected at most {len(rows)}, as many as there are"
                    )
                keep[rows[_picked(scores[rows], share, self.pick)]] = True
        return keep

    def _share(self, index: int, members: int) -> int:
        """How many of each of the `members` sets of a group stay."""
        share, rest = divmod(self.counts[index], members)
        if rest or (self.pick == "extremes" and share % 2):
            raise ValueError(
                f"got counts={dict(self.counts)}, pick={self.pick!r} in a group of {members} {self.within}s; expected a multiple of "
                f"{members * (2 if self.pick == 'extremes' else 1)} in place of {self.counts[index]}, since each {self.within} keeps "
                "equally many"
            )
        return share


def _picked(scores: Tensor, share: int, pick: Keep) -> Tensor:
    """[share] the rows of `scores` [n] that stay."""
    order = scores.argsort(descending=True, stable=True)
    if pick == "best":
        return order[:share]
    half, end = share // 2, max(share, int((scores > -torch.inf).sum()))
    return torch.cat([order[:half], order[end - half : end]])


def trained_part(tree: Tree) -> Tensor:
    """[N] the states that a stochastic step arrives at, or at a descendant."""
    part = tree.level > 0
    for nodes in reversed(tree.generations[1:]):
        part[tree.parent[nodes[part[nodes]]]] = True
    return part


def candidates(tree: Tree) -> Tensor:
    """[N] the states among which a selection chooses: the trained part; without a stochastic step all but the probes'."""
    return trained_part(tree) if len(tree.edges) else ~tree.probe


def sampled(tree: Tree) -> Tensor:
    """[L] the leaves, in the order of tree.leaves, that end a sample; the others end a probe of an earlier state."""
    return ~tree.probe[tree.leaves]


def check_frontiers(tree: Tree, select: Select) -> None:
    """ValueError unless each declared index has candidates, all of one generation, so that they are compared at once."""
    among = candidates(tree)
    for index in select.counts:
        generations = tree.generation[among & (tree.index == index)].unique().tolist()
        if len(generations) != 1:
            raise ValueError(
                f"got a selection at grid index {index}, whose candidates are of the generations {generations}; expected "
                "one generation: choose an index that every trained trajectory visits after equally many steps"
            )


def choose(select: Select, tree: Tree, nodes: Tensor, among: Tensor, preview: Preview) -> Tensor:
    """[n] bool: which of `nodes` [n], one generation, are continued: all but the candidates that `select` drops.

    among [N]: candidates(tree). preview: see `Preview`; called only where some candidates are dropped.
    """
    continued = torch.ones(len(nodes), dtype=torch.bool)
    for index, count in select.counts.items():
        rows = (among[nodes] & (tree.index[nodes] == index)).nonzero().flatten()
        groups = tree.group[nodes[rows]]
        if not len(rows) or (count is not None and bool((groups.bincount()[groups] == count).all())):
            continue
        kept = select.keep(tree, nodes[rows], preview(nodes, rows, select.preview_steps)).cpu()
        if kept.shape != rows.shape or kept.dtype != torch.bool:
            raise ValueError(f"got {kept.dtype}{list(kept.shape)} from keep; expected torch.bool[{len(rows)}]")
        numbers = {group: int(kept[groups == group].sum()) for group in groups.unique().tolist()}
        if any(number != count if count is not None else number < 1 for number in numbers.values()):
            raise ValueError(
                f"got {numbers} states kept at grid index {index}, by group; expected "
                f"{'at least one' if count is None else count} in each"
            )
        continued[rows] = kept
    return continued


def selected_cost(tree: Tree, best: Best) -> Cost:
    """What `tree` costs when `best` selects on it, whichever states stay.

    `rollout` counts every state evaluated: also those whose descendants are all dropped later, the dropped candidates
    that had a preview, and all steps of a preview but the first, which shares the candidate's velocity. ValueError where
    candidates of one index lead to subtrees of different cost: the cost would then depend on the scores.
    """
    check_frontiers(tree, best)
    among, continued = candidates(tree), torch.zeros(len(tree), dtype=torch.bool)
    _check_subtrees(tree, best.counts, among)
    looked_at, steps = torch.zeros(len(tree), dtype=torch.bool), torch.zeros(len(tree), dtype=torch.int64)

    def count(nodes: Tensor, rows: Tensor, preview_steps: int) -> Tensor:
        looked_at[nodes[rows]] = True
        steps[nodes[rows]] = len(subgrid(int(tree.index[nodes[rows[0]]]), tree.num_steps, preview_steps))
        return torch.zeros(len(rows), 1)

    blind = replace(best, score=unscored)
    for generation in tree.generations:
        parents = tree.parent[generation]
        nodes = generation[(parents < 0) | continued[parents.clamp(min=0)]]
        continued[nodes] = choose(blind, tree, nodes, among, count)
    rest = tree.keep(continued).cost()
    own = int((continued | (steps > 0))[tree.evaluated].sum())
    return Cost(own + int((steps - 1).clamp(min=0).sum()), rest.train, rest.edges, rest.leaves, int(looked_at.sum()))


def _check_subtrees(tree: Tree, counts: Mapping[int, int], among: Tensor) -> None:
    subtree_costs = _subtree_costs(tree)
    for index in counts:
        distinct = subtree_costs[among & (tree.index == index)].unique(dim=0)
        if len(distinct) > 1:
            raise ValueError(
                f"got a selection at grid index {index}, whose states lead to unequal subtrees, (rows, trained states, "
                f"edges, leaves) = {distinct.tolist()[:4]}; expected equal ones, or the cost depends on which stay: select "
                "at another index"
            )


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


def check_counts(counts: Mapping[int, int], within: str, preview_steps: int, pick: str) -> None:
    """ValueError unless at least one state stays at each index, and of the extremes an even number."""
    if within not in ("group", "root", "parent") or pick not in ("best", "extremes"):
        raise ValueError(
            f"got within={within!r}, pick={pick!r}; expected 'group', 'root' or 'parent', and 'best' or 'extremes'"
        )
    if not counts or any(index < 0 or count < 1 for index, count in counts.items()):
        raise ValueError(f"got counts={dict(counts)}; expected grid index >= 0 -> how many stay, at least one")
    if pick == "extremes" and any(count % 2 for count in counts.values()):
        raise ValueError(f"got counts={dict(counts)}, pick='extremes'; expected even numbers: half best, half worst")
    if preview_steps < 0:
        raise ValueError(f"got preview_steps={preview_steps}; expected at least 1, or 0 to score the states themselves")
