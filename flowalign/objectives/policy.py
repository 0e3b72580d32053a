"""Policy-gradient losses of one edge from its log-probs and advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    clip_range: float | tuple[float, float]

    def loss(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
        """`log_prob`, `old_log_prob` [E]; `advantages` [E, C]. Returns the loss [E], summed over channels."""
        ...


@dataclass(frozen=True)
class ClippedRatio:
    """PPO's clipped surrogate, one term per advantage channel (grpo_family §2.4): max(−A r, −A clip(r, 1−lo, 1+hi)).

    `clip_range` is one number or (below, above). It acts on the ratio of the kernel's own log-probs: 1e-4 is the
    Flow-GRPO value for mean-reduced log-probs of about 65,536 elements; for D elements scale it by √(65,536/D)."""

    clip_range: float | tuple[float, float] = 1e-4

    def __post_init__(self) -> None:
        if min(self.bounds) <= 0:
            raise ValueError(
                f"clip_range={self.clip_range}: expected numbers above 0; a large one switches clipping off"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        return self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)

    def loss(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
        below, above = self.bounds
        ratio = (log_prob - old_log_prob).exp()[:, None]
        clipped = ratio.clamp(1 - below, 1 + above)
        return torch.maximum(-advantages * ratio, -advantages * clipped).sum(1)
