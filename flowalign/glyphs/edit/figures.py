"""Figures of a Glyphs-Edit pipeline for its model card and its tests: shares of edits that are done, and how much else is kept.

Apart from the rewards that train on it, on purpose, as `flowalign.glyphs.judge`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from flowalign.glyphs.edit import CALL_ARGS
from flowalign.glyphs.edit.prompts import AXES, Axis, EditPrompt
from flowalign.glyphs.judge import in_batches, name_colors, read_words


@dataclass(frozen=True)
class Figures:
    """Of the edits of one axis, in [0, 1]. exact: the share whose word, the new one of a word edit, is read exactly; colors: whose ink
    and paper are both as they are to be; kept: 1 - mean |difference| to the source where the right result equals it."""

    exact: float
    colors: float
    kept: float


def sample_edits(
    pipeline: FluxKontextPipeline,
    records: Sequence[EditPrompt],
    steps: int,
    guidance_scale: float,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Pictures [N, 3, 24, 48] in [0, 1], one per edit; the noise depends on the seed and the place alone."""
    prompts, images = [record["prompt"] for record in records], [record["image"] for record in records]
    return in_batches(
        pipeline, {"prompt": prompts, "image": images}, steps, guidance_scale, CALL_ARGS, seed, batch_size
    )


def judge(pictures: Tensor, records: Sequence[EditPrompt]) -> dict[Axis, Figures]:
    """Compares pictures [N, 3, 24, 48] in [0, 1] with what their edits ask for, by what is changed."""
    exact = torch.tensor([word == record["target"] for word, record in zip(read_words(pictures), records, strict=True)])
    colors = torch.tensor(
        [
            found == (record["ink"], record["paper"])
            for found, record in zip(name_colors(pictures), records, strict=True)
        ]
    )
    sources = torch.stack([to_tensor(record["image"]) for record in records])
    keep = torch.tensor([[[pixel == "1" for pixel in row] for row in record["keep"]] for record in records])
    difference = (pictures - sources).abs().mean(1)
    kept = 1 - (difference * keep).sum((1, 2)) / keep.sum((1, 2))
    figures = {}
    for axis in AXES:
        rows = torch.tensor([record["axis"] == axis for record in records])
        figures[axis] = Figures(*(column[rows].float().mean().item() for column in (exact, colors, kept)))
    return figures
