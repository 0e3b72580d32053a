"""A reward on another scale, within bounds, or only where another one is high enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec, spec_of
from rewards.guard import score
from rewards.parts import ask, check_names, check_one_channel, joint_spec, wants_gradient, with_raw


@dataclass(frozen=True, eq=False)
class Standardized:
    """(score − loc) / scale, every channel alike: constants, such as mean and deviation on samples of the base model, so
    that rewards can be summed or compared. A negative scale turns a reward around (less is better).

    Name and channels are the reward's; component `raw` (`raw/channel`): the score as it was. Uncertainty is divided by |scale|.
    Not kept: statistics that run along with training; within a group `flowalign.advantage` standardizes."""

    reward: Reward
    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.loc) or not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"got loc={self.loc}, scale={self.scale}; expected finite numbers, scale not 0")

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        spec = spec_of(self.reward)
        if spec.range is None:
            return spec
        low, high = sorted((bound - self.loc) / self.scale for bound in spec.range)
        return replace(spec, range=(low, high))

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        output = score(self.reward, batch, grad=wants_gradient(self.spec), max_fail_rate=1.0)
        doubt = output.uncertainty
        return replace(
            output,
            scores=(output.scores - self.loc) / self.scale,
            components=with_raw(output),
            uncertainty=None if doubt is None else doubt / abs(self.scale),
        )


@dataclass(frozen=True, eq=False)
class Capped:
    """The score within [low, high], every channel alike: what a policy gains beyond `high` (the level of good human work, say)
    earns nothing, which takes the incentive from over-optimization.

    low, high: None is no bound. soft: c + h·tanh((score − c)/h), c the middle and h half the width of the interval, instead of
    a cut: for low = −high it is high·tanh(score/high). Needs both bounds. Beyond a hard bound the gradient is 0.
    Name and channels are the reward's; component `raw` (`raw/channel`): the score as it was. Its uncertainty is kept: a cap never
    enlarges a difference."""

    reward: Reward
    low: float | None = None
    high: float | None = None
    soft: bool = False

    def __post_init__(self) -> None:
        low, high = self._bounds()
        if not low < high or (low, high) == (-math.inf, math.inf):
            raise ValueError(f"got low={self.low}, high={self.high}; expected at least one bound, and low < high")
        if self.soft and not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"got soft=True with low={self.low}, high={self.high}; expected both bounds")

    def _bounds(self) -> tuple[float, float]:
        return (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        spec = spec_of(self.reward)
        low, high = (
            self._cap(torch.tensor(bound, dtype=torch.float64)).item() for bound in spec.range or (-math.inf, math.inf)
        )
        return replace(spec, range=(low, high) if low < high else self._bounds())

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        output = score(self.reward, batch, grad=wants_gradient(self.spec), max_fail_rate=1.0)
        return replace(output, scores=self._cap(output.scores), components=with_raw(output))

    def _cap(self, scores: Tensor) -> Tensor:
        low, high = self._bounds()
        if not self.soft:
            return scores.clamp(low, high)
        middle, half = (low + high) / 2, (high - low) / 2
        return middle + half * torch.tanh((scores - middle) / half)


@dataclass(frozen=True, eq=False)
class Gated:
    """The score of `reward` where `gate` scores at least `threshold`, else `otherwise`: text counts only in a picture of
    some quality, consistency only in a video that moves.

    otherwise: None is the smallest score of the reward's range (ValueError if the range has none). For a gate of which less is better
    take Standardized(gate, scale=-1). Both have one channel and different names; a sample is valid if it is for both. Components:
    open (1 or 0), both scores under their names and their components as `part/component`. Gradients are the reward's where the
    gate is open, else 0; the gate needs none. Uncertainty: the reward's where open, else 0."""

    reward: Reward
    gate: Reward
    threshold: float
    otherwise: float | None = None
    name: str = "gated"

    def __post_init__(self) -> None:
        check_names("a gated reward", [self.reward, self.gate])
        check_one_channel("a gated reward", [self.reward, self.gate])
        if not math.isfinite(self.threshold) or not math.isfinite(self._closed()):
            raise ValueError(
                f"got threshold={self.threshold}, otherwise={self.otherwise} and reward {self.reward.name!r} of range "
                f"{spec_of(self.reward).range}; expected finite numbers: set `otherwise`, the score below the threshold"
            )
        self.spec  # noqa: B018 (checked at construction)

    def _closed(self) -> float:
        """The score where the gate is closed; NaN if nothing says it."""
        lowest = (spec_of(self.reward).range or (math.nan,))[0]
        return lowest if self.otherwise is None else self.otherwise

    @property
    def spec(self) -> RewardSpec:
        """What both read; as differentiable as the reward."""
        both = joint_spec("a gated reward", [self.reward, self.gate])
        return replace(both, differentiable=spec_of(self.reward).differentiable)

    def load(self) -> None:
        self.reward.load()
        self.gate.load()

    def close(self) -> None:
        self.reward.close()
        self.gate.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        (own,), parts, info = ask([self.reward], batch, grad=wants_gradient(self.spec))
        (gate,), more, said = ask([self.gate], batch, grad=False)
        level = gate.scores[:, 0].to(own.scores.device)
        is_open, scores = level >= self.threshold, own.scores[:, 0]
        valid = own.valid[:, 0].to(level.device) & gate.valid[:, 0].to(level.device)
        components = {self.reward.name: scores.detach().float(), self.gate.name: level, "open": is_open.float()}
        doubt = own.uncertainty
        return RewardOutput(
            torch.where(is_open, scores, self._closed()),
            valid,
            components | parts | more,
            ["; ".join(text for text in texts if text) for texts in zip(info, said, strict=True)],
            uncertainty=None if doubt is None else torch.where(is_open, doubt[:, 0], 0),
        )
