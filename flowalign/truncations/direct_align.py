"""Direct-Align and the semantic relative preference of SRPO (2509.06942)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowalign.truncations.base import Chains, Outcome, Passes, Visit
from samplers.schedules import shift


@dataclass(frozen=True)
class DirectAlign:
    """A sample x0 is noised with a known ε to any σ, the network makes one step to σ', and x̂0 = (x' − σ'·ε)/(1 − σ') is
    recovered: exactly if v = ε − x0, so that even the noisiest levels give a clean image. Only v carries gradient.

    ε is the start noise of x0, as in the released code. Levels: σ = f_shift(1 − t), σ' = f_shift(1 − t − length), t uniform on
    [low, high − length]. ∂x̂0/∂v = −(σ − σ')/(1 − σ'): the gain is of the step's length, where that of a prediction is σ.
    inversion: how often the step goes up instead, from σ' to σ, with the gain +(σ − σ')/(1 − σ) and the words swapped: it
    takes away from the velocity what the unwanted words reward, with the opposite sign.

    Semantic relative preference: the reward is (1+k)·r(x̂0, wanted words + prompt) − r(x̂0, unwanted words + prompt), so what a
    reward model likes in every image cancels but for the share k, which goes from `discount`[0] at data to [1] at noise, read at
    the cleaner level of the step (denoising), `inversion_discount` (inversion): the code's order, whose levels count from data.
    Empty words leave the prompt as it is; with both empty the reward is k·r.

    Cost: the chain without graph, one graph, one image, scored twice. Of the paper: discounts, high, shift. low keeps 1 − σ off 0
    (the code for Qwen-Image leaves out 5 % too); length is 1 − groundtruth_ratio = .9; inversion in half of the updates is our
    reading. A rectified flow is needed."""

    wanted: str = "Realistic photo"
    unwanted: str = "CG Render"
    length: float = 0.1
    low: float = 0.05
    high: float = 0.9
    shift: float = 3.0
    discount: tuple[float, float] = (0.1, 0.25)
    inversion_discount: tuple[float, float] = (0.3, 0.01)
    inversion: float = 0.5

    def __post_init__(self) -> None:
        if not (self.length > 0 and 0 <= self.low <= self.high - self.length and self.high <= 1 and self.shift > 0):
            raise ValueError(f"got {self}; expected 0 <= low, low + length <= high <= 1, length > 0 and shift > 0")
        if not 0 <= self.inversion <= 1 or (self.inversion > 0 and self.low == 0):
            raise ValueError(f"got {self}; expected inversion in [0, 1], and low > 0 with it: x̂0 divides by 1 − σ")
        if min(*self.discount, *self.inversion_discount) < 0:
            raise ValueError(f"got {self}; expected discounts of at least 0")

    def passes(self, steps: int) -> Passes:
        return Passes(steps, 1, 1, 2)

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        if not chains.path.rectified:
            raise ValueError(
                f"got {type(self).__name__} for a policy on {type(chains.path).__name__}; expected a rectified flow"
            )
        t = self.low + float(rng.random()) * (self.high - self.length - self.low)
        inverted = float(rng.random()) < self.inversion
        noisy, clean = shift(1 - t, self.shift), shift(1 - t - self.length, self.shift)
        start, stop = (clean, noisy) if inverted else (noisy, clean)
        sample = chains.whole(())[0]
        recovered, visit = self.recovered(chains, sample, chains.x.to(sample), start, stop)
        low, high = self.inversion_discount if inverted else self.discount
        k = low + (1 - t - self.length) * (high - low)
        texts = [text and f"{text}. " for text in (self.wanted, self.unwanted)]
        first, second = reversed(texts) if inverted else texts
        return Outcome((recovered,), (visit,), ((1 + k, first), (-1.0, second)))

    def recovered(
        self, chains: Chains, sample: Tensor, noise: Tensor, start: float, stop: float
    ) -> tuple[Tensor, Visit]:
        """x̂0 [n, *] after one step of the network from level `start` to `stop`, of `sample` with `noise`."""
        x, sigma = chains.path.add_noise(sample, noise, start), torch.full((len(sample),), start, device=sample.device)
        v = chains.velocity(x, sigma, torch.arange(len(x)))
        # regularizers look at the velocity at `start`; a kernel, which they ask for a step, has none that goes up
        levels = torch.tensor([start, stop if stop < start else 0.0])
        moved = x + (stop - start) * v
        return (moved - stop * noise) / (1 - stop), Visit(x, v, levels[0], levels[1], 0)
