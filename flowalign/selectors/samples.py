"""Selection sample by sample: a share of each one's steps, or the best and worst samples of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.advantage import Advantages, SignalContext
from flowalign.credit.base import lines
from flowalign.selectors.base import START
from samplers import Forest, generator
from samplers.noise import visits


@dataclass(frozen=True)
class Fraction:
    """A random share of each sample's steps, ⌊share · steps⌋ of them, drawn anew for every sample and iteration.

    DanceGRPO's timestep_fraction (2505.07818; 0.6: 9 of 15). A draw is a function of (seed, iteration, prompt uid, the
    sample's last step). A sample is a line of stochastic steps (flowalign.credit.base.lines); a line of one step loses it."""

    share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"got select.share={self.share}; expected a number inside (0, 1]")

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        tree = forest.tree
        last = lines(tree).last
        uids = context.uids or range(tree.num_groups)
        if len(uids) != tree.num_groups:
            raise ValueError(f"got {len(uids)} uids for {tree.num_groups} groups; expected one per group")
        names = list(zip(uids, visits(uids), strict=True))
        chosen = torch.zeros(len(tree.edges), dtype=torch.bool)
        for end in last.unique().tolist():
            steps = (last == end).nonzero().flatten()
            node = int(tree.edges[end])
            key = (context.seed, "timestep", context.iteration, *names[int(tree.group[node])], int(tree.local[node]))
            order = torch.from_numpy(generator(*key).permutation(len(steps)))
            chosen[steps[order[: int(len(steps) * self.share + 1e-9)]]] = True
        return chosen


@dataclass(frozen=True)
class BestOfN:
    """The `keep`/2 best and `keep`/2 worst samples of each group, by the mean advantage of their steps.

    DanceGRPO's best-of-n (2505.07818). Advantages were taken over the whole group and are not taken again. A sample is a line of stochastic steps; one
    without a valid step is no candidate. In a group of at most `keep` candidates all are chosen."""

    keep: int = 8

    def __post_init__(self) -> None:
        if self.keep < 2 or self.keep % 2:
            raise ValueError(f"got select.keep={self.keep}; expected an even number, half best and half worst")

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        tree = forest.tree
        last, usable = lines(tree).last, advantages.valid.any(1)
        total, count = (torch.zeros(len(last), dtype=torch.float64) for _ in range(2))
        total.index_add_(0, last[usable], advantages.values[usable].double().sum(1))
        count.index_add_(0, last[usable], torch.ones(int(usable.sum()), dtype=torch.float64))
        chosen = torch.zeros(len(last), dtype=torch.bool)
        for group in range(tree.num_groups):
            ends = ((count > 0) & (tree.group[tree.edges] == group)).nonzero().flatten()
            ranked = ends[(total[ends] / count[ends]).argsort(stable=True)]
            if len(ranked) > self.keep:
                ranked = torch.cat([ranked[: self.keep // 2], ranked[-(self.keep // 2) :]])
            chosen |= torch.isin(last, ranked)
        return chosen
