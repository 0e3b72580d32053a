"""The edits of Glyphs-Edit and their two fixed lists.

A source picture is a scene of Glyphs, and an instruction changes one thing in it: `write it in blue`, `put it on a pink background`,
`change the word to "LAMP"`. All else is to stay, the word's place too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypedDict, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flowalign.glyphs import prompts as scenes
from flowalign.glyphs.prompts import INKS, PAPERS, GlyphsPrompt, Scene, parse_prompt
from flowalign.glyphs.renderer import JITTER, render

Axis = Literal["ink", "paper", "word"]
AXES: Final = get_args(Axis)


@dataclass(frozen=True)
class Edit:
    """A scene and what is to be changed in it: its `axis`, to `target`, a color or a word."""

    source: Scene
    axis: Axis
    target: str

    @property
    def instruction(self) -> str:
        if self.axis == "word":
            return f'change the word to "{self.target}"'
        return f"write it in {self.target}" if self.axis == "ink" else f"put it on a {self.target} background"

    @property
    def result(self) -> Scene:
        return self.to(self.target)

    def to(self, value: str) -> Scene:
        """The scene with that value on the axis."""
        return self.source._replace(**{self.axis: value})


class EditPrompt(TypedDict):
    """An instruction and its source picture, with what rewards need to judge the result.

    target, ink, paper: of the result; colors are RGB in 0..255. keep: rows of "1" where the right result equals the source, else
    "0"."""

    prompt: str
    image: Image.Image
    axis: Axis
    target: str
    ink: str
    paper: str
    ink_rgb: tuple[int, int, int]
    paper_rgb: tuple[int, int, int]
    keep: list[str]


def train_prompts() -> list[EditPrompt]:
    """The edits for alignment: the words of Glyphs' training prompts, ink, paper and word changed in turn."""
    return _records(scenes.train_prompts())


def held_out_prompts() -> list[EditPrompt]:
    """The edits for evaluation: of words, to words, that neither pre-training nor alignment has seen."""
    return _records(scenes.held_out_prompts())


def draw_edits(edits: Sequence[Edit], offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Sources and right results [N, 3, 24, 48] in [0, 1]; offsets [N, 2] as the renderer's."""

    def drawn(scenes: Sequence[Scene]) -> Tensor:
        words, inks, papers = zip(*scenes, strict=True)
        return render(words, inks, papers, offsets)

    return drawn([edit.source for edit in edits]), drawn([edit.result for edit in edits])


def _records(prompts: Sequence[GlyphsPrompt]) -> list[EditPrompt]:
    edits = []
    for number, record in enumerate(prompts):
        source, axis = parse_prompt(record["prompt"]), AXES[number % len(AXES)]
        if axis == "word":
            target = prompts[(number + 1) % len(prompts)]["target"]
        else:
            names = [name for name in (INKS if axis == "ink" else PAPERS) if name not in source]
            target = names[number // (len(AXES) * 16) % len(names)]
        edits.append(Edit(source, axis, target))
    shifts = torch.randint(-JITTER, JITTER + 1, (len(edits), 2), generator=torch.Generator().manual_seed(len(edits)))
    sources, results = draw_edits(edits, shifts)
    kept = ((sources - results).abs().amax(1) < 1 / 255).byte() + ord("0")
    return [
        EditPrompt(
            prompt=edit.instruction,
            image=to_pil_image(source),
            axis=edit.axis,
            target=edit.result.word,
            ink=edit.result.ink,
            paper=edit.result.paper,
            ink_rgb=INKS[edit.result.ink],
            paper_rgb=PAPERS[edit.result.paper],
            keep=[row.tobytes().decode() for row in rows.numpy()],
        )
        for edit, source, rows in zip(edits, sources, kept, strict=True)
    ]
