"""Roles: further sets of the trained weights on the same base, where they start, and what they follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import Parameter

BUILT_IN = ("policy", "reference")


@dataclass(frozen=True)
class Role:
    """A second set of the trained weights.

    init: "policy", a copy of its weights; "reference", the model without training; or what is on a disk: of a policy with a
    LoRA a folder with another one (a run's lora/, or diffusers' save_lora_weights), with its own alpha; of a policy that
    trains full weights a pipeline with the same network (the teacher of a distilled model). update: "frozen" never changes; "copy" takes over the weights of
    `of`, "policy" or another role (an `old` snapshot); "ema" is role ← d·role + (1-d)·of; "trained" has its own optimizer,
    which the trainer makes and steps. Roles follow after each optimizer step of the policy, a role after the one it follows.

    every: optimizer steps between two changes, at least 1. decay in [0, 1): d, or without a `rate` its constant. With one,
    d = min(decay, offset + rate·(n - start)) at the n-th change, and 0 (a copy) before the change `start`: the schedule of
    DiffusionNFT's sampling policy (arXiv:2509.16117). rate > 0; offset in [0, 1); start at least 0."""

    update: Literal["frozen", "copy", "ema", "trained"] = "frozen"
    every: int = 1
    decay: float = 0.9
    rate: float | None = None
    offset: float = 0.0
    start: int = 0
    init: str = "policy"
    of: str = "policy"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"got role.every={self.every}; expected a number of optimizer steps, at least 1")
        if not 0 <= self.decay < 1:
            raise ValueError(f"got role.decay={self.decay}; expected 0 <= decay < 1, such as 0.9")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"got role.rate={self.rate}; expected a positive number, or null for a constant decay")
        if not 0 <= self.offset < 1 or self.start < 0:
            raise ValueError(
                f"got role.offset={self.offset}, role.start={self.start}; expected 0 <= offset < 1 and start >= 0"
            )
        if self.rate is None and self.offset:
            raise ValueError(
                f"got role.offset={self.offset} without a rate, which it would not change: set role.rate too"
            )
        if self.of != "policy" and not self.follows:
            raise ValueError(
                f"got role.of={self.of!r} with update={self.update}, which follows nothing: set update to copy or ema"
            )

    @property
    def follows(self) -> bool:
        """Whether its weights follow those of `of`; else nothing but its own optimizer, if any, changes them."""
        return self.update in ("copy", "ema")

    @property
    def folder(self) -> str | None:
        """The folder of a LoRA, or the pipeline, from which it starts, if it does."""
        return None if self.init in BUILT_IN else self.init

    def decay_at(self, update: int) -> float:
        """The share of the role's old weights that its `update`-th change (1 is the first) keeps, in [0, 1)."""
        if update < self.start:
            return 0.0
        return self.decay if self.rate is None else min(self.decay, self.offset + self.rate * (update - self.start))


Named = Iterable[tuple[str, Parameter]]


@torch.no_grad()
def follow(role: Role, step: int, source: Named, own: Named) -> None:
    """Updates a role's weights after the policy's `step`-th optimizer step (1 is the first), if it is due. In place: never
    call it between a forward under the role and its backward."""
    if not role.follows or step % role.every:
        return
    keep = role.decay_at(step // role.every) if role.update == "ema" else 0.0
    for (_, theirs), (_, target) in zip(source, own, strict=True):
        target.lerp_(theirs.to(target.dtype), 1 - keep)


def check_roles(roles: Mapping[str, Role]) -> None:
    """ValueError for names that have another meaning already, or are no identifiers, and for roles that follow a role that
    is not there, or each other in a circle."""
    taken = [name for name in roles if name in BUILT_IN or not name.isidentifier()]
    if taken:
        raise ValueError(
            f"got policy.roles {taken}; expected names of letters, digits and _ other than 'policy' (what is trained) and "
            "'reference' (the model without training), such as old or fast_ema"
        )
    in_order(roles)


def in_order(roles: Mapping[str, Role]) -> list[str]:
    """The names, each after the role that it follows. ValueError as for `check_roles`."""
    order: list[str] = []
    for name, role in roles.items():
        if role.of != "policy" and role.of not in roles:
            raise ValueError(
                f"got policy.roles.{name}.of={role.of!r}; expected 'policy' or one of {', '.join(roles)}: add that role"
            )
    while len(order) < len(roles):
        ready = [n for n, role in roles.items() if n not in order and role.of in ("policy", *order)]
        if not ready:
            circle = [name for name in roles if name not in order]
            raise ValueError(
                f"got policy.roles {', '.join(circle)}, which follow each other in a circle; expected one of them to follow "
                "the policy: set its `of` to policy"
            )
        order += ready
    return order
