"""Data N(m, τ²) in one dimension under a rectified flow: exact velocities, posteriors and tilts, and where an objective stops.

Expectations are Gauss-Hermite sums, exact for the polynomials that most objectives make of x0. An objective is asked for the
coefficients of the nodes as of any other draws, so what is found is what its (c, κ) have, and no formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowalign.advantage import Advantage, SignalContext
from flowalign.credit import Broadcast
from flowalign.objectives import Anchor, DrawIds, Predictions, StateObjective, VelocityAnchor
from flowalign.trainers.samples import Places

F64 = torch.float64


@dataclass(frozen=True)
class Reward:
    """slope·x − ½·curvature·x²."""

    slope: float
    curvature: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.slope * x - self.curvature * x.square() / 2


@dataclass(frozen=True)
class Gaussian:
    """N(mean, variance)."""

    mean: float
    variance: float

    def nodes(self, count: int = 24) -> tuple[Tensor, Tensor]:
        """(values [count], weights [count] that add up to 1): exact for polynomials below degree 2·count."""
        points, weights = np.polynomial.hermite_e.hermegauss(count)
        x = self.mean + self.variance**0.5 * torch.from_numpy(points)
        return x, torch.from_numpy(weights / weights.sum())

    def tilted(self, reward: Reward, amount: float = 1.0) -> Gaussian:
        """p·e^{amount·r}/Z."""
        precision = 1 / self.variance + amount * reward.curvature
        return Gaussian((self.mean / self.variance + amount * reward.slope) / precision, 1 / precision)

    def centered(self, reward: Reward, x: Tensor) -> Tensor:
        """r(x) − E r."""
        return reward(x) - reward.slope * self.mean + reward.curvature * (self.mean**2 + self.variance) / 2

    def spread(self, sigma: float | Tensor) -> float | Tensor:
        """V, the variance of x."""
        return (1 - sigma) ** 2 * self.variance + sigma**2

    def line(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, shift) of v = E[ε − x0 | x] as a function of x."""
        slope = (sigma - (1 - sigma) * self.variance) / self.spread(sigma)
        return slope, -self.mean - slope * (1 - sigma) * self.mean

    def velocity(self, x: float, sigma: float) -> float:
        slope, shift = self.line(torch.tensor(sigma, dtype=F64))
        return float(slope * x + shift)

    def posterior(self, x: float, sigma: float) -> Gaussian:
        """x0 | x."""
        gain = (1 - sigma) * self.variance / self.spread(sigma)
        return Gaussian(self.mean + gain * (x - (1 - sigma) * self.mean), self.variance * sigma**2 / self.spread(sigma))


def compared(advantage: Advantage, scores: Tensor) -> Tensor:
    """[n] float64 of samples with `scores` [groups, members], as a trainer of samples has them compared."""
    groups, members = scores.shape
    group, local = torch.arange(groups).repeat_interleave(members), torch.arange(members).repeat(groups)
    forest = Places(group, local, torch.zeros(groups * members, dtype=torch.int64)).one_step_each()
    column = scores.reshape(-1, 1).double()
    credit = Broadcast().assign(forest, column, torch.ones_like(column, dtype=torch.bool), ("reward",))
    return advantage.compare(forest, credit, SignalContext()).values[:, 0].double()


# ---------------------------------------------------------------------------------------- a number: v at one (x, σ)


@dataclass(frozen=True, eq=False)
class AtState:
    """The draws at one (x, σ): x0 | x at `nodes` points of `data`, with the velocities of roles there."""

    data: Gaussian
    x: float
    sigma: float
    roles: Mapping[str, float]
    nodes: int = 24

    @property
    def samples(self) -> Tensor:
        """[n] x0."""
        return self.data.posterior(self.x, self.sigma).nodes(self.nodes)[0]

    def gradient(
        self, objective: StateObjective, advantage: Tensor, anchors: Sequence[Anchor], v: float
    ) -> tuple[float, float]:
        """(of the mean loss by v, over 2; the mean curvature)."""
        x0, weights = self.data.posterior(self.x, self.sigma).nodes(self.nodes)
        known = {name: torch.full((len(x0), 1), value, dtype=F64) for name, value in self.roles.items()}
        target, live = ((self.x - x0) / self.sigma)[:, None], torch.full((len(x0), 1), v, dtype=F64)
        found = Predictions(live, known, target, torch.full((len(x0),), self.sigma, dtype=F64))
        at = objective.coefficients(found, advantage, torch.ones(len(x0)))
        pulls = at.c * (live - target)[:, 0]
        curvature = at.c
        for role, kappa in at.kappa.items():
            pulls, curvature = pulls + kappa * (live - found.of(role))[:, 0], curvature + kappa
        for anchor in anchors:
            pulled = live.clone().requires_grad_()
            total = (anchor.beta * anchor.pull(pulled, found.of(anchor.role), found.noise)).sum()
            pulls = pulls + torch.autograd.grad(total, pulled)[0][:, 0] / 2
            curvature = curvature + anchor.curvature(found.noise)
        return float(weights @ pulls), float(weights @ curvature)

    def stop(self, objective: StateObjective, advantage: Tensor, *anchors: Anchor, start: float | None = None) -> float:
        """The v at which the population gradient vanishes: secants from `start`, the old velocity by default."""
        begin = self.roles["old"] if start is None else start
        return root(lambda v: self.gradient(objective, advantage, anchors, v)[0], begin, begin + 0.01)


# ---------------------------------------------------------------------------------------- a student v = α(σ)·x + γ(σ)


@dataclass(frozen=True, eq=False)
class Student:
    """v = slope·x + shift at the levels `grid()`, [2N + 1] each: what RK4 needs for N steps from noise to data."""

    slope: Tensor
    shift: Tensor

    @staticmethod
    def grid(steps: int = 100) -> Tensor:
        return torch.linspace(1, 0, 2 * steps + 1, dtype=F64)

    @staticmethod
    def exact(data: Gaussian) -> Student:
        return Student(*data.line(Student.grid()))

    def endpoint(self) -> Gaussian:
        """The law of its samples, by RK4 of the affine map from the start noise."""
        slopes, shifts = self.slope.tolist(), self.shift.tolist()
        scale, offset, step = 1.0, 0.0, -2.0 / (len(slopes) - 1)
        for left in range(0, len(slopes) - 1, 2):
            (a, b, c), (p, q, r) = slopes[left : left + 3], shifts[left : left + 3]
            moved = []
            for value, (s, t, u) in ((scale, (0.0, 0.0, 0.0)), (offset, (p, q, r))):
                one = a * value + s
                two = b * (value + step / 2 * one) + t
                three = b * (value + step / 2 * two) + t
                four = c * (value + step * three) + u
                moved.append(value + step / 6 * (one + 2 * two + 2 * three + four))
            scale, offset = moved
        return Gaussian(offset, scale**2)


def affine_stop(
    objective: StateObjective, data: Gaussian, advantage: Tensor, roles: Mapping[str, Student],
    *anchors: VelocityAnchor, nodes: int = 3,
) -> tuple[Student, Tensor]:  # fmt: skip
    """(The affine student at which the gradient vanishes at each level, the Hessian [L, 2, 2] over 2 there.)

    Samples are the nodes of `data`, with `advantage` [nodes]; ε has two. For objectives whose gradient is affine in v."""
    x0, weight = data.nodes(nodes)
    eps, of_noise = Gaussian(0, 1).nodes(2)
    sigma, count = Student.grid()[:, None], 2 * nodes
    samples, noise = x0.repeat_interleave(2), eps.repeat(nodes)
    weights = (weight[:, None] * of_noise).flatten()
    x, levels = (1 - sigma) * samples + sigma * noise, len(sigma)
    target = (noise - samples).expand(levels, count).reshape(-1, 1)
    known = {name: (each.slope[:, None] * x + each.shift[:, None]).reshape(-1, 1) for name, each in roles.items()}

    def gradient(slope: float, shift: float) -> Tensor:
        live = (slope * x + shift).reshape(-1, 1)
        found = Predictions(live, known, target, sigma.expand(levels, count).reshape(-1))
        at = objective.coefficients(found, advantage.repeat_interleave(2).repeat(levels), torch.ones(len(live)))
        pulls = at.c * (live - target)[:, 0]
        for role, kappa in at.kappa.items():
            pulls = pulls + kappa * (live - found.of(role))[:, 0]
        for anchor in anchors:
            pulls = pulls + anchor.beta * (live - found.of(anchor.role))[:, 0]
        pulls = pulls.reshape(levels, count) * weights
        return torch.stack([(pulls * x).sum(1), pulls.sum(1)], 1)

    zero = gradient(0.0, 0.0)
    hessian = torch.stack([gradient(1.0, 0.0) - zero, gradient(0.0, 1.0) - zero], 2)
    solved = torch.linalg.solve(hessian, -zero)
    return Student(solved[:, 0], solved[:, 1]), hessian


# ---------------------------------------------------------------------------------------- a shift: v = v_ref + θ at one σ


def shift_gradient(
    objective: StateObjective, data: Gaussian, sigma: float, outcomes: Callable[[Tensor], Sequence[tuple[Tensor, Tensor]]],
    shared: bool, nodes: int,
) -> Callable[[float], float]:  # fmt: skip
    """The gradient of the loss of a group of two by θ, over 2; reference and old are exact. shared: both members have one ε.

    outcomes(x0 [P, 2]): what advantages [P, 2] a pair may get, and with which probability [P]."""
    axes = [data.nodes(nodes)] * 2 + [Gaussian(0, 1).nodes(nodes)] * (1 if shared else 2)
    points = torch.cartesian_prod(*(values for values, _ in axes))
    weights = torch.cartesian_prod(*(weights for _, weights in axes)).prod(1)
    x0, eps = points[:, :2], points[:, 2:].expand(-1, 2)
    slope, shift = data.line(torch.tensor(sigma, dtype=F64))
    exact = (slope * ((1 - sigma) * x0 + sigma * eps) + shift).reshape(-1, 1)
    target, count = (eps - x0).reshape(-1, 1), len(points)
    group, number = torch.arange(count).repeat_interleave(2), torch.zeros(2 * count, dtype=torch.int64)

    def gradient(theta: float) -> float:
        found = Predictions(
            exact + theta,
            dict.fromkeys(("reference", "old"), exact),
            target,
            torch.full((2 * count,), sigma, dtype=F64),
        )
        total = 0.0
        for advantage, probability in outcomes(x0):
            ids = DrawIds(advantage.flatten(), group, number)
            at = objective.coefficients(found, ids.advantage, objective.couple(objective.value(found), ids))
            assert not at.kappa
            pulls = (at.c * (found.live - target)[:, 0]).reshape(count, 2).sum(1)
            total += float((weights * probability) @ pulls)
        return total

    return gradient


def root(function: Callable[[float], float], before: float, now: float) -> float:
    """Where it is 0, by secants from two places."""
    value = function(before)
    for _ in range(80):
        here = function(now)
        if abs(here) < 1e-13:
            return now
        before, value, now = now, here, now - here * (now - before) / (here - value)
    raise AssertionError(f"no root near {now}: {here}")
