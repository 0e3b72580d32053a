"""Advantages gated by the spread of their set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.advantage.base import Advantages, Sets, SignalContext, Within, by_channel
from flowalign.credit import EdgeValues
from samplers import Forest


@dataclass(frozen=True)
class VarianceGated:
    """ω · (value − mean) / max(std, high): sets in which almost nothing differs are not blown up to unit spread.

    VG-GRPO (SCORP, 2604.11734) in our reading, since its thresholds are not public: the gate ω is 0 below `low`, 1 from
    `high` on, linear between; both in units of the set's std. None: the 10 % and 50 % quantile of the stds of this
    batch's sets and, with `history`, of so many before them, first in first out (kept per channel, in the checkpoint).
    low = high = 0 is the plain z-score, and |advantage| never exceeds it. Clamped to ±clip."""

    within: Within = "prompt"
    low: float | None = None
    high: float | None = None
    history: int = 0
    clip: float = 5.0

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"got low={self.low}, high={self.high}; expected two numbers, or neither for quantiles")
        if self.low is not None and self.high is not None and not 0 <= self.low <= self.high:
            raise ValueError(f"got low={self.low}, high={self.high}; expected 0 <= low <= high")
        if self.history < 0 or (self.history and self.low is not None):
            raise ValueError(
                f"got history={self.history}, low={self.low}; expected history >= 0, and 0 with thresholds that are given"
            )

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        channels = iter(credit.channels)

        def rule(sets: Sets) -> tuple[Tensor, Tensor]:
            mean, std = sets.moments()
            return self._gate(sets, mean, std, *self._thresholds(std[sets.usable], next(channels), context)), std

        return by_channel(forest, credit, self.within, rule)

    def _gate(self, sets: Sets, mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
        ramp = ((std - low) / max(high - low, 1e-300)).clamp(0, 1)
        gate = torch.where(std >= high, 1.0, torch.where(std < low, 0.0, ramp))
        scale = gate / std.clamp(min=max(high, 1e-300))
        return ((sets.values - mean[sets.keys]) * scale[sets.keys]).clamp(-self.clip, self.clip)

    def _thresholds(self, std: Tensor, channel: str, context: SignalContext) -> tuple[float, float]:
        """low, high; of quantiles, those of the sets' stds [K] and of the remembered ones, which these then follow."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        if self.history:
            past = context.memory.get(channel, [])
            context.memory[channel] = [*past, *std.tolist()][-self.history :]
            std = torch.cat([torch.tensor(past, dtype=std.dtype), std])
        if not len(std):
            return 0.0, 0.0
        return float(std.quantile(0.1)), float(std.quantile(0.5))
