"""Statistics of pictures that need no model: monitors beside a learned reward, since they move when it is exploited.

A text reward that erases the background lowers saturation and edges and raises black or flat; a preference model that is
over-optimized raises saturation and contrast; a grid of single pixels raises high_frequency. Put them into `evaluation.rewards`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec

Statistic = Literal[
    "brightness", "contrast", "saturation", "colorfulness", "sharpness", "edges", "high_frequency", "black", "flat", "entropy"
]  # fmt: skip
BLACK = 0.1  # a pixel of which no channel is above this is black
LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709, here of gamma-encoded values


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """Statistics of each image as channels, of RGB in [0, 1] as it is (gamma-encoded), with luma Y = .2126 R + .7152 G + .0722 B.

      brightness      mean Y, 0 to 1
      contrast        standard deviation of Y, 0 to 0.5
      saturation      mean of (max − min) / max over R, G, B (HSV; 0 for black), 0 to 1
      colorfulness    √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb) with rg = R − G, yb = (R + G)/2 − B (Hasler and Süsstrunk 2003, who
                      count to 255), 0 to 2
      sharpness       variance of the 4-neighbor Laplacian of Y, 0 to 16
      edges           mean Sobel gradient of Y, where a step from 0 to 1 counts 1, 0 to √2
      high_frequency  share of the power of Y, without its mean, above half of the Nyquist frequency in x or y, 0 to 1; 0 if Y is flat
      black           share of pixels with no channel above 0.1, 0 to 1
      flat            share of pixels equal to their right and lower neighbors in 8 bits, 0 to 1
      entropy         of the colors, 4 bits per channel, in bits, 0 to 12

    All but black, flat and entropy are differentiable. Images have at least 3 × 3 pixels. Not kept: comparability across
    resolutions for sharpness, edges and high_frequency."""

    statistics: tuple[Statistic, ...] = get_args(Statistic)
    name: str = "image"

    def __post_init__(self) -> None:
        if not self.statistics or not set(self.statistics) <= set(STATISTICS):
            raise ValueError(f"got statistics={self.statistics}; expected some of {tuple(STATISTICS)}")
        self.spec  # noqa: B018 (checked at construction)

    @property
    def spec(self) -> RewardSpec:
        chosen = [STATISTICS[name] for name in self.statistics]
        return RewardSpec(
            channels=tuple(self.statistics),
            differentiable=all(each.differentiable for each in chosen),
            range=(0.0, max(each.most for each in chosen)),
        )

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        images = batch.images
        assert images is not None
        if min(images.shape[-2:]) < 3:
            raise ValueError(f"got images of {list(images.shape[-2:])} pixels; expected at least 3 x 3")
        scores = torch.stack([STATISTICS[name].of(images) for name in self.statistics], 1)
        scores = scores if torch.is_grad_enabled() else scores.float()
        return RewardOutput(scores, torch.ones_like(scores, dtype=torch.bool))


def luma(images: Tensor) -> Tensor:
    """[N, H, W] of [N, 3, H, W]."""
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(1)


def root(squares: Tensor) -> Tensor:
    """√, with gradient 0 at 0."""
    above = squares > 0
    return torch.where(above, torch.where(above, squares, 1).sqrt(), 0)


def brightness(images: Tensor) -> Tensor:
    return luma(images).mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    return root(luma(images).var((1, 2), correction=0))


def saturation(images: Tensor) -> Tensor:
    most, least = images.amax(1), images.amin(1)
    lit = most > 0
    return torch.where(lit, (most - least) / torch.where(lit, most, 1), 0).mean((1, 2))


def colorfulness(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
    spread = root(opponents.var((2, 3), correction=0).sum(1))
    return spread + 0.3 * root(opponents.mean((2, 3)).square().sum(1))


def sharpness(images: Tensor) -> Tensor:
    y = luma(images)
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return (around - 4 * y[:, 1:-1, 1:-1]).var((1, 2), correction=0)


def edges(images: Tensor) -> Tensor:
    y = luma(images)
    down = (y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]) / 4  # smoothed over rows
    along = (y[:, :, :-2] + 2 * y[:, :, 1:-1] + y[:, :, 2:]) / 4
    across = (down[:, :, 2:] - down[:, :, :-2]).square() + (along[:, 2:] - along[:, :-2]).square()
    return root(across).mean((1, 2))


def high_frequency(images: Tensor) -> Tensor:
    y = luma(images)
    power = torch.fft.fft2(y - y.mean((1, 2), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(size, device=y.device).abs() > 0.25 for size in y.shape[1:])
    total, high = power.sum((1, 2)), (power * (rows[:, None] | columns)).sum((1, 2))
    some = total > 1e-10 * y[0].numel() ** 2  # below lies rounding: a deviation of Y of 1e-5
    return torch.where(some, high / torch.where(some, total, 1), 0)


def black(images: Tensor) -> Tensor:
    return (images.amax(1) <= BLACK).to(images.dtype).mean((1, 2))


def flat(images: Tensor) -> Tensor:
    levels = (images.detach() * 255).round()
    here = levels[:, :, :-1, :-1]
    same = (here == levels[:, :, :-1, 1:]) & (here == levels[:, :, 1:, :-1])
    return same.all(1).to(images.dtype).mean((1, 2))


def entropy(images: Tensor) -> Tensor:
    levels = (images.detach().clamp(0, 1) * 15).round().long().flatten(2)
    cells = levels[:, 0] * 256 + levels[:, 1] * 16 + levels[:, 2]
    shares = torch.stack([cell.bincount(minlength=4096) for cell in cells]) if len(cells) else cells.new_zeros(0, 4096)
    p = shares.to(images.dtype) / cells.shape[1]
    return -torch.special.xlogy(p, p).sum(1) / torch.log(p.new_tensor(2.0))


class _Statistic(NamedTuple):
    """of: [N] from images [N, 3, H, W]; most: the largest value, the least being 0."""

    of: Callable[[Tensor], Tensor]
    most: float
    differentiable: bool = True


STATISTICS: dict[str, _Statistic] = {
    "brightness": _Statistic(brightness, 1.0),
    "contrast": _Statistic(contrast, 0.5),
    "saturation": _Statistic(saturation, 1.0),
    "colorfulness": _Statistic(colorfulness, 2.0),
    "sharpness": _Statistic(sharpness, 16.0),
    "edges": _Statistic(edges, 2**0.5),
    "high_frequency": _Statistic(high_frequency, 1.0),
    "black": _Statistic(black, 1.0, differentiable=False),
    "flat": _Statistic(flat, 1.0, differentiable=False),
    "entropy": _Statistic(entropy, 12.0, differentiable=False),
}
