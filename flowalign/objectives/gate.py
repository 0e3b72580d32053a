"""A gate: only samples that are good enough take part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """Samples whose raw reward is at least `min_reward` take part (KEPO 2602.00400, in the form it has for flows).

    channel: of a reward with several, whose score is read; None: the only one. The loss is divided by the number of samples
    that are kept, or by `least` if they are fewer. A sample without a score is not kept.
    min_reward is a raw reward: if the reward is rescaled, so must it be."""

    min_reward: float
    channel: str | None = None
    least: int = 1

    def __post_init__(self) -> None:
        if self.least < 1 or self.min_reward != self.min_reward:
            raise ValueError(f"got {self}; expected least at least 1 and a number as min_reward")

    def column(self, channels: tuple[str, ...]) -> int:
        """Which of the reward's channels is read. ValueError for one that it has not, or for several without naming one."""
        if self.channel is None and len(channels) == 1:
            return 0
        if self.channel not in channels:
            raise ValueError(
                f"got a gate with channel={self.channel!r} for a reward with the channels {list(channels)}; expected one of them: set "
                "gate.channel"
            )
        return channels.index(self.channel)

    def keeps(self, scores: Tensor, valid: Tensor) -> Tensor:
        """[L] bool; scores, valid [L] of that channel."""
        return valid & (scores >= self.min_reward)
