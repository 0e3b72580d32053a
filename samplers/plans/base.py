"""What a plan is, and the one grower behind chains, windows and trees."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Protocol

import numpy as np

from samplers.selection import Score, Select
from samplers.trees import Cost, Tree


class Plan(Protocol):
    """A topology that may change from iteration to iteration; `rng` is the caller's, one per group or iteration."""

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree: ...

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The most that one group costs in any iteration, each number by itself."""
        ...

    def select(self, score: Score) -> Select | None:
        """What `rollout` drops states by, given what scores them; None: every state of the tree is rolled out."""
        ...


class Bounded(Plan, Protocol):
    """A plan that others can wrap: it knows its extreme topologies, so the wrapped cost is known as well."""

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """Trees that bound the cost of every iteration's tree: none costs more in any number, plain or wrapped."""
        ...


def costliest(plan: Bounded, num_steps: int, group_size: int) -> Cost:
    """The `forecast` of a plan that knows its extremes: the most that they cost, each number by itself."""
    return most([tree.cost() for tree in plan.extremes(num_steps, group_size)])


def select_nothing(plan: Plan, score: Score) -> Select | None:
    """The `select` of a plan that drops no state."""
    return None


def most(costs: Sequence[Cost]) -> Cost:
    """The most of each number."""
    return Cost(*(max(vars(cost)[entry.name] for cost in costs) for entry in fields(Cost)))


def grow(roots: int, width: Sequence[int], level: Sequence[float]) -> Tree:
    """The tree of one group, step by step: every state has width[i] children at step i, reached at level[i]."""
    num_steps = len(width)
    if num_steps < 1 or roots < 1:
        raise ValueError(f"num_steps={num_steps}, group_size={roots} came; expected both at least 1")
    for step, (children, noise) in enumerate(zip(width, level, strict=True)):
        if children < 1 or (children > 1 and noise == 0):
            raise ValueError(
                f"{children} children at step {step} with level {noise} came; expected at least one, and one only where "
                "the step is deterministic: siblings would be equal"
            )
    tips = list(range(roots))
    parents, indices, levels = [-1] * roots, [0] * roots, [0.0] * roots
    for step in range(num_steps):
        above = [tip for tip in tips for _ in range(width[step])]
        tips = list(range(len(parents), len(parents) + len(above)))
        parents += above
        indices += [step + 1] * len(above)
        levels += [level[step]] * len(above)
    return Tree.from_parents(parents, indices, levels, num_steps)
