"""Truncations whose reward sees the true sample, and whose gradient is that of a shorter way to it (straight-through)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowalign.truncations.base import Chains, Outcome, Passes, check_steps, visit
from samplers import straight_through


@dataclass(frozen=True)
class Sparse:
    """FlowBP-Sparse (2606.11075): x_S with gradient g·(−Δ_k) of `count` random steps k, every network input detached.

    The steps are drawn without replacement with weights (k+1)^power: late ones more often. g = 1 + rescale·(ΣΔ_all/ΣΔ_active −
    1) makes up for the steps left out; rescale 0: g = 1. `count` graphs."""

    count: int = 4
    power: float = 1.0
    rescale: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 1 or self.power < 0 or not 0 <= self.rescale <= 1:
            raise ValueError(f"got {self}; expected count >= 1, power >= 0 and a rescale in [0, 1]")

    def passes(self, steps: int) -> Passes:
        check_steps(self, steps, self.count)
        return Passes(steps - self.count, self.count)

    def active(self, rng: np.random.Generator, steps: int) -> list[int]:
        """The steps that carry gradient, of `steps`."""
        weights = np.arange(1.0, steps + 1) ** self.power
        return sorted(rng.choice(steps, self.count, replace=False, p=weights / weights.sum()).tolist())

    def gain(self, sigmas: Tensor, active: list[int]) -> float:
        """g."""
        lengths = -sigmas.double().diff()
        return 1 + self.rescale * (float(lengths.sum() / lengths[active].sum()) - 1)

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        chains.check_deterministic(self)
        active = self.active(rng, chains.steps)
        x, visits = chains.whole(active, cut=range(chains.steps))
        return Outcome((straight_through(x, self.gain(chains.sigmas, active) * x),), visits)


@dataclass(frozen=True)
class TwoLeaps:
    """LeapAlign (2604.15311): two random steps k < j; the gradient is that of the leaps k -> j -> 0, the values are those of the
    whole chain.

    x_j = straight-through(x_j, x_k − (σ_k − σ_j)·v_k), then x_S = straight-through(x_S, x_j − σ_j·v_j), where the network at j
    sees a state whose gradient is multiplied by `through`. ∂/∂v_k = −(σ_k − σ_j)·(1 − through·σ_j·∂v_j/∂x), ∂/∂v_j = −σ_j. A
    sample weighs 1/(max(d_j, floor) + max(d_0, floor)), d the mean distance of a leap's end from the true state. Two graphs;
    v_k and v_j serve the chain as well, whose kernel must not be a multistep one. Numbers of the code of FlowBP (2606.11075)."""

    through: float = 0.3
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.through <= 1 or not self.floor > 0:
            raise ValueError(f"got {self}; expected through in [0, 1] and a floor > 0")

    def passes(self, steps: int) -> Passes:
        check_steps(self, steps, 2)
        return Passes(steps - 2, 2)

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        chains.check_deterministic(self)
        chains.check_one_step(self)
        steps, sigmas = chains.steps, chains.sigmas
        k, j = sorted(rng.choice(steps, 2, replace=False).tolist())
        x_k = chains.run(chains.x, sigmas[: k + 1]).x if k else chains.x
        first = chains.run(x_k, sigmas[[k, j]], active=[0])
        x_j = self._on(chains, x_k, first.velocities[0], k, j)
        second = chains.run(
            straight_through(x_j, first.x), sigmas[[j, steps]], active=[0], cut=[0], cut_scale=self.through
        )
        x = self._on(chains, x_j, second.velocities[0], j, steps)
        distances = [_distance(first.x, x_j).clamp(min=self.floor), _distance(second.x, x).clamp(min=self.floor)]
        visits = visit(first, sigmas[[k, j]], 0, number=k), visit(second, sigmas[[j, steps]], 0, number=j)
        return Outcome((straight_through(x, second.x),), visits, weight=1 / (distances[0] + distances[1]))

    def _on(self, chains: Chains, x: Tensor, v: Tensor, start: int, stop: int) -> Tensor:
        """x at level `stop` of the chain that leaves x at `start`, where its velocity is v; without graph."""
        x = chains.step(x.detach(), v.detach(), start)
        return chains.run(x, chains.sigmas[start + 1 : stop + 1]).x if start + 1 < stop else x


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference [n]."""
    return (x - y).detach().abs().flatten(1).mean(1)
