"""What a selector is, and what it may depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flowalign.advantage import Advantages
from samplers import Forest


@dataclass(frozen=True)
class SelectionContext:
    """What a selector that draws at random or moves with the iteration depends on, and nothing else.

    seed: of the run. iteration: of the loop. uids: the prompt uid of each group, so that a draw does not depend on which
    process holds the prompt; () stands for the groups' numbers."""

    seed: int = 0
    iteration: int = 0
    uids: Sequence[int] = ()


START = SelectionContext()


class Selector(Protocol):
    def choose(self, forest: Forest, advantages: Advantages, context: SelectionContext = START) -> Tensor:
        """A mask [E] of the edges to train. Invalid edges are dropped by the trainer whatever is returned."""
        ...
