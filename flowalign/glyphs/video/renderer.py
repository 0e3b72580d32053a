"""The Glyphs-Video renderer: a word of three capitals that moves over plain paper, drawn by indexing.

A clip is 9 frames of 32x64 pixels, RGB float in [0, 1]. The word starts in the middle, where any path of two halves fits, and moves by
STEP pixels between a frame and the next. Its ink goes evenly from the first color to the last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import CELL, indexed, letter_masks
from flowalign.glyphs.video.prompts import DIRECTIONS, FRAMES, WORD_LENGTH, Scene

HEIGHT, WIDTH = 32, 64
STEP = 1  # pixels between a frame and the next
ROWS = slice(4, 22)  # of a letter's mask: its 13 rows with one above, and the tail of a Q
WORD_HEIGHT, WORD_WIDTH = ROWS.stop - ROWS.start, WORD_LENGTH * CELL
# corners (down, right) of the masks at which a word may be: capitals stay inside, of a Q one row of its tail may not
LOWEST = (0, 1)
HIGHEST = (16, WIDTH - WORD_WIDTH - 1)


def draw(letters: Tensor, inks: Tensor, papers: Tensor, places: Tensor) -> Tensor:
    """Clips [N, F, 3, HEIGHT, WIDTH] in [0, 1].

    letters [N, 3] in 0..25; inks [N, F, 3] and papers [N, 3] RGB in [0, 1]; places [N, F, 2] the corner (down, right) of the word's
    mask."""
    count = len(places)
    word = letter_masks()[letters][:, :, ROWS].permute(0, 2, 1, 3).reshape(count, WORD_HEIGHT, WORD_WIDTH)
    page = word.new_zeros(count, WORD_HEIGHT + 2 * HEIGHT, WORD_WIDTH + 2 * WIDTH)
    page[:, HEIGHT : HEIGHT + WORD_HEIGHT, WIDTH : WIDTH + WORD_WIDTH] = word
    rows = torch.arange(HEIGHT) + HEIGHT - places[..., :1]  # [N, F, HEIGHT]
    columns = torch.arange(WIDTH) + WIDTH - places[..., 1:]
    number = torch.arange(count)[:, None, None, None]
    mask = page[number, rows[..., :, None], columns[..., None, :]].unsqueeze(2)
    return papers[:, None, :, None, None] * (1 - mask) + inks[..., None, None] * mask


def paths(actions: Tensor, start: Tensor | None = None) -> Tensor:
    """Places [N, F, 2] of words that take `actions` [N, F - 1] (numbers of DIRECTIONS). start [N, 2] in [0, 1]: where, of all places from
    which the whole path fits; None: in the middle."""
    steps = torch.tensor(list(DIRECTIONS.values()))[actions] * STEP
    path = torch.cat([steps.new_zeros(len(steps), 1, 2), steps.cumsum(1)], 1)
    low = torch.tensor(LOWEST) - path.amin(1)
    high = torch.tensor(HIGHEST) - path.amax(1)
    if (low > high).any():
        raise ValueError("got a path that leaves the picture; expected one whose places all fit: turn back earlier")
    if start is None:
        start = torch.full((len(path), 2), 0.5)
    first = low + ((high - low + 1) * start).long().clamp(max=high - low)
    return first[:, None] + path


def ink_of_frames(first: Tensor, last: Tensor, frames: int = FRAMES) -> Tensor:
    """[N, F, 3] from the colors [N, 3] of the first frame and the last."""
    return torch.lerp(first[:, None], last[:, None], torch.linspace(0, 1, frames)[:, None])


def render(scenes: Sequence[Scene]) -> Tensor:
    """Clips [N, F, 3, HEIGHT, WIDTH] in [0, 1] of scenes."""
    names = list(DIRECTIONS)
    actions = torch.tensor([[names.index(action) for action in scene.actions] for scene in scenes])
    letters = indexed(scene.word for scene in scenes)
    inks = ink_of_frames(_rgb([INKS[scene.ink] for scene in scenes]), _rgb([INKS[scene.last_ink] for scene in scenes]))
    return draw(letters, inks, _rgb([PAPERS[scene.paper] for scene in scenes]), paths(actions))


def _rgb(colors: Sequence[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(colors, dtype=torch.float32) / 255
