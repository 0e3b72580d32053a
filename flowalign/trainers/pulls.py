"""How strong the anchors of a loss are beside its signal, in a unit that all trainers share: κ/(c·w)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.objectives import (
    Anchor,
    DrawIds,
    Objective,
    Predictions,
    Regularizer,
    RoleSteps,
    StateObjective,
    StepWeight,
    Transitions,
)
from samplers import Forest, generator
from samplers.kernels.base import spread

STEPS_OF_EACH_INDEX = 8


@dataclass(frozen=True, eq=False)
class Pulls:
    """At n draws or steps of levels sigma [n], with an unchanged policy: the gradient of the loss is that of

        signal·⟨(v − u)²⟩ + Σ κ·⟨(v − v_role)²⟩

    where the sample has advantage 1. signal [n]: c·w. kappa: [n] of each anchor, by name. role: of each, by name."""

    sigma: Tensor
    signal: Tensor
    kappa: Mapping[str, Tensor]
    role: Mapping[str, str]

    def ratio(self, name: str) -> Tensor:
        """[n] κ/(c·w) of an anchor: with it alone a sample of advantage 1 moves the target by (u − v) over it."""
        return self.kappa[name] / self.signal


def pulls_of_draws(
    objective: StateObjective, anchors: Mapping[str, Anchor], sigma: Tensor, found: Predictions
) -> Pulls:
    """Of an objective of states at n draws. c is that of a member with advantage 1 beside one with −1 and the same errors, so
    that an objective which compares the members of a group has one."""
    count = len(sigma)
    roles = {role: _twice(velocity) for role, velocity in found.roles.items()}
    both = Predictions(_twice(found.live), roles, _twice(found.target), _twice(found.noise))
    advantage, pair = torch.tensor([1.0, -1.0]).repeat_interleave(count), torch.arange(count).repeat(2)
    coupling = torch.ones(2 * count)
    if objective.coupled:
        coupling = objective.couple(objective.value(both), DrawIds(advantage, pair, torch.zeros_like(pair)))
    signal = objective.coefficients(both, advantage, coupling).c[:count].double().cpu()
    kappa = {name: anchor.curvature(found.noise).double().cpu() for name, anchor in anchors.items()}
    return Pulls(sigma.double().cpu(), signal, kappa, {name: anchor.role for name, anchor in anchors.items()})


def pulls_of_edges(
    forest: Forest, objective: Objective, step_weight: StepWeight, regularizers: Mapping[str, Regularizer]
) -> Pulls:
    """Of a loss of steps, at no more than 8 of each step of the grid. u is the velocity that would have made the step without
    noise: (x' − α·x)/b. Both numbers are measured, c·w by the gradient of the loss at ratio 1, κ by the divergence between two
    velocities, the second of them longer: neither depends on what the network says, so random ones do. A term that is 0 there,
    such as a hinge on lengths, has κ = 0."""
    tree = forest.tree
    step_of = tree.index[tree.parent[tree.edges]]
    edges = torch.cat([tree.edges[step_of == index][:STEPS_OF_EACH_INDEX] for index in step_of.unique()])
    arrived, position = forest.at(edges), torch.arange(len(edges))
    velocity, other = (_like(arrived, number) for number in range(2))
    along = _rows(velocity * other).sum(1) / _rows(velocity).square().sum(1)
    other = other - spread(along.to(other), other) * velocity  # so that velocity + other is longer than velocity
    velocity.requires_grad_()
    with torch.enable_grad():
        step = forest.edge_steps(edges, velocity, position)
        log_prob = step.log_prob(arrived)
        old = forest.edge_steps(edges, velocity.detach(), position) if objective.needs_old_means else None
        advantages = torch.ones(len(edges), 1).to(log_prob)
        loss = objective.loss(log_prob, log_prob.detach(), advantages, Transitions(step, arrived, old))
        total = (step_weight.weigh(step, forest, edges) * loss).sum()
    (gradient,) = torch.autograd.grad(total, velocity)
    with torch.no_grad():
        gap = (step.policy.mean - arrived) / spread(step.policy.velocity_coef, arrived)  # v − u
        signal = _rows(gradient * gap).sum(1) / (2 * _rows(gap).square().mean(1))
        here = RoleSteps(step, velocity.detach())
        moved = RoleSteps(forest.edge_steps(edges, velocity.detach() + other, position), velocity.detach() + other)
        size = _rows(other).square().mean(1)
        kappa = {name: term.beta * term.divergence(here, moved).double() / size for name, term in regularizers.items()}
    sigma = forest.sigma(tree.parent[edges])
    return Pulls(
        sigma.double().cpu(), signal.cpu(), {name: values.cpu() for name, values in kappa.items()},
        {name: term.role for name, term in regularizers.items()},
    )  # fmt: skip


def _twice(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows])


def _rows(values: Tensor) -> Tensor:
    return values.double().flatten(1)


def _like(states: Tensor, number: int) -> Tensor:
    rng = generator(0, "data", "pulls", number)
    return torch.from_numpy(rng.standard_normal(tuple(states.shape))).to(states)
