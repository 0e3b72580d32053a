"""Reward-difference prediction (PRDP, 2402.08714): pairs of samples of a prompt, and the regression on their rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of samples of one prompt that differ in their reward, each once.

    better, worse [P]: the samples. gap [P] float64: r(better) − r(worse) > 0. weight [P]: sums to 1 over the pairs of a
    prompt, divided by the number of prompts, those without a pair among them."""

    better: Tensor
    worse: Tensor
    gap: Tensor
    weight: Tensor

    @property
    def samples(self) -> Tensor:
        """The samples that some pair holds, in ascending order."""
        return torch.cat([self.better, self.worse]).unique()

    def __len__(self) -> int:
        return len(self.gap)


def pairs_of(rewards: Tensor, valid: Tensor, group: Tensor) -> Pairs:
    """The pairs of N samples with `rewards`, `valid` and prompts `group` (0 to G − 1), each [N].

    Ties are dropped, as are samples without a valid reward (2402.08714, App. G: the mask r_i − r_j > 0)."""
    rewards = torch.where(valid, rewards.double(), torch.nan)
    gap = rewards[:, None] - rewards[None]
    better, worse = ((gap > 0) & (group[:, None] == group[None])).nonzero().unbind(1)
    count = group[better].bincount(minlength=int(group.max()) + 1)
    return Pairs(better, worse, gap[better, worse], 1.0 / (count.double()[group[better]] * len(count)))


def pair_errors(rewarded: Tensor, pairs: Pairs, beta: float) -> Tensor:
    """[P] R̂_better − R̂_worse − gap/β, the residuals of the implicit rewards `rewarded` [N] (2402.08714, eq. 15)."""
    return rewarded[pairs.better] - rewarded[pairs.worse] - pairs.gap / beta


def pair_loss(rewarded: Tensor, clipped: Tensor, pairs: Pairs, beta: float) -> Tensor:
    """Σ weight · max(e², e_clip²) over pairs, e = `pair_errors` of `rewarded` [N], e_clip of `clipped` [N] (eq. 21).

    An upper bound of the loss without clipping. Where the clipped error is the larger one, steps that are outside their
    range have no gradient: they went further towards the target than the range allows. Where the plain error is the
    larger one, all steps pull. 0 without pairs."""
    plain, limited = (pair_errors(values, pairs, beta).square() for values in (rewarded, clipped))
    return (pairs.weight * torch.maximum(plain, limited)).sum()


def clip_steps(log_ratio: Tensor, old: Tensor, clip_range: float) -> Tensor:
    """[E] log-ratios to the reference, each no further than `clip_range` from that under the rollout's weights, `old` [E]
    (2402.08714, eq. 16 to 18). That is, log π_θ/π_old within ±clip_range."""
    return torch.minimum(torch.maximum(log_ratio, old - clip_range), old + clip_range)


def start_variance(values: Tensor, start: Tensor, group: Tensor) -> float | None:
    """How much of the variance of `values` [N] inside a group comes from their starts: an unbiased estimate of Var(E[value |
    start]), at least 0; start, group [N].

    With values r/β − R̂ that is Var(log Z(start)): what no policy can predict, since it does not choose its start. None where
    no start has two samples, or no group two such starts."""
    numbers, place, count = start.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, place, values.double()) / count
    within = (values.double() - mean[place]).square().sum()
    free = int((count - 1).sum())
    group_of = torch.zeros(len(numbers), dtype=group.dtype).index_copy_(0, place, group)
    between = [mean[group_of == one] for one in group_of.unique()]
    between = [means for means in between if len(means) > 1]
    if not free or not between:
        return None
    spread = sum(float(means.var()) for means in between) / len(between)
    return max(0.0, spread - float(within) / free * float((1.0 / count).mean()))
