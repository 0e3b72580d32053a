"""Rollouts of which the states are wanted and no scores: by the policy or by other roles, to the end or only part of the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flowalign.data import PromptRecord
from flowalign.rollouts.gather import gather_forest, joined
from flowalign.rollouts.rolling import Rolling, grow
from flowalign.rollouts.task import Task
from samplers import Cost, Forest, Plan, Select, Tree, rollout, stopped_at, unscored
from samplers.selection import Score


@dataclass(frozen=True)
class BetaStep:
    """Each trajectory stops at the state of step ⌊T·u⌋ of T, u ~ Beta(a, b); keyed by iteration and group.

    (5, 2) is DanceOPD's (2606.27377): late, little noise, 10.93 of 16 steps on average; its variants are (2, 5) and (5, 5)."""

    a: float = 5.0
    b: float = 2.0

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0):
            raise ValueError(f"got BetaStep(a={self.a}, b={self.b}); expected both above 0")

    def draw(self, rng: np.random.Generator, count: int, num_steps: int) -> torch.Tensor:
        """[count] steps in 0..num_steps-1."""
        u = torch.from_numpy(rng.beta(self.a, self.b, count))
        return (u * num_steps).long().clamp(max=num_steps - 1)


@dataclass(frozen=True)
class Stopping:
    """`plan`, each root of which goes to the step that `at` draws and no further: no leaves, nothing to decode."""

    plan: Plan
    at: BetaStep

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The tree of one group."""
        tree = self.plan.tree(num_steps, group_size, iteration, rng)
        return stopped_at(tree, self.at.draw(rng, tree.num_roots, num_steps))

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """At most that of the whole plan."""
        return self.plan.forecast(num_steps, group_size)

    def select(self, score: Score) -> Select | None:
        """None: a plan that selects is refused."""
        return self.plan.select(unscored)


@dataclass(frozen=True)
class Sampler:
    """Who rolls a group out: the weights of a role, with a guidance scale."""

    role: str = "policy"
    guidance_scale: float = 1.0


@torch.no_grad()
def roll_out(
    task: Task, prompts: Sequence[PromptRecord], iteration: int, samplers: Sequence[Sampler],
    roll: Callable[..., Forest] = rollout, keep_velocities: bool = False,
) -> tuple[Forest, float, float]:  # fmt: skip
    """(the forest of all groups, network rows, seconds of this process): group g by samplers[g]; nothing is decoded or scored.

    roll, keep_velocities: as `collect`."""
    processes, before, began = task.processes, task.policy.evaluations, time.perf_counter()
    share = processes.groups(len(prompts))
    parts = []
    for sampler in dict.fromkeys(samplers[group] for group in share):
        settings = replace(task.rollout, guidance_scale=sampler.guidance_scale)
        its_task = replace(task, rollout=settings, process_rewards=())
        rolling = Rolling(its_task, prompts, iteration, roll, keep_velocities)
        with task.policy.role(sampler.role):
            parts.append(rolling.part([group for group in share if samplers[group] == sampler]))
    forest = parts[0].forest
    if len(parts) > 1:
        forest, _ = joined(grow(task.rollout, task.seed, iteration, share), share, parts)
    if processes.count > 1:
        whole = grow(task.rollout, task.seed, iteration, range(len(prompts)))
        forest = gather_forest(processes, whole, forest)
    rows = processes.total(task.policy.evaluations - before)
    return forest, rows, time.perf_counter() - began
