"""NormGuard: velocities must not grow longer than the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.objectives.kl import RoleSteps
from samplers import Kernel


@dataclass(frozen=True)
class NormGuard:
    """beta · relu(q − 1)², q = ‖v_θ‖/‖v_ref‖ at the state that a step leaves (NormGuard, 2606.27771).

    A hinge: only velocities longer than the reference's are pulled back, and straight towards 0; the gradient is
    2·beta·relu(q − 1)·v_θ/(‖v_θ‖·‖v_ref‖). The paper's exact form and weight are not public: our reading. Norms over all
    elements of a state, guidance included; a state counts once for each step that leaves it.
    beta 0 adds nothing and still has q measured (norm/<role>), at the price of the role's evaluations, which a KL to the same
    role shares. Choose beta by that meter: the paper reports 5 to 15 % of inflation.
    Not kept: a velocity of the right length may point anywhere; that is the KL's business."""

    beta: float = 0.0
    role: str = "reference"
    active = True

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"got NormGuard with beta={self.beta}; expected 0 (only measure) or a positive weight")

    def check(self, kernel: Kernel) -> None:
        """Velocities do not depend on the kernel."""

    def divergence(self, policy: RoleSteps, other: RoleSteps) -> Tensor:
        return self.pull(policy.velocity, other.velocity)

    def curvature(self, noise: Tensor) -> Tensor:
        """[n] 0: it only acts on velocities that are too long."""
        return torch.zeros_like(noise)

    def pull(self, velocity: Tensor, other: Tensor, noise: Tensor | None = None) -> Tensor:
        """[n] relu(q − 1)² of velocities [n, *]; an `Anchor` of draws too, at every level alike."""
        return (norm_ratio(velocity, other) - 1).relu().square()


def norm_ratio(velocity: Tensor, other: Tensor) -> Tensor:
    """[n] ‖velocity‖/‖other‖ of rows [n, *], over all elements; `other` without gradient."""
    length, reference = (v.flatten(1).norm(dim=1) for v in (velocity, other.detach().to(velocity)))
    return length / reference.clamp(min=1e-30)
