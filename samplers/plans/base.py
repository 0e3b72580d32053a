"""What a plan is, and the function that builds the trees of chains, windows and splits."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Protocol

import numpy as np

from samplers.selection import Score, Select
from samplers.trees import Cost, Tree

MAX_STATES = 2_000_000  # of one group; building it takes some seconds


class Plan(Protocol):
    """The topology of one group's rollout, which may change from iteration to iteration."""

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The tree of one group; a function of the arguments and of what `rng` draws."""
        ...

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The most that one group costs in any iteration, each number by itself."""
        ...

    def select(self, score: Score) -> Select | None:
        """Which states `rollout` drops, by their `score` (the higher, the better); None: it drops no state."""
        ...


class Bounded(Plan, Protocol):
    """A plan that others can wrap: it gives its most expensive topologies, from which a wrapper computes its own cost."""

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """Trees of which, for each number of `Cost`, one is at least as high as any iteration's tree, plain or wrapped."""
        ...


def costliest(plan: Bounded, num_steps: int, group_size: int) -> Cost:
    """The `forecast` of a plan with extremes: the most that they cost, each number by itself."""
    return most([tree.cost() for tree in plan.extremes(num_steps, group_size)])


def select_nothing(plan: Plan, score: Score) -> Select | None:
    """The `select` of a plan that drops no state."""
    return None


def most(costs: Sequence[Cost]) -> Cost:
    """The maximum of each number over `costs`."""
    return Cost(*(max(vars(cost)[entry.name] for cost in costs) for entry in fields(Cost)))


def check_states(count: int) -> None:
    """ValueError for a group's tree of more than MAX_STATES states, before it is built."""
    if count > MAX_STATES:
        raise ValueError(
            f"got a tree of {count:,} states for one group; expected at most {MAX_STATES:,}: take fewer steps, a smaller "
            "group_size, or a plan with fewer children"
        )


def grow(roots: int, width: Sequence[int], level: Sequence[float]) -> Tree:
    """The tree of one group, step by step: every state has width[i] children at step i, reached at level[i]."""
    num_steps = len(width)
    if num_steps < 1 or roots < 1:
        raise ValueError(f"got num_steps={num_steps}, group_size={roots}; expected both at least 1")
    for step, (children, noise) in enumerate(zip(width, level, strict=True)):
        if children < 1 or (children > 1 and noise == 0):
            raise ValueError(
                f"got {children} children at step {step} with level {noise}; expected at least one, and one only where "
                "the step is deterministic: siblings would be equal"
            )
    count = widest = roots
    for children in width:
        widest *= children
        count += widest
    check_states(count)
    states = list(range(roots))  # of the generation that the next step leaves
    parents, indices, levels = [-1] * roots, [0] * roots, [0.0] * roots
    for step in range(num_steps):
        repeated = [state for state in states for _ in range(width[step])]
        states = list(range(len(parents), len(parents) + len(repeated)))
        parents += repeated
        indices += [step + 1] * len(repeated)
        levels += [level[step]] * len(repeated)
    return Tree.from_parents(parents, indices, levels, num_steps)
