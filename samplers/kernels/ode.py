"""The probability-flow ODE, by Euler: what diffusers' FlowMatchEulerDiscreteScheduler does."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.kernels.base import Affine, Kernel, affine_step, check_choices, step_inputs
from samplers.kernels.ddim import DDIM
from samplers.kernels.gaussian import Constants, Reduce
from samplers.paths import Path


@dataclass(frozen=True)
class ODE:
    """x' = x - h·v, whatever the level. No density: log_prob with constants "none" is 0, with "full" an error."""

    reduce: Reduce = "mean"
    constants: Constants = "none"
    uses_roots = False

    def __post_init__(self) -> None:
        check_choices(self.reduce, self.constants)

    __call__ = affine_step

    def bind(self, path: Path) -> Kernel:
        """Itself on a rectified flow; on a variance-preserving path its ODE is DDIM with η = 0."""
        return self if path.rectified else DDIM(eta=0.0, reduce=self.reduce, constants=self.constants).bind(path)

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """(1, -h, 0)."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        return Affine(alpha=torch.ones_like(sigma), velocity_coef=sigma_next - sigma, std=torch.zeros_like(sigma))
