"""Where windows and stochastic steps lie, iteration by iteration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


class Position(Protocol):
    """Where a window starts: a value in low..last."""

    def start(self, iteration: int, low: int, last: int, rng: np.random.Generator) -> int: ...

    def starts(self, low: int, last: int) -> Sequence[int]:
        """All that `start` may give."""
        ...


@dataclass(frozen=True)
class Random:
    """Uniform over all positions (Flow-GRPO-Fast)."""

    def start(self, iteration: int, low: int, last: int, rng: np.random.Generator) -> int:
        """One draw from `rng`."""
        return int(rng.integers(low, last + 1))

    def starts(self, low: int, last: int) -> Sequence[int]:
        """All positions."""
        return range(low, last + 1)


@dataclass(frozen=True)
class Fixed:
    """Always at `at` (MixGRPO "frozen")."""

    at: int = 0

    def start(self, iteration: int, low: int, last: int, rng: np.random.Generator) -> int:
        """`at`, which must be one of the positions."""
        if not low <= self.at <= last:
            raise ValueError(f"Fixed(at={self.at}) came; expected a start inside {low}..{last} for this window")
        return self.at

    def starts(self, low: int, last: int) -> Sequence[int]:
        """`at` alone."""
        return [self.start(0, low, last, np.random.default_rng(0))]


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
        positions = self.starts(low, last)
        durations = [self._lasts(position, last) for position in positions]
        left = iteration % sum(durations) if self.roll_back else iteration
        for position, duration in zip(positions, durations, strict=True):
            if left < duration:
                return position
            left -= duration
        return positions[-1]

    def starts(self, low: int, last: int) -> Sequence[int]:
        """Every `stride`-th position."""
        return range(low, last + 1, self.stride)

    def _lasts(self, position: int, last: int) -> int:
        if self.strategy == "constant" or last == 0:
            return self.every
        if self.strategy == "exp_decay":
            return math.ceil(self.every * math.exp(-self.rate * max(0, position - self.threshold)))
        fewest = self.every_min if self.every_min is not None else max(1, self.every // 4)
        return int((self.every * (last - position) + fewest * position) / last)


def last_start(size: int, low: int, high: int | None, num_steps: int) -> int:
    """The last place where a window of `size` inside low..high-1 can start; high None stands for num_steps - 1."""
    end = num_steps - 1 if high is None else high
    if size < 1 or low < 0 or end > num_steps or end - size < low:
        raise ValueError(
            f"a window of size={size} with low={low}, high={high} came for {num_steps} steps; expected size >= 1, "
            f"low >= 0 and low + size <= {end} <= {num_steps}: shorten it, move its bounds, or take more steps"
        )
    return end - size


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
            raise ValueError(f"candidates={given} came; expected different step numbers >= 0, at least one")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count} came; expected at least 1, or None for all candidates")

    def draw(self, num_steps: int, rng: np.random.Generator) -> tuple[int, ...]:
        """The steps of one iteration, in order."""
        among, count = self._among(num_steps)
        if count == len(among):
            return among
        return tuple(sorted(int(step) for step in rng.choice(among, count, replace=False)))

    def extremes(self, num_steps: int) -> list[tuple[int, ...]]:
        """The earliest steps, with each possible last one: early steps cost more, but for a compressed tail."""
        among, count = self._among(num_steps)
        return [(*among[: count - 1], last) for last in among[count - 1 :]]

    def _among(self, num_steps: int) -> tuple[tuple[int, ...], int]:
        among = tuple(range(num_steps - 1)) if self.candidates is None else tuple(sorted(self.candidates))
        count = len(among) if self.count is None else self.count
        if not among or among[-1] >= num_steps or count > len(among):
            raise ValueError(
                f"count={self.count} of candidates={self.candidates} came for {num_steps} steps; expected at most "
                f"{len(among)} of steps inside 0..{num_steps - 1}"
            )
        return among, count
