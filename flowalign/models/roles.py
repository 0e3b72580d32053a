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
    """A second set of the trained weights; it starts as a copy of the policy's.

    update: "frozen" never changes; "copy" takes over the policy's weights (an `old` snapshot); "ema" is
    role ← d·role + (1-d)·policy with d = decay, or min(decay, rate·n) at the n-th change if a `rate` is given
    (DiffusionNFT's schedule for the sampling policy, arXiv:2509.16117); "trained" has its own optimizer, which the trainer
    makes and steps. every: the policy's optimizer steps between two changes, at least 1. decay in [0, 1); rate > 0."""

    update: Literal["frozen", "copy", "ema", "trained"] = "frozen"
    every: int = 1
    decay: float = 0.9
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"got role.every={self.every}; expected a number of optimizer steps, at least 1")
        if not 0 <= self.decay < 1:
            raise ValueError(f"got role.decay={self.decay}; expected 0 <= decay < 1, such as 0.9")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"got role.rate={self.rate}; expected a positive number, or null for a constant decay")

    def decay_at(self, update: int) -> float:
        """The share of the role's old weights that its `update`-th change (1 is the first) keeps, in [0, 1)."""
        return self.decay if self.rate is None else min(self.decay, self.rate * update)


Named = Iterable[tuple[str, Parameter]]


@torch.no_grad()
def follow(role: Role, step: int, policy: Named, own: Named) -> None:
    """Updates a role's weights after the policy's `step`-th optimizer step (1 is the first), if it is due. In place: never
    call it between a forward under the role and its backward."""
    if role.update not in ("copy", "ema") or step % role.every:
        return
    keep = role.decay_at(step // role.every) if role.update == "ema" else 0.0
    for (_, source), (_, target) in zip(policy, own, strict=True):
        target.lerp_(source.to(target.dtype), 1 - keep)


def check_roles(roles: Mapping[str, Role]) -> None:
    """ValueError for names that have another meaning already, or are no identifiers."""
    taken = [name for name in roles if name in BUILT_IN or not name.isidentifier()]
    if taken:
        raise ValueError(
            f"got policy.roles {taken}; expected names of letters, digits and _ other than 'policy' (what is trained) and "
            "'reference' (the model without training), such as old or fast_ema"
        )
