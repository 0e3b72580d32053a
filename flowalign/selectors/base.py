"""What a selector is, and what it may depend on."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from flowalign.advantage import Advantages, SignalContext
from samplers import Forest

START = SignalContext()


class Selector(Protocol):
    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        """A mask [E] of the edges to train. Invalid edges are dropped by the trainer whatever is returned."""
        ...
