"""One update of a policy gradient: the loss of its edges, micro-batch by micro-batch, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flowalign.objectives import Objective, Regularizer, RoleSteps, StepWeight, Targets, Transitions
from flowalign.objectives.norm_guard import norm_ratio
from flowalign.trainers.drift import check_drift, drift_metrics, velocity_unit
from flowalign.trainers.update_engine import Measures, Part, States, UpdateEngine
from samplers import Forest, Step


def states_of(forest: Forest, nodes: Tensor) -> States:
    """The network inputs of `nodes`; a condition row is a group."""
    return States(forest.at(nodes), forest.sigma(nodes), forest.tree.group[nodes])


@dataclass(eq=False)
class EdgeUpdate:
    """The loss of `edges` [E] of a forest with their advantages [E, C] and clip bounds [E, C, 2] (None: the objective's).

    targets: of each supervision by name, with its weight. first: whether it is
    the first update of its rollout: the policy is still the one that rolled out. anchored: the ratio of the first update
    is taken against its own log-prob; of a later one against `rescore`'s, if that was called, else the rollout's."""

    engine: UpdateEngine
    forest: Forest
    edges: Tensor
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
        return self.engine.micro_batches(len(self.nodes), self.micro_batch)

    @torch.no_grad()
    def rescore(self) -> float:
        """Keeps this process's velocities, computed in the update's own micro-batches. Returns network rows per sample."""
        before = self.engine.task.policy.evaluations
        self.anchors = [self.engine.velocity(self.states.at(part.index)) for part in self.parts]
        rows = self.engine.task.policy.evaluations - before
        return self.engine.task.processes.total(rows) / self.engine.images

    def loss(self, part: Part, measures: Measures) -> Tensor:
        """The share of one micro-batch."""
        forest, place = self.forest, part.place(self.position)
        mine = place >= 0
        edges, place = self.edges[mine], place[mine]
        velocity = self.engine.velocity(self.states.at(part.index))
        step, arrived = forest.edge_steps(edges, velocity, place), forest.at(edges, velocity.device)
        log_prob = step.log_prob(arrived)
        old_step, old = self._anchor(part, edges, place, velocity, log_prob)
        bounds = None if self.bounds is None else self.bounds[mine]
        transitions = Transitions(step, arrived, old_step, bounds)
        advantages, count = self.advantages[mine].to(log_prob), len(self.edges)
        weight = self.step_weight.weigh(step, forest, edges)
        losses = {"policy": (weight * self.objective.loss(log_prob, old, advantages, transitions)).sum() / count}
        here = RoleSteps(step, velocity[place.to(velocity.device)])
        for name, term in self.regularizers.items():
            losses[name] = (
                term.beta * term.divergence(here, self._under(term.role, edges, velocity.device)).sum() / count
            )
        real = self.nodes[part.index[: part.real]]
        self._measure_norms(velocity[: part.real], real, measures)
        for name, (scale, targets) in self.targets.items():
            aimed = int(torch.isin(self.nodes, targets.nodes).sum())
            losses[name] = scale * targets.loss(real, velocity[: part.real]).sum() / max(aimed, 1)
        drift = (log_prob.detach() - forest.log_prob[edges].to(log_prob.device)).abs()
        if self.first:
            check_drift(drift, velocity_unit(step), self.max_drift)
            measures.add(drift=drift, step=forest.tree.index[forest.tree.parent[edges]])
        measures.add(
            log_ratio=self.objective.log_ratio(log_prob, old, transitions),
            clipped=self.objective.clipped(log_prob.detach(), old, advantages, transitions),
            **{f"loss/{name}": loss for name, loss in losses.items()},
        )
        return sum(losses.values(), torch.zeros((), device=log_prob.device))

    def _under(self, role: str, edges: Tensor, device: torch.device) -> RoleSteps:
        velocities = self.forest.velocities[role].at(self.forest.tree.parent[edges], device)
        return RoleSteps(self.forest.role_steps(role, edges, device), velocities)

    @property
    def _roles(self) -> list[str]:
        """Those that regularizers name."""
        return sorted({term.role for term in self.regularizers.values()})

    def _measure_norms(self, velocity: Tensor, nodes: Tensor, measures: Measures) -> None:
        """The length of the velocities at `nodes` over that under each role (2606.27771: it grows when things go wrong)."""
        for role in self._roles:
            ratio = norm_ratio(velocity.detach(), self.forest.velocities[role].at(nodes, velocity.device))
            measures.add(**{f"norm/{role}": ratio, f"norm_step/{role}": self.forest.tree.index[nodes]})

    def _anchor(
        self, part: Part, edges: Tensor, place: Tensor, velocity: Tensor, log_prob: Tensor
    ) -> tuple[Step | None, Tensor]:
        """The transitions (None where the objective does not need them) and log-probs that the ratio is taken against."""
        forest, needed = self.forest, self.objective.needs_old_means
        if self.first and self.anchored:
            return (forest.edge_steps(edges, velocity.detach(), place) if needed else None), log_prob.detach()
        if self.anchors:
            old = forest.edge_steps(edges, self.anchors[part.number], place)
            return old, old.log_prob(forest.at(edges, velocity.device))
        old_step = forest.role_steps("old", edges, velocity.device) if needed else None
        return old_step, forest.log_prob[edges].to(log_prob.device)

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
