"""Penalties that keep the policy near a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from samplers import Kernel, Step


@dataclass(frozen=True, eq=False)
class RoleSteps:
    """E transitions under the weights of one role: `step`, and the `velocity` [E, *] at the states they leave."""

    step: Step
    velocity: Tensor


class Regularizer(Protocol):
    """beta · divergence of the policy's transitions from a role's, the mean over edges."""

    @property
    def role(self) -> str: ...

    @property
    def beta(self) -> float: ...

    @property
    def active(self) -> bool:
        """Whether its role is evaluated: False leaves it out as if it were not there."""
        ...

    def check(self, kernel: Kernel) -> None:
        """ValueError where it does not mean with this kernel what it says."""
        ...

    def divergence(self, policy: RoleSteps, other: RoleSteps) -> Tensor:
        """[E] of the transitions under the policy from `other`, the same ones under the role; without beta."""
        ...


@dataclass(frozen=True)
class KLPenalty:
    """beta · KL(policy ‖ reference) of the transition; Δμ, Δv: differences to the reference, s: std, h: step size.

    form: "exact" Δμ²/(2s²), the Gaussian KL, and what CPS code means by its β (TP-GRPO: 1e-4); "exact_times_h" h times
    that, Flow-GRPO's (2505.05470; β .04 for GenEval and OCR, .01 for PickScore); "velocity" Δv² and "mean_sq" Δμ², without
    a variance. Each [E], reduced over elements as the kernel's log-prob is."""

    beta: float = 0.0
    form: Literal["exact", "exact_times_h", "velocity", "mean_sq"] = "exact_times_h"
    role: str = "reference"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"got KLPenalty with beta={self.beta}; expected 0 (off) or a positive weight")

    @property
    def active(self) -> bool:
        return self.beta > 0

    def check(self, kernel: Kernel) -> None:
        """ValueError for exact_times_h where the noise of a step is not g·√h (CPS, DDIM): it would be no Δμ²/(2g²)."""
        if self.beta and self.form == "exact_times_h" and not _noise_is_diffusion(kernel):
            raise ValueError(
                f"got a KLPenalty with form=exact_times_h and rollout.kernel={kernel}; its β is meant for kernels whose noise is "
                "g·√h (Flow-SDE), and code with this one (CPS) means the exact KL, of which this form is the step size's share, "
                "4 to 27 % on SD3's ten steps: set form=exact, or mean_sq for Δμ² without a variance"
            )

    def divergence(self, policy: RoleSteps, other: RoleSteps) -> Tensor:
        return policy.step.kl(other.step, form=self.form)


def _noise_is_diffusion(kernel: Kernel) -> bool:
    """Whether std² grows in proportion to the step size, as in an Euler-Maruyama step."""
    sigma, sigma_next = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.4, 0.3]).double()
    rate = kernel.coefficients(sigma, sigma_next, torch.ones_like(sigma)).std.square() / (sigma - sigma_next)
    return torch.allclose(rate[0], rate[1], rtol=1e-6)
