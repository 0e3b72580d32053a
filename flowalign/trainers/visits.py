"""The states that a distillation looks at: the steps that leave them, how much each counts, and the cost of what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.distributed.deal import Deal
from flowalign.distributed.processes import Processes
from flowalign.objectives import Match, Pull, Steps
from flowalign.trainers.pull_update import Future
from samplers import Forest, Path, Tree, cost_to_go, mean_below, trajectory_share


@dataclass(frozen=True, eq=False)
class Visits:
    """`nodes` [S] of a forest, and the `steps` [n] that leave them; position [n]: of each step's state in `nodes`.

    share [n]: of its group's trajectories that take a step. unit: the sum of `share` per sample. kept [n]: the share of those
    that a gate keeps; None: all."""

    nodes: Tensor
    steps: Steps
    position: Tensor
    share: Tensor
    unit: float
    kept: Tensor | None = None

    @staticmethod
    def of(forest: Forest, match: Match, *, stopped: bool) -> Visits:
        """All states that a step leaves (a stochastic one, if `match` needs it); of trajectories that were stopped their ends,
        where the step would be a deterministic one."""
        tree, share = forest.tree, trajectory_share(forest.tree)
        if stopped:
            left = torch.ones(len(tree), dtype=torch.bool)
            left[tree.evaluated] = False
            left, level = left.nonzero().flatten(), torch.zeros(int(left.sum()), dtype=torch.float64)
            reached, counted = tree.index[left] + 1, left
        else:
            counted = tree.edges if match.stochastic_only else (tree.parent >= 0).nonzero().flatten()
            left, level, reached = tree.parent[counted], tree.level[counted], tree.index[counted]
        nodes, position = left.unique(return_inverse=True)
        steps = Steps(left, forest.sigma(left), forest.sigmas[reached], level, tree.index[left])
        ends = len(tree) - len(tree.evaluated)
        return Visits(nodes, steps, position, share[counted], float(share[counted].sum()) / ends)

    def gated(self, tree: Tree, kept: Tensor, *, drop: bool) -> Visits:
        """With only the samples whose leaves are `kept` [L]. drop: without the states that none of them passes."""
        ends = torch.zeros(len(tree), dtype=torch.float64)
        ends[tree.leaves] = kept.double()
        share = mean_below(tree, ends)[self.steps.nodes]
        found = replace(self, kept=share)
        return found._only(share > 0) if drop else found

    def everywhere(self) -> Visits:
        """Without the gate."""
        return replace(self, kept=None)

    def of_groups(self, tree: Tree, chosen: Tensor) -> tuple[Visits, Tensor]:
        """Those of the groups where `chosen` [G], and which of `nodes` they have [s]."""
        found = self._only(chosen[tree.group[self.steps.nodes]])
        return found, torch.searchsorted(self.nodes, found.nodes)

    def weight(self, forest: Forest, path: Path, match: Match, least: int = 1) -> Tensor:
        """[S] float64 what each state counts in the mean over steps of w: over the trajectories that are kept, or `least` if they
        are fewer."""
        share = self.share if self.kept is None else self.share * self.kept
        total = max(float(share.sum()), least * self.unit)
        values = share * match.weight(forest.kernel, path, self.steps).to(share)
        return torch.zeros(len(self.nodes), dtype=torch.float64).index_add(0, self.position, values) / total

    def _only(self, mask: Tensor) -> Visits:
        """The steps of the mask [n]."""
        steps = Steps(**{name: values[mask.to(values.device)] for name, values in vars(self.steps).items()})
        nodes, position = steps.nodes.unique(return_inverse=True)
        kept = None if self.kept is None else self.kept[mask]
        return Visits(nodes, steps, position, self.share[mask], self.unit, kept)


def future(
    forest: Forest, visits: Visits, pulls: Mapping[str, Pull], deal: Deal, processes: Processes
) -> Future:  # fmt: skip
    """The score-function term of Σ pulls: each stochastic step that arrives at one of `visits.nodes` gets the cost of that state
    and of what follows it, under the rollout's own velocities, less the mean over the other samples of the group there.
    deal: who has the velocities at which of `visits.nodes`. Collective. ValueError as `check_arrivals`: a window that moves may
    have passed before the run."""
    tree, nodes, reduce = forest.tree, visits.nodes, forest.kernel.reduce
    check_arrivals(tree, nodes)
    share, mine, cost = trajectory_share(tree), deal.mine, torch.zeros(len(tree), dtype=torch.float64)
    old = forest.velocities["old"].at(nodes[mine])
    cost[nodes[mine]] = torch.stack([
        pull.weight[mine] * pull.match.error(old, pull.velocity.at(mine), reduce).double().cpu() for pull in pulls.values()
    ]).sum(0) / share[nodes[mine]]  # fmt: skip
    cost = processes.gather(cost[None]).sum(0)
    edges = tree.edges[torch.isin(tree.edges, nodes)]
    follows = cost_to_go(tree, cost)[edges]
    sets = torch.stack([tree.group[edges], tree.index[edges]], 1).unique(dim=0, return_inverse=True)[1]
    count = torch.bincount(sets).double()[sets]
    total = torch.zeros(len(edges), dtype=torch.float64).index_add(0, sets, follows)[sets]
    others = torch.where(count > 1, (total - follows) / (count - 1).clamp(min=1), 0.0)
    position = torch.searchsorted(nodes, tree.parent[edges])
    return Future(forest, edges, position, share[edges] * (follows - others))


def check_arrivals(tree: Tree, nodes: Tensor) -> None:
    """ValueError where a deterministic step arrives at one of `nodes`."""
    if bool(((tree.parent[nodes] >= 0) & (tree.level[nodes] == 0)).any()):
        raise ValueError(
            "got trainer.horizon=full with states that a deterministic step arrives at, through which the cost would have to be "
            "differentiated; expected stochastic steps before each state: take samplers.Chain, or horizon=myopic"
        )
