"""JPEG size as a reward (DDPO, arXiv:2305.13301): a smoke test of a training loop, without model weights.

The image is rounded to 8 bits (round(255 x)), as flow_grpo does, and encoded by Pillow with 4:2:0 chroma, its default.
Sizes depend on the encoder's version and grow with the resolution: compare only at one resolution. Identical images have
identical sizes, so a group of equal images has no spread.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec


@dataclass(frozen=True, eq=False)
class JPEGIncompressibility:
    """Size of the JPEG in kB (1000 bytes), above 0; larger is better. Component: kilobytes."""

    quality: int = 95
    name: str = "jpeg_incompressibility"

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(range=(0, math.inf))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        size = kilobytes(batch, self.quality)
        return RewardOutput(size, torch.ones(len(size), dtype=torch.bool), {"kilobytes": size})


@dataclass(frozen=True, eq=False)
class JPEGCompressibility:
    """-kB / divide_by, below 0, smaller files are better. divide_by: 1 is DDPO's, 500 flow_grpo's. Component:
    kilobytes."""

    quality: int = 95
    divide_by: float = 1.0
    name: str = "jpeg_compressibility"

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(range=(-math.inf, 0))

    def __post_init__(self) -> None:
        if self.divide_by <= 0:
            raise ValueError(
                f"got divide_by={self.divide_by}; expected a number above 0, such as 1 (kB) or 500 (flow_grpo)"
            )

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        size = kilobytes(batch, self.quality)
        return RewardOutput(-size / self.divide_by, torch.ones(len(size), dtype=torch.bool), {"kilobytes": size})


def kilobytes(batch: RewardBatch, quality: int) -> Tensor:
    """float32 [N]: JPEG size of each image in 1000 bytes."""
    from PIL import Image

    sizes = []
    for picture in batch.pixels().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=quality)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)
