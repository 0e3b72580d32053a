"""Chains: every sample is a trajectory of its own, from the start or from where the group parts.

`chain`, `window` and `scattered` are functions for direct use; `Chain`, `Window` and `RandomSteps` the same as plans.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from samplers.plans.base import costliest, grow, select_nothing
from samplers.plans.positions import Position, Random, Steps, window_end
from samplers.trees import Tree


def chain(num_steps: int, group_size: int, *, shared_start: bool = False, train_last: bool = False) -> Tree:
    """Every step stochastic but the last (to σ = 0), which is deterministic unless `train_last` (Flow-GRPO).

    shared_start: one root, `group_size` children at the first step (DanceGRPO's shared initial noise).
    """
    return scattered(
        num_steps, group_size, range(num_steps if train_last else num_steps - 1), shared_start=shared_start
    )


def window(num_steps: int, group_size: int, start: int, size: int, *, shared_start: bool = True) -> Tree:
    """Steps start..start+size-1 stochastic, the others deterministic (Flow-GRPO-Fast, MixGRPO 2507.21802).

    shared_start: one root; the deterministic prefix runs once and `group_size` children part at step `start`.
    A window that holds the last step (num_steps - 1) trains it: the reward then sees the noise of Flow-SDE and
    Dance-SDE; a CPS step to σ = 0 has no noise and no gradient.
    """
    if size < 1 or start < 0 or start + size > num_steps:
        raise ValueError(
            f"got window start={start}, size={size} for {num_steps} steps; expected size >= 1 and "
            f"0 <= start <= num_steps - size = {num_steps - size}"
        )
    return scattered(num_steps, group_size, range(start, start + size), shared_start=shared_start)


def scattered(num_steps: int, group_size: int, steps: Collection[int], *, shared_start: bool = True) -> Tree:
    """The steps of `steps` stochastic, the others deterministic; `window`, but the steps need not be consecutive.

    shared_start: one root; `group_size` children part at the first stochastic step.
    """
    if any(not 0 <= step < num_steps for step in steps):
        raise ValueError(f"got steps {sorted(steps)}; expected numbers inside 0..{num_steps - 1}")
    if shared_start and (group_size < 2 or not steps):
        raise ValueError(
            f"got shared_start with group_size={group_size} and {len(steps)} stochastic steps; expected a group of at "
            "least 2 that parts at a stochastic step: use shared_start=False or a larger group"
        )
    width = [1] * num_steps
    if shared_start:
        width[min(steps)] = group_size
    level = [float(step in steps) for step in range(num_steps)]
    return grow(1 if shared_start else group_size, width, level)


@dataclass(frozen=True)
class Chain:
    """`chain` as a plan: the same in every iteration."""

    shared_start: bool = False
    train_last: bool = False

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The chain; `iteration` and `rng` do not matter."""
        return chain(num_steps, group_size, shared_start=self.shared_start, train_last=self.train_last)

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """The one tree."""
        return [chain(num_steps, group_size, shared_start=self.shared_start, train_last=self.train_last)]


@dataclass(frozen=True)
class Window:
    """`window` as a plan: `size` stochastic steps, all inside low..high-1, that start where `position` says.

    high: None stands for num_steps - 1, which keeps the last step deterministic; num_steps allows it.
    position: None stands for Random().
    """

    size: int = 1
    low: int = 0
    high: int | None = None
    position: Position | None = None
    shared_start: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.low < 0:
            raise ValueError(f"got Window(size={self.size}, low={self.low}); expected size >= 1 and low >= 0")

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The window of this iteration."""
        high = window_end(self.size, self.low, self.high, num_steps)
        start = (self.position or Random()).start(iteration, self.low, high, self.size, rng)
        return window(num_steps, group_size, start, self.size, shared_start=self.shared_start)

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """One tree per position."""
        high = window_end(self.size, self.low, self.high, num_steps)
        starts = (self.position or Random()).starts(self.low, high, self.size)
        return [window(num_steps, group_size, start, self.size, shared_start=self.shared_start) for start in starts]


@dataclass(frozen=True)
class RandomSteps:
    """`count` stochastic steps out of `candidates`, drawn each iteration (Flow-Factory: one of 1, 2, 3 for FLUX).

    candidates: None stands for all but the last. count: None stands for all of them.
    """

    count: int | None = 1
    candidates: tuple[int, ...] | None = None
    shared_start: bool = True

    def __post_init__(self) -> None:
        self._steps()

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The steps of this iteration."""
        return scattered(num_steps, group_size, self._steps().draw(num_steps, rng), shared_start=self.shared_start)

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """The earliest steps, with each possible last one."""
        sets = self._steps().extremes(num_steps)
        return [scattered(num_steps, group_size, steps, shared_start=self.shared_start) for steps in sets]

    def _steps(self) -> Steps:
        return Steps(self.candidates, self.count)
