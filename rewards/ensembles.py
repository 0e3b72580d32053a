"""Several rewards for one thing as one conservative score, and how far they disagree as its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec
from rewards.parts import (
    ask,
    check_names,
    check_one_channel,
    close_parts,
    columns,
    joint_spec,
    load_parts,
    wants_gradient,
)

How = Literal["mean", "wco", "uwo", "lcb", "softmin"]
COEF: dict[str, float | None] = {"mean": None, "wco": None, "uwo": 0.1, "lcb": 1.0, "softmin": 1.0}


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One score of K members r_1 … r_K, and their spread as its uncertainty. Bring the members to one scale first
    (`Standardized`), or the least of them is always the one with the smallest scale.

    how, with m the mean and v the variance (over K) of the members:
      "mean"     m
      "wco"      min_i r_i: worst case (2310.02743)
      "uwo"      m − coef·v: uncertainty weighted (2310.02743); coef 0.1
      "lcb"      m − coef·s: lower confidence bound, s the spread; coef 1. With one member that states an uncertainty u
                 (a model with a predicted deviation) it is r − coef·u
      "softmin"  −coef·log mean_i exp(−r_i/coef): from the least (coef → 0) to the mean (coef → ∞); coef 1
    coef: None is the figure above, which is ours; "mean" and "wco" have none.

    spread s = √(v + mean_i u_i²): the deviation of the mixture of the members (1612.01474), u_i what member i says of itself.
    One channel; a sample is valid if it is for every member. Components: spread, each member's score under its name and
    its components as `member/component`. Gradients reach every member but through u_i; where all members agree, that of √v
    is taken as 0. Not kept: members that share a backbone err together, which no spread shows.
    """

    rewards: list[Reward]
    how: How = "mean"
    coef: float | None = None
    name: str = "ensemble"

    def __post_init__(self) -> None:
        check_names("an ensemble", self.rewards)
        check_one_channel("an ensemble", self.rewards)
        coefficient(self.how, self.coef)
        self.spec  # noqa: B018 (checked at construction)

    @property
    def spec(self) -> RewardSpec:
        """The members' together, one channel."""
        return joint_spec("an ensemble", self.rewards)

    load, close = load_parts, close_parts

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        outputs, components, info = ask(self.rewards, batch, grad=wants_gradient(self.spec))
        members, doubts = columns(outputs)
        scores, deviation = combined(members, doubts, self.how, self.coef), spread(members, doubts)
        own = {part.name: column for part, column in zip(self.rewards, members.detach().float().T, strict=True)}
        own["spread"] = deviation.detach().float()
        return RewardOutput(scores, ~scores.isnan(), own | components, info, uncertainty=deviation)


def coefficient(how: How, coef: float | None) -> float:
    """The coefficient of a rule; ValueError for an unknown rule, a coefficient it has no use for, or one that is not above 0."""
    if how not in COEF:
        raise ValueError(f"got how={how!r}; expected one of {tuple(COEF)}")
    if COEF[how] is None:
        if coef is not None:
            raise ValueError(f"got coef={coef} with how={how!r}; expected None: this rule has no coefficient")
        return 0.0
    value = COEF[how] if coef is None else coef
    assert value is not None
    if not 0 < value < math.inf:
        raise ValueError(f"got coef={coef} with how={how!r}; expected a number above 0")
    return value


def combined(members: Tensor, doubts: Tensor, how: How, coef: float | None = None) -> Tensor:
    """[N]: the scores [N, K] of K members, whose own uncertainties are doubts [N, K], by a rule of `Ensemble`."""
    strength = coefficient(how, coef)
    if how == "wco":
        return members.amin(1)
    if how == "softmin":  # around the least member: no exponent above 0, and no cancellation where strength is large
        least = members.detach().amin(1, keepdim=True)
        return least[:, 0] - strength * torch.log1p(torch.expm1((least - members) / strength).mean(1))
    mean = members.mean(1)
    if how == "uwo":
        return mean - strength * members.var(1, correction=0)
    return mean - strength * spread(members, doubts) if how == "lcb" else mean


def spread(members: Tensor, doubts: Tensor) -> Tensor:
    """[N]: √(variance over the members + mean square of their own uncertainties), with gradient 0 at 0."""
    variance = members.var(1, correction=0) + doubts.square().mean(1)
    apart = variance != 0  # NaN too, so that it stays NaN
    return torch.where(apart, torch.where(apart, variance, 1).sqrt(), 0)
