"""A weighted sum of rewards, with the score of each part as a component."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec
from rewards.parts import ask, check_names, check_one_channel, close_parts, joint_spec, load_parts, wants_gradient


@dataclass(frozen=True, eq=False)
class Mix:
    """sum_k weights[k] * score_k of raw scores: no standardization, so mind the scales (OCR 0..1, JPEG tens of kB).

    One channel: the sum. A part of several channels is refused, since a weight is for one score; `Channels` keeps them
    apart. A sample is valid if it is for every part. Components: each part's raw score under the part's name, and the part's
    own components as `part/component`. Two parts of one class need different names. Each part is asked through `score`, so
    a failure names the part. Uncertainty: sum_k |weights[k]| * u_k, an upper bound, over the parts that state one.
    """

    rewards: list[Reward]
    weights: list[float]
    name: str = "mix"

    def __post_init__(self) -> None:
        check_names("a mix", self.rewards)
        if len(self.rewards) != len(self.weights):
            names = [part.name for part in self.rewards]
            raise ValueError(f"got a mix of rewards {names} and weights {self.weights}; expected one weight per reward")
        check_one_channel("a mix", self.rewards)
        joint_spec("a mix", self.rewards)

    @property
    def spec(self) -> RewardSpec:
        """The parts' together, one channel."""
        return joint_spec("a mix", self.rewards)

    load, close = load_parts, close_parts

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        outputs, parts, info = ask(self.rewards, batch, grad=wants_gradient(self.spec))
        total = torch.zeros_like(outputs[0].scores[:, 0])
        uncertainty = None
        components = {}
        for part, weight, output in zip(self.rewards, self.weights, outputs, strict=True):
            column = output.scores[:, 0].to(total)
            total = total + weight * column  # NaN where this part has no score
            components[part.name] = column.detach().float()
            if output.uncertainty is not None:
                more = abs(weight) * output.uncertainty[:, 0].to(total)
                uncertainty = more if uncertainty is None else uncertainty + more
        return RewardOutput(total, ~total.isnan(), components | parts, info, uncertainty=uncertainty)
