"""The Glyphs prompt grammar and its two fixed word lists.

`the word "KITE" in red on a yellow background`: a word of four capitals, an ink, a paper. Words are random letter
quadruples taken from a hash, so the lists are the same on every machine and Python. Held-out words are in no training
prompt, and pre-training draws its quadruples around them.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from itertools import cycle, product
from typing import NamedTuple, TypedDict

INKS = {"red": (200, 0, 0), "green": (0, 120, 0), "blue": (0, 0, 220), "black": (0, 0, 0)}
PAPERS = {"white": (255, 255, 255), "yellow": (255, 230, 0), "pink": (255, 170, 200), "cyan": (120, 230, 255)}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORD_LENGTH = 4
TRAIN_WORDS, HELD_OUT_WORDS = 1024, 512

_PATTERN = re.compile(
    rf'the word "([A-Z]{{{WORD_LENGTH}}})" in ({"|".join(INKS)}) on a ({"|".join(PAPERS)}) background'
)


class Scene(NamedTuple):
    """What a prompt asks for."""

    word: str
    ink: str
    paper: str


class GlyphsPrompt(TypedDict):
    """A prompt with what rewards need to judge its picture; colors are RGB in 0..255."""

    prompt: str
    target: str
    ink: str
    paper: str
    ink_rgb: tuple[int, int, int]
    paper_rgb: tuple[int, int, int]


def make_prompt(word: str, ink: str, paper: str) -> str:
    """The prompt of a scene; ValueError if the scene is outside the grammar."""
    prompt = f'the word "{word}" in {ink} on a {paper} background'
    parse_prompt(prompt)
    return prompt


def parse_prompt(prompt: str) -> Scene:
    """The scene of a prompt, the inverse of `make_prompt`."""
    match = _PATTERN.fullmatch(prompt)
    if match is None:
        raise ValueError(
            f'got {prompt!r}, not a Glyphs prompt; expected: the word "KITE" in INK on a PAPER background, with '
            f"{WORD_LENGTH} capitals, INK one of {', '.join(INKS)} and PAPER one of {', '.join(PAPERS)}"
        )
    return Scene(*match.groups())


def train_prompts() -> list[GlyphsPrompt]:
    """The prompts for alignment: TRAIN_WORDS words, each in one of the 16 color pairs, evenly."""
    return _records(hashed_words("glyphs word", WORD_LENGTH)[HELD_OUT_WORDS:])


def held_out_prompts() -> list[GlyphsPrompt]:
    """The prompts for evaluation: HELD_OUT_WORDS words that neither pre-training nor alignment has seen."""
    return _records(hashed_words("glyphs word", WORD_LENGTH)[:HELD_OUT_WORDS])


@cache
def hashed_words(label: str, length: int) -> tuple[str, ...]:
    """Distinct pseudo-random words of `length` capitals from hashes of `label` and a number, HELD_OUT_WORDS words first, then TRAIN_WORDS."""
    words: dict[str, None] = {}
    counter = 0
    while len(words) < HELD_OUT_WORDS + TRAIN_WORDS:
        digest = hashlib.blake2b(f"{label} {counter}".encode(), digest_size=8).digest()
        code = int.from_bytes(digest, "big")  # 64 bits: the bias of the remainder is below 1e-13
        words["".join(LETTERS[code // 26**place % 26] for place in range(length))] = None
        counter += 1
    return tuple(words)


def _records(words: Sequence[str]) -> list[GlyphsPrompt]:
    """One record per word; color pairs cycle, so every pair is equally frequent."""
    return [
        GlyphsPrompt(
            prompt=make_prompt(word, ink, paper),
            target=word,
            ink=ink,
            paper=paper,
            ink_rgb=INKS[ink],
            paper_rgb=PAPERS[paper],
        )
        for word, (ink, paper) in zip(words, cycle(product(INKS, PAPERS)), strict=False)
    ]
