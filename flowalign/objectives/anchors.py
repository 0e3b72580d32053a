"""Anchors of an objective of states: what holds the policy's velocity near a role's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from flowalign.objectives.matching import mean_square


class Anchor(Protocol):
    """beta · pull of the policy's velocity towards a role's, the mean over draws."""

    @property
    def role(self) -> str: ...

    @property
    def beta(self) -> float: ...

    @property
    def active(self) -> bool:
        """Whether its role is evaluated: False leaves it out as if it were not there."""
        ...

    def curvature(self, noise: Tensor) -> Tensor:
        """[n] what it adds to the curvature of draws whose ε has the coefficient noise [n]; with beta."""
        ...

    def pull(self, velocity: Tensor, other: Tensor, noise: Tensor) -> Tensor:
        """[n] of velocities [n, *] from the role's; without beta."""
        ...


@dataclass(frozen=True)
class VelocityAnchor:
    """beta·⟨(v − v_role)²⟩, the mean over elements: the KL between the diffusions that v and v_role drive, up to the level's
    factor (ELBO-PG's "girsanov", 2602.04663).

    space "velocity" as it stands, "x0" times b² (V-GRPO's, 2604.23380). A beta is comparable between methods only as
    beta/(c·w), its size beside the pull of a sample of advantage 1, which `flowalign doctor` prints."""

    beta: float = 0.0
    role: str = "reference"
    space: Literal["velocity", "x0"] = "velocity"

    def __post_init__(self) -> None:
        if self.beta < 0 or self.space not in ("velocity", "x0"):
            raise ValueError(
                f"got beta={self.beta}, space={self.space!r}; expected 0 (off) or a positive weight, and velocity or x0"
            )

    @property
    def active(self) -> bool:
        return self.beta > 0

    def curvature(self, noise: Tensor) -> Tensor:
        return self.beta * (torch.ones_like(noise) if self.space == "velocity" else noise.square())

    def pull(self, velocity: Tensor, other: Tensor, noise: Tensor) -> Tensor:
        gap = mean_square(velocity, other)
        return gap if self.space == "velocity" else noise.to(gap).square() * gap
