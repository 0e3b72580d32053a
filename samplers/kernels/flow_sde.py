"""Flow-SDE: the reverse SDE whose noise grows towards pure noise (Flow-GRPO, arXiv 2505.05470)."""

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
from samplers.kernels.gaussian import Constants, Reduce


def flow_diffusion(
    a: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_cap: float | None, step: Tensor | int | None
) -> Tensor:
    """g = a·√(σ/(1-σ)) [N], where a number `sigma_cap` bounds the σ of 1-σ; with None, σ' stands for it at
    index 0 where σ is near 1.

    `step`: grid index that each row leaves. ValueError for a stochastic row at σ = 1, where g is infinite, if neither
    bounds it.
    """
    if sigma_cap is not None:
        bounded = sigma.clamp(max=sigma_cap)
    elif step is not None:
        first = torch.as_tensor(step, device=sigma.device) == 0
        bounded = torch.where(first & near_one(sigma, sigma_next), sigma_next, sigma)
    elif bool(((sigma == 1) & (a > 0)).any()):
        raise ValueError(
            "got a stochastic step from sigma = 1 without its grid index, where Flow-SDE's noise is infinite; expected "
            "step=0, the first step of a grid: pass TransitionContext(step=...), or give the kernel a sigma_cap"
        )
    else:
        bounded = sigma
    return torch.where(a == 0, 0.0, a * (sigma / (1.0 - bounded)).sqrt())


def near_one(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """[N] whether a step is longer than the distance of its σ from 1: there 1/(1-σ) says nothing about the step."""
    return 1.0 - sigma < sigma - sigma_next


def check_cap(sigma_cap: float | None) -> None:
    """A cap lies inside (0, 1)."""
    if sigma_cap is not None and not 0.0 < sigma_cap < 1.0:
        raise ValueError(
            f"got sigma_cap={sigma_cap}; expected a number inside (0, 1), or None for σ' at the first step"
        )


@dataclass(frozen=True)
class FlowSDE:
    """Euler-Maruyama with g = a·√(σ/(1-σ)), a = noise_level·level; h = σ - σ'.

    α = 1 - a²h/(2(1-σ)), b = -h(1 + a²/2), s = a√(σh/(1-σ)).
    noise_level: 0.7 (SD3.5, flow_grpo), 0.9 (FLUX, TempFlow-GRPO), 1.2 (Qwen-Image, verl-omni); not comparable between
    kernels. sigma_cap: what stands for σ inside the 1-σ of g. None: σ' at the first step of a grid (index 0), if it is
    longer than 1-σ (flow_grpo; from σ = 1 such a step has s = a whatever its length); a number: min(σ, sigma_cap) at
    every step (UniRL's 0.99 stands only where σ = 1). The two are not interchangeable.
    Not kept: the marginals. From a level below 1, or with a number as sigma_cap, the error of the variance falls as h;
    from σ = 1 with None only as h^min(1, a²) (h^0.49 at 0.7), since the first step is off by a⁴/4 however short it is,
    and by level σ the later ones have shrunk that error by (h/(1-σ))^a² only. A last step to σ' = 0 leaves noise
    behind.
    """

    noise_level: float = 0.7
    sigma_cap: float | None = None
    reduce: Reduce = "mean"
    constants: Constants = "full"
    uses_roots = False

    def __post_init__(self) -> None:
        check_noise_level(self.noise_level)
        check_choices(self.reduce, self.constants)
        check_cap(self.sigma_cap)

    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N], float64."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        g = flow_diffusion(self.noise_level * level, sigma, sigma_next, self.sigma_cap, step)
        return euler_where_deterministic(euler_maruyama(g, sigma, sigma_next), level, sigma, sigma_next)
