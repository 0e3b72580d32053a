"""Pruning of trees (BranchGRPO, 2509.06040): it removes edges from the update only; all leaves are scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.advantage import Advantages, SignalContext
from flowalign.credit.base import Lines, lines
from flowalign.selectors.base import START
from samplers import Forest


@dataclass(frozen=True)
class ParentTop1:
    """Below the last split only the best child branch of each parent, by the advantage of the split's own step.

    The last split: states with several stochastic steps, below which no state has several. Its own steps stay, and so
    does what lies above; a tie goes to the first branch."""

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        tree, line = forest.tree, lines(forest.tree)
        split = _last_split(forest, line)
        score = _scores(advantages)
        losers = torch.zeros(len(score), dtype=torch.bool)
        for parent in tree.parent[tree.edges[split]].unique().tolist():
            siblings = (tree.parent[tree.edges] == parent).nonzero().flatten()
            losers[siblings] = True
            losers[siblings[score[siblings].argmax()]] = False
        return ~torch.isin(line.last, line.last[losers & split]) | ~_below(line, split)


@dataclass(frozen=True)
class ExtremeB:
    """Below the last split only the `b` best and `b` worst branches of each tree, by the advantage of their last step."""

    b: int = 4

    def __post_init__(self) -> None:
        if self.b < 1:
            raise ValueError(f"got select.b={self.b}; expected at least 1")

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        tree, line = forest.tree, lines(forest.tree)
        split = _last_split(forest, line)
        score, root = _scores(advantages), tree.root[tree.edges]
        ends = line.last[split].unique()
        ends = ends[score[ends].isfinite()]
        kept = []
        for tree_root in root[ends].unique().tolist():
            own = ends[root[ends] == tree_root]
            ranked = own[score[own].argsort(stable=True)]
            kept.append(torch.cat([ranked[: self.b], ranked[-self.b :]]))
        chosen = torch.cat(kept) if kept else ends
        return torch.isin(line.last, chosen) | ~_below(line, split)


@dataclass(frozen=True)
class DepthWindow:
    """Leaves out the steps of a window of `size` grid steps, which moves by one towards `stop` every `every` iterations.

    It covers first..first+size−1, `first` going from `start` to `stop` and staying there. Smaller is shallower (noisier).
    The authors' script names states, from depth 15 to 9 of 20; step i arrives at depth i + 1, hence 14 and 8. One reading
    of the paper goes the other way, so the two ends say the sign. size: 4 in the script; the paper's cost table fits 5.
    ValueError for a window that leaves the grid: on one of ten steps these defaults would leave out nothing."""

    size: int = 4
    start: int = 14
    stop: int = 8
    every: int = 30

    def __post_init__(self) -> None:
        if self.size < 1 or self.every < 1 or min(self.start, self.stop) < 0:
            raise ValueError(f"got {self}; expected size and every at least 1, start and stop at least 0")

    def first(self, iteration: int) -> int:
        """The first step that is left out in this iteration."""
        moved = min(iteration // self.every, abs(self.stop - self.start))
        return self.start + moved * (1 if self.stop > self.start else -1)

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        steps = forest.tree.num_steps
        if max(self.start, self.stop) + self.size > steps:
            raise ValueError(
                f"got select.start={self.start}, select.stop={self.stop} and select.size={self.size} on a grid of {steps} steps; "
                f"expected windows inside it: both ends at most {steps - self.size}"
            )
        step = forest.tree.index[forest.tree.parent[forest.tree.edges]]
        first = self.first(context.iteration)
        return (step < first) | (step >= first + self.size)


def _scores(advantages: Advantages) -> Tensor:
    """[E] advantages, summed over channels; an invalid edge ranks below all others."""
    return torch.where(advantages.valid.any(1), advantages.values.double().sum(1), -torch.inf)


def _last_split(forest: Forest, line: Lines) -> Tensor:
    """[E] the stochastic steps that leave a state together with others, if no step below them does."""
    tree = forest.tree
    parent = tree.parent[tree.edges]
    several = parent.bincount(minlength=len(tree))[parent] > 1
    above_split = torch.zeros(len(parent), dtype=torch.bool)
    for step in tree.generation[tree.edges].argsort(descending=True).tolist():
        before = int(line.above[step])
        if before >= 0 and bool(several[step] | above_split[step]):
            above_split[before] = True
    return several & ~above_split


def _below(line: Lines, split: Tensor) -> Tensor:
    """[E] the steps that come after one of `split`."""
    after = torch.zeros_like(split)
    for step in range(len(split)):  # edges are sorted by generation: what comes before stands before
        before = int(line.above[step])
        after[step] = before >= 0 and bool(split[before] | after[before])
    return after
