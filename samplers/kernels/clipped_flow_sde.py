"""Flow-SDE whose step is never noisier than a bound (LongCat-Video, arXiv 2510.22200; GenRL's diffusion_clip)."""

from dataclasses import dataclass

import torch
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
from samplers.kernels.flow_sde import check_cap, flow_diffusion
from samplers.kernels.gaussian import Constants, Reduce


@dataclass(frozen=True)
class ClippedFlowSDE:
    """Euler-Maruyama with g = min(a·√(σ/(1-σ)), c/√h), a = noise_level·level, c = max_std: so s = g√h <= c.

    noise_level 0.7, max_std 0.45: GenRL's Wan defaults. sigma_cap: as in FlowSDE. The bound does not scale with the
    level. Not kept: the marginals, with FlowSDE's order in h (from σ = 1 at 1,000 steps the error is half as large); a
    last step to σ' = 0 leaves noise behind.
    """

    noise_level: float = 0.7
    max_std: float = 0.45
    sigma_cap: float | None = None
    reduce: Reduce = "mean"
    constants: Constants = "full"
    uses_roots = False

    def __post_init__(self) -> None:
        check_noise_level(self.noise_level)
        check_choices(self.reduce, self.constants)
        check_cap(self.sigma_cap)
        if not self.max_std > 0:
            raise ValueError(f"got max_std={self.max_std}; expected a number > 0, the largest std of one step")

    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N], float64."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        g = flow_diffusion(self.noise_level * level, sigma, sigma_next, self.sigma_cap, step)
        g = torch.minimum(g, self.max_std / (sigma - sigma_next).sqrt())
        return euler_where_deterministic(euler_maruyama(g, sigma, sigma_next), level, sigma, sigma_next)
