"""Flow-SDE: the reverse SDE whose noise grows towards pure noise (Flow-GRPO, arXiv 2505.05470)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.kernels.base import (
    Affine,
    Constants,
    Reduce,
    affine_step,
    bind_rectified_flow,
    check_choices,
    check_noise_level,
    euler_maruyama,
    euler_where_silent,
    step_inputs,
)


def flow_diffusion(sigma: Tensor, sigma_next: Tensor, sigma_cap: float | None) -> Tensor:
    """√(σ/(1-σ)), where sigma_cap (None: σ' of the row, where σ is 1) bounds the σ of 1-σ."""
    capped = torch.where(sigma == 1, sigma_next, sigma) if sigma_cap is None else sigma.clamp(max=sigma_cap)
    return (sigma / (1.0 - capped)).sqrt()


def check_cap(sigma_cap: float | None) -> None:
    """A cap lies inside (0, 1)."""
    if sigma_cap is not None and not 0.0 < sigma_cap < 1.0:
        raise ValueError(f"sigma_cap={sigma_cap} came; expected a number inside (0, 1), or None for σ' at σ=1")


@dataclass(frozen=True)
class FlowSDE:
    """Euler-Maruyama with g = a·√(σ/(1-σ)), a = noise_level·level; h = σ - σ'.

    α = 1 - a²h/(2(1-σ)), b = -h(1 + a²/2), s = a√(σh/(1-σ)).
    noise_level: 0.7 (SD3.5, flow_grpo), 0.9 (FLUX, TempFlow-GRPO), 1.2 (Qwen-Image, verl-omni); not comparable between
    kernels. sigma_cap: what stands for σ inside the 1-σ of g. None: the row's own σ' where σ is exactly 1
    (flow_grpo; a first step has s = a); a number: min(σ, sigma_cap) (UniRL: 0.99). The two are not interchangeable.
    Not kept: the marginals, to first order in h; a last step to σ' = 0 leaves noise behind.
    """

    noise_level: float = 0.7
    sigma_cap: float | None = None
    reduce: Reduce = "mean"
    constants: Constants = "full"
    uses_rows = False

    def __post_init__(self) -> None:
        check_noise_level(self.noise_level)
        check_choices(self.reduce, self.constants)
        check_cap(self.sigma_cap)

    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0) -> Affine:
        """α, b, s [N], float64."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        g = self.noise_level * level * flow_diffusion(sigma, sigma_next, self.sigma_cap)
        return euler_where_silent(euler_maruyama(g, sigma, sigma_next), level, sigma, sigma_next)
