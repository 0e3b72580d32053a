"""What is descended when a reward is back-propagated: functions of the reward of one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RewardLoss(Protocol):
    """The loss of each sample."""

    def of(self, reward: Tensor) -> Tensor:
        """[n], differentiable in the reward [n]."""
        ...


@dataclass(frozen=True)
class Negative:
    """−scale·r: DRaFT (2309.17400). AlignProp's 10 − r (2310.03739) has the same gradient."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"got {self}; expected a scale > 0: the reward is ascended")

    def of(self, reward: Tensor) -> Tensor:
        return -self.scale * reward


@dataclass(frozen=True)
class Hinge:
    """scale·max(margin − r, 0): no gradient from a sample that has reached the margin, so that the reward saturates there.

    ReFL (2304.05977): 1e-3·max(2 − r, 0) with ImageReward; SRPO (2509.06942): max(.7 − r, 0)/2 with HPSv2.1."""

    margin: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"got {self}; expected a scale > 0: the reward is ascended")

    def of(self, reward: Tensor) -> Tensor:
        return self.scale * (self.margin - reward).relu()
