"""Edge selectors: which edges are trained, decided after the advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowalign.advantage import Advantages
from flowalign.credit.base import largest_of_each_sign, lines
from samplers import Forest, generator
from samplers.noise import visits


@dataclass(frozen=True)
class Moment:
    """When a selection is made: what selectors that draw or move with time depend on, and nothing else.

    uids: the prompt uid of each group, so that a draw does not depend on which process holds the prompt; () stands for
    the groups' numbers."""

    seed: int = 0
    iteration: int = 0
    uids: Sequence[int] = ()


START = Moment()


class Selector(Protocol):
    def choose(self, forest: Forest, advantages: Advantages, moment: Moment = START) -> Tensor:
        """A mask [E] of the edges to train. Invalid edges are dropped by the trainer whatever is returned."""
        ...


@dataclass(frozen=True)
class AllEdges:
    """Every valid edge, those with advantage 0 too: they count in the mean and, if a KL is on, are held by it."""

    def choose(self, forest: Forest, advantages: Advantages, moment: Moment = START) -> Tensor:
        return advantages.valid.any(1)


@dataclass(frozen=True)
class NonZeroAdvantage:
    """Edges with an advantage other than 0: groups in which nothing differs cost no forward or backward."""

    def choose(self, forest: Forest, advantages: Advantages, moment: Moment = START) -> Tensor:
        return (advantages.values != 0).any(1)


@dataclass(frozen=True)
class All:
    """Edges that every one of `parts` chooses; each sees all edges, so their order does not matter."""

    parts: list[Selector]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("All.parts is empty; expected at least one selector")

    def choose(self, forest: Forest, advantages: Advantages, moment: Moment = START) -> Tensor:
        return torch.stack([part.choose(forest, advantages, moment) for part in self.parts]).all(0)


@dataclass(frozen=True)
class Fraction:
    """A random share of each sample's steps, ⌊share · steps⌋ of them, drawn anew for every sample and iteration.

    DanceGRPO's timestep_fraction (0.6: 9 of 15). A draw is a function of (seed, iteration, prompt uid, the sample's last
    step). A sample is a line of stochastic steps (flowalign.credit.base.lines); a line of one step loses it."""

    share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"select.share={self.share} came; expected a number inside (0, 1]")

    def choose(self, forest: Forest, advantages: Advantages, moment: Moment = START) -> Tensor:
        tree = forest.tree
        last = lines(tree).last
        uids = moment.uids or range(tree.num_groups)
        if len(uids) != tree.num_groups:
            raise ValueError(f"{len(uids)} uids came for {tree.num_groups} groups; expected one per group")
        names = list(zip(uids, visits(uids), strict=True))
        chosen = torch.zeros(len(tree.edges), dtype=torch.bool)
        for end in last.unique().tolist():
            steps = (last == end).nonzero().flatten()
            node = int(tree.edges[end])
            key = (moment.seed, "timestep", moment.iteration, *names[int(tree.group[node])], int(tree.local[node]))
            order = torch.from_numpy(generator(*key).permutation(len(steps)))
            chosen[steps[order[: int(len(steps) * self.share + 1e-9)]]] = True
        return chosen


@dataclass(frozen=True)
class BestOfN:
    """The `keep`/2 best and `keep`/2 worst samples of each group, by the mean advantage of their steps (DanceGRPO).

    Advantages were taken over the whole group and are not taken again. A sample is a line of stochastic steps; one
    without a valid step is no candidate. A group of `keep` candidates or fewer stays whole."""

    keep: int = 8

    def __post_init__(self) -> None:
        if self.keep < 2 or self.keep % 2:
            raise ValueError(f"select.keep={self.keep} came; expected an even number, half best and half worst")

    def choose(self, forest: Forest, advantages: Advantages, moment: Moment = START) -> Tensor:
        tree = forest.tree
        last, known = lines(tree).last, advantages.valid.any(1)
        total, count = (torch.zeros(len(last), dtype=torch.float64) for _ in range(2))
        total.index_add_(0, last[known], advantages.values[known].double().sum(1))
        count.index_add_(0, last[known], torch.ones(int(known.sum()), dtype=torch.float64))
        chosen = torch.zeros(len(last), dtype=torch.bool)
        for group in range(tree.num_groups):
            ends = ((count > 0) & (tree.group[tree.edges] == group)).nonzero().flatten()
            ranked = ends[(total[ends] / count[ends]).argsort(stable=True)]
            if len(ranked) > self.keep:
                ranked = torch.cat([ranked[: self.keep // 2], ranked[-(self.keep // 2) :]])
            chosen |= torch.isin(last, ranked)
        return chosen


@dataclass(frozen=True)
class PositiveNegativeBalance:
    """As many edges of positive as of negative advantage over the batch, the largest; all if only one sign occurs.

    Channels are summed. Edges of advantage 0 are left out."""

    def choose(self, forest: Forest, advantages: Advantages, moment: Moment = START) -> Tensor:
        return largest_of_each_sign(advantages.values.double().sum(1), advantages.valid.any(1))
