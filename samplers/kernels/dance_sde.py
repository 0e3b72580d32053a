"""Dance-SDE: the reverse SDE with constant noise (DanceGRPO, arXiv 2505.07818)."""

from dataclasses import dataclass

from torch import Tensor

from samplers.kernels.base import (
    Affine,
    affine_step,
    bind_rectified_flow,
    check_choices,
    check_noise_level,
    euler_maruyama,
    euler_where_deterministic,
    step_inputs,
)
from samplers.kernels.gaussian import Constants, Reduce


@dataclass(frozen=True)
class DanceSDE:
    """Euler-Maruyama with g = η = noise_level·level; h = σ - σ'.

    α = 1 - η²h/(2σ), b = -h(1 + η²(1-σ)/(2σ)), s = η√h.
    noise_level: 0.3 (FLUX and Wan images), 0.25 (HunyuanVideo). Not kept: the marginals, whose error is of first order
    in h; DanceGRPO itself never lets the noise of the last step reach the reward (a last step of level 0 does the
    same).
    """

    noise_level: float = 0.3
    reduce: Reduce = "mean"
    constants: Constants = "full"
    uses_roots = False

    def __post_init__(self) -> None:
        check_noise_level(self.noise_level)
        check_choices(self.reduce, self.constants)

    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N], float64."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        affine = euler_maruyama(self.noise_level * level, sigma, sigma_next)
        return euler_where_deterministic(affine, level, sigma, sigma_next)
