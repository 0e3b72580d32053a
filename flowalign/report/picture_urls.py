"""Images of an evaluation as data URLs that together fit into a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flowalign.models.images import animation, image_bytes
from flowalign.report.page import data_url
from flowalign.storage.mp4 import QUALITY, mp4_bytes

BUDGET = 14 * 2**20  # characters of all images of a page
SMALLEST = 48  # pixels: the shorter side is not reduced below
TINY = 128  # pixels: images up to it are enlarged without smoothing
PROBES = {4: 24, 5: 6}  # images and videos of a column, by dimensions, from which the size of all is estimated
LOWER = 26  # mp4 quality in a page of JPEGs


@dataclass(frozen=True)
class PictureURLs:
    """stills, clips [column][image]: data URLs; clips are those of videos, [] of images. factor: how far they are reduced.
    lossless: PNG and not JPEG. sources: {uid: data URL} of source images."""

    stills: list[list[str]]
    clips: list[list[str]]
    factor: int
    lossless: bool
    tiny: bool
    sources: dict[int, str] = field(default_factory=dict)


def picture_urls(
    pixels: Sequence[Tensor], fps: float, budget: int = BUDGET, sources: Mapping[int, Tensor] | None = None
) -> PictureURLs:
    """pixels [column]: uint8 [N, 3, h, w], or [N, F, 3, h, w] of videos, whose first frame is the still. sources: {uid: uint8 [3, h, w]}.

    PNG if `budget` allows, else JPEG, else reduced by a whole factor, as small as needed; videos as `clip`. The size is
    estimated from PROBES per column. Not kept: the budget, where images of SMALLEST pixels are still more."""
    video, size, given = pixels[0].ndim == 5, tuple(pixels[0].shape[-2:]), sources or {}
    for factor, lossless in _ways(min(size)):
        estimate = sum(len(url) for each in pixels for url in _probe(each, factor, lossless, fps)) * _scale(pixels[0])
        if estimate + sum(len(_still(source, factor, lossless)) for source in given.values()) <= budget:
            break
    stills = [[_still(image, factor, lossless) for image in each] for each in pixels]
    clips = [[_clip(frames, factor, lossless, fps) for frames in each] for each in pixels] if video else []
    shown = {uid: _still(source, factor, lossless) for uid, source in given.items()}
    return PictureURLs(stills, clips, factor, lossless, max(size) // factor <= TINY, shown)


def clip(frames: Tensor, fps: float, *, lossless: bool = True) -> tuple[str, bytes]:
    """MIME type and file of a video for a page: of uint8 frames [F, 3, h, w] up to TINY pixels an animated WebP, which keeps every pixel
    in half the bytes of an mp4; of larger ones an mp4, a seventh of a WebP. lossless: as of PictureURLs."""
    if max(frames.shape[-2:]) > TINY:
        return "video/mp4", mp4_bytes(frames, fps, QUALITY if lossless else LOWER)
    settings = {"lossless": True} if lossless else {"quality": 75, "method": 2}
    return "image/webp", animation(frames, fps, format="WEBP", **settings)


def _ways(side: int) -> Iterator[tuple[int, bool]]:
    yield 1, True
    for factor in count(1):
        if factor > 1 and side // factor < SMALLEST:
            return
        yield factor, False


def _probes(pixels: Tensor) -> int:
    return min(len(pixels), PROBES[pixels.ndim])


def _scale(pixels: Tensor) -> float:
    return len(pixels) / _probes(pixels)


def _probe(pixels: Tensor, factor: int, lossless: bool, fps: float) -> Iterator[str]:
    for place in torch.linspace(0, len(pixels) - 1, _probes(pixels)).long().tolist():
        yield _still(pixels[place], factor, lossless)
        if pixels.ndim == 5:
            yield _clip(pixels[place], factor, lossless, fps)


def _still(image: Tensor, factor: int, lossless: bool) -> str:
    first = _reduced(image if image.ndim == 3 else image[0], factor)
    if lossless:
        return data_url("image/png", image_bytes(first, format="PNG"))
    return data_url("image/jpeg", image_bytes(first, format="JPEG", quality=88))


def _clip(frames: Tensor, factor: int, lossless: bool, fps: float) -> str:
    return data_url(*clip(_reduced(frames, factor), fps, lossless=lossless))


def _reduced(pixels: Tensor, factor: int) -> Tensor:
    """uint8 [..., h, w]."""
    if factor == 1:
        return pixels
    return avg_pool2d(pixels.float(), factor, ceil_mode=True).round().to(torch.uint8)
