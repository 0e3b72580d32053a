"""The tiny pipelines of all families as checkpoints, and the records and sizes that each can make."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models import Family, Policy, Size, inspect_checkpoint, load_policy, path_of
from flowalign.models.checks import check_image_size
from flowalign.models.load import read_pipeline
from flowalign.models.shipped import SHIPPED
from flowalign.testing import tiny_pipeline

PROMPTS = ('the word "KITE" in red on a yellow background', "a word", "the word")
NEGATIVE = "a background"
SIDES = ((32, 64), (64, 32), (64, 64))
VIDEOS = (5, 9, 17)  # numbers of frames, of which a family takes the first two that it makes


@dataclass(frozen=True)
class Subject:
    """One tiny pipeline: its name, and its folder."""

    name: str
    folder: str

    @cached_property
    def family(self) -> Family:
        return inspect_checkpoint(self.folder)[1]

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        return json.loads((Path(self.folder) / "scheduler" / "scheduler_config.json").read_text())

    @cached_property
    def sizes(self) -> list[Size]:
        """What it can make: three images of different sides, and of videos several numbers of frames."""
        videos = [frames for frames in VIDEOS if self._makes(Size(*SIDES[0], frames))][:2]
        return [Size(*sides, frames) for sides, frames in zip(SIDES, [*videos, 1, 1, 1], strict=False)]

    @property
    def size(self) -> Size:
        return self.sizes[0]

    def _makes(self, size: Size) -> bool:
        try:
            check_image_size(self.folder, size)
        except ValueError:
            return False
        return True

    def records(self, count: int = len(PROMPTS)) -> list[PromptRecord]:
        """Prompts of different length, each with as many source images as the family needs, of their own colors."""
        images = self.family.source_images[0]
        return [
            PromptRecord(uid, PROMPTS[uid], images=tuple(_image(uid, number) for number in range(images)))
            for uid in range(count)
        ]

    @property
    def together(self) -> int:
        """How many records a call of the pipeline takes: with source images one."""
        return 1 if self.family.source_images[1] else len(PROMPTS)

    def policy(self, **arguments: Any) -> Policy:
        return load_policy(self.folder, **{"negative_prompt": NEGATIVE * self.family.negative_prompts, **arguments})

    def pipeline(self, setup: list[str], policy: Policy) -> DiffusionPipeline:
        """Freshly read, but for the policy's networks (convolutions round by where their weights lie in memory), then set up as the
        report tells the user."""
        networks: dict[str, Any] = policy.modules()
        pipeline = read_pipeline(self.folder, **networks)
        exec("\n".join(setup), {"pipe": pipeline})
        return pipeline


def parity(family: Subject, ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, which is 0; of a model on discrete levels relative to the norm, at most 1e-6."""
    if path_of(family.folder).rectified:
        found, allowed = float((ours - theirs).abs().max()), 0.0
    else:
        found, allowed = float((ours - theirs).norm() / theirs.norm()), 1e-6
    assert found <= allowed
    return found


SHIPPED_WORLDS = ("glyphs-edit", "glyphs-video")  # trained, and as small


@functools.cache
def subject(name: str) -> Subject:
    """The tiny pipeline, saved once per process, or one that comes with flowalign."""
    if name in SHIPPED_WORLDS:
        return Subject(name, str(SHIPPED[name]))
    folder = _folder() / name
    tiny_pipeline(name).save_pretrained(folder)
    return Subject(name, str(folder))


@functools.cache
def _folder() -> Path:
    holder = tempfile.TemporaryDirectory()
    _kept.append(holder)
    return Path(holder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed with the process


@functools.cache
def _image(uid: int, number: int) -> Path:
    path = _folder() / f"source-{uid}-{number}.png"
    pixels = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(10 * uid + number))
    Image.fromarray((pixels * 255).byte().numpy()).resize((64, 32), Image.Resampling.BILINEAR).save(path)
    return path
