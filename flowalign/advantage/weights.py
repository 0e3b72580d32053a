"""Weights of whole samples in place of z-scores: the best of a set, pairs, exponential shares, softly clipped advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.advantage.base import FLAT, Advantage, Advantages, Sets, SignalContext, Within, by_channel
from flowalign.credit import EdgeValues
from flowalign.credit.base import lines
from samplers import Forest


@dataclass(frozen=True)
class Exponential:
    """e^{η·R}/mean of it over the set, minus 1: how much more often a sample would be drawn from p·e^{ηR}/Z than from p.

    Implicit tilt matching (2512.21829) with an anchor of 1 to `old`; with `offset` 0 the weight itself, for regression on
    reward-weighted samples (RAFT's soft form). Adding a constant to the rewards of a set changes nothing. η = 1/β in one
    step, or β⁻¹ as the sum over several.
    Not kept: the weight 1 of equal rewards, which get 0 with either offset: a regression on the policy's own samples that nothing tells
    apart is noise. Z is estimated in the set, so G samples under-tilt by O(1/G): keep the std of η·R at .5 or less."""

    eta: float = 1.0
    offset: float = -1.0
    within: Within = "prompt"

    def __post_init__(self) -> None:
        if not self.eta > 0 or self.offset not in (-1.0, 0.0):
            raise ValueError(f"got eta={self.eta}, offset={self.offset}; expected eta > 0, and an offset of -1 or 0")

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        return by_channel(forest, credit, self.within, self._rule)

    def _rule(self, sets: Sets) -> tuple[Tensor, Tensor]:
        _, std = sets.moments()
        highest = torch.full_like(std, -torch.inf).scatter_reduce(
            0, sets.keys[sets.valid], sets.values[sets.valid], "amax"
        )
        weight = torch.where(sets.valid, (self.eta * (sets.values - highest[sets.keys])).exp(), 0.0)
        mean, _ = replace(sets, values=weight).moments()
        return weight / mean.clamp(min=1e-300)[sets.keys] + self.offset, std


@dataclass(frozen=True)
class Best:
    """1 for the `count` best samples of each set, 0 for the others (RAFT 2304.06767: best of K).

    min_gap: a set whose best is not more than this above its mean has none: with a saturated reward all would be winners. ties
    "first": the earlier of equal samples; "all": every sample as good as the last that is in. within: prompt or batch (the
    best of all prompts together). Select them with NonZeroAdvantage, or the others cost a forward each.
    The law of the best of K has KL ln K − (K − 1)/K to p where rewards are continuous; iterated, tilts multiply."""

    count: int = 1
    min_gap: float = 1e-6
    ties: Literal["first", "all"] = "first"
    within: Literal["prompt", "batch"] = "prompt"

    def __post_init__(self) -> None:
        if self.count < 1 or self.min_gap < 0 or self.ties not in ("first", "all"):
            raise ValueError(
                f"got count={self.count}, min_gap={self.min_gap}, ties={self.ties!r}; expected count >= 1, min_gap >= 0, and "
                "first or all"
            )

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        def chosen(values: Tensor) -> Tensor:
            if float(values.max() - values.mean()) <= self.min_gap:
                return torch.zeros_like(values)
            order = values.argsort(descending=True, stable=True)
            last = values[order[: self.count]][-1]
            if self.ties == "all":
                return (values >= last).double()
            return torch.zeros_like(values).index_fill(0, order[: self.count], 1.0)

        return _of_samples(forest, credit, self.within, chosen)


@dataclass(frozen=True)
class BestAndWorst:
    """+1 for the best sample of each prompt, −1 for the worst, 0 for the others: the pair of online Diffusion-DPO (2311.12908).

    min_gap: prompts whose rewards differ by no more have no pair (flow_grpo's code trains on noise there). Select the pair
    with NonZeroAdvantage."""

    min_gap: float = 1e-6

    def __post_init__(self) -> None:
        if self.min_gap < 0:
            raise ValueError(f"got min_gap={self.min_gap}; expected at least 0")

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        def chosen(values: Tensor) -> Tensor:
            signs = torch.zeros_like(values)
            if float(values.max() - values.min()) > self.min_gap:
                signs[values.argmax()], signs[values.argmin()] = 1.0, -1.0
            return signs

        return _of_samples(forest, credit, "prompt", chosen)


@dataclass(frozen=True)
class SoftClipped:
    """eta·tanh(A/eta) of another advantage's A (V-GRPO, 2604.23380; eta 3 to 5).

    recenter: less the mean over the valid edges of each prompt. After tanh the advantages of a skewed group no longer add
    up to 0, and noise that the group shares cancels only where they do."""

    advantage: Advantage
    eta: float = 3.0
    recenter: bool = False

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"got eta={self.eta}; expected a number above 0")

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        found = self.advantage.compare(forest, credit, context)
        values = self.eta * (found.values / self.eta).tanh()
        if self.recenter:
            group, valid = forest.tree.group[forest.tree.edges], found.valid.float()
            zero = torch.zeros(forest.tree.num_groups, values.shape[1])
            total, count = (zero.index_add(0, group, each) for each in (values * valid, valid))
            values = (values - (total / count.clamp(min=1))[group]) * valid
        return replace(found, values=values)


@dataclass(frozen=True)
class Constant:
    """1 for every sample that has a score: supervised fine-tuning, which compares nothing."""

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        valid = credit.valid.all(1, keepdim=True)
        return Advantages(valid.float(), valid, 0.0)


def _of_samples(forest: Forest, credit: EdgeValues, within: str, chosen: Callable[[Tensor], Tensor]) -> Advantages:
    """chosen(values [S]) -> [S] applied to the valid samples of each set, channel by channel; a sample is a line of steps, with
    the mean of its values, and all of its steps get its number."""
    tree = forest.tree
    ends, sample = lines(tree).last.unique(return_inverse=True)
    group = tree.group[tree.edges[ends]] if within == "prompt" else torch.zeros(len(ends), dtype=torch.int64)
    columns, masks, flat = [], [], []
    for values, valid in zip(credit.values.T, credit.valid.T, strict=True):
        zero = torch.zeros(len(ends), dtype=torch.float64)
        count = zero.index_add(0, sample[valid], torch.ones(int(valid.sum()), dtype=torch.float64))
        mean = zero.index_add(0, sample[valid], values[valid]) / count.clamp(min=1)
        found, compared = zero.clone(), torch.zeros(len(ends), dtype=torch.bool)
        for one in group.unique().tolist():
            members = ((group == one) & (count > 0)).nonzero().flatten()
            if len(members) < 2:
                continue
            compared[members] = True
            found[members] = chosen(mean[members])
            flat.append(float(mean[members].std(correction=0)) <= FLAT)
        columns.append(torch.where(valid, found[sample], 0.0))
        masks.append(valid & compared[sample])
    return Advantages(torch.stack(columns, 1).float(), torch.stack(masks, 1), sum(flat) / len(flat) if flat else 1.0)
