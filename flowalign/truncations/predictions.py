"""Truncations whose reward sees the prediction x̂0 at a step before the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowalign.truncations.base import Chains, Outcome, Passes


@dataclass(frozen=True)
class OneStep:
    """ReFL (2304.05977): x̂0 predicted at one random step k, uniform on low..high−1; only that step carries gradient.

    ∂x̂0/∂v_k = −σ_k. One graph, and the steps after k are not computed. ImageReward's code: 30..39 of 40. Negative numbers
    count from the end, None is T: OneStep(-10, None) are the last ten. Not kept: the step's own effect on what follows; the
    reward sees a prediction, which is blurred where σ_k is large."""

    low: int = -10
    high: int | None = None

    def passes(self, steps: int) -> Passes:
        return Passes(self._range(steps)[1] - 1, 1)

    def _range(self, steps: int) -> tuple[int, int]:
        low = self.low + steps * (self.low < 0)
        high = steps if self.high is None else self.high + steps * (self.high < 0)
        if not 0 <= low < high <= steps:
            raise ValueError(
                f"got {self} with rollout.num_inference_steps={steps}; expected low < high inside 0..{steps}, negative numbers "
                "from the end: change them, or take more steps"
            )
        return low, high

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        stop = int(rng.integers(*self._range(chains.steps)))
        x, visits = chains.whole([stop], stop=stop)
        return Outcome((x,), visits)


@dataclass(frozen=True)
class EquallySpaced:
    """DRTune (2405.00760): `count` equally spaced steps carry gradient, the network's input is always detached, and the chain
    stops early, at a step k uniform in the last `stopping` of the grid, where the reward sees x̂0.

    ∂x̂0/∂v_j = −Δ_j of an active step, −σ_k if the stop is one of them. `count` graphs. The start of the spacing is uniform,
    the stride ⌊(k+1)/count⌋; if k+1 < count, all steps are active. Numbers of the code of FlowBP (2606.11075), since the
    paper's were not at hand. Not kept: how a step changes what later steps see."""

    count: int = 3
    stopping: float = 0.4

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.stopping <= 1:
            raise ValueError(f"got {self}; expected count >= 1 and a share of the steps in (0, 1]")

    def passes(self, steps: int) -> Passes:
        count = min(self.count, steps)
        return Passes(steps - count, count)

    def steps(self, rng: np.random.Generator, steps: int) -> tuple[list[int], int]:
        """(the active steps, the stop) of a chain of `steps`."""
        stop = steps - int(rng.integers(1, max(1, round(self.stopping * steps)) + 1))
        count = min(self.count, stop + 1)
        stride = (stop + 1) // count
        start = int(rng.integers(0, stop - (count - 1) * stride + 1))
        return [start + number * stride for number in range(count)], stop

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        active, stop = self.steps(rng, chains.steps)
        x, visits = chains.whole(active, cut=range(stop + 1), stop=stop)
        return Outcome((x,), visits)
