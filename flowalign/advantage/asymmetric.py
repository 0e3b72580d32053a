"""A-GRAE: which prompts and which signs weigh more, as training goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.advantage.base import Advantages, Sets, SignalContext, Within, by_channel
from flowalign.credit import EdgeValues
from samplers import Forest


@dataclass(frozen=True)
class Asymmetric:
    """ω·z/(2√p) + (1 − ω)·z/(2√(1−p)), positive ones times min(1, ω/alpha), clamped to ±clip (A-GRAE, 2602.05548).

    z: the set's z-score (population std); p: its success rate, kept inside [1/2G, 1 − 1/2G] for G samples; ω: the
    success rate of the whole batch. Sets in which nothing differs get 0. alpha: 1 (the paper's language models), 0.5
    (multimodal); the paper does not apply it to images.
    Success rates are means of rewards in [0, 1]. rescale "quantiles" (ours, for other rewards): p and ω are means of
    (R − q05)/(q95 − q05), clamped to [0, 1], with this batch's quantiles over all edges; z is still that of R, so
    samples outside the quantiles keep their order.
    clip is ours: the one success of 24 samples gets 5 where the formula gives 7.2; a larger clip keeps it."""

    within: Within = "prompt"
    alpha: float = 0.5
    rescale: Literal["none", "quantiles"] = "none"
    clip: float = 5.0

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ValueError(f"got advantage.alpha={self.alpha}; expected a number above 0")

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        return by_channel(forest, credit, self.within, self._rule)

    def _rule(self, sets: Sets) -> tuple[Tensor, Tensor]:
        if not bool(sets.valid.any()):
            return sets.values, torch.zeros_like(sets.count)
        mean, std = sets.moments()
        success = self._success(sets)
        progress = float(success.values[success.valid].mean())
        margin = 1 / (2 * sets.samples.clamp(min=1))
        p = torch.maximum(torch.minimum(success.moments()[0], 1 - margin), margin)
        focus = progress / (2 * p.sqrt()) + (1 - progress) / (2 * (1 - p).sqrt())
        score = (sets.values - mean[sets.keys]) * (focus / std.clamp(min=1e-300))[sets.keys]
        score = torch.where(score > 0, score * min(1.0, progress / self.alpha), score)
        return score.clamp(-self.clip, self.clip), std

    def _success(self, sets: Sets) -> Sets:
        """The same sets with rewards in [0, 1]."""
        rewards = sets.values[sets.valid]
        if self.rescale == "none":
            if bool(((rewards < 0) | (rewards > 1)).any()):
                raise ValueError(
                    f"got rewards from {float(rewards.min()):.3g} to {float(rewards.max()):.3g}; A-GRAE expects success rates "
                    "inside [0, 1]: set rescale='quantiles'"
                )
            return sets
        low, high = float(rewards.quantile(0.05)), float(rewards.quantile(0.95))
        inside = ((sets.values - low) / max(high - low, 1e-300)).clamp(0, 1)
        return replace(sets, values=torch.where(sets.valid, inside, 0.0))
