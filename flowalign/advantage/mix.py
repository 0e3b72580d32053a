"""Several channels: mixed into one, kept side by side, or each with an advantage of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.advantage.base import FLAT, Advantage, Advantages, SignalContext
from flowalign.credit import EdgeValues
from samplers import Forest


@dataclass(frozen=True)
class Mixed:
    """Channels times their `weights` (None: 1 each), mixed.

    how: "reward_sum" one advantage of the summed values (Flow-GRPO); "advantage_sum" the sum of the channels' advantages
    (MixGRPO 2507.21802); "gdpo" that sum, normalized once more over the batch (as in Flow-Factory); "keep" one column
    per channel: a clipped ratio then has one term per channel, and a weight on a column is the coefficient of its term
    (DanceGRPO 2505.07818, Euphonium 2602.04928). Sums of advantages are clamped to ±clip; each
    channel was clamped by its own rule before (MixGRPO's code clamps the sum alone: give `advantage` clip: .inf for that).
    reward_sum is clamped by `advantage` only.
    Where channels are summed, an edge is valid only if it is in every channel whose weight is not 0.
    ValueError for a single channel, which no mix changes."""

    advantage: Advantage
    how: Literal["reward_sum", "advantage_sum", "gdpo", "keep"] = "advantage_sum"
    weights: dict[str, float] | None = None
    delta: float = 1e-4
    clip: float = 5.0

    def __post_init__(self) -> None:
        if self.how not in ("reward_sum", "advantage_sum", "gdpo", "keep"):
            raise ValueError(f"got how={self.how!r}; expected 'reward_sum', 'advantage_sum', 'gdpo' or 'keep'")
        if self.clip <= 0:
            raise ValueError(f"got clip={self.clip}; expected a number above 0")

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        _need_several(f"Mixed(how={self.how!r})", credit.channels)
        weights = self._weights(credit.channels)
        needed = weights != 0
        if self.how == "reward_sum":
            complete = credit.valid[:, needed].all(1, keepdim=True)
            total = torch.where(credit.valid, credit.values, 0.0) @ weights[:, None]
            return self.advantage.compare(forest, EdgeValues(total, complete, ("sum",)), context)
        each = self.advantage.compare(forest, credit, context)
        if self.how == "keep":
            return Advantages((each.values * weights).float(), each.valid & needed, each.zero_std_ratio)
        complete = each.valid[:, needed].all(1, keepdim=True)
        total = torch.where(complete, (each.values.double() @ weights)[:, None], 0.0)
        if self.how == "gdpo" and bool(complete.any()):
            mean, std = total[complete].mean(), total[complete].std(correction=0)
            total = torch.where(complete & (std > FLAT), (total - mean) / (std + self.delta), 0.0)
        return Advantages(total.clamp(-self.clip, self.clip).float(), complete, each.zero_std_ratio)

    def _weights(self, channels: tuple[str, ...]) -> Tensor:
        weights = dict.fromkeys(channels, 1.0) if self.weights is None else self.weights
        if set(weights) != set(channels) or not any(weights.values()):
            raise ValueError(
                f"got weights for {sorted(weights)}; expected one for each channel of {list(channels)}, not all 0"
            )
        return torch.tensor([weights[channel] for channel in channels], dtype=torch.float64)


@dataclass(frozen=True)
class PerChannel:
    """Each channel through an advantage of its own, by its name or by the part it came from ("p" for the channels "p/…"
    of a Joined credit): Euphonium's outcome inside `prompt`, its process reward inside `prompt_step` (2602.04928).
    ValueError for a single channel, for a channel without a part and for a part without a channel."""

    parts: dict[str, Advantage]

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        _need_several("PerChannel", credit.channels)
        columns, used = [], set()
        for place, channel in enumerate(credit.channels):
            name = channel if channel in self.parts else channel.partition("/")[0]
            if name not in self.parts:
                raise ValueError(f"got channel {channel!r}; expected one of {sorted(self.parts)}: add it to parts")
            used.add(name)
            one = EdgeValues(credit.values[:, [place]], credit.valid[:, [place]], (channel,))
            own = replace(context, memory=context.memory.setdefault(channel, {}))
            columns.append(self.parts[name].compare(forest, one, own))
        if unused := sorted(set(self.parts) - used):
            raise ValueError(
                f"parts {unused} match none of the channels {list(credit.channels)}: remove or rename them"
            )
        return Advantages(
            torch.cat([column.values for column in columns], 1),
            torch.cat([column.valid for column in columns], 1),
            sum(column.zero_std_ratio for column in columns) / len(columns),
        )


def _need_several(part: str, channels: tuple[str, ...]) -> None:
    if len(channels) < 2:
        raise ValueError(
            f"got one channel, {list(channels)}, for {part}, which combines several, so there is nothing to combine: a reward "
            "that sums others (rewards.Mix) is one channel. Take the advantage alone (Normalized), or a credit with several "
            "channels (Joined)"
        )
