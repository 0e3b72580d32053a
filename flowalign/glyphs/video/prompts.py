"""The prompt grammar of Glyphs-Video and its two fixed lists.

`the word "CAT" in red turning blue on a white background moving left then up`: a word of three capitals, an ink, what it turns
to (half of the prompts), a paper, and two directions, half of the clip each.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from flowalign.glyphs.prompts import HELD_OUT_WORDS, INKS, PAPERS, hashed_words

WORD_LENGTH = 3
FRAMES = 9
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (down, right)

_PATTERN = re.compile(
    rf'the word "([A-Z]{{{WORD_LENGTH}}})" in ({"|".join(INKS)})(?: turning ({"|".join(INKS)}))? on a ({"|".join(PAPERS)}) '
    rf"background moving ({'|'.join(DIRECTIONS)}) then ({'|'.join(DIRECTIONS)})"
)


class Scene(NamedTuple):
    """What a prompt asks for. last_ink: the color of the last frame, `ink` where it does not turn."""

    word: str
    ink: str
    last_ink: str
    paper: str
    first: str
    second: str

    @property
    def actions(self) -> list[str]:
        """The direction between each frame and the next."""
        half = (FRAMES - 1) // 2
        return [self.first] * half + [self.second] * half


class VideoPrompt(TypedDict):
    """A prompt with what rewards need to judge its clip; colors are RGB in 0..255, `actions` one direction between each frame
    and the next."""

    prompt: str
    target: str
    ink: str
    last_ink: str
    paper: str
    ink_rgb: tuple[int, int, int]
    last_ink_rgb: tuple[int, int, int]
    paper_rgb: tuple[int, int, int]
    actions: list[str]


def make_prompt(scene: Scene) -> str:
    """The prompt of a scene; ValueError if the scene is outside the grammar."""
    turning = "" if scene.ink == scene.last_ink else f" turning {scene.last_ink}"
    prompt = (
        f'the word "{scene.word}" in {scene.ink}{turning} on a {scene.paper} background moving {scene.first} '
        f"then {scene.second}"
    )
    parse_prompt(prompt)
    return prompt


def parse_prompt(prompt: str) -> Scene:
    """The scene of a prompt, the inverse of `make_prompt`."""
    match = _PATTERN.fullmatch(prompt)
    if match is None:
        raise ValueError(
            f'got {prompt!r}, not a prompt of Glyphs-Video; expected: the word "CAT" in INK [turning INK] on a PAPER background '
            f"moving DIRECTION then DIRECTION, with {WORD_LENGTH} capitals, INK one of {', '.join(INKS)}, PAPER one of "
            f"{', '.join(PAPERS)} and DIRECTION one of {', '.join(DIRECTIONS)}"
        )
    word, ink, last, paper, first, second = match.groups()
    return Scene(word, ink, last or ink, paper, first, second)


def train_prompts() -> list[VideoPrompt]:
    """The prompts for alignment: TRAIN_WORDS words; colors, turns and directions occur evenly."""
    return _records(hashed_words("glyphs video word", WORD_LENGTH)[HELD_OUT_WORDS:])


def held_out_prompts() -> list[VideoPrompt]:
    """The prompts for evaluation: HELD_OUT_WORDS words that neither pre-training nor alignment has seen."""
    return _records(hashed_words("glyphs video word", WORD_LENGTH)[:HELD_OUT_WORDS])


def _records(words: Sequence[str]) -> list[VideoPrompt]:
    """One record per word. Color pairs, directions and turns cycle with periods 16, 16 · 16 and 2 · 3."""
    pairs = [(ink, paper) for ink in INKS for paper in PAPERS]
    paths = [(first, second) for first in DIRECTIONS for second in DIRECTIONS]
    records: list[VideoPrompt] = []
    for number, word in enumerate(words):
        ink, paper = pairs[number % len(pairs)]
        first, second = paths[(number + number // len(pairs)) % len(paths)]
        others = [name for name in INKS if name != ink]
        turns = (number // len(pairs)) % 2 == 1
        last = others[(number // (2 * len(pairs))) % len(others)] if turns else ink
        scene = Scene(word, ink, last, paper, first, second)
        records.append(
            VideoPrompt(
                prompt=make_prompt(scene),
                target=word,
                ink=ink,
                last_ink=last,
                paper=paper,
                ink_rgb=INKS[ink],
                last_ink_rgb=INKS[last],
                paper_rgb=PAPERS[paper],
                actions=scene.actions,
            )
        )
    return records
