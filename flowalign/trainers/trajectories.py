"""The log density ratios of trajectories to the reference, step by step: what reward-difference prediction regresses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowalign.distributed.deal import Deal
from flowalign.errors import RunError
from flowalign.trainers.drift import check_drift, drift_metrics, velocity_unit
from flowalign.trainers.edge_update import states_of
from flowalign.trainers.update_engine import Measures, Part, States, UpdateEngine
from samplers import Forest, Rows, send

REFERENCE, OLD = "reference", "old"


@dataclass(eq=False)
class Trajectories:
    """The stochastic steps `edges` [E] of a forest that has the velocities of the rollout ("old") and of the reference. deal: who
    trains which of the states that they leave.

    One number per step, its log density ratio to the reference, reduced over elements as the kernel's log-probs are; one
    state serves all steps that leave it. They are differences of means, never of two densities. Made by all processes together."""

    engine: UpdateEngine
    forest: Forest
    edges: Tensor
    deal: Deal
    micro_batch: int

    @cached_property
    def nodes(self) -> Tensor:
        """[S] the distinct states that the steps leave."""
        return self.forest.tree.distinct_parents(self.edges)[0]

    @cached_property
    def owner(self) -> Tensor:
        """[E] which of `nodes` each step leaves."""
        return self.forest.tree.distinct_parents(self.edges)[1]

    @cached_property
    def states(self) -> States:
        """The network inputs at `nodes`."""
        return states_of(self.forest, self.nodes)

    def numbers(self, part: Part) -> Tensor:
        """[e] the log-ratios of the policy as it is now, of a micro-batch's own steps; with graph if gradients are on."""
        place, states = part.place(self.owner), self.states.at(part.index)
        edges, place = self.edges[place >= 0], place[place >= 0]
        known = self.forest.velocities[REFERENCE].at(self.nodes[part.index[: part.real]])
        x, sigma, rows, there, arrived, known = send(
            self.engine.device, states.x, states.sigma, states.rows, place, self.forest.at(edges), known
        )
        velocity = self.engine.velocity(States(x, sigma, rows))
        step, reference = (self.forest.edge_steps(edges, v, Rows(place, there), x) for v in (velocity, known))
        return step.log_ratio(reference, arrived)

    @torch.no_grad()
    def __post_init__(self) -> None:
        """Measures, under the weights of the rollout, [3, E] float64: log-ratio, KL divergence to the reference, unit of drift."""
        found = torch.zeros(3, len(self.edges), dtype=torch.float64)
        mine = torch.isin(self.owner, self.deal.mine).nonzero().flatten()
        for some in mine.split(self.micro_batch) if len(mine) else ():
            edges = self.edges[some]
            old, reference = (self.forest.role_steps(role, edges) for role in (OLD, REFERENCE))
            columns = old.log_ratio(reference, self.forest.at(edges)), old.kl(reference, "exact"), velocity_unit(old)
            found[:, some] = torch.stack(columns).double()
        self._rolled = self.engine.task.processes.gather(found[None]).sum(0)

    @property
    def rolled(self) -> Tensor:
        """[E] the log-ratios under the weights of the rollout, from its own velocities: no evaluation."""
        return self._rolled[0]

    @property
    def drift_unit(self) -> Tensor:
        """[E] see `velocity_unit`."""
        return self._rolled[2]

    @property
    def kl(self) -> Tensor:
        """[E] the KL divergence of each step to the reference, under the weights of the rollout."""
        return self._rolled[1]

    def along_paths(self, values: Tensor) -> Tensor:
        """[L] the sum of `values` [E] over the steps to each leaf, with gradient; 0 where no step of the path is in `edges`."""
        at_nodes = torch.zeros(len(self.forest.tree), dtype=values.dtype).index_copy(0, self.edges, values)
        return self.forest.path_sum(at_nodes)


@dataclass(frozen=True, eq=False)
class Replay:
    """The log-ratios of `steps` by an unchanged policy, held against the rollout's. limit: how far they may differ where they
    are clipped around the rollout's; None: they are not. max_drift: where it is more than rounding, see `check_drift`."""

    steps: Trajectories
    limit: float | None
    max_drift: float
    measures: Measures

    def numbers(self, part: Part) -> Tensor:
        """As `steps.numbers`, which are measured."""
        numbers = self.steps.numbers(part)
        self.measures.add(number=numbers, edge=(part.place(self.steps.owner) >= 0).nonzero().flatten())
        return numbers

    def check(self, measures: Measures) -> None:
        """RunError for a drift beyond a limit of the numbers in `measures`, if it has any, of this process."""
        if "number" not in measures.values:
            return
        steps, edge = self.steps, torch.cat(measures.values["edge"])
        drift = (torch.cat(measures.values["number"]).double() - steps.rolled[edge]).abs()
        check_drift(drift, steps.drift_unit[edge], self.max_drift)
        if self.limit is not None and not bool((drift <= self.limit).all()):
            raise RunError(
                f"got log-ratios of an unchanged policy {float(drift.max()):.1e} from the rollout's; expected at most "
                f"{self.limit:.1e}, a tenth of the clip range, which would act on rounding: take trainer.anchor=rescore, or a "
                "wider clip_range"
            )

    def rescored(self) -> tuple[Tensor, float]:
        """([E] float64 the numbers of all steps, without graph, in the micro-batches of an update; network rows per sample);
        collective. RunError as `check`."""
        engine, deal, before = self.steps.engine, self.steps.deal, self.steps.engine.task.policy.evaluations
        parts = engine.micro_batches(deal, self.steps.micro_batch)
        numbers = engine.scalars(deal, parts, self.numbers, self.steps.owner)
        self.measures.fetch()
        self.check(self.measures)
        rows = engine.task.policy.evaluations - before
        return numbers, engine.task.processes.total(rows) / engine.images

    def metrics(self) -> dict[str, float]:
        """Collective."""
        tree, edge = self.steps.forest.tree, self.measures.rows("edge").long()
        drift = (self.measures.rows("number") - self.steps.rolled[edge]).abs()
        return drift_metrics(drift, tree.index[tree.parent[self.steps.edges[edge]]])
