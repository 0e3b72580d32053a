"""Colors of text on a plain background: are ink and paper of the colors that were asked for, or how near are they?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec

INK_SHARE = 0.05  # of the pixels, the ones farthest from the paper color, are taken for ink
NO_INK = 0.1  # nearer than this to the paper (RGB in [0, 1], Euclidean), a color does not count as ink

Palette = Mapping[str, tuple[int, int, int]]
Metric = Literal["mean", "both", "ink", "paper"]


@dataclass(frozen=True, eq=False)
class ColorAccuracy:
    """Share of the two colors, ink and paper, whose nearest palette color has the name in the metadata: 0, 0.5 or 1.

    Paper is the median of the picture's outermost pixels, channel by channel. Ink is the median of the 5 % of all
    pixels that lie farthest from the paper (so up to 2.5 % of stray pixels do no harm; text covering less is not seen).
    Distances are Euclidean in gamma-encoded RGB. A picture without ink has its ink wrong.

    metric: "mean" of the two, "both" (1 only if both are right), "ink" or "paper" alone. palette: name -> RGB, integers 0..255; None
    takes `metadata["palette"]`. ink_key, paper_key: where the metadata names the colors. A sample whose metadata lacks
    them, or names a color that is not in the palette, is invalid. Components: ink, paper.
    """

    palette: dict[str, tuple[int, int, int]] | None = None
    metric: Metric = "mean"
    ink_key: str = "ink"
    paper_key: str = "paper"
    name: str = "color"

    @property
    def spec(self) -> RewardSpec:
        """Not differentiable: colors are compared by name."""
        return RewardSpec(range=(0, 1))

    def __post_init__(self) -> None:
        _check_metric(self.metric, get_args(Metric))
        if self.palette is not None:
            _colors(self.palette)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        pages = batch.pixels().float() / 255
        paper = paper_color(pages)
        ink, strength = ink_color(pages, paper)
        rows = [self._judge(batch.metadata[i], ink[i], paper[i], strength[i].item()) for i in range(len(batch))]
        parts = torch.tensor([row[:2] for row in rows], dtype=torch.float32).reshape(-1, 2)
        return _output(parts, self.metric, [row[2] for row in rows])

    def _judge(self, wanted: dict[str, Any], ink: Tensor, paper: Tensor, strength: float) -> tuple[float, float, str]:
        """(ink right, paper right, what was seen); NaN where the metadata cannot say."""
        palette: Palette | None = self.palette if self.palette is not None else wanted.get("palette")
        if not palette:
            return torch.nan, torch.nan, "no palette: give one to ColorAccuracy or to the metadata as 'palette'"
        for key in (self.ink_key, self.paper_key):
            if wanted.get(key) not in palette:
                return (
                    torch.nan,
                    torch.nan,
                    f"metadata[{key!r}] is {wanted.get(key)!r}; expected one of {list(palette)}",
                )
        names, values = list(palette), _colors(palette)
        seen_ink = "none" if strength < NO_INK else names[int((values - ink).norm(dim=1).argmin())]
        seen_paper = names[int((values - paper).norm(dim=1).argmin())]
        right = seen_ink == wanted[self.ink_key], seen_paper == wanted[self.paper_key]
        return float(right[0]), float(right[1]), f"{seen_ink} on {seen_paper}"


@dataclass(frozen=True, eq=False)
class ColorCloseness:
    """1 − d/√3, d the distance of the ink, and of the paper, from the colors in the metadata: graded in [0, 1], where ColorAccuracy only
    counts names, so that samples that are all wrong, or all right, are told apart.

    Ink, paper and distances are ColorAccuracy's. metric: "mean" of both, "ink" or "paper" alone. ink_key, paper_key: where the
    metadata has the color, RGB in 0..255; a sample that lacks one that the metric reads is invalid. Components: ink, paper."""

    metric: Literal["mean", "ink", "paper"] = "mean"
    ink_key: str = "ink_rgb"
    paper_key: str = "paper_rgb"
    name: str = "color_closeness"

    @property
    def spec(self) -> RewardSpec:
        """Not differentiable: a median has the gradient of one pixel."""
        return RewardSpec(range=(0, 1))

    def __post_init__(self) -> None:
        _check_metric(self.metric, ("mean", "ink", "paper"))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        pages = batch.pixels().float() / 255
        paper = paper_color(pages)
        seen = torch.stack([ink_color(pages, paper)[0], paper], 1)  # [N, 2, 3]
        wanted = [[_rgb(row.get(key)) for key in (self.ink_key, self.paper_key)] for row in batch.metadata]
        distance = (seen - torch.tensor(wanted).reshape(-1, 2, 3)).norm(dim=2)
        levels = [[round(255 * part) for part in color] for color in seen.flatten(0, 1).tolist()]
        info = [f"{ink} on {sheet}" for ink, sheet in zip(levels[::2], levels[1::2], strict=True)]
        return _output(1 - distance / 3**0.5, self.metric, info)


def _rgb(color: Any) -> list[float]:
    """A color of the metadata in [0, 1]; NaN for what is none."""
    good = isinstance(color, list | tuple) and len(color) == 3
    good = good and all(isinstance(part, int | float) and 0 <= part <= 255 for part in color)
    return [part / 255 for part in color] if good else [math.nan] * 3


def _output(parts: Tensor, metric: Metric, info: list[str]) -> RewardOutput:
    """parts [N, 2]: of ink and of paper, NaN where it is not known."""
    columns = {"mean": parts.mean(1), "both": parts.amin(1), "ink": parts[:, 0], "paper": parts[:, 1]}
    scores = columns[metric]
    return RewardOutput(scores, ~scores.isnan(), {"ink": parts[:, 0], "paper": parts[:, 1]}, info)


def _check_metric(metric: str, known: tuple[str, ...]) -> None:
    if metric not in known:
        raise ValueError(f"got metric={metric!r}; expected one of {known}")


def paper_color(images: Tensor) -> Tensor:
    """[N, 3]: median of the outermost pixels of images [N, 3, H, W], each once or, at the corners, twice."""
    frame = [images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]]
    return torch.cat(frame, dim=2).median(dim=2).values


def ink_color(images: Tensor, paper: Tensor) -> tuple[Tensor, Tensor]:
    """Median color [N, 3] of the INK_SHARE of pixels farthest from the paper [N, 3], and its distance [N] from it."""
    pixels = images.flatten(2)
    distance = (pixels - paper[:, :, None]).norm(dim=1)
    farthest = distance.topk(max(1, round(INK_SHARE * pixels.shape[2])), dim=1).indices
    ink = pixels.gather(2, farthest[:, None, :].expand(-1, 3, -1)).median(dim=2).values
    return ink, (ink - paper).norm(dim=1)


def _colors(palette: Palette) -> Tensor:
    """Palette as [C, 3] in [0, 1]."""
    for name, color in palette.items():
        if len(color) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in color):
            raise ValueError(f"got palette color {name!r}={color!r}; expected three integers from 0 to 255")
    return torch.tensor([list(color) for color in palette.values()], dtype=torch.float32) / 255
