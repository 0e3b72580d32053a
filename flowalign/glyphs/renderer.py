"""The Glyphs renderer: four capital letters in a monospaced bold font on plain paper, drawn by indexing.

Ground truth for pre-training and for tests of rewards. A picture is 24x48 pixels, RGB float in [0, 1]. The 26 letter
masks are rasterised once by PIL from DejaVu Sans Mono Bold (shipped inside every matplotlib); a batch is then one
gather and one blend, about 2 microseconds per picture, so drawing does not slow training.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS, WORD_LENGTH

HEIGHT, WIDTH = 24, 48
JITTER = 1  # each picture is moved by up to this many pixels along each axis
FONT_SIZE = 18  # capitals are 13 pixels high
CELL = 11  # advance of one letter in pixels
LEFT, TOP = 1, 5  # corner of the first cell at offset (0, 0); glyphs have ~1 px of side bearing


@cache
def letter_masks() -> Tensor:
    """Coverage of each letter in its cell, [26, HEIGHT, CELL] float in [0, 1], capitals at offset (0, 0)."""
    import matplotlib  # only for the font file in its package data

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    font = ImageFont.truetype(str(path), FONT_SIZE)
    masks = []
    for letter in LETTERS:
        cell = Image.new("L", (CELL, HEIGHT))
        # anchor "ms": x is the middle of the advance, y is the baseline, so every letter sits on one line
        ImageDraw.Draw(cell).text((CELL / 2, TOP + 13), letter, fill=255, font=font, anchor="ms")
        masks.append(np.asarray(cell, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(masks))


def draw(letters: Tensor, inks: Tensor, papers: Tensor, offsets: Tensor) -> Tensor:
    """Pictures [N, 3, HEIGHT, WIDTH] in [0, 1] of words given as letter indices.

    letters [N, 4] in 0..25; inks and papers [N, 3] RGB in [0, 1]; offsets [N, 2] = (down, right), each in
    -JITTER..JITTER. All on the CPU.
    """
    if offsets.abs().max() > JITTER:
        raise ValueError(f"got offsets up to {int(offsets.abs().max())}; expected at most {JITTER}: clamp them")
    count = letters.shape[0]
    line = letter_masks()[letters].permute(0, 2, 1, 3).reshape(count, HEIGHT, WORD_LENGTH * CELL)
    page = line.new_zeros(count, HEIGHT + 2 * JITTER, WIDTH + 2 * JITTER)
    page[:, JITTER : JITTER + HEIGHT, JITTER + LEFT : JITTER + LEFT + line.shape[-1]] = line
    rows = torch.arange(HEIGHT) + JITTER - offsets[:, :1]  # moving down by d reads d rows higher
    columns = torch.arange(WIDTH) + JITTER - offsets[:, 1:]
    mask = page[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)
    return papers[:, :, None, None] * (1 - mask) + inks[:, :, None, None] * mask


def render(words: Sequence[str], inks: Sequence[str], papers: Sequence[str], offsets: Tensor | None = None) -> Tensor:
    """Pictures [N, 3, HEIGHT, WIDTH] in [0, 1] of words in named colors; without offsets, centered."""
    for word in words:
        if len(word) != WORD_LENGTH or not set(word) <= set(LETTERS):
            raise ValueError(f"got the word {word!r}; expected {WORD_LENGTH} capital letters, such as 'KITE'")
    if offsets is None:
        offsets = torch.zeros(len(words), 2, dtype=torch.long)
    return draw(indexed(words), _rgb(inks, INKS), _rgb(papers, PAPERS), offsets)


def indexed(words: Iterable[str]) -> Tensor:
    """Letter indices [words, letters] of words of capitals."""
    return torch.tensor([[LETTERS.index(letter) for letter in word] for word in words])


def spelled(letters: Tensor) -> list[str]:
    """The words of letter indices [words, letters]."""
    return ["".join(LETTERS[letter] for letter in word) for word in letters.tolist()]


def palette(*groups: Mapping[str, tuple[int, int, int]]) -> Tensor:
    """[colors, 3] in [0, 1] of named colors, group after group."""
    return torch.tensor([color for colors in groups for color in colors.values()], dtype=torch.float32) / 255


def _rgb(names: Sequence[str], colors: dict[str, tuple[int, int, int]]) -> Tensor:
    """Named colors as [N, 3] in [0, 1]."""
    unknown = sorted(set(names) - set(colors))
    if unknown:
        raise ValueError(f"got unknown color {unknown[0]!r}; expected one of {', '.join(colors)}")
    return torch.tensor([colors[name] for name in names], dtype=torch.float32) / 255
