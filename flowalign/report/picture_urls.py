"""Images of an evaluation as data URLs that together fit into a page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from PIL import Image
from torch import Tensor

from flowalign.models.images import picture
from flowalign.report.page import data_url

BUDGET = 14 * 2**20  # characters of all images of a page
SMALLEST = 48  # pixels: the shorter side is not reduced below
TINY = 128  # pixels: images up to it are enlarged without smoothing
PROBES = 24  # images of a column from which the size of all is estimated


@dataclass(frozen=True)
class PictureURLs:
    """stills, clips [column][image]: data URLs; clips are those of videos, [] of images. factor: how far they are reduced.
    lossless: PNG and not JPEG."""

    stills: list[list[str]]
    clips: list[list[str]]
    factor: int
    lossless: bool
    tiny: bool


def picture_urls(pixels: Sequence[Tensor], fps: float, budget: int = BUDGET) -> PictureURLs:
    """pixels [column]: uint8 [N, 3, h, w], or [N, F, 3, h, w] of videos, whose first frame is the still.

    PNG if `budget` allows, else JPEG, else reduced by a whole factor, as small as needed; videos as animated WebP. The size is
    estimated from PROBES images per column. Not kept: the budget, where images of SMALLEST pixels are still more."""
    video, size = pixels[0].ndim == 5, tuple(pixels[0].shape[-2:])
    for factor, lossless in _ways(min(size)):
        estimate = sum(len(url) for each in pixels for url in _probe(each, factor, lossless, fps)) * _scale(pixels)
        if estimate <= budget:
            break
    stills = [[_still(image, factor, lossless) for image in each] for each in pixels]
    clips = [[_clip(frames, factor, fps) for frames in each] for each in pixels] if video else []
    return PictureURLs(stills, clips, factor, lossless, max(size) // factor <= TINY)


def _ways(side: int) -> Iterator[tuple[int, bool]]:
    yield 1, True
    for factor in count(1):
        if factor > 1 and side // factor < SMALLEST:
            return
        yield factor, False


def _scale(pixels: Sequence[Tensor]) -> float:
    return len(pixels[0]) / min(len(pixels[0]), PROBES)


def _probe(pixels: Tensor, factor: int, lossless: bool, fps: float) -> Iterator[str]:
    for place in torch.linspace(0, len(pixels) - 1, min(len(pixels), PROBES)).long().tolist():
        yield _still(pixels[place], factor, lossless)
        if pixels.ndim == 5:
            yield _clip(pixels[place], factor, fps)


def _still(image: Tensor, factor: int, lossless: bool) -> str:
    buffer = io.BytesIO()
    picture = _picture(image if image.ndim == 3 else image[0], factor)
    if lossless:
        picture.save(buffer, "PNG")
        return data_url("png", buffer.getvalue())
    picture.save(buffer, "JPEG", quality=88)
    return data_url("jpeg", buffer.getvalue())


def _clip(frames: Tensor, factor: int, fps: float) -> str:
    buffer = io.BytesIO()
    first, *others = (_picture(frame, factor) for frame in frames)
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=75, method=2
    )
    return data_url("webp", buffer.getvalue())


def _picture(image: Tensor, factor: int) -> Image.Image:
    whole = picture(image)
    return whole.reduce(factor) if factor > 1 else whole
