"""Roles: further sets of the trained weights on the same base, and when they follow the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import Parameter

BUILT_IN = ("policy", "reference")


@dataclass(frozen=True)
class Role:
    """A second set of the trained weights; it begins as a copy of the policy's.

    update: "frozen" stays what it was; "copy" takes the policy's weights (an `old` snapshot); "ema" is
    role ← d·role + (1-d)·policy with d = decay, or min(decay, rate·n) at the n-th update if a `rate` is given
    (DiffusionNFT's schedule for the sampling policy); "trained" has an optimizer of its own, the trainer's business.
    every: optimizer steps of the policy between two updates."""

    update: Literal["frozen", "copy", "ema", "trained"] = "frozen"
    every: int = 1
    decay: float = 0.9
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"role.every={self.every}: expected a number of optimizer steps, at least 1")
        if not 0 <= self.decay < 1:
            raise ValueError(f"role.decay={self.decay}: expected 0 <= decay < 1")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"role.rate={self.rate}: expected a positive number, or null for a constant decay")

    def decay_at(self, update: int) -> float:
        """How much of the role the `update`-th update (1 is the first) keeps."""
        return self.decay if self.rate is None else min(self.decay, self.rate * update)


Named = Iterable[tuple[str, Parameter]]


@torch.no_grad()
def follow(role: Role, step: int, policy: Named, own: Named) -> None:
    """Moves a role's weights after the policy's `step`-th optimizer step (1 is the first), if it is time. In place:
    not between a forward under the role and its backward."""
    if role.update not in ("copy", "ema") or step % role.every:
        return
    keep = role.decay_at(step // role.every) if role.update == "ema" else 0.0
    for (_, source), (_, target) in zip(policy, own, strict=True):
        target.lerp_(source.to(target.dtype), 1 - keep)


def check_roles(roles: Mapping[str, Role]) -> None:
    """ValueError for names that mean something else."""
    taken = [name for name in roles if name in BUILT_IN or not name.isidentifier()]
    if taken:
        raise ValueError(
            f"policy.roles {taken}: 'policy' is what is trained and 'reference' is the model without training; expected "
            "other names of letters, digits and _, such as old or fast_ema"
        )
