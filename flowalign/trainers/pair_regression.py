"""The loss of reward-difference prediction on one rollout, and what is measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.objectives.reward_difference import Pairs, clip_steps, pair_loss, start_variance
from flowalign.trainers.trajectories import Replay, Trajectories


@dataclass(frozen=True, eq=False)
class PairRegression:
    """The loss of one rollout's `pairs` as a function of the log-ratios [E] of its `steps`, and what it measures.

    rewards [L]: of the leaves. beta, clip_range, over_steps: see RewardDifference."""

    steps: Trajectories
    pairs: Pairs
    rewards: Tensor
    beta: float
    clip_range: float
    over_steps: Literal["mean", "sum"]

    def implicit(self, numbers: Tensor) -> Tensor:
        """[L] R̂ of each leaf, of the log-ratios [E] of the steps."""
        total, tree = self.steps.along_paths(numbers), self.steps.forest.tree
        if self.over_steps == "sum":
            return total
        return total / tree.path_sum(torch.ones(len(tree))).max()

    def loss(self, old: Tensor, numbers: Tensor) -> Tensor:
        """old [E]: the log-ratios that the clip range lies around."""
        clipped = clip_steps(numbers, old, self.clip_range)
        return pair_loss(self.implicit(numbers), self.implicit(clipped), self.pairs, self.beta)

    def of_rollout(self) -> dict[str, float]:
        """Metrics that no update changes."""
        tree, used = self.steps.forest.tree, self.pairs.samples
        group = tree.group[tree.leaves]
        kept = group[self.pairs.better].bincount(minlength=tree.num_groups)
        sizes = group.bincount(minlength=tree.num_groups)
        found = {
            "group/zero_std_ratio": float((kept == 0).double().mean()),
            "group/trained_edges": float(len(self.steps.edges)),
            "pair/kept_ratio": float(kept.sum() / (sizes * (sizes - 1) / 2).sum()),
        }
        if len(used):
            found["pair/kl"] = float(self.steps.along_paths(self.steps.kl)[used].mean())
        floor = self._floor()
        return found if floor is None else found | {"pair/floor": floor}

    def _floor(self) -> float | None:
        """What `pair/error` cannot fall below, since samples of a pair start from different noise; None: not known."""
        tree, beta, used = self.steps.forest.tree, self.beta, self.pairs.samples
        start, group = tree.root[tree.leaves], tree.group[tree.leaves]
        apart = self.pairs.weight[start[self.pairs.better] != start[self.pairs.worse]].sum()
        if not len(used):
            return None
        if not float(apart):
            return 0.0
        values = self.rewards.double() / beta - self.implicit(self.steps.rolled)
        variance = start_variance(values[used], start[used], group[used])
        return None if variance is None else beta * math.sqrt(2 * variance * float(apart / self.pairs.weight.sum()))

    def metrics(self, numbers: Tensor, old: Tensor, replay: Replay | None) -> dict[str, float]:
        """Of the log-ratios [E] before an update, and of the `replay` if it is the first."""
        tree, used = self.steps.forest.tree, self.pairs.samples
        moved, beta, group = numbers - old, self.beta, tree.group[tree.leaves][used]
        implicit = beta * self.implicit(numbers)[used]
        mean = torch.zeros(tree.num_groups, dtype=implicit.dtype).index_add(0, group, implicit)
        mean = mean / group.bincount(minlength=tree.num_groups).clamp(min=1)
        return {
            "ratio/clip_fraction": float((moved.abs() > self.clip_range).double().mean()),
            "ratio/approx_kl": float(0.5 * moved.square().mean()),
            "pair/error": beta * math.sqrt(float(self.loss(old, numbers))),
            "pair/implicit_reward_std": float((implicit - mean[group]).square().mean().sqrt()),
            **({} if replay is None else replay.metrics()),
        }
