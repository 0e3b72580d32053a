"""Plans: which steps are stochastic and where samples part. Pure data; each gives the Tree of one group.

`chain` and `window` are functions for direct use; `Chain` and `Window` are the same with a schedule over iterations,
for configurations. A plan of your own is a dataclass with `tree` and `forecast`, built on Tree.from_parents.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from samplers.trees import Cost, Tree


def chain(num_steps: int, group_size: int, *, shared_start: bool = False, train_last: bool = False) -> Tree:
    """Every step stochastic but the last (to σ = 0), which is deterministic unless `train_last` (Flow-GRPO).

    shared_start: one root, `group_size` children at the first step (DanceGRPO's shared initial noise).
    """
    return _trajectories(num_steps, group_size, 0, num_steps if train_last else num_steps - 1, shared_start)


def window(num_steps: int, group_size: int, start: int, size: int, *, shared_start: bool = True) -> Tree:
    """Steps start..start+size-1 stochastic, the others deterministic (Flow-GRPO-Fast, MixGRPO 2507.21802).

    shared_start: one root; the deterministic prefix runs once and `group_size` children part at step `start`.
    A window that holds the last step (num_steps - 1) trains it: a CPS step to σ = 0 has no noise and no gradient.
    """
    if size < 1 or start < 0 or start + size > num_steps:
        raise ValueError(
            f"window start={start}, size={size} came for {num_steps} steps; expected size >= 1 and "
            f"0 <= start <= num_steps - size = {num_steps - size}"
        )
    return _trajectories(num_steps, group_size, start, size, shared_start)


class Plan(Protocol):
    """A topology that may change from iteration to iteration; `rng` is the caller's, one per group or iteration."""

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree: ...

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The cost of one group in the most expensive iteration."""
        ...


@dataclass(frozen=True)
class Chain:
    """`chain` as a plan: the same in every iteration."""

    shared_start: bool = False
    train_last: bool = False

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The chain; `iteration` and `rng` do not matter."""
        return chain(num_steps, group_size, shared_start=self.shared_start, train_last=self.train_last)

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The exact cost of every iteration."""
        return chain(num_steps, group_size, shared_start=self.shared_start, train_last=self.train_last).cost()


class Position(Protocol):
    """Where a window starts: a value in low..last."""

    def start(self, iteration: int, low: int, last: int, rng: np.random.Generator) -> int: ...


@dataclass(frozen=True)
class Random:
    """Uniform over all positions (Flow-GRPO-Fast)."""

    def start(self, iteration: int, low: int, last: int, rng: np.random.Generator) -> int:
        """One draw from `rng`."""
        return int(rng.integers(low, last + 1))


@dataclass(frozen=True)
class Fixed:
    """Always at `at` (MixGRPO "frozen")."""

    at: int = 0

    def start(self, iteration: int, low: int, last: int, rng: np.random.Generator) -> int:
        """`at`, which must be one of the positions."""
        if not low <= self.at <= last:
            raise ValueError(f"Fixed(at={self.at}) came; expected a start inside {low}..{last} for this window")
        return self.at


@dataclass(frozen=True)
class Sliding:
    """From `low` towards the data, `stride` steps at a time (MixGRPO "progressive"); a function of the iteration.

    A position lasts `every` iterations ("constant"), or fewer and fewer: "decay" falls linearly from `every` at step 0
    to `every_min` at the last position (None: every/4, at least 1); "exp_decay" is
    ceil(every·exp(-rate·max(0, l - threshold))).
    After the last position the window stays there, or with `roll_back` starts again.
    Not kept: MixGRPO's code counts windows up to T-2 and lets them shrink to nothing; here all have the full size.
    """

    every: int = 25
    stride: int = 1
    roll_back: bool = False
    strategy: Literal["constant", "decay", "exp_decay"] = "constant"
    every_min: int | None = None
    rate: float = 0.1
    threshold: int = 13

    def __post_init__(self) -> None:
        if self.every < 1 or self.stride < 1:
            raise ValueError(f"Sliding(every={self.every}, stride={self.stride}) came; expected both at least 1")
        if self.strategy not in ("constant", "decay", "exp_decay"):
            raise ValueError(f"strategy={self.strategy!r} came; expected 'constant', 'decay' or 'exp_decay'")
        if self.every_min is not None and not 1 <= self.every_min <= self.every:
            raise ValueError(f"every_min={self.every_min} came; expected a number inside 1..every = {self.every}")
        if self.rate < 0:
            raise ValueError(f"rate={self.rate} came; expected a number >= 0")

    def start(self, iteration: int, low: int, last: int, rng: np.random.Generator) -> int:
        """The position of this iteration; `rng` does not matter."""
        positions = range(low, last + 1, self.stride)
        durations = [self._lasts(position, last) for position in positions]
        left = iteration % sum(durations) if self.roll_back else iteration
        for position, duration in zip(positions, durations, strict=True):
            if left < duration:
                return position
            left -= duration
        return positions[-1]

    def _lasts(self, position: int, last: int) -> int:
        if self.strategy == "constant" or last == 0:
            return self.every
        if self.strategy == "exp_decay":
            return math.ceil(self.every * math.exp(-self.rate * max(0, position - self.threshold)))
        fewest = self.every_min if self.every_min is not None else max(1, self.every // 4)
        return int((self.every * (last - position) + fewest * position) / last)


@dataclass(frozen=True)
class Window:
    """`window` as a plan: `size` stochastic steps, all inside low..high-1, at a place given by `position`.

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
            raise ValueError(f"Window(size={self.size}, low={self.low}) came; expected size >= 1 and low >= 0")

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The window of this iteration."""
        start = (self.position or Random()).start(iteration, self.low, self._last(num_steps), rng)
        return window(num_steps, group_size, start, self.size, shared_start=self.shared_start)

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The earliest window: it shares the shortest prefix, so no position costs more."""
        self.tree(num_steps, group_size, 0, np.random.default_rng(0))  # a position outside the window is an error
        return window(num_steps, group_size, self.low, self.size, shared_start=self.shared_start).cost()

    def _last(self, num_steps: int) -> int:
        high = num_steps - 1 if self.high is None else self.high
        if high > num_steps or high - self.size < self.low:
            raise ValueError(
                f"Window(size={self.size}, low={self.low}, high={self.high}) came for {num_steps} steps; expected "
                f"low + size <= {high} <= {num_steps}: shorten the window, move its bounds, or take more steps"
            )
        return high - self.size


def _trajectories(num_steps: int, group_size: int, start: int, size: int, shared_start: bool) -> Tree:
    """`group_size` trajectories with the stochastic steps start..start+size-1; shared up to `start` if asked."""
    if num_steps < 1 or group_size < 1:
        raise ValueError(f"num_steps={num_steps}, group_size={group_size} came; expected both at least 1")
    if shared_start and (group_size < 2 or size < 1):
        raise ValueError(
            f"shared_start came with group_size={group_size} and {size} stochastic steps; expected a group of at least "
            "2 that parts at a stochastic step: use shared_start=False or a larger group"
        )
    parent, index, level = [], [], []
    tips = [-1] * (1 if shared_start else group_size)
    for place in range(num_steps + 1):
        step = place - 1
        if shared_start and step == start:
            tips = tips * group_size
        parent += tips
        index += [place] * len(tips)
        level += [1.0 if start <= step < start + size else 0.0] * len(tips)
        tips = list(range(len(parent) - len(tips), len(parent)))
    return Tree.from_parents(parent, index, level, num_steps)
