"""Clip ranges that depend on the advantage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.advantage import Advantages
from flowalign.objectives.transitions import ClipRange, check_elements, scale_of_clip_range
from samplers import Forest


@dataclass(frozen=True)
class DynamicClip:
    """ε = low + (high − low) · sigmoid(sensitivity · A / max|A| of the tree), the same below and above.

    Dynamic-TreeRPO (2509.23352, Eq. 11, whose exact form is not public) in our reading: steps that did well may move
    further. low and high are scaled as the clip range of ClippedRatio: `elements` is the size of the latents that they
    are for, None leaves them as they stand. low = high is a constant clip range."""

    low: float = 5e-5
    high: float = 2e-4
    sensitivity: float = 4.0
    elements: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"got low={self.low}, high={self.high}; expected 0 < low <= high")
        check_elements(self.elements)

    @property
    def clip(self) -> ClipRange:
        """Its narrowest."""
        return ClipRange(self.low, self.elements)

    def bounds(self, forest: Forest, advantages: Advantages) -> Tensor:
        """[E, C, 2] for every edge of the forest, float64. A tree is all that descends from one root."""
        root = forest.tree.root[forest.tree.edges]
        size = advantages.values.double().abs()
        largest = torch.zeros(forest.tree.num_roots, size.shape[1], dtype=torch.float64)
        largest = largest.scatter_reduce(0, root[:, None].expand_as(size), size, "amax")[root]
        relative = torch.where(largest > 0, advantages.values.double() / largest, 0.0)
        width = self.low + (self.high - self.low) * (self.sensitivity * relative).sigmoid()
        width = width * scale_of_clip_range(self.elements, forest.states, forest.kernel.reduce)
        return width[..., None].expand(-1, -1, 2)
