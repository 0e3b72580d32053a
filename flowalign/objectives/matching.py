"""Matching another network's velocities at given states: how much each step weighs, and the regression itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from samplers import Held, Kernel, Path
from samplers.kernels.base import spread

Form = Literal["kl", "ode", "mean", "velocity", "x0"]


def mean_square(velocity: Tensor, other: Tensor) -> Tensor:
    """[n] ⟨(v − v')²⟩ of velocities [n, *], the mean over elements, in the precision of the first."""
    return (velocity - other.to(velocity)).square().flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps of a rollout: the `nodes` [n] they leave, σ and σ' [n], their level [n] and the grid index [n] they leave."""

    nodes: Tensor
    sigma: Tensor
    sigma_next: Tensor
    level: Tensor
    index: Tensor


@dataclass(frozen=True)
class Match:
    """w·⟨(v − v_m)²⟩ at the state that a step leaves, v_m a teacher's velocity there; ⟨⟩ reduced as the kernel's log-prob.

    form, of the step's mean μ = αx + bv and standard deviation s: "kl" w = b²/(2s²), the exact KL of the student's step from
    the teacher's (Flow-OPD 2605.08063, DiffusionOPD 2605.15055); "ode" h²/2, its limit for deterministic steps of unit variance
    (DiffusionOPD; b of the deterministic step in place of h on other paths); "mean" b², ⟨Δμ²⟩; "velocity" 1 (DanceOPD
    2606.27377); "x0" σ², the error of the predicted clean latent (b(σ)² on other paths).
    normalized: the error is divided by its own ⟨|v − v_m|⟩, a constant, so that all states pull about equally.
    Every form has the same fixed point, v = v_m wherever the student goes; they differ in which steps count first."""

    form: Form = "kl"
    normalized: bool = False

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"got form={self.form!r}; expected 'kl', 'ode', 'mean', 'velocity' or 'x0'")

    @property
    def stochastic_only(self) -> bool:
        """Whether it has a value at stochastic steps only."""
        return self.form == "kl"

    @property
    def reads_level(self) -> bool:
        """Whether it depends on how noisy the step is that was taken."""
        return self.form in ("kl", "mean")

    def weight(self, kernel: Kernel, path: Path, steps: Steps) -> Tensor:
        """w [n] float64. ValueError for "kl" where a step draws no noise."""
        if self.form == "velocity":
            return torch.ones(len(steps.nodes), dtype=torch.float64)
        if self.form == "x0":
            return path.mix(steps.sigma.double())[1].square()
        level = steps.level if self.reads_level else torch.zeros_like(steps.level)
        step = kernel.coefficients(steps.sigma, steps.sigma_next, level, steps.index)
        if self.form == "ode":
            return step.velocity_coef.square() / 2
        if self.form == "mean":
            return step.velocity_coef.square()
        if bool((step.std == 0).any()):
            raise ValueError(
                f"got form=kl at steps {steps.index[step.std == 0].unique().tolist()}, in which {kernel} draws no noise; expected "
                "stochastic steps: leave these deterministic in the plan, or take form=ode"
            )
        return step.velocity_coef.square() / (2 * step.std.square())

    def error(self, velocity: Tensor, target: Tensor, reduce: str) -> Tensor:
        """[n] ⟨(v − v_m)²⟩ of velocities [n, *], without w."""
        gap = velocity - target.to(velocity)
        if self.normalized:
            size = gap.detach().abs().flatten(1).mean(1) + 1e-8
            gap = gap / spread(size.sqrt(), gap)
        squares = gap.square().flatten(1)
        return squares.mean(1) if reduce == "mean" else squares.sum(1)


@dataclass(frozen=True, eq=False)
class Pull:
    """A term of a loss over S states: Σ_s weight_s · error(v_s, velocity_s). velocity [S, *] is a constant, of which this process
    has some; weight [S] >= 0, which holds everything else: the form's w, the share of the state, a scale, the division by the count."""

    velocity: Held
    weight: Tensor
    match: Match = Match("velocity")

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(velocity [n, *], weight [n]) of the states `index` [n], which this process has."""
        return self.velocity.at(index), self.weight[index]

    def loss(self, velocity: Tensor, target: Tensor, weight: Tensor, reduce: str) -> Tensor:
        """The sum over n states under the velocities [n, *]; target, weight: `at` these states, beside the velocities."""
        return (weight.to(velocity) * self.match.error(velocity, target, reduce)).sum()
