"""Edge selectors: which edges are trained, decided after the advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flowalign.advantage import Advantages
from samplers import Forest


class Selector(Protocol):
    def choose(self, forest: Forest, advantages: Advantages) -> Tensor:
        """A mask [E] of the edges to train. Invalid edges are dropped by the trainer whatever is returned."""
        ...


@dataclass(frozen=True)
class AllEdges:
    """Every valid edge, those with advantage 0 too: they count in the mean and, if a KL is on, are held by it."""

    def choose(self, forest: Forest, advantages: Advantages) -> Tensor:
        return advantages.valid.any(1)


@dataclass(frozen=True)
class NonZeroAdvantage:
    """Edges with an advantage other than 0: groups in which nothing differs cost no forward or backward."""

    def choose(self, forest: Forest, advantages: Advantages) -> Tensor:
        return (advantages.values != 0).any(1)
