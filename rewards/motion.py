"""Statistics of videos that need no model: how much moves, how evenly, and whether anything does at all.

A reward that is a mean over frames is highest for a still, and any measure of consistency is too: pair them with `MotionBand`, or
let them count only where something moves: Gated(reward, gate=VideoStatistics(("motion",)), threshold=…).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.features import Features, Thumbnail, lowpass

Statistic = Literal["motion", "flicker", "consistency", "first_frame", "static"]
LOWPASS = 16  # frames are averaged to so many pixels a side before flicker is measured
STILL = 1 / 255  # frames that differ by less, in the mean over pixels, count as the same


@dataclass(eq=False)
class VideoStatistics:
    """Statistics of each video of F frames x_0 … x_{F−1}, in [0, 1], as channels.

      motion       fps · mean |x_t − x_{t−1}| over pixels and frames: change per second. At any frame rate a film has one
                   figure, except where a pixel goes back and forth between two frames
      flicker      mean |y_t − (y_{t−1} + y_{t+1})/2| of frames averaged to 16 × 16 pixels, 0 to 1: 0 for a still and for even change
      consistency  mean of 1 − d²/2, d the distance of the features of neighboring frames: the cosine, if they are unit vectors
      first_frame  the same against x_0, for videos that continue an image
      static       share of neighboring frames that differ by less than 1/255 in the mean: 1 for a still

    VBench's (2311.17982) consistency of subject and background is the mean of `consistency` and `first_frame` with features of DINO and
    CLIP. features: None is Thumbnail(). All but static are differentiable, where the features are. A video of one frame (flicker: of
    two) has no score. Not kept: optical flow; a moving camera counts as motion."""

    statistics: tuple[Statistic, ...] = get_args(Statistic)
    features: Features | None = None
    name: str = "video"
    _features: Features = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.statistics or not set(self.statistics) <= set(get_args(Statistic)):
            raise ValueError(f"got statistics={self.statistics}; expected some of {get_args(Statistic)}")
        self._features = Thumbnail() if self.features is None else self.features
        self.spec  # noqa: B018 (checked at construction)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(("videos",), channels=tuple(self.statistics), differentiable="static" not in self.statistics)

    def load(self) -> None:
        self._features.load()

    def close(self) -> None:
        self._features.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.videos is not None and batch.fps is not None
        frames = batch.videos.shape[1]
        columns = [self._measure(name, batch.videos, batch.fps) for name in self.statistics]
        scores = torch.stack(columns, 1)
        scores = scores if torch.is_grad_enabled() else scores.float()
        short = f"a video of {frames} frame{'s'[: frames > 1]}; expected at least 2, for flicker 3"
        return RewardOutput(scores, ~scores.isnan(), info=[short if frames < 3 else ""] * len(batch))

    def _measure(self, name: Statistic, videos: Tensor, fps: float) -> Tensor:
        if videos.shape[1] < (3 if name == "flicker" else 2):
            return videos.mean((1, 2, 3, 4)) * torch.nan
        if name == "motion":
            return motion(videos, fps)
        if name == "flicker":
            return flicker(videos)
        if name == "static":
            return (change(videos) < STILL).to(videos.dtype).mean(1)
        vectors = self._features.embed(videos.flatten(0, 1)).reshape(*videos.shape[:2], -1)
        earlier = vectors[:, :-1] if name == "consistency" else vectors[:, :1]
        return (1 - (vectors[:, 1:] - earlier).square().sum(2) / 2).mean(1)


@dataclass(frozen=True, eq=False)
class MotionBand:
    """1 where motion m (see VideoStatistics: change per second) lies in [low, high], m/low below and high/m above: neither a still,
    which scores 0, nor a flickering video wins. In [0, 1].

    Set the band from real videos of the kind and the policy's fps. Component: motion. A video of one frame has no score. Differentiable; an
    exact still has the gradient 0. Not kept: it is a guard; a reward of motion for its own sake teaches shaking."""

    low: float
    high: float
    name: str = "motion"

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"got low={self.low}, high={self.high}; expected 0 < low < high, in change per second")

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(("videos",), differentiable=True, range=(0, 1))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.videos is not None and batch.fps is not None
        one = batch.videos.shape[1] < 2
        amount = batch.videos.mean((1, 2, 3, 4)) * torch.nan if one else motion(batch.videos, batch.fps)
        scores = (amount / self.low).clamp(max=1) * self.high / amount.clamp(min=self.high)
        scores = scores if torch.is_grad_enabled() else scores.float()
        info = ["a video of 1 frame; expected at least 2"] * len(batch) if one else []
        return RewardOutput(scores, ~scores.isnan(), {"motion_per_second": amount.detach().float()}, info)


def change(videos: Tensor) -> Tensor:
    """[N, F − 1]: mean absolute difference of neighboring frames of videos [N, F, 3, H, W]."""
    return (videos[:, 1:] - videos[:, :-1]).abs().mean((2, 3, 4))


def motion(videos: Tensor, fps: float) -> Tensor:
    """[N]: change per second."""
    return fps * change(videos).mean(1)


def flicker(videos: Tensor) -> Tensor:
    """[N]: mean absolute distance of a low-passed frame from the mean of its neighbors; at least 3 frames."""
    small = lowpass(videos, LOWPASS)
    return (small[:, 1:-1] - (small[:, :-2] + small[:, 2:]) / 2).abs().mean((1, 2, 3, 4))
