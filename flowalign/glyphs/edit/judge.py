"""A judge of Glyphs edits by rules, which answers questions as a vision-language model is asked: two pictures and a text.

It knows nothing beside the pictures and the text. What the source shows is read from it, what was asked for from the instruction in
the text, and the right result is drawn anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flowalign.glyphs.edit.prompts import Axis, Edit, draw_edits
from flowalign.glyphs.judge import read_words
from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS, WORD_LENGTH, Scene
from flowalign.glyphs.renderer import HEIGHT, JITTER, WIDTH, palette
from rewards import RewardBatch, SourceConsistency, score
from rewards.color import ink_color, paper_color
from rewards.ocr.text import similarity

GRAMMAR: dict[Axis, str] = {
    "ink": rf"write it in ({'|'.join(INKS)})\b",
    "paper": rf"put it on a ({'|'.join(PAPERS)}) background",
    "word": rf'change the word to "([A-Z]{{{WORD_LENGTH}}})"',
}
SPOILT = 0.2  # mean difference of the pixels to keep at which nothing counts as kept: a wrong paper has 0.13 to 0.25
STRANGE = 1.0  # distance in RGB of an ink or a paper from all of the world's at which it counts as foreign
DIRT = 0.1  # mean distance of the pixels from mixtures of ink and paper at which a picture counts as dirt
UNKNOWN = 0.02  # a source whose redrawing differs by more, in the mean, is no picture of Glyphs
PALETTE = palette(INKS, PAPERS)


@dataclass(frozen=True)
class Judgment:
    """Numbers from 0 to 1. success: of what was asked for; kept: of what was to stay, by SourceConsistency, 0 from a mean difference of
    SPOILT on; natural: how near ink and paper are to colors of the world; clean: how far each pixel is a mixture of the two."""

    success: float
    kept: float
    natural: float
    clean: float

    @property
    def overall(self) -> float:
        """EditScore's (2509.23909): sqrt(min(success, kept) · min(natural, clean))."""
        return float((min(self.success, self.kept) * min(self.natural, self.clean)) ** 0.5)


def judge(source: Tensor, edited: Tensor, text: str) -> Judgment:
    """Pictures [3, 24, 48] in [0, 1]; text: holds the instruction. ValueError for other pictures and texts."""
    _check(source, edited)
    (axis, target), (scene, offset) = instruction_in(text), _scene(source.numpy().tobytes())
    edit = Edit(scene, axis, target)
    drawn, right = draw_edits([edit], offset)
    keep = ((drawn - right).abs().amax(1)[0] < 1 / 255).int().tolist()
    batch = RewardBatch(
        prompts=[text], images=edited[None], conditions=[[source]],
        metadata=[{"keep": ["".join(map(str, row)) for row in keep]}],
    )  # fmt: skip
    lost = 1 - score(SourceConsistency(), batch).scores.item()
    return Judgment(_success(edited, edit), max(0.0, 1 - lost / SPOILT), *quality(edited))


def quality(picture: Tensor) -> tuple[float, float]:
    """(natural, clean) of a picture [3, 24, 48], as in Judgment."""
    _check(picture)
    paper = paper_color(picture[None])
    ink = ink_color(picture[None], paper)[0]
    strange = torch.cdist(torch.cat([ink, paper]), PALETTE).amin(1).max()
    pixels, span = picture.flatten(1).T - paper, ink - paper  # [H·W, 3], [1, 3]
    share = ((pixels * span).sum(1, keepdim=True) / span.square().sum().clamp(min=1e-6)).clamp(0, 1)
    dirt = (pixels - share * span).norm(dim=1).mean()
    return max(0.0, 1 - float(strange) / STRANGE), max(0.0, 1 - float(dirt) / DIRT)


def instruction_in(text: str) -> tuple[Axis, str]:
    """(axis, target) of the one instruction of Glyphs-Edit in a text."""
    found = {(axis, target) for axis, form in GRAMMAR.items() for target in re.findall(form, text)}
    if len(found) != 1:
        raise ValueError(f"got {len(found)} instructions in {text[-200:]!r}; expected one of Glyphs-Edit")
    return found.pop()


def answer(pictures: Sequence[Tensor], turns: Sequence[str], score_range: int = 25) -> str:
    """To EditScore's questions, in its format: {"reasoning": "...", "score": [number, number]}, each from 0 to `score_range`. Of two pictures, source
    and result: success and kept. Of one: natural and clean. ValueError for what it cannot judge."""
    if len(pictures) == 1:
        names, numbers = ("natural", "clean"), quality(pictures[0])
    else:
        source, edited = pictures
        found = judge(source, edited, turns[-1])
        names, numbers = ("success", "kept"), (found.success, found.kept)
    reasoning = ", ".join(f"{name} {number:.3f}" for name, number in zip(names, numbers, strict=True))
    return json.dumps({"reasoning": reasoning, "score": [score_range * number for number in numbers]})


def chance_of_yes(pictures: Sequence[Tensor], turns: Sequence[str]) -> float:
    """To PARM's questions (2501.13926), of source and picture. Is it clear enough, the first of one turn about it: `clean`. Its potential, or
    whether it matches: the overall score. ValueError for what it cannot judge."""
    source, picture = pictures
    if len(turns) == 1 and "clear enough" in turns[0]:
        return quality(picture)[1]
    return judge(source, picture, turns[-1]).overall


def _success(edited: Tensor, edit: Edit) -> float:
    """Of a word its share of right letters, as OCR's edit metric; of a color how much of the way from the old one to it is done."""
    if edit.axis == "word":
        return similarity(read_words(edited[None])[0], edit.target)
    paper = paper_color(edited[None])
    seen = paper if edit.axis == "paper" else ink_color(edited[None], paper)[0]
    colors = INKS if edit.axis == "ink" else PAPERS
    old, new = (torch.tensor(colors[name]) / 255 for name in (getattr(edit.source, edit.axis), edit.target))
    return max(0.0, 1 - float((seen[0] - new).norm() / (old - new).norm().clamp(min=0.1)))


@lru_cache(maxsize=256)  # all samples of a prompt have one source
def _scene(pixels: bytes) -> tuple[Scene, Tensor]:
    """What a source shows, and its shift [1, 2]."""
    picture = torch.frombuffer(bytearray(pixels), dtype=torch.float32).reshape(3, HEIGHT, WIDTH)
    word = read_words(picture[None])[0]
    paper = paper_color(picture[None])
    ink = ink_color(picture[None], paper)[0]
    names = [
        list(colors)[int(torch.cdist(seen, palette(colors)).argmin())]
        for seen, colors in ((ink, INKS), (paper, PAPERS))
    ]
    if len(word) != WORD_LENGTH or not set(word) <= set(LETTERS):
        raise ValueError(
            f"got a source in which {word!r} is read; expected a picture of Glyphs, of {WORD_LENGTH} capitals"
        )
    scene = Scene(word, *names)
    places = torch.arange(-JITTER, JITTER + 1)
    shifts = torch.cartesian_prod(places, places)
    drawn = draw_edits([Edit(scene, "ink", scene.ink)] * len(shifts), shifts)[0]
    apart = (drawn - picture).abs().mean((1, 2, 3))
    if float(apart.min()) > UNKNOWN:
        raise ValueError(
            f"got a source that differs by {float(apart.min()):.3f} from {scene} redrawn; expected a picture of Glyphs"
        )
    return scene, shifts[apart.argmin()][None]


def _check(*pictures: Tensor) -> None:
    for picture in pictures:
        if picture.shape != (3, HEIGHT, WIDTH):
            raise ValueError(f"got a picture {list(picture.shape)}; expected [3, {HEIGHT}, {WIDTH}], of Glyphs")
