"""Figures of a CLIP on held-out Glyphs: does it find the caption of a picture, and does it agree with OCR on a
policy's samples?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.glyphs.clip_training import SIZES, captions, scenes_of
from flowalign.glyphs.prompts import LETTERS, WORD_LENGTH, held_out_prompts
from flowalign.glyphs.renderer import JITTER, render
from rewards import OCR, RewardBatch, score
from rewards.image.clip import Clip
from rewards.image.scorer import unit

CAPTIONS = 32  # that a picture chooses among


@dataclass(frozen=True)
class ClipFigures:
    """top1: share of held-out pictures whose own caption has the highest cosine among 32 held-out captions; among 32
    that differ in one letter; among itself and the six of other colors. ocr_pearson, ocr_spearman: correlation of the
    cosine with rewards.OCR (soft) over a policy's samples, one per prompt."""

    top1: float
    top1_letter: float
    top1_color: float
    ocr_pearson: float
    ocr_spearman: float


def clip_figures(clip: Clip, samples: Tensor) -> ClipFigures:
    """samples: pictures [n, 3, 24, 48] in [0, 1] of a policy for the first n held-out prompts."""
    records, generator = held_out_prompts(), torch.Generator().manual_seed(0)
    own = scenes_of([record["prompt"] for record in records])
    offsets = torch.randint(-JITTER, JITTER + 1, (len(records), 2), generator=generator)
    words, inks, papers = ([record[key] for record in records] for key in ("target", "ink", "paper"))
    pictures = render(words, inks, papers, offsets)
    count = len(samples)
    batch = RewardBatch(
        prompts=captions(own[:count]), images=samples, metadata=[dict(each) for each in records[:count]]
    )
    read = score(OCR(metric="soft", fold={"0": "O"}), batch).scores[:, 0]
    pair = torch.stack([cosines(clip, samples, own[:count, None])[:, 0], read])
    return ClipFigures(
        top1(clip, pictures, torch.stack([own.roll(-shift, 0) for shift in range(CAPTIONS)], 1)),
        top1(clip, pictures, torch.stack([_with_others(each, other_letters(each, generator)) for each in own])),
        top1(clip, pictures, torch.stack([_with_others(each, other_colors(each)) for each in own])),
        float(torch.corrcoef(pair)[0, 1]),
        float(torch.corrcoef(pair.argsort(1).argsort(1).float())[0, 1]),
    )


def top1(clip: Clip, pictures: Tensor, scenes: Tensor) -> float:
    """Share of the pictures [N, 3, 24, 48] whose cosine is highest with the first of their scenes [N, K, 6]."""
    return float((cosines(clip, pictures, scenes).argmax(1) == 0).float().mean())


@torch.no_grad()
def cosines(clip: Clip, pictures: Tensor, scenes: Tensor) -> Tensor:
    """[N, K]: of each picture with the captions of its scenes [N, K, 6]."""
    distinct, inverse = scenes.flatten(0, 1).unique(dim=0, return_inverse=True)
    texts = torch.cat([unit(clip.texts(captions(part))) for part in distinct.split(512)])
    images = torch.cat([unit(clip.images(clip.preprocess(part))) for part in pictures.split(512)])
    return (images[:, None] * texts[inverse].view(*scenes.shape[:2], -1)).sum(2)


def other_letters(scene: Tensor, generator: torch.Generator) -> Tensor:
    """31 distinct scenes [31, 6] that differ from `scene` [6] in one letter."""
    places = torch.arange(WORD_LENGTH).repeat_interleave(len(LETTERS) - 1)
    by = torch.arange(1, len(LETTERS)).repeat(WORD_LENGTH)
    return _changed(scene, places, by)[torch.randperm(len(by), generator=generator)[: CAPTIONS - 1]]


def other_colors(scene: Tensor) -> Tensor:
    """The six scenes [6, 6] that differ from `scene` [6] in ink or paper."""
    return _changed(scene, torch.tensor([4, 4, 4, 5, 5, 5]), torch.tensor([1, 2, 3] * 2))


def _with_others(scene: Tensor, others: Tensor) -> Tensor:
    return torch.cat([scene[None], others])


def _changed(scene: Tensor, column: Tensor, by: Tensor) -> Tensor:
    rows, changed = torch.arange(len(column)), scene.repeat(len(column), 1)
    changed[rows, column] = (changed[rows, column] + by) % SIZES[column]
    return changed
