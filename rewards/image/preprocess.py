"""Images in [0, 1] become the square, normalized pixels that a vision tower was trained on, with their gradient.

The resampling is that of Pillow: bicubic with a = -0.5 and antialiasing, which torch has only with antialias=True. Scores
were made with 8-bit images; `quantize` rounds as they did, mode "pil" takes Pillow itself, so the difference can be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's; also of laion's ViT-H, PickScore, HPSv2 and ImageReward
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Mode = Literal["tensor", "pil"]
Interpolation = Literal["bicubic", "bilinear"]
Rounding = Literal["floor", "round"]
Resample = Callable[[Tensor, int, int], Tensor]  # images, height, width


@dataclass(frozen=True)
class Preprocess:
    """Resize, make square, normalize: what one checkpoint expects.

    fit: "crop" scales the short side to `size` and crops the center, "pad" scales the long side and pads with `fill`
    (before normalizing), "squash" ignores the aspect. crop_offset: where an odd difference is halved: "floor" as the image
    processors of transformers do, "round" (half to even) as torchvision does.
    """

    size: int
    fit: Literal["crop", "pad", "squash"] = "crop"
    crop_offset: Rounding = "round"
    interpolation: Interpolation = "bicubic"
    fill: float = 0.0
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor, mode: Mode = "tensor", quantize: bool = False) -> Tensor:
        """[N, 3, size, size] from [N, 3, H, W], in the dtype and on the device of `images`.

        quantize: rounds to 8 bits before and after resizing, with a straight-through gradient. Mode "pil" has no gradient.
        """
        resample = resampling(mode, quantize, self.interpolation)
        if self.fit == "crop":
            square = center_crop(resize_short(images, self.size, resample), self.size, self.crop_offset)
        elif self.fit == "pad":
            square = resize_long_pad(images, self.size, self.fill, resample)
        else:
            square = resample(images, self.size, self.size)
        mean, std = (square.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return (square - mean) / std


def resampling(mode: Mode, quantize: bool, interpolation: Interpolation = "bicubic") -> Resample:
    """How `Preprocess` resizes: with torch ("tensor"), which may round to 8 bits before and after, or with Pillow ("pil")."""

    def resample(images: Tensor, height: int, width: int) -> Tensor:
        if mode == "pil":
            return resize_with_pil(images, height, width, interpolation)
        if not quantize:
            return resize(images, height, width, interpolation)
        return to_8_bits(resize(to_8_bits(images), height, width, interpolation))

    return resample


def resize(images: Tensor, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Antialiased. Not clamped: bicubic overshoots [0, 1] at sharp edges, where Pillow cuts off."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode=interpolation, align_corners=False, antialias=True)


def resize_with_pil(images: Tensor, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Pillow's, on 8-bit images; no gradient."""
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    pixels = (images.detach().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    resized = [Image.fromarray(picture).resize((width, height), filters[interpolation]) for picture in pixels]
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))
    return stacked.permute(0, 3, 1, 2).to(images) / 255


def resize_short(images: Tensor, size: int, resample: Resample = resize) -> Tensor:
    """The short side becomes `size`, the long side int(size · long / short), truncated."""
    height, width = images.shape[-2:]
    long = int(size * max(height, width) / min(height, width))
    return resample(images, *((size, long) if height <= width else (long, size)))


def center_crop(images: Tensor, size: int, offset: Rounding = "round") -> Tensor:
    """The central size × size pixels; see Preprocess.crop_offset."""
    top, left = ((side - size) // 2 if offset == "floor" else round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize_long_pad(images: Tensor, size: int, fill: float = 0.0, resample: Resample = resize) -> Tensor:
    """The long side becomes `size`, the rest is `fill`, the odd line at the bottom or right.

    Pads always: tgxs002/HPSv2 leaves an image whose long side is `size` already as it is, which its model cannot take.
    """
    scale = size / max(images.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    top, left = (size - height) // 2, (size - width) // 2
    around = (left, size - width - left, top, size - height - top)
    return F.pad(resample(images, height, width), around, value=fill)


def to_8_bits(images: Tensor) -> Tensor:
    """round(255 x) / 255 within [0, 1], as flow_grpo rounds; the gradient passes as if nothing had been done."""
    return images + ((images.detach().clamp(0, 1) * 255).round() / 255 - images.detach())
