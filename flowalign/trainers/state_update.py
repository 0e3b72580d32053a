"""One update of an objective of states: the loss of its draws, micro-batch by micro-batch, and what it measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowalign.distributed.deal import Deal
from flowalign.objectives import Anchor, Coefficients, DrawIds, Predictions, StateObjective
from flowalign.objectives.matching import mean_square
from flowalign.objectives.norm_guard import norm_ratio
from flowalign.trainers.base import Update
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine
from samplers import Held, Path, SampleKeys, send


@dataclass(frozen=True, eq=False)
class Draws:
    """D network inputs with their targets [D, *], the coefficient noise [D] of ε in each, and what they belong to. weight [D]: of
    each in the loss; None: 1. deal: who trains which of them; a process has the inputs and targets of its own."""

    states: States
    target: Held
    noise: Tensor
    ids: DrawIds
    deal: Deal
    weight: Tensor | None = None

    @staticmethod
    def of(
        latents: Held, group: Tensor, advantage: Tensor, keys: SampleKeys, sigma: Tensor, path: Path, engine: UpdateEngine,
        stream: str = "renoise",
    ) -> Draws:  # fmt: skip
        """Of n clean latents [n, *], their groups [n] and advantages [n]: draw 0 of all, then draw 1, …; sigma [draws, n].
        Collective: latents come from the process of their group."""
        states, targets, (count, n) = [], [], sigma.shape
        rows, samples = group.repeat(count), torch.arange(n).repeat(count)
        deal = engine.deal(rows)
        latents = engine.bring(latents, group, deal.wanted(samples))
        here = torch.zeros(len(rows), dtype=torch.bool)
        here[deal.padded[deal.rank]] = True
        for number, mine in enumerate(here.view(count, n)):
            own = mine.nonzero().flatten()
            x0, level = latents.at(own), sigma[number, own]
            noise = keys.at(own).noise(x0.shape[1:], number, stream).to(x0)
            states.append(path.add_noise(x0, noise, level))
            targets.append(path.velocity(x0, noise, level))
        x = Held.of(torch.cat(states), here)
        numbers = torch.arange(count).repeat_interleave(n)
        ids = DrawIds(advantage.repeat(count), rows, numbers)
        levels = sigma.flatten()
        target = Held(x.row, torch.cat(targets))
        return Draws(States(x.values, levels, rows, x.row), target, path.mix(levels.double())[1], ids, deal)

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True, eq=False)
class _Given:
    """What one micro-batch of n draws reads, on the device: see `Draws`; `roles`: velocities of others [n, *], coupling [n]: of each
    with its group."""

    states: States
    target: Tensor
    noise: Tensor
    advantage: Tensor
    coupling: Tensor
    roles: Mapping[str, Tensor]
    weight: Tensor | None

    def beside(self, velocity: Tensor) -> Predictions:
        """With the velocities [n, *] of the trained role."""
        return Predictions(velocity.detach(), self.roles, self.target, self.noise)


@dataclass(eq=False)
class StateUpdate:
    """The loss of `draws`: the mean over them of c·⟨(v − u)²⟩ + Σ κ_a·⟨(v − v_a)²⟩ (see `objective`) and of the anchors.

    When it is made, it evaluates the roles that objective and anchors read, with the weights they have then, each state once
    over all processes; rows: what that cost, network rows per sample. role: whose velocities are trained; it is what the
    objective calls "policy". The metrics of any other role than "policy" begin with its name."""

    engine: UpdateEngine
    draws: Draws
    objective: StateObjective
    anchors: Mapping[str, Anchor]
    micro_batch: int
    role: str = "policy"

    def __post_init__(self) -> None:
        self._roles, self.rows = dict[str, Held](), 0.0
        for role in roles_of(self.objective, self.anchors.values()):
            self._roles[role], rows = self.engine.frozen(self.draws.states, role, mine=self.draws.deal.mine)
            self.rows += rows
        self._coupling = torch.ones(len(self.draws))
        if self.objective.coupled:
            before = self.engine.task.policy.evaluations
            values = self.engine.scalars(self.draws.deal, self.parts, self._value)
            rows = self.engine.task.processes.total(self.engine.task.policy.evaluations - before)
            self.rows += rows / self.engine.images
            self._coupling = self.objective.couple(values, self.draws.ids)

    @cached_property
    def parts(self) -> list[Part]:
        """This process's micro-batches."""
        return self.engine.micro_batches(self.draws.deal, self.micro_batch)

    def update(self, trained: TrainedRole) -> Update:
        """The optimizer step."""
        return self.engine.update(trained, self.parts, self.loss, self.metrics)

    def _value(self, part: Part) -> Tensor:
        here = self._given(part)
        return self.objective.value(here.beside(self.engine.velocity(here.states, self.role)[: part.real]))

    def _given(self, part: Part) -> _Given:
        """What a micro-batch reads of the draws, sent to the device by one copy; of padding the states alone."""
        draws, index = self.draws, part.index[: part.real]
        states, weight = draws.states.at(part.index), [] if draws.weight is None else [draws.weight[index]]
        roles = [values.at(index) for values in self._roles.values()]
        x, sigma, rows, target, noise, advantage, coupling, *rest = send(
            self.engine.device, states.x, states.sigma, states.rows, draws.target.at(index), draws.noise[index],
            draws.ids.advantage[index], self._coupling[index], *roles, *weight,
        )  # fmt: skip
        by_role = dict(zip(self._roles, rest, strict=False))
        return _Given(States(x, sigma, rows), target, noise, advantage, coupling, by_role, rest[-1] if weight else None)

    def loss(self, part: Part, measures: Measures) -> Tensor:
        """The share of one micro-batch; of padding there is the backward alone."""
        here = self._given(part)
        velocity = self.engine.velocity(here.states, self.role)[: part.real]
        found = here.beside(velocity)
        at = self.objective.coefficients(found, here.advantage, here.coupling)
        pulls = {self.role: at.c.to(velocity) * mean_square(velocity, found.target)}
        for role, kappa in at.kappa.items():
            pulls[self.role] = pulls[self.role] + kappa.to(velocity) * mean_square(velocity, found.of(role))
        for name, anchor in self.anchors.items():
            pulls[name] = anchor.beta * anchor.pull(velocity, found.of(anchor.role), found.noise)
        weight = velocity.new_ones(part.real) if here.weight is None else here.weight
        share = (weight / len(self.draws)).to(velocity)
        losses = {name: (share * pull).sum() for name, pull in pulls.items()}
        measures.add(
            curvature=self._curvature(at, found),
            error=found.error(found.live),
            **{
                f"{name}/{role}": values
                for role in self._roles
                for name, values in _beside(role, here.advantage, found)
            },
            **{f"loss/{name}": loss for name, loss in losses.items()},
        )
        return sum(losses.values(), torch.zeros((), device=velocity.device))

    def _curvature(self, at: Coefficients, found: Predictions) -> Tensor:
        own = at.c + sum(at.kappa.values(), torch.zeros_like(at.c))
        return own + sum((anchor.curvature(found.noise) for anchor in self.anchors.values()), torch.zeros_like(own))

    def metrics(self, measures: Measures) -> dict[str, float]:
        """Once the step is taken; of the weights before it."""
        curvature, own = measures.rows("curvature"), self.role == "policy"
        draws, beside = ("draws/", "{}/{}") if own else (f"{self.role}/", f"{self.role}/{{}}_{{}}")
        return {
            f"{draws}error": float(measures.rows("error").mean()),
            f"{draws}curvature_min": float(curvature.min()),
            f"{draws}curvature_negative": float((curvature < 0).double().mean()),
            **{
                beside.format(name, role): float(measures.rows(f"{name}/{role}").mean())
                for name in ("gap", "norm", "accuracy")
                for role in self._roles
            },
            **{name: measures.total(name) for name in measures.values if name.startswith("loss/")},
            "cost/frozen_per_image": self.rows,
        }


def _beside(role: str, advantage: Tensor, found: Predictions) -> Iterable[tuple[str, Tensor]]:
    """Measures [n] of the velocities beside a role's, by name. accuracy: 1 where the error is less than the role's for a better
    sample, or more for a worse one; ½ where nothing differs."""
    other = found.of(role)
    ahead = found.error(other) - found.error(found.live)
    yield "gap", mean_square(found.live, other)
    yield "norm", norm_ratio(found.live, other)
    yield "accuracy", (ahead.sign() * advantage.to(ahead).sign() + 1) / 2


def roles_of(objective: StateObjective, anchors: Iterable[Anchor]) -> list[str]:
    """The roles that an objective and its anchors read, each once."""
    return list(dict.fromkeys([*objective.needs, *(anchor.role for anchor in anchors)]))
