"""Selection edge by edge: all of them, those with an advantage, or as many of each sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.advantage import Advantages, SignalContext
from flowalign.credit.base import largest_of_each_sign
from flowalign.selectors.base import START, Selector
from samplers import Forest


@dataclass(frozen=True)
class AllEdges:
    """Every valid edge, those with advantage 0 too: they count in the mean and, if a KL is on, are held by it."""

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        return advantages.valid.any(1)


@dataclass(frozen=True)
class NonZeroAdvantage:
    """Edges with an advantage other than 0: groups in which nothing differs cost no forward or backward."""

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        return (advantages.values != 0).any(1)


@dataclass(frozen=True)
class All:
    """Edges that every one of `parts` chooses; each sees all edges, so their order does not matter."""

    parts: list[Selector]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("got no All.parts; expected at least one selector")

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        return torch.stack([part.choose(forest, advantages, context) for part in self.parts]).all(0)


@dataclass(frozen=True)
class PositiveNegativeBalance:
    """As many edges of positive as of negative advantage over the batch, the largest; all if only one sign occurs.

    Channels are summed. Edges of advantage 0 are left out."""

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        return largest_of_each_sign(advantages.values.double().sum(1), advantages.valid.any(1))
