"""Any reward of images as a reward of videos: which frames it sees, and what becomes of their scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec, channels_of, spec_of
from rewards.guard import score
from rewards.parts import wants_gradient

Reduce = Literal["mean", "min", "max", "top", "mean_positive"]


@dataclass(frozen=True, eq=False)
class OnFrames:
    """`reward` on frames of each video, then one score per video and channel.

    frames: "all", "first", "last", "first_last", or a number of frames at equal distances, first and last among them (one: the
    middle). every: each so-many-th of them, from the first (4 in CostaliyA/Flow-OPD and verl-omni). per_second: so many frames
    per second of the video instead, by its fps (1 in THUDM/VisionReward). A video that has too few frames for the choice is an error.
    reduce: "mean", "min", "max"; "top", the mean of the highest `share` of the frames, at least one (HPSv3
    in ModelTC/GenRL); "mean_positive", the mean of the scores above 0, and 0 where none is (the OCR of Flow-OPD): a video
    that shows the text once scores as one that shows it always.

    Name, channels and range are the reward's. A video is valid if every frame seen is. Components: the mean over the frames.
    Uncertainty: for "mean" the mean of the frames', else the largest of the frames seen, which bounds it. info: that of the first
    frame that says something. The reward gets all frames of the batch at once: WithTimeout(reward, batch_size=…) splits
    them. A groupwise one compares frames of one time. Not kept: motion. Mean scores of frames are highest for a still: pair them
    with `MotionBand`."""

    reward: Reward
    frames: Literal["all", "first", "last", "first_last"] | int = "all"
    every: int = 1
    per_second: float | None = None
    reduce: Reduce = "mean"
    share: float = 0.3

    def __post_init__(self) -> None:
        named = ("all", "first", "last", "first_last")
        if self.frames not in named and (isinstance(self.frames, str) or self.frames < 1):
            raise ValueError(f"got frames={self.frames!r}; expected one of {named}, or a number of at least 1")
        if self.every < 1 or (self.every > 1 and self.frames != "all"):
            raise ValueError(
                f"got every={self.every} with frames={self.frames!r}; expected at least 1, and frames='all'"
            )
        if self.per_second is not None and (not self.per_second > 0 or (self.frames, self.every) != ("all", 1)):
            raise ValueError(
                f"got per_second={self.per_second}; expected a number above 0, with frames='all' and every=1"
            )
        if self.reduce not in ("mean", "min", "max", "top", "mean_positive") or not 0 < self.share <= 1:
            raise ValueError(
                f"got reduce={self.reduce!r}, share={self.share}; expected 'mean', 'min', 'max', 'top' or 'mean_positive', and a "
                "share in (0, 1]"
            )
        if not set(spec_of(self.reward).inputs) <= {"images", "conditions"}:
            raise ValueError(
                f"got reward {self.reward.name!r}, which reads {spec_of(self.reward).inputs}; expected a reward of images"
            )

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        """The reward's, of videos."""
        spec = spec_of(self.reward)
        spec = replace(spec, inputs=("videos", *(name for name in spec.inputs if name == "conditions")))
        if self.reduce != "mean_positive" or spec.range is None:
            return spec
        return replace(spec, range=(0.0, max(spec.range[1], 1e-9)))  # no frame above 0 scores 0

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.videos is not None and batch.fps is not None
        index = self.seen(batch.videos.shape[1], batch.fps)
        stills = frames_as_images(batch, index)
        if self.spec.groupwise:  # the frames of one time make a group, not all frames of the videos of one prompt
            places = [group * len(index) + time for group in batch.group_ids for time in range(len(index))]
            stills = replace(stills, group_ids=places)
        output = score(self.reward, stills, grad=wants_gradient(self.spec), max_fail_rate=1.0)
        rows, count, channels = len(batch), len(index), len(channels_of(self.reward))
        scores = output.scores.reshape(rows, count, channels)
        doubt = None if output.uncertainty is None else output.uncertainty.reshape(rows, count, channels)
        if doubt is not None:
            doubt = doubt.mean(1) if self.reduce == "mean" else doubt.amax(1)
        said = [output.info[row * count : (row + 1) * count] for row in range(rows)]
        return RewardOutput(
            self._reduced(scores),
            output.valid.reshape(rows, count, channels).all(1),
            {key: part.reshape(rows, count).mean(1) for key, part in output.components.items()},
            [next((f"frame {i}: {text}" for i, text in zip(index, texts, strict=True) if text), "") for texts in said],
            uncertainty=doubt,
        )

    def seen(self, count: int, fps: float) -> list[int]:
        """The numbers of the frames, of `count`, that the reward sees; ValueError if there are too few."""
        if self.per_second is not None:
            if self.per_second > fps:
                raise ValueError(
                    f"got per_second={self.per_second:g} and videos of {fps:g} fps; expected no more than they have"
                )
            times = range(int((count - 1) / fps * self.per_second + 1e-9) + 1)
            return [round(number * fps / self.per_second) for number in times]
        if isinstance(self.frames, int):
            if self.frames > count:
                raise ValueError(
                    f"got frames={self.frames} and videos of {count} frames; expected no more than they have"
                )
            if self.frames == 1:
                return [count // 2]
            return [round(number * (count - 1) / (self.frames - 1)) for number in range(self.frames)]
        named = {"first": [0], "last": [count - 1], "first_last": sorted({0, count - 1})}
        return named.get(self.frames, list(range(0, count, self.every)))

    def _reduced(self, scores: Tensor) -> Tensor:
        """[N, C] from the scores [N, F, C] of the frames."""
        if self.reduce == "min":
            return scores.amin(1)
        if self.reduce == "max":
            return scores.amax(1)
        if self.reduce == "top":
            return scores.topk(max(1, int(self.share * scores.shape[1])), dim=1).values.mean(1)
        if self.reduce == "mean_positive":
            above = scores.detach() > 0
            return torch.where(above, scores, 0).sum(1) / above.sum(1).clamp(min=1)
        return scores.mean(1)


def frames_as_images(batch: RewardBatch, index: list[int]) -> RewardBatch:
    """Frames `index` of each of N videos as N · len(index) images, those of a video one after the other, each with what the batch
    holds of its video."""
    assert batch.videos is not None
    rows = torch.arange(len(batch)).repeat_interleave(len(index))
    stills = batch.videos[:, index].flatten(0, 1)
    return replace(
        replace(batch, videos=None, fps=None, images=None, latents=None, sigma=None).select(rows), images=stills
    )
