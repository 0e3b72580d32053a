"""How images look, without a model: monitors of each image, and thumbnails by which near-duplicates are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards import GroupDiversity, ImageStatistics, JPEGIncompressibility, RewardBatch, Thumbnail
from rewards.diversity import group_distances

FRAMES = 8  # of a video, evenly spaced, are looked at
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Appearance:
    """Of N images or videos. monitors {measure: float64 [N]}: those of rewards.ImageStatistics, and jpeg_kb, the size of the
    JPEG in kB; of a video their mean over its frames. thumbnails fp32 [N, D]: their Euclidean distance is the root mean square
    difference of two images averaged down to 16 × 16 pixels, in [0, 1]."""

    monitors: dict[str, Tensor]
    thumbnails: Tensor

    @staticmethod
    def of(pixels: Tensor) -> Appearance:
        """Of uint8 [N, 3, H, W] or [N, F, 3, H, W], at least 3 × 3 pixels."""
        return Appearance.cat([_of_batch(part) for part in pixels.split(_BATCH)])

    @staticmethod
    def cat(parts: Sequence[Appearance]) -> Appearance:
        """All of all parts, in their order."""
        return Appearance(
            {name: torch.cat([part.monitors[name] for part in parts]) for name in parts[0].monitors},
            torch.cat([part.thumbnails for part in parts]),
        )

    def rows(self, order: Tensor) -> Appearance:
        """Those of the numbers `order` [n], in that order."""
        return Appearance({name: values[order] for name, values in self.monitors.items()}, self.thumbnails[order])


def _of_batch(pixels: Tensor) -> Appearance:
    videos = pixels[:, None] if pixels.ndim == 4 else pixels
    chosen = torch.linspace(0, videos.shape[1] - 1, min(FRAMES, videos.shape[1])).round().long()
    frames = videos[:, chosen].float() / 255
    count, flat = frames.shape[:2], frames.flatten(0, 1)
    batch = RewardBatch(prompts=[""] * len(flat), images=flat)
    statistics, jpeg = ImageStatistics(), JPEGIncompressibility()
    named = dict(zip(statistics.statistics, statistics(batch).scores.T, strict=True)) | {"jpeg_kb": jpeg(batch).scores}
    thumbnails = Thumbnail().embed(flat).reshape(*count, -1) / count[1] ** 0.5  # the mean square over all frames
    return Appearance(
        {name: values.double().reshape(count).mean(1) for name, values in named.items()}, thumbnails.flatten(1)
    )


def diversity(appearance: Appearance, uids: Sequence[int], samples: Sequence[int]) -> dict[str, float | None]:
    """{"distance", "repeated"} × {"within_prompt", "across_prompts"} as `distance_within_prompt`, …

    distance: mean thumbnail distance of two images; repeated: share of pairs nearer than that of rewards.GroupDiversity, the
    near-duplicates. within_prompt: of two samples of a prompt; across_prompts: of the images of two prompts with the same
    number of sample. Means over pairs of equal weight; None without a pair."""
    found: dict[str, float | None] = {}
    near = GroupDiversity().near
    for name, groups in (("within_prompt", uids), ("across_prompts", samples)):
        members = [[row for row, group in enumerate(groups) if group == each] for each in dict.fromkeys(groups)]
        apart = [group_distances(appearance.thumbnails[rows], [0] * len(rows)).flatten() for rows in members]
        pairs = torch.cat([each[each.isfinite()] for each in apart])
        found[f"distance_{name}"] = float(pairs.mean()) if len(pairs) else None
        found[f"repeated_{name}"] = float((pairs < near).double().mean()) if len(pairs) else None
    return found


def distances_across_prompts(thumbnails: Tensor, samples: Sequence[int]) -> Tensor:
    """[N] float64, a number per image of thumbnails [N, D], of which the mean is `distance_across_prompts`: 2·d_i − mean(d), d_i
    the mean distance of image i to the images of other prompts with the same number of sample; nan without one.

    A mean over pairs depends on each image twice, so it varies as the mean of these numbers, not of the d_i, whose interval would be
    half as wide. Not kept: collapse within a prompt, which rewards.GroupDiversity measures on several samples."""
    found = torch.full((len(thumbnails),), torch.nan, dtype=torch.float64)
    numbers = torch.tensor(list(samples))
    for each in dict.fromkeys(samples):
        rows = (numbers == each).nonzero().flatten()
        group = thumbnails[rows].double()
        if len(group) > 1:
            apart = torch.stack([(group - row).norm(dim=1).sum() for row in group]) / (len(group) - 1)
            found[rows] = 2 * apart - apart.mean()
    return found
