"""Truncations of the plain chain: the reward sees its end, and some of its steps carry gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowalign.truncations.base import Chains, Outcome, Passes, check_steps, visit


@dataclass(frozen=True)
class LastSteps:
    """The last `count` steps (DRaFT-K, 2309.17400); None: all of them (DRaFT, AlignProp without truncation).

    ∂x_S/∂v_k = b_k·Π_{j>k}(a_j + b_j·∂v_j/∂x) of the active steps, −Δ_k·Π(1 − Δ_j·∂v_j/∂x) for the ODE. `count` graphs. Not
    kept: what the other steps would change."""

    count: int | None = 1

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"got LastSteps(count={self.count}); expected at least 1, or null for all steps")

    def passes(self, steps: int) -> Passes:
        check_steps(self, steps, self.count or 1)
        return Passes(steps - (self.count or steps), self.count or steps)

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        x, visits = chains.whole(range(chains.steps - (self.count or chains.steps), chains.steps))
        return Outcome((x,), visits)


@dataclass(frozen=True)
class RandomSuffix:
    """AlignProp (2310.03739): the steps after a random cut.

    The paper's randomized truncation keeps one contiguous suffix, and so does this part: its length is uniform on
    `shortest`..T. independent: as the released code draws, which draws the cut anew at every step, so that step i of T keeps
    its gradient by itself with probability (i+1)/(T+1); of none (probability T!/(T+1)^T) the last. Not kept: a cut after the
    last step, which the code allows and which would train nothing."""

    shortest: int = 1
    independent: bool = False

    def __post_init__(self) -> None:
        if self.shortest < 1 or (self.independent and self.shortest > 1):
            raise ValueError(f"got {self}; expected shortest >= 1, and 1 with independent draws, which have no suffix")

    def passes(self, steps: int) -> Passes:
        check_steps(self, steps, self.shortest)
        return Passes(0, steps)

    def active(self, rng: np.random.Generator, steps: int) -> list[int]:
        """The steps that carry gradient, of `steps`."""
        if not self.independent:
            return list(range(steps - int(rng.integers(self.shortest, steps + 1)), steps))
        kept = [step for step in range(steps) if int(rng.integers(0, steps + 1)) <= step]
        return kept or [steps - 1]

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        x, visits = chains.whole(self.active(rng, chains.steps))
        return Outcome((x,), visits)


@dataclass(frozen=True)
class LowVariance:
    """DRaFT-LV (2309.17400): the last step, and again from `copies` re-noised copies of the sample; the loss is the mean.

    y_i = add_noise(x_S, ε_i, σ_{S−1}), x_S without graph; ∂/∂v = −σ_{S−1} for each. with_sample: whether the sample itself is
    one of them (as in the code of FlowBP, 2606.11075) or only gives the copies; the paper's text can be read both ways. The
    copies' steps are deterministic."""

    copies: int = 2
    with_sample: bool = True

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"got LowVariance(copies={self.copies}); expected at least 1: else take LastSteps(1)")

    def passes(self, steps: int) -> Passes:
        graphs = self.copies + self.with_sample
        return Passes(steps - self.with_sample, graphs, graphs, graphs)

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        last, sigmas = chains.steps - 1, chains.sigmas[-2:]
        x, visits = chains.whole([last] if self.with_sample else [])
        looks = [x] if self.with_sample else []
        for number in range(self.copies):
            copy = chains.path.add_noise(x.detach(), chains.renoise(number).to(x), float(sigmas[0]))
            unrolled = chains.run(copy, sigmas, active=[0])
            looks.append(unrolled.x)
            visits = (*visits, visit(unrolled, sigmas, 0, number=last))
        return Outcome(tuple(looks), visits)
