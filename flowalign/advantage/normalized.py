"""The group z-score and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.advantage.base import Advantages, Sets, SignalContext, Within, by_channel
from flowalign.credit import EdgeValues
from samplers import Forest


@dataclass(frozen=True)
class Normalized:
    """(value − mean of its set) / (std + delta), clamped to ±clip (Flow-GRPO, 2505.05470).

    std: "set" the set's own (per-prompt), "batch" that of all valid edges (flow_grpo's global std), "largest" the
    largest of all sets (LongCat-Video), "pooled" that of all centered values (RAM 2605.10759: hard prompts keep small
    advantages), "none" no division (Dr. GRPO). Population std unless `unbiased` (DanceGRPO),
    which counts samples: as many as one grid step of the set has edges. trim: this share of each set's samples, rounded
    down, is left out of mean and std, the worst ones ("low", MixGRPO) or as many best ones too ("both", UniRL); they
    still get an advantage. A set of fewer than two valid edges has no baseline: its edges are invalid. A set whose std
    is below 1e-6 gets advantage 0."""

    within: Within = "prompt"
    std: Literal["set", "batch", "largest", "pooled", "none"] = "set"
    delta: float = 1e-4
    clip: float = 5.0
    unbiased: bool = False
    trim: float = 0.0
    trim_side: Literal["low", "both"] = "low"

    def __post_init__(self) -> None:
        if self.delta < 0 or self.clip <= 0:  # clamp(-clip, clip) would give them all one value
            raise ValueError(f"got advantage.delta={self.delta}, advantage.clip={self.clip}; expected >= 0 and > 0")
        if not 0 <= self.trim < (0.5 if self.trim_side == "both" else 1):
            raise ValueError(
                f"got advantage.trim={self.trim}; expected a share from 0 to below 1, below 0.5 with trim_side='both'"
            )

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        return by_channel(forest, credit, self.within, self._rule)

    def _rule(self, sets: Sets) -> tuple[Tensor, Tensor]:
        left_out = (self.trim * sets.samples + 1e-9).floor()  # samples of each set, on one side
        mean, std = sets.moments(self._inner(sets, left_out))
        if self.unbiased:
            count = sets.samples - left_out * (2 if self.trim_side == "both" else 1)
            std = std * (count / (count - 1).clamp(min=1)).sqrt()
        advantage = sets.values - mean[sets.keys]
        if self.std != "none":
            advantage = advantage / (self._scale(std, sets)[sets.keys] + self.delta)
        return advantage.clamp(-self.clip, self.clip), std

    def _scale(self, std: Tensor, sets: Sets) -> Tensor:
        if self.std == "batch":  # of the raw rewards of the whole batch, not of the centered ones (flow_grpo)
            return sets.values[sets.valid].std(correction=0).expand_as(std)
        if self.std == "largest":
            return (std[sets.usable].max() if bool(sets.usable.any()) else std.new_zeros(())).expand_as(std)
        if self.std == "pooled":
            valid = sets.valid & sets.usable[sets.keys]
            mean, _ = sets.moments()
            spread = (sets.values - mean[sets.keys])[valid].square().mean() if bool(valid.any()) else std.new_zeros(())
            return spread.sqrt().expand_as(std)
        return std

    def _inner(self, sets: Sets, left_out: Tensor) -> Tensor:
        """[E] the valid edges that count in the statistics; `left_out` [K] samples on one side do not."""
        if not self.trim:
            return sets.valid
        order = torch.argsort(sets.values, stable=True)
        order = order[sets.valid[order]]
        order = order[sets.keys[order].argsort(stable=True)]  # set after set, the worst of each first
        begin = sets.count.cumsum(0) - sets.count
        rank = torch.arange(len(order)) - begin[sets.keys[order]]
        per_sample = sets.count / sets.samples.clamp(min=1)  # in a chain a sample has this many edges, of one value
        cut = (left_out * per_sample)[sets.keys[order]]
        inside = rank >= cut
        if self.trim_side == "both":
            inside &= rank < sets.count[sets.keys[order]] - cut
        inner = torch.zeros_like(sets.valid)
        inner[order[inside]] = True
        return inner
