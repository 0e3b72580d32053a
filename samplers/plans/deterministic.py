"""Independent samples of the ODE: nothing to train in the rollout itself, only clean latents."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samplers.plans.base import costliest, select_nothing
from samplers.plans.chains import scattered
from samplers.trees import Tree


@dataclass(frozen=True)
class Deterministic:
    """`group_size` samples, each from a start of its own, every step deterministic (level 0).

    For trainers that use the clean latents (DiffusionNFT 2509.16117, AWM 2509.25050) or chosen states of the way, which
    `rollout(..., keep="all")` stores. There are no edges, hence no log-probs: PolicyGradient refuses it.
    """

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The chains; `iteration` and `rng` do not matter."""
        return scattered(num_steps, group_size, (), shared_start=False)

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """The one tree."""
        return [scattered(num_steps, group_size, (), shared_start=False)]
