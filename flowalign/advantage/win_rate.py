"""Pref-GRPO's win rate, from the scores of a pointwise reward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.advantage.base import Advantages, Sets, SignalContext, Within, by_channel
from flowalign.credit import EdgeValues
from samplers import Forest


@dataclass(frozen=True)
class WinRate:
    """The z-score of w_i = Σ_{j≠i} [1 if i scores higher, ½ for a tie] / (G − 1), over the G samples of a set (Pref-GRPO,
    2508.20751).

    The steps of a sample have one value, as with Broadcast on chains; where they differ (Gain) take within=prompt_step, or a
    step's rank counts its own sample's other steps as beaten. decimals: what w is rounded to (3 in its code; None: not at all). Population std; clamped to ±clip. A set in which all
    tie gets 0.
    Not kept: the size of gaps; two images that hardly differ are as far apart as two that differ a lot. Not part of it:
    a judge that looks at two images at once, which Pref-GRPO asks for each of the G·(G−1)/2 pairs; here two scores of one
    reward are compared, so preferences are transitive."""

    within: Within = "prompt"
    decimals: int | None = 3
    delta: float = 1e-4
    clip: float = 5.0

    def __post_init__(self) -> None:
        if self.decimals is not None and self.decimals < 1:
            raise ValueError(f"got decimals={self.decimals}; expected at least 1, or None for no rounding")
        if self.delta < 0 or self.clip <= 0:
            raise ValueError(f"got delta={self.delta}, clip={self.clip}; expected >= 0 and > 0")

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        return by_channel(forest, credit, self.within, self._rule)

    def _rule(self, sets: Sets) -> tuple[Tensor, Tensor]:
        rate = win_rates(sets)
        rates = replace(sets, values=rate if self.decimals is None else rate.round(decimals=self.decimals))
        mean, std = rates.moments()
        advantage = (rates.values - mean[sets.keys]) / (std + self.delta)[sets.keys]
        return advantage.clamp(-self.clip, self.clip), std


def win_rates(sets: Sets) -> Tensor:
    """[E] the share of the set's other samples that an edge's sample beats, ties by half; 0 where invalid.

    In a chain a sample has as many edges as there are trained steps, all of one value: they are no opponents of each
    other."""
    rate, scored = torch.zeros_like(sets.values), sets.valid
    if not bool(scored.any()):
        return rate
    pairs = torch.stack([sets.keys[scored].double(), sets.values[scored]], 1)
    # sorted by set, then by value
    distinct, place, equal = torch.unique(pairs, dim=0, return_inverse=True, return_counts=True)
    key = distinct[:, 0].long()
    below = equal.cumsum(0) - equal - (sets.count.cumsum(0) - sets.count)[key]
    own = sets.count / sets.samples.clamp(min=1)  # edges of one sample
    others = (sets.count - own).clamp(min=1)[key]
    rate[scored] = ((below + (equal - own[key]).clamp(min=0) / 2) / others)[place]
    return rate
