"""Truncations whose reward sees the prediction x̂0 at a step before the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowalign.truncations.base import Chains, Outcome, Passes, check_steps


@dataclass(frozen=True)
class OneStep:
    """ReFL (2304.05977): x̂0 predicted at one random step k, uniform in the last `share` of the grid; only that step carries
    gradient.

    ∂x̂0/∂v_k = −σ_k. One graph, and the steps after k are not computed. share: of ImageReward's code, steps 30 to 39 of 40; it
    is rounded to whole steps, at least one. Not kept: the step's own effect on what follows; the reward sees a prediction, which
    is blurred where σ_k is large."""

    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"got {self}; expected a share of the steps in (0, 1]")

    def passes(self, steps: int) -> Passes:
        return Passes(steps - 1, 1)

    def stop(self, rng: np.random.Generator, steps: int) -> int:
        """k, of a chain of `steps`."""
        return _late(rng, steps, self.share)

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        stop = self.stop(rng, chains.steps)
        x, visits = chains.whole([stop], stop=stop)
        return Outcome((x,), visits)


@dataclass(frozen=True)
class EquallySpaced:
    """DRTune (2405.00760): `count` equally spaced steps carry gradient, the network's input is always detached, and the chain
    stops early, at a step k uniform in the last `stopping` of the grid, where the reward sees x̂0.

    ∂x̂0/∂v_j = −Δ_j of an active step, −σ_k if the stop is one of them. `count` graphs. The start of the spacing is uniform,
    the stride ⌊(k+1)/count⌋; if k+1 < count, all steps are active. Both numbers are those of FlowBP's code (2606.11075). Not kept: how a step changes what later steps see."""

    count: int = 3
    stopping: float = 0.4

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.stopping <= 1:
            raise ValueError(f"got {self}; expected count >= 1 and a share of the steps in (0, 1]")

    def passes(self, steps: int) -> Passes:
        check_steps(self, steps, self.count)
        return Passes(steps - self.count, self.count)

    def steps(self, rng: np.random.Generator, steps: int) -> tuple[list[int], int]:
        """(the active steps, the stop) of a chain of `steps`."""
        stop = _late(rng, steps, self.stopping)
        count = min(self.count, stop + 1)
        stride = (stop + 1) // count
        start = int(rng.integers(0, stop - (count - 1) * stride + 1))
        return [start + number * stride for number in range(count)], stop

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        active, stop = self.steps(rng, chains.steps)
        x, visits = chains.whole(active, cut=range(stop + 1), stop=stop)
        return Outcome((x,), visits)


def _late(rng: np.random.Generator, steps: int, share: float) -> int:
    """One of the last `share` of the steps, of which there is at least one."""
    return steps - int(rng.integers(1, max(1, round(share * steps)) + 1))
