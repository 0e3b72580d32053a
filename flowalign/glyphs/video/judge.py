"""Figures of a Glyphs-Video pipeline for its model card and its tests: shares of words, colors and directions that are right.

Apart from the rewards that train on it, on purpose, as `flowalign.glyphs.judge`. Directions are told by the center of the ink, not by a
network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import WanPipeline
from torch import Tensor

from flowalign.glyphs.judge import in_batches, nearest_names, read_words
from flowalign.glyphs.video import CALL_ARGS
from flowalign.glyphs.video.prompts import DIRECTIONS, VideoPrompt

INK_SHARE = 20  # one of so many pixels is surely ink: letters cover a tenth of a frame


@dataclass(frozen=True)
class Figures:
    """Shares in [0, 1]. exact: of first, middle and last frames, read exactly; colors: paper, first and last ink all right;
    directions: of the steps from frame to frame."""

    exact: float
    colors: float
    directions: float


def sample_clips(
    pipeline: WanPipeline,
    prompts: Sequence[str],
    steps: int,
    guidance_scale: float,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """Clips [N, F, 3, 32, 64] in [0, 1], one per prompt; the noise depends on the seed and the place alone."""
    return in_batches(pipeline, {"prompt": prompts}, steps, guidance_scale, CALL_ARGS, seed, batch_size)


def judge(clips: Tensor, records: Sequence[VideoPrompt]) -> Figures:
    """Compares clips [N, F, 3, 32, 64] in [0, 1] with what their prompts ask for."""
    seen = [0, clips.shape[1] // 2, clips.shape[1] - 1]
    words = torch.tensor(
        [
            [word == record["target"] for word, record in zip(read_words(clips[:, frame]), records, strict=True)]
            for frame in seen
        ]
    )
    first, last = name_colors(clips[:, 0]), name_colors(clips[:, -1])
    colors = [
        start == (record["ink"], record["paper"]) and end == (record["last_ink"], record["paper"])
        for start, end, record in zip(first, last, records, strict=True)
    ]
    names = list(DIRECTIONS)
    asked = torch.tensor([[names.index(action) for action in record["actions"]] for record in records])
    return Figures(
        words.float().mean().item(),
        torch.tensor(colors).float().mean().item(),
        (directions(clips) == asked).float().mean().item(),
    )


def name_colors(frames: Tensor) -> list[tuple[str, str]]:
    """The named ink and paper nearest to those of each frame [N, 3, H, W]: paper is its median, ink the mean of the pixels furthest from
    it."""
    return nearest_names(frames, frames.flatten(2).median(-1).values, INK_SHARE)


def directions(clips: Tensor) -> Tensor:
    """[N, F - 1]: the number in DIRECTIONS of how the center of what is not paper moves between each frame and the next."""
    paper = clips.flatten(3).median(-1).values[..., None, None]
    weight = (clips - paper).square().sum(2)  # [N, F, H, W]
    weight = weight / weight.sum((2, 3), keepdim=True).clamp(min=1e-6)
    rows, columns = (torch.arange(size, dtype=weight.dtype) for size in weight.shape[2:])
    centers = torch.stack([(weight.sum(3) * rows).sum(2), (weight.sum(2) * columns).sum(2)], -1)
    steps = centers.diff(dim=1)
    unit = torch.tensor(list(DIRECTIONS.values()), dtype=steps.dtype)
    return (steps @ unit.T).argmax(-1)
