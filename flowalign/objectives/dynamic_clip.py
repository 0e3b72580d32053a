"""Clip ranges that depend on the advantage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.advantage import Advantages
from samplers import Forest


@dataclass(frozen=True)
class DynamicClip:
    """ε = low + (high − low) · sigmoid(sensitivity · A / max|A| of the tree), the same below and above.

    Dynamic-TreeRPO (2509.23352, Eq. 11, whose exact form is not public) in our reading: steps that did well may move
    further. Like every clip range, low and high are for log-probs reduced over about 65,536 elements by the mean;
    low = high is a constant clip range."""

    low: float = 5e-5
    high: float = 2e-4
    sensitivity: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"got low={self.low}, high={self.high}; expected 0 < low <= high")

    def bounds(self, forest: Forest, advantages: Advantages) -> Tensor:
        """[E, C, 2] for every edge of the forest, float64. A tree is all that descends from one root."""
        root = forest.tree.root[forest.tree.edges]
        size = advantages.values.double().abs()
        largest = torch.zeros(forest.tree.num_roots, size.shape[1], dtype=torch.float64)
        largest = largest.scatter_reduce(0, root[:, None].expand_as(size), size, "amax")[root]
        relative = torch.where(largest > 0, advantages.values.double() / largest, 0.0)
        width = self.low + (self.high - self.low) * (self.sensitivity * relative).sigmoid()
        return width[..., None].expand(-1, -1, 2)
