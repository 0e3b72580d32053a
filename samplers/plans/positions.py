"""Where windows and stochastic steps lie, iteration by iteration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


class Position(Protocol):
    """Where a window of `size` steps inside low..high-1 starts: a step in low..high-size."""

    def start(self, iteration: int, low: int, high: int, size: int, rng: np.random.Generator) -> int:
        """The first step of this iteration's window."""
        ...

    def starts(self, low: int, high: int, size: int) -> Sequence[int]:
        """All that `start` may give."""
        ...


@dataclass(frozen=True)
class Random:
    """Uniform over all positions (Flow-GRPO-Fast)."""

    def start(self, iteration: int, low: int, high: int, size: int, rng: np.random.Generator) -> int:
        """One draw from `rng`."""
        return int(rng.integers(low, high - size + 1))

    def starts(self, low: int, high: int, size: int) -> Sequence[int]:
        """All positions."""
        return range(low, high - size + 1)


@dataclass(frozen=True)
class Fixed:
    """Always at `at` (MixGRPO "frozen")."""

    at: int = 0

    def start(self, iteration: int, low: int, high: int, size: int, rng: np.random.Generator) -> int:
        """`at`, which must be one of the positions."""
        if not low <= self.at <= high - size:
            raise ValueError(f"got Fixed(at={self.at}); expected a start inside {low}..{high - size} for this window")
        return self.at

    def starts(self, low: int, high: int, size: int) -> Sequence[int]:
        """`at` alone."""
        return [self.start(0, low, high, size, np.random.default_rng(0))]


@dataclass(frozen=True)
class Sliding:
    """From `low` towards the data, `stride` steps at a time (MixGRPO 2507.21802, "progressive"); a function of the
    iteration.

    A window that starts at step l lasts `every` iterations ("constant"), or fewer and fewer: "decay" lasts
    int(every·(1 - l/l_max) + every_min·l/l_max), l_max = high - 1, which is T-2 by default as in MixGRPO's code
    (every_min None: every/4, at least 1); "exp_decay" lasts ceil(every·exp(-rate·max(0, l - threshold))).
    After the last position the window stays there, or with `roll_back` starts again.
    Not kept: MixGRPO's code moves l on to l_max = T-2 and lets the window shrink to nothing on the way; here all
    windows have the full size, so the last one starts at high - size and "decay" does not come down to every_min.
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
            raise ValueError(f"got Sliding(every={self.every}, stride={self.stride}); expected both at least 1")
        if self.strategy not in ("constant", "decay", "exp_decay"):
            raise ValueError(f"got strategy={self.strategy!r}; expected 'constant', 'decay' or 'exp_decay'")
        if self.every_min is not None and not 1 <= self.every_min <= self.every:
            raise ValueError(f"got every_min={self.every_min}; expected a number inside 1..every = {self.every}")
        if self.rate < 0:
            raise ValueError(f"got rate={self.rate}; expected a number >= 0")

    def start(self, iteration: int, low: int, high: int, size: int, rng: np.random.Generator) -> int:
        """The position of this iteration; `rng` does not matter."""
        positions = self.starts(low, high, size)
        durations = [self.duration(position, high) for position in positions]
        left = iteration % sum(durations) if self.roll_back else iteration
        for position, duration in zip(positions, durations, strict=True):
            if left < duration:
                return position
            left -= duration
        return positions[-1]

    def starts(self, low: int, high: int, size: int) -> Sequence[int]:
        """Every `stride`-th position."""
        return range(low, high - size + 1, self.stride)

    def duration(self, position: int, high: int) -> int:
        """How many iterations the window that starts at step `position` lasts; it lies below step `high`."""
        if self.strategy == "constant":
            return self.every
        if self.strategy == "exp_decay":
            return math.ceil(self.every * math.exp(-self.rate * max(0, position - self.threshold)))
        fewest = self.every_min if self.every_min is not None else max(1, self.every // 4)
        progress = position / max(high - 1, 1)
        return max(fewest, int(self.every * (1 - progress) + fewest * progress))


def window_end(size: int, low: int, high: int | None, num_steps: int) -> int:
    """The `high` of a window of `size` steps inside low..high-1, checked; None stands for num_steps - 1."""
    end = num_steps - 1 if high is None else high
    if size < 1 or low < 0 or end > num_steps or end - size < low:
        raise ValueError(
            f"got a window of size={size} with low={low}, high={high} for {num_steps} steps; expected size >= 1, "
            f"low >= 0 and low + size <= {end} <= {num_steps}: shorten it, move its bounds, or take more steps"
        )
    return end


@dataclass(frozen=True)
class Steps:
    """`count` of `candidates`, drawn anew in each iteration (Flow-Factory).

    candidates: None stands for all steps but the last. count: None stands for all candidates.
    """

    candidates: tuple[int, ...] | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        given = self.candidates
        if given is not None and (not given or len(set(given)) < len(given) or min(given) < 0):
            raise ValueError(f"got candidates={given}; expected different step numbers >= 0, at least one")
        if self.count is not None and self.count < 1:
            raise ValueError(f"got count={self.count}; expected at least 1, or None for all candidates")

    def draw(self, num_steps: int, rng: np.random.Generator) -> tuple[int, ...]:
        """The steps of one iteration, in order."""
        candidates, count = self._candidates(num_steps)
        if count == len(candidates):
            return candidates
        return tuple(sorted(int(step) for step in rng.choice(candidates, count, replace=False)))

    def extremes(self, num_steps: int) -> list[tuple[int, ...]]:
        """The earliest steps, with each possible last one: earlier steps cost more, except that a later last step costs
        more where tails are compressed."""
        candidates, count = self._candidates(num_steps)
        return [(*candidates[: count - 1], last) for last in candidates[count - 1 :]]

    def _candidates(self, num_steps: int) -> tuple[tuple[int, ...], int]:
        """The candidates in order, and how many of them are drawn."""
        candidates = tuple(range(num_steps - 1)) if self.candidates is None else tuple(sorted(self.candidates))
        count = len(candidates) if self.count is None else self.count
        if not candidates or candidates[-1] >= num_steps or count > len(candidates):
            raise ValueError(
                f"got count={self.count} of candidates={self.candidates} for {num_steps} steps; expected at most "
                f"{len(candidates)} of steps inside 0..{num_steps - 1}"
            )
        return candidates, count
