"""A world in which the actions can be read exactly: a dot on a line, moved by each action; and the model that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CentroidShift:
    """Class k is a shift of the centre of mass by k - reach pixels to the right; logits -sharpness · (shift - class)²,
    so that the most probable class is the rounded shift. [n, F - 1, 2 · reach + 1]."""

    reach: int = 4
    sharpness: float = 1.0

    def load(self) -> None: ...

    def close(self) -> None: ...

    def logits(self, videos: Tensor) -> list[Tensor]:
        columns = videos.mean((2, 3))  # [n, F, W]
        place = torch.arange(columns.shape[2], dtype=columns.dtype, device=columns.device)
        centre = (columns * place).sum(2) / columns.sum(2).clamp(min=1e-6)
        classes = torch.arange(-self.reach, self.reach + 1, dtype=columns.dtype, device=columns.device)
        return [-self.sharpness * (centre.diff(dim=1)[..., None] - classes).square()]


def dots(places: Tensor, width: int = 128) -> Tensor:
    """Videos [n, F, 3, 2, width] of a Gaussian dot, 1.5 pixels wide, at `places` [n, F] in pixels."""
    columns = torch.arange(width, dtype=places.dtype)
    dot = (-0.5 * ((columns - places[..., None]) / 1.5).square()).exp()
    return dot[:, :, None, None, :].expand(-1, -1, 3, 2, -1)
