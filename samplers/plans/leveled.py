"""A plan with a noise level of its own at every step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from samplers.plans.base import Plan
from samplers.selection import Score, Select
from samplers.trees import Cost, Tree


@dataclass(frozen=True)
class Leveled:
    """`plan` whose stochastic steps from grid index i have factors[i] times their level: per-step noise for every kernel.

    factors: one per step of the grid, above 0; deterministic steps stay so. A level multiplies the kernel's own noise
    level, so with Flow-SDE, Dance-SDE and linear-σ the diffusion coefficient is factors[i]·g_i, DenseGRPO's ψ_i
    (2601.20218); CPS takes it inside the sine, DDIM times η. Topology and cost are the plan's. The outermost plan.
    """

    plan: Plan
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.factors or not all(0.0 < factor < math.inf for factor in self.factors):
            raise ValueError(f"got factors={self.factors}; expected a finite number above 0 for every step of the grid")

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The plan's tree with scaled levels."""
        if len(self.factors) != num_steps:
            raise ValueError(f"got {len(self.factors)} factors for {num_steps} steps; expected one per step")
        tree = self.plan.tree(num_steps, group_size, iteration, rng)
        return replace(tree, level=tree.level * _of_parents(tree, self.factors))

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The plan's own."""
        return self.plan.forecast(num_steps, group_size)

    def select(self, score: Score) -> Select | None:
        """The plan's own."""
        return self.plan.select(score)


def _of_parents(tree: Tree, factors: Sequence[float]) -> Tensor:
    """[N] the factor of the step that arrives at each node; at roots, whose level is 0, any."""
    by_index = torch.tensor(factors, dtype=torch.float64)
    return by_index[tree.index[tree.parent.clamp(min=0)]]
