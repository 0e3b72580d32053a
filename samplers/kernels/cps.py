"""Flow-CPS: coefficients-preserving sampling (arXiv 2509.05952), DDIM-η for rectified flow."""

import math
from dataclasses import dataclass

from torch import Tensor

from samplers.kernels.base import (
    Affine,
    affine_step,
    bind_rectified_flow,
    check_choices,
    check_noise_level,
    euler_where_deterministic,
    step_inputs,
)
from samplers.kernels.gaussian import Constants, Reduce


@dataclass(frozen=True)
class CPS:
    """x' = (1-σ')·x̂0 + σ'cosφ·ε̂ + σ'sinφ·z, φ = a·π/2, a = noise_level·level in [0, 1].

    α = (1-σ') + σ'cosφ, b = -σ(1-σ') + (1-σ)σ'cosφ, s = σ'sinφ; deterministic at σ' = 0. For its KL take the form
    "exact", which is that of the reference code.
    noise_level: 0.7 (SD3.5), 0.8 (FLUX). constants "none" (every reference implementation; clip 1e-5 assumes it).
    Kept: the total noise, exactly, at any step size. Not kept: the marginals of spread-out data: where the variance V
    is right, one step adds -(1-cosφ)²σ²(1-σ²/V) to it as h -> 0, so more steps at one φ do not converge.
    """

    noise_level: float = 0.7
    reduce: Reduce = "mean"
    constants: Constants = "none"
    uses_roots = False

    def __post_init__(self) -> None:
        check_noise_level(self.noise_level, highest=1.0)
        check_choices(self.reduce, self.constants)

    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N], float64."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        a = self.noise_level * level
        if bool((a > 1.0 + 1e-12).any()):
            raise ValueError(
                f"got noise_level·level = {float(a.max())}; expected at most 1, where CPS refreshes all noise: lower the level"
            )
        angle = a * (math.pi / 2.0)
        kept_noise = sigma_next * angle.cos()
        affine = Affine(
            alpha=(1.0 - sigma_next) + kept_noise,
            velocity_coef=-sigma * (1.0 - sigma_next) + (1.0 - sigma) * kept_noise,
            std=sigma_next * angle.sin(),
        )
        return euler_where_deterministic(affine, a, sigma, sigma_next)
