"""Supervision: a regression of velocities at the trained states, beside the policy gradient, and what its parts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowalign.objectives.matching import mean_square
from samplers import Forest, Held, Path, send


@dataclass(frozen=True, eq=False)
class Targets:
    """Target velocities [S, *] at the states `nodes` [S], each with a `weight` [S] >= 0; of the velocities a process has some."""

    nodes: Tensor
    velocity: Held
    weight: Tensor

    def loss(self, nodes: Tensor, velocity: Tensor) -> Tensor:
        """[n] weight · ⟨(v − target)²⟩ of `nodes` under `velocity` [n, *], the mean over elements; 0 without a target."""
        match = nodes[:, None] == self.nodes[None]
        aimed = match.any(1)
        if not bool(aimed.any()):
            return velocity.new_zeros(len(nodes))
        found = match.int().argmax(1)
        place = torch.where(aimed, found, found[aimed][0])
        weight = torch.where(aimed, self.weight[place], 0.0).to(velocity.dtype)
        weight, target = send(velocity.device, weight, self.velocity.at(place))
        return weight * mean_square(velocity, target)


class Supervision(Protocol):
    """A regression of the velocities at trained states onto targets."""

    @property
    def needs_old(self) -> bool:
        """Whether forest.velocities["old"] must hold the rollout's own velocities."""
        ...

    @property
    def needs_guidance(self) -> bool:
        """Whether the rollout must be guided by a reward (rollout.reward_guidance), whose gradients its targets read."""
        ...

    @property
    def role(self) -> str | None:
        """The role whose velocities at the trained states its targets read; None: it reads no role's."""
        ...

    def check(self, path: Path, channels: tuple[str, ...]) -> None:
        """ValueError unless its formula holds for a policy on `path` and a reward of `channels`."""
        ...

    def scale_at(self, iteration: int) -> float:
        """The factor of its loss."""
        ...

    def targets(self, forest: Forest, scores: Tensor, valid: Tensor) -> Targets:
        """scores, valid [L, C] in the order of the leaves."""
        ...


def check_fade(scale: float, fade: int | None) -> None:
    """ValueError for a scale below 0, or a fade of no iteration."""
    if scale < 0 or (fade is not None and fade < 1):
        raise ValueError(f"got scale={scale}, fade={fade}; expected scale >= 0 and fade >= 1 or None")


def faded(scale: float, fade: int | None, iteration: int) -> float:
    """`scale`, which falls linearly to 0 over `fade` iterations; None: it stays."""
    return scale * (1.0 if fade is None else max(0.0, 1 - iteration / fade))
