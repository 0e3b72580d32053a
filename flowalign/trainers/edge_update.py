"""One update of a policy gradient: the loss of its edges, micro-batch by micro-batch, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flowalign.distributed.deal import Deal
from flowalign.objectives import Objective, Regularizer, RoleSteps, StepWeight, Targets, Transitions
from flowalign.objectives.norm_guard import norm_ratio
from flowalign.trainers.drift import check_drift, drift_metrics, velocity_unit
from flowalign.trainers.update_engine import Measures, Part, States, UpdateEngine
from samplers import Forest, HostBuffer, Rows, Step, send


def states_of(forest: Forest, nodes: Tensor) -> States:
    """The network inputs of `nodes`, as far as this process has them; a condition row is a group."""
    return States(forest.states, forest.sigma(nodes), forest.tree.group[nodes], forest.row[nodes])


@dataclass(frozen=True, eq=False)
class _Given:
    """What one micro-batch reads of a rollout, all but `edges` [E] on the device: its states, which of them each step leaves (place),
    the states where the steps arrived, log-probs and advantages, velocities of roles at its own states, clip bounds."""

    states: States
    edges: Tensor
    place: Rows
    arrived: Tensor
    log_prob: Tensor
    advantages: Tensor
    roles: Mapping[str, Tensor]
    bounds: Tensor | None

    def under(self, forest: Forest, role: str) -> RoleSteps:
        """The transitions under a role."""
        return self.under_velocity(forest, self.roles[role])

    def under_velocity(self, forest: Forest, velocity: Tensor) -> RoleSteps:
        """The transitions under the velocities [n, *] of its own states."""
        return RoleSteps(forest.edge_steps(self.edges, velocity, self.place, self.states.x), self.place.of(velocity))


@dataclass(eq=False)
class EdgeUpdate:
    """The loss of `edges` [E] of a forest with their advantages [E, C] and clip bounds [E, C, 2] (None: the objective's). deal: who
    trains which of the states that they leave.

    targets: of each supervision by name, with its weight. first: whether it is the first update of its rollout: the policy is
    still the one that rolled out. anchored: the ratio of the first update
    is taken against its own log-prob; of a later one against `rescore`'s, if that was called, else the rollout's."""

    engine: UpdateEngine
    forest: Forest
    edges: Tensor
    deal: Deal
    advantages: Tensor
    bounds: Tensor | None
    objective: Objective
    step_weight: StepWeight
    regularizers: Mapping[str, Regularizer]
    targets: Mapping[str, tuple[float, Targets]]
    micro_batch: int
    first: bool
    anchored: bool
    max_drift: float
    anchors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes, self.position = self.forest.tree.distinct_parents(self.edges)
        self.states = states_of(self.forest, self.nodes)

    @cached_property
    def parts(self) -> list[Part]:
        """This process's micro-batches."""
        return self.engine.micro_batches(self.deal, self.micro_batch)

    @torch.no_grad()
    def rescore(self) -> float:
        """Keeps this process's velocities, computed in the update's own micro-batches. Returns network rows per sample."""
        before, kept = self.engine.task.policy.evaluations, HostBuffer(sum(len(part.index) for part in self.parts))
        for part in self.parts:
            kept.add(self.engine.velocity(self.states.at(part.index)))
        self.anchors = list(kept.read().split([len(part.index) for part in self.parts])) if self.parts else []
        rows = self.engine.task.policy.evaluations - before
        return self.engine.task.processes.total(rows) / self.engine.images

    def loss(self, part: Part, measures: Measures) -> Tensor:
        """The share of one micro-batch."""
        forest, here = self.forest, self._given(part)
        edges, place, count = here.edges, here.place, len(self.edges)
        velocity = self.engine.velocity(here.states)
        step, arrived = forest.edge_steps(edges, velocity, place, here.states.x), here.arrived
        log_prob = step.log_prob(arrived)
        old_step, old = self._anchor(here, velocity, log_prob)
        transitions = Transitions(step, arrived, old_step, here.bounds)
        advantages = here.advantages.to(log_prob)
        weight = self.step_weight.weigh(step, forest, edges)
        losses = {"policy": (weight * self.objective.loss(log_prob, old, advantages, transitions)).sum() / count}
        policy = RoleSteps(step, place.of(velocity))
        for name, term in self.regularizers.items():
            losses[name] = term.beta * term.divergence(policy, here.under(forest, term.role)).sum() / count
        real = self.nodes[part.index[: part.real]]
        for role in self._roles:  # it grows when things go wrong (2606.27771)
            ratio = norm_ratio(velocity[: part.real].detach(), here.roles[role])
            measures.add(**{f"norm/{role}": ratio, f"norm_step/{role}": forest.tree.index[real]})
        for name, (scale, targets) in self.targets.items():
            aimed = int(torch.isin(self.nodes, targets.nodes).sum())
            losses[name] = scale * targets.loss(real, velocity[: part.real]).sum() / max(aimed, 1)
        if self.first:
            drift = (log_prob.detach() - here.log_prob.to(log_prob)).abs()
            measures.add(drift=drift, drift_unit=velocity_unit(step), step=forest.tree.index[forest.tree.parent[edges]])
        measures.add(
            log_ratio=self.objective.log_ratio(log_prob, old, transitions),
            clipped=self.objective.clipped(log_prob.detach(), old, advantages, transitions),
            **{f"loss/{name}": loss for name, loss in losses.items()},
        )
        return sum(losses.values(), torch.zeros((), device=log_prob.device))

    def check(self, measures: Measures) -> None:
        """RunError for a drift that is more than rounding, in the first update."""
        if self.first:
            drift, unit = (torch.cat(measures.values[name]) for name in ("drift", "drift_unit"))
            check_drift(drift, unit, self.max_drift)

    def _given(self, part: Part) -> _Given:
        """What a micro-batch reads of the rollout, sent to the device by one copy."""
        forest, all_places = self.forest, part.place(self.position)
        mine = all_places >= 0
        edges, place, real = self.edges[mine], all_places[mine], self.nodes[part.index[: part.real]]
        states, bounds = self.states.at(part.index), [] if self.bounds is None else [self.bounds[mine]]
        needed = {role: forest.velocities[role].at(real) for role in self._needed_roles}
        if self.anchors:
            needed["anchor"] = self.anchors[part.number]
        x, sigma, rows, there, arrived, log_prob, advantages, *rest = send(
            self.engine.device, states.x, states.sigma, states.rows, place, forest.at(edges), forest.log_prob[edges],
            self.advantages[mine], *needed.values(), *bounds,
        )  # fmt: skip
        roles = dict(zip(needed, rest, strict=False))
        return _Given(
            States(x, sigma, rows), edges, Rows(place, there), arrived, log_prob, advantages, roles, rest[-1] if bounds else None
        )  # fmt: skip

    @property
    def _roles(self) -> list[str]:
        """Those that regularizers name."""
        return sorted({term.role for term in self.regularizers.values()})

    @property
    def _needed_roles(self) -> list[str]:
        """Those whose velocities a micro-batch reads."""
        own = self.first and self.anchored
        old = ["old"] if self.objective.needs_old_means and not own and not self.anchors else []
        return list(dict.fromkeys([*self._roles, *old]))

    def _anchor(self, here: _Given, velocity: Tensor, log_prob: Tensor) -> tuple[Step | None, Tensor]:
        """The transitions (None where the objective does not need them) and log-probs that the ratio is taken against."""
        forest, needed = self.forest, self.objective.needs_old_means
        if self.first and self.anchored:
            old = here.under_velocity(forest, velocity.detach()).step if needed else None
            return old, log_prob.detach()
        if self.anchors:
            rescored = here.under(forest, "anchor").step
            return rescored, rescored.log_prob(here.arrived)
        return (here.under(forest, "old").step if needed else None), here.log_prob.to(log_prob)

    def metrics(self, measures: Measures) -> dict[str, float]:
        """Once the step is taken; of the weights before it."""
        log_ratio, clipped = measures.rows("log_ratio"), measures.rows("clipped")
        found = {
            "ratio/clip_fraction": float(clipped.mean()),
            "ratio/approx_kl": float(0.5 * (log_ratio**2).mean()),
            **{name: measures.total(name) for name in measures.values if name.startswith("loss/")},
        }
        for role in self._roles:
            ratio, index = measures.rows(f"norm/{role}"), measures.rows(f"norm_step/{role}")
            found[f"norm/{role}"] = float(ratio.mean())
            found |= {f"norm_step/{role}_{int(k)}": float(ratio[index == k].mean()) for k in index.unique()}
        if self.first:
            found |= drift_metrics(measures.rows("drift"), measures.rows("step"))
        return found
