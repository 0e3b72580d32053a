"""What two pictures have to have in common to count as alike: the contract of an embedding, and one without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


class Features(Protocol):
    """Pictures as vectors, whose Euclidean distance d says how far they differ. Of unit vectors (CLIP, DINO: normalize them)
    1 − d²/2 is the cosine."""

    def embed(self, images: Tensor) -> Tensor:
        """[N, D] from RGB images [N, 3, H, W] in [0, 1]; a row depends on its own image only."""
        ...

    def load(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Thumbnail:
    """The picture averaged down to at most size × size pixels: d is the root mean square difference of two thumbnails, in [0, 1].
    Differentiable. Not kept: detail finer than its pixels, and what the picture shows."""

    size: int = 16

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"got Thumbnail.size={self.size}; expected at least 1 pixel")

    def load(self) -> None: ...

    def close(self) -> None: ...

    def embed(self, images: Tensor) -> Tensor:
        small = lowpass(images, self.size).flatten(1)
        return small / small.shape[1] ** 0.5


def lowpass(images: Tensor, size: int) -> Tensor:
    """[..., 3, h, w] with h, w at most `size`: means over equal areas."""
    flat = images.flatten(0, -4)
    height, width = images.shape[-2:]
    small = adaptive_avg_pool2d(flat, (min(size, height), min(size, width)))
    return small.reshape(*images.shape[:-2], *small.shape[-2:])
