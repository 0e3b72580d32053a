"""A weighted sum of rewards, with the score of each part as a component."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewards.base import Reward, RewardBatch, RewardOutput
from rewards.guard import score


@dataclass(frozen=True)
class Mix:
    """sum_k weights[k] * score_k of raw scores: no standardization, so mind the scales (OCR 0..1, JPEG tens of kB).

    A sample is valid if it is for every part. Components: each part's raw score under the part's name, and the part's own
    components as `part/component`. Two parts of one class need different names. Each part is asked through `score`, so a
    failure names the part.
    """

    rewards: list[Reward]
    weights: list[float]
    name: str = "mix"

    def __post_init__(self) -> None:
        names = [part.name for part in self.rewards]
        if not names or len(names) != len(self.weights):
            raise ValueError(f"got a mix of rewards {names} and weights {self.weights}; expected one weight per reward")
        if len(set(names)) < len(names):
            raise ValueError(f"got a mix of rewards {names}; expected different names: set `name` on the equal ones")

    def load(self) -> None:
        for part in self.rewards:
            part.load()

    def close(self) -> None:
        for part in self.rewards:
            part.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        total = torch.zeros(len(batch))
        components = {}
        info = [""] * len(batch)
        for part, weight in zip(self.rewards, self.weights, strict=True):
            output = score(part, batch, max_fail_rate=1.0)  # the caller's `score` judges how many may fail
            total = total + weight * output.scores  # NaN where this part has no score
            components[part.name] = output.scores
            components |= {f"{part.name}/{key}": value for key, value in output.components.items()}
            info = [
                f"{text}; {part.name}: {more}" if more else text for text, more in zip(info, output.info, strict=True)
            ]
        return RewardOutput(total, ~total.isnan(), components, [text.removeprefix("; ") for text in info])
