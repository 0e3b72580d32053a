"""A-GRAE: which prompts and which signs weigh more, as training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.advantage.base import Advantages, Sets, Within, by_channel
from flowalign.credit import EdgeValues
from samplers import Forest


@dataclass(frozen=True)
class Asymmetric:
    """ω·z/(2√p) + (1 − ω)·z/(2√(1−p)), positive ones times min(1, ω/alpha) (A-GRAE 2602.05548; grpo_family §10.2).

    z: the set's z-score (population std); p: its mean reward, kept inside [1/2G, 1 − 1/2G] for G samples; ω: the mean
    reward of the whole batch. Sets in which nothing differs get 0. alpha: 1 (the paper's language models), 0.5
    (multimodal); it was never applied to images there.
    Rewards must lie in [0, 1]; rescale "quantiles" maps the batch's 5 % and 95 % quantiles there first (ours; of this
    batch, not running)."""

    within: Within = "prompt"
    alpha: float = 0.5
    rescale: Literal["none", "quantiles"] = "none"
    clip: float = 5.0

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ValueError(f"advantage.alpha={self.alpha} came; expected a number above 0")

    def compare(self, forest: Forest, credit: EdgeValues) -> Advantages:
        return by_channel(forest, credit, self.within, self._rule)

    def _rule(self, sets: Sets) -> tuple[Tensor, Tensor]:
        if not bool(sets.valid.any()):
            return sets.values, torch.zeros_like(sets.count)
        sets = self._scaled(sets)
        mean, std = sets.moments()
        progress = float(sets.values[sets.valid].mean())
        margin = 1 / (2 * sets.samples.clamp(min=1))
        p = torch.maximum(torch.minimum(mean, 1 - margin), margin)
        focus = progress / (2 * p.sqrt()) + (1 - progress) / (2 * (1 - p).sqrt())
        score = (sets.values - mean[sets.keys]) * (focus / std.clamp(min=1e-300))[sets.keys]
        score = torch.where(score > 0, score * min(1.0, progress / self.alpha), score)
        return score.clamp(-self.clip, self.clip), std

    def _scaled(self, sets: Sets) -> Sets:
        known = sets.values[sets.valid]
        if self.rescale == "none":
            if bool(((known < 0) | (known > 1)).any()):
                raise ValueError(
                    f"rewards from {float(known.min()):.3g} to {float(known.max()):.3g} came; A-GRAE expects success "
                    "rates inside [0, 1]: set rescale='quantiles'"
                )
            return sets
        low, high = float(known.quantile(0.05)), float(known.quantile(0.95))
        inside = ((sets.values - low) / max(high - low, 1e-300)).clamp(0, 1)
        return Sets(sets.keys, torch.where(sets.valid, inside, 0.0), sets.valid, sets.count, sets.samples)
