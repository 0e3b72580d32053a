"""Linear-σ SDE: what flow_grpo's Wan sampler draws from (arXiv 2505.05470, code)."""

import math
from dataclasses import dataclass

from torch import Tensor

from samplers.kernels.base import (
    Affine,
    affine_step,
    bind_rectified_flow,
    check_choices,
    euler_maruyama,
    euler_where_deterministic,
    step_inputs,
)
from samplers.kernels.gaussian import Constants, Reduce


@dataclass(frozen=True)
class LinearSDE:
    """Euler-Maruyama with g = level·(sigma_min + (sigma_max - sigma_min)·σ).

    flow_grpo takes the second and the last value of its own grid, about 0.98 (20 steps, shift 3) and 0; give them here.
    Unlike Flow-SDE, g stays finite at σ = 1. Not kept: the marginals, whose error is of first order in h.
    """

    sigma_min: float = 0.0
    sigma_max: float = 1.0
    reduce: Reduce = "mean"
    constants: Constants = "full"
    uses_roots = False

    def __post_init__(self) -> None:
        check_choices(self.reduce, self.constants)
        if not (0.0 <= self.sigma_min <= self.sigma_max and math.isfinite(self.sigma_max)):
            raise ValueError(
                f"got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}; expected 0 <= sigma_min <= sigma_max"
            )

    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N], float64."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        g = level * (self.sigma_min + (self.sigma_max - self.sigma_min) * sigma)
        return euler_where_deterministic(euler_maruyama(g, sigma, sigma_next), level, sigma, sigma_next)
