"""Images and videos in [0, 1] become the patches that Qwen2-VL reads, with their gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rewards.image.preprocess import CLIP_MEAN, CLIP_STD, Mode, resampling

MAX_ASPECT = 200  # of the sides of an image; QwenLM/Qwen2-VL refuses more


@dataclass(frozen=True, eq=False)
class Patches:
    """An image, or a video. rows [t·h·w, 3·T·P·P]: one per patch of T frames of P × P pixels; grid: (t, h, w) in patches."""

    rows: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Eye:
    """Resize to between min_pixels and max_pixels per frame (about: sides are multiples of patch · merge), normalize, cut.

    patch, merge, temporal: those of the vision tower, which joins merge × merge patches to one token."""

    min_pixels: int
    max_pixels: int
    patch: int = 14
    merge: int = 2
    temporal: int = 2

    def __call__(self, frames: Tensor, mode: Mode = "tensor", quantize: bool = False) -> Patches:
        """Of frames [F, 3, H, W], one for an image; mode and quantize as in rewards.image.preprocess.Preprocess."""
        height, width = frames.shape[-2:]
        size = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        resized = resampling(mode, quantize)(frames, *size)
        mean, std = (resized.new_tensor(numbers)[:, None, None] for numbers in (CLIP_MEAN, CLIP_STD))
        return patchify((resized - mean) / std, self.patch, self.merge, self.temporal)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor` with about the same aspect, of at most max_pixels, else of at least min_pixels.

    The nearest multiples, if their area lies between the two; else the sides are scaled to that area, and rounded down if it
    is too large, up if too small. ValueError for an aspect beyond 200."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"got an image of {height} x {width} pixels; expected an aspect of at most {MAX_ASPECT}: crop it"
        )
    nearest = [max(factor, round(side / factor) * factor) for side in (height, width)]
    area = nearest[0] * nearest[1]
    if area > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        nearest = [max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)]
    elif area < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        nearest = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return nearest[0], nearest[1]


def patchify(frames: Tensor, patch: int = 14, merge: int = 2, temporal: int = 2) -> Patches:
    """Of frames [F, 3, H, W], H and W multiples of patch · merge. The last frame is repeated up to a multiple of `temporal`, so
    an image is seen twice. The merge × merge patches of a token are neighbors: rows go by time, block row, block column,
    row in the block, column in the block; numbers in a row by color, time, y, x."""
    missing = -len(frames) % temporal
    frames = frames if not missing else _with_last_repeated(frames, missing)
    t, h, w = len(frames) // temporal, frames.shape[2] // patch, frames.shape[3] // patch
    cut = frames.reshape(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
    rows = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * temporal * patch * patch)
    return Patches(rows, (t, h, w))


def _with_last_repeated(frames: Tensor, times: int) -> Tensor:
    index = [*range(len(frames)), *[len(frames) - 1] * times]
    return frames[index]
