"""One update that pulls velocities at given states to targets, and what it measures; and the score-function term beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flowalign.distributed.deal import Deal
from flowalign.objectives import Pull
from flowalign.objectives.matching import mean_square
from flowalign.trainers.base import Update
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine
from samplers import Forest, Rows, send
from samplers.kernels.base import spread


@dataclass(frozen=True, eq=False)
class Future:
    """Σ_e factor_e · log p(step e): by its gradient a step is blamed for the cost of the states that come after it.

    edges [E]: the stochastic steps of `forest`. position [E]: the state that each leaves, as its place among the states of the
    update. factor [E] float64: what it is blamed, without gradient (see `visits.future`). Log-probs are sums over elements."""

    forest: Forest
    edges: Tensor
    position: Tensor
    factor: Tensor

    def loss(self, part: Part, x: Tensor, velocity: Tensor) -> Tensor:
        """The sum over the steps that leave the states x [n, *] of `part`, under their velocities [n, *]."""
        place = part.place(self.position)
        mine = place >= 0
        edges, place = self.edges[mine], place[mine]
        there, arrived, factor = send(velocity.device, place, self.forest.at(edges), self.factor[mine])
        step = self.forest.edge_steps(edges, velocity, Rows(place, there), x).policy
        z = (arrived - step.mean) / spread(step.std, step.mean)
        log_prob = -z.square().flatten(1).sum(1) / 2  # less what does not depend on the policy
        return (factor.to(log_prob) * log_prob).sum()


@dataclass(frozen=True, eq=False)
class PullUpdate:
    """The loss Σ pulls + future at the S `states`. deal: who trains which of them. pulls: by name, the metric is loss/<name>;
    "policy" is one of them.

    masks: by name, [S] bool, a set of states whose mean distance to the target of "policy" is the metric distill/gap_<name>."""

    engine: UpdateEngine
    states: States
    deal: Deal
    pulls: Mapping[str, Pull]
    micro_batch: int
    future: Future | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def parts(self) -> list[Part]:
        """This process's micro-batches."""
        return self.engine.micro_batches(self.deal, self.micro_batch)

    def update(self, trained: TrainedRole) -> Update:
        """The optimizer step."""
        return self.engine.update(trained, self.parts, self.loss, self.metrics)

    def loss(self, part: Part, measures: Measures) -> Tensor:
        """The share of one micro-batch."""
        index, reduce = part.index[: part.real], self.engine.task.rollout.kernel.reduce
        states, given = self._given(part, index)
        velocity = self.engine.velocity(states)
        real = velocity[: part.real]
        losses = {name: pull.loss(real, *given[name], reduce) for name, pull in self.pulls.items()}
        if self.future is not None:
            losses["future"] = self.future.loss(part, states.x, velocity)
        gap = mean_square(real.detach(), given["policy"][0])
        measures.add(gap=gap, state=index, **{f"loss/{name}": loss for name, loss in losses.items()})
        return sum(losses.values(), torch.zeros((), device=velocity.device))

    def _given(self, part: Part, index: Tensor) -> tuple[States, dict[str, tuple[Tensor, Tensor]]]:
        """The states of a micro-batch, and of each pull the targets and weights at its own ones; sent to the device by one copy."""
        here, numbers = self.states.at(part.index), [each for pull in self.pulls.values() for each in pull.at(index)]
        x, sigma, rows, *sent = send(self.engine.device, here.x, here.sigma, here.rows, *numbers)
        pairs = zip(sent[::2], sent[1::2], strict=True)
        return States(x, sigma, rows), dict(zip(self.pulls, pairs, strict=True))

    def metrics(self, measures: Measures) -> dict[str, float]:
        """Once the step is taken; of the weights before it. gap: mean ⟨(v − target)²⟩ over states and elements."""
        found = {name: measures.total(name) for name in measures.values if name.startswith("loss/")}
        gap, state = measures.rows("gap"), measures.rows("state").long()
        found["distill/gap"] = float(gap.mean())
        for name, mask in self.masks.items():
            if bool(mask[state].any()):
                found[f"distill/gap_{name}"] = float(gap[mask[state]].mean())
        return found
