"""How much of its source image an edit has kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.image.preprocess import resize

WHITE = 128  # of 255: from here on a pixel of a mask is white


class _NoScoreError(Exception):
    """Why a sample has no score."""


@dataclass(frozen=True, eq=False)
class SourceConsistency:
    """1 − mean |edited − source| over the pixels that an edit should keep, and their channels, in [0, 1]; 1 is all kept.

    source: the first of the sample's conditions; where its size differs it is resized to the edit's, bilinear with antialiasing, whatever
    its aspect. metadata[key]: which pixels to keep; without it all, so that the edit that was asked for costs too. Rows of "1" (keep) and
    "0", or the path of a mask image, white (from half on) to keep; of another size, a pixel is kept where the mask says so of all
    that it covers. Component: kept, the share of pixels to keep.

    A sample without a source is invalid, as is one whose mask cannot be read or keeps nothing; `info` says why. Differences of
    brightness, color and place count alike, pixel by pixel: a scene moved by a pixel is not kept. The spread of scores is small (a
    wrong paper: about 0.8; between samples of one prompt 0.003 or less on Glyphs), so give it weight in a mix."""

    key: str = "keep"
    name: str = "consistency"

    @property
    def spec(self) -> RewardSpec:
        """Differentiable: the gradient is the sign of the difference, so 0 where nothing has changed."""
        return RewardSpec(("images", "conditions"), differentiable=True, range=(0, 1))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        images, conditions = batch.unit_images(), batch.conditions
        assert conditions is not None
        scores, kept, info = [], [], []
        for image, sources, metadata in zip(images, conditions, batch.metadata, strict=True):
            try:
                difference = (image - _source(sources, image)).abs().mean(0)
                keep = _mask(metadata.get(self.key), self.key, image)
                scores.append(1 - (difference * keep).sum() / keep.sum())
                kept.append(float(keep.mean()))
                info.append("")
            except _NoScoreError as error:
                scores.append(image.sum() * torch.nan)  # with a graph, as the others
                kept.append(torch.nan)
                info.append(str(error))
        total = torch.stack(scores)
        total = total if torch.is_grad_enabled() else total.float()
        return RewardOutput(total, ~total.isnan(), {"kept": torch.tensor(kept, dtype=torch.float32)}, info)


def _source(sources: list[Tensor], image: Tensor) -> Tensor:
    """The source [3, H, W], as large as `image`."""
    if not sources:
        raise _NoScoreError("no source image: its conditions are empty; take prompts with an 'image'")
    height, width = image.shape[-2:]
    return resize(sources[0][None].to(image), height, width, "bilinear")[0]


def _mask(given: Any, key: str, image: Tensor) -> Tensor:
    """[H, W] of 1 (keep) and 0, as large as `image`, from rows, a path or None (all)."""
    height, width = image.shape[-2:]
    if given is None:
        return image.new_ones(height, width)
    mask = _read(given, key) if isinstance(given, str) else _rows(given, key)
    keep = (adaptive_avg_pool2d(mask[None], (height, width))[0] > 1 - 1e-4).to(image)
    if not bool(keep.any()):
        raise _NoScoreError(f"metadata[{key!r}] keeps no pixel of {height} x {width}; expected at least one")
    return keep


def _rows(given: Any, key: str) -> Tensor:
    """[h, w] of rows of "0" and "1"."""
    rows = given if isinstance(given, list) and all(isinstance(row, str) for row in given) else []
    if not rows or not rows[0] or len({len(row) for row in rows}) > 1 or not set("".join(rows)) <= {"0", "1"}:
        raise _NoScoreError(
            f'metadata[{key!r}] is {given!r:.100}; expected rows of "0" and "1" of one length, or the path of a mask image'
        )
    return torch.tensor([[float(char) for char in row] for row in rows])


def _read(path: str, key: str) -> Tensor:
    """[h, w] of a mask image: 1 where it is white."""
    try:
        with Image.open(Path(path).expanduser()) as picture:
            return torch.from_numpy(np.array(picture.convert("L")) >= WHITE).float()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of a broken PNG
        raise _NoScoreError(
            f"metadata[{key!r}]: got the mask {path!r}, which cannot be read ({error}); expected an image file"
        ) from error
