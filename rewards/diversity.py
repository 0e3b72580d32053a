"""Diversity within a group: how far the samples of one prompt lie apart, and how many of them repeat each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.features import Features, Thumbnail


@dataclass(eq=False)
class GroupDiversity:
    """Of each image, beside the others of its group (equal group_ids), two channels:

      distance  mean Euclidean distance of its features to theirs
      repeated  share of them nearer than `near`, 0 to 1

    The mean of `repeated` over a group is the share of pairs that are near-duplicates: near 1 the policy has collapsed. features: None
    is Thumbnail(), pixels averaged to 16 × 16; any `Features` measures what it sees. near: 0.02, for Thumbnail about five of 255 levels.
    Groupwise: an image that is alone in its group has no score. Not differentiable."""

    near: float = 0.02
    features: Features | None = None
    name: str = "group"
    _features: Features = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.near > 0:
            raise ValueError(f"got near={self.near}; expected a distance above 0")
        self._features = Thumbnail() if self.features is None else self.features

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(channels=("distance", "repeated"), groupwise=True)

    def load(self) -> None:
        self._features.load()

    def close(self) -> None:
        self._features.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.images is not None
        distances = group_distances(self._features.embed(batch.images), batch.group_ids)
        repeated = torch.where(distances.isnan(), torch.nan, (distances < self.near).to(distances.dtype))
        scores = torch.stack([distances.nanmean(1), repeated.nanmean(1)], 1).float()  # of nothing: NaN
        valid = torch.isfinite(scores)
        info = ["" if ok else "it is alone in its group" for ok in valid.all(1).tolist()]
        return RewardOutput(scores, valid, info=info)


def group_distances(features: Tensor, groups: list[int]) -> Tensor:
    """[N, N]: Euclidean distances between the rows of features [N, D] of one group; NaN between groups, and of a row to itself."""
    if not groups:
        return features.new_zeros(0, 0)
    group = torch.tensor(groups, device=features.device)
    apart = group[:, None] != group
    apart |= torch.eye(len(groups), dtype=torch.bool, device=features.device)
    return torch.stack([(features - row).norm(dim=1) for row in features]).masked_fill(apart, torch.nan)
