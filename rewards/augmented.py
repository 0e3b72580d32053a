"""Test-time augmentation: the same sample scored in several slightly changed views."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec, spec_of
from rewards.ensembles import How, coefficient, combined, spread
from rewards.guard import score
from rewards.parts import check_one_channel, columns, wants_gradient


class View(NamedTuple):
    """One change of a picture. side: of the window, as a share of the picture's. down, right: where the window lies, 0 to 1 of
    the room it has. flip: mirrored left to right."""

    side: float
    down: float
    right: float
    flip: bool


@dataclass(frozen=True, eq=False)
class Augmented:
    """`reward` of the picture and of views − 1 changed copies of it, combined as an `Ensemble` combines members (how, coef), with
    their spread as the uncertainty. A score that rests on a texture of single pixels falls in the changed copies.

    A copy is a window of the picture (its border repeated `shift` pixels outwards) with 1 − crop to 1 of its side, anywhere, resized
    to the full size (bilinear), mirrored half of the time if `flip`. crop: 0.02; shift: 1; flip: off, since it turns text
    and "left of" around. Copies are drawn from the seed alone, so they are the same in every call, for every sample, and the
    first ones of more views; all frames of a video change alike. Conditions (source images) do not.

    One channel, of images or videos. Name and inputs are the reward's. A sample is valid if all its views are. Components: the
    reward's own on the unchanged picture; spread; drop, the unchanged score less the mean of the copies. Gradients
    pass through all views. Cost: `views` calls of the reward. Not kept: JPEG and blur as views."""

    reward: Reward
    views: int = 4
    crop: float = 0.02
    shift: int = 1
    flip: bool = False
    how: How = "mean"
    coef: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.views < 2 or not 0 <= self.crop < 1 or self.shift < 0 or not (self.crop or self.shift or self.flip):
            raise ValueError(
                f"got views={self.views}, crop={self.crop}, shift={self.shift}, flip={self.flip}; expected at least 2 views, "
                "crop from 0 to below 1, shift of at least 0 pixels, and one of the three changes"
            )
        coefficient(self.how, self.coef)
        check_one_channel("an augmented reward", [self.reward])
        inputs = spec_of(self.reward).inputs
        if not inputs or "latents" in inputs:
            raise ValueError(
                f"got reward {self.reward.name!r}, which reads {inputs or 'no pictures'}; expected images or videos, which views change"
            )

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        """The reward's; its range where the rule keeps to it."""
        keeps = self.how in ("mean", "wco", "softmin")
        return spec_of(self.reward) if keeps else replace(spec_of(self.reward), range=None)

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        grad = wants_gradient(self.spec)
        copies = [batch] + [changed(batch, view, self.shift) for view in self.drawn()]
        outputs = [score(self.reward, copy, grad=grad, max_fail_rate=1.0) for copy in copies]
        members, doubts = columns(outputs)
        deviation, seen = spread(members, doubts), members.detach().float()
        more = {"spread": deviation.detach().float(), "drop": seen[:, 0] - seen[:, 1:].mean(1)}
        scores = combined(members, doubts, self.how, self.coef)
        return replace(
            outputs[0], scores=scores, valid=~scores.isnan(), components=outputs[0].components | more, uncertainty=deviation
        )  # fmt: skip

    def drawn(self) -> list[View]:
        """The changed copies."""
        numbers = torch.rand(self.views - 1, 4, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [View(1 - self.crop * a, b, c, self.flip and d < 0.5) for a, b, c, d in numbers]


def changed(batch: RewardBatch, view: View, shift: int) -> RewardBatch:
    """The batch with every image and every frame in that view."""
    images, videos = (None if x is None else _seen(x, view, shift) for x in (batch.images, batch.videos))
    return replace(batch, images=images, videos=videos)


def _seen(pixels: Tensor, view: View, shift: int) -> Tensor:
    """[..., 3, H, W] in a view."""
    flat = pixels.flatten(0, -4)
    height, width = flat.shape[-2:]
    rows, columns = max(1, round(view.side * height)), max(1, round(view.side * width))
    top = round(view.down * (height + 2 * shift - rows))
    left = round(view.right * (width + 2 * shift - columns))
    if len(flat):
        flat = pad(flat, (shift,) * 4, mode="replicate")
    window = flat[..., top : top + rows, left : left + columns]
    if (rows, columns) != (height, width):
        window = interpolate(window, (height, width), mode="bilinear", align_corners=False)
    return (window.flip(-1) if view.flip else window).reshape(pixels.shape)
