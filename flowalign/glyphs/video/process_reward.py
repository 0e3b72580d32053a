"""A latent process reward of Glyphs-Video: the OCR score that the clip which a noisy state becomes is expected to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flowalign.glyphs.process_reward import CLASSES, LetterReader, normalized, read_weights, scored
from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS
from flowalign.glyphs.renderer import CELL
from flowalign.glyphs.video.parts import CHANNELS
from flowalign.glyphs.video.prompts import DIRECTIONS, FRAMES, WORD_LENGTH, parse_prompt
from flowalign.glyphs.video.renderer import HEIGHT, WIDTH, WORD_HEIGHT, WORD_WIDTH, paths
from rewards import RewardBatch, RewardOutput, RewardSpec

WEIGHTS: Final = Path(__file__).parent / "process_reward.safetensors"
JUDGED = (0, FRAMES // 2, FRAMES - 1)  # the frames that OCR reads: rewards.OnFrames(frames=3)
MARGIN = 1  # pixels around a letter
BLOCK = 3 * 2 * 4 * 4  # numbers that a latent stands for: 4x4 pixels of two frames


@dataclass(frozen=True, eq=False)
class ClipScenes:
    """What N prompts ask for, as numbers: letters [N, 3], inks [N, 2] of first and last frame, paper [N], and the corner
    [N, FRAMES, 2] (down, right) of the word in each frame, as the renderer places it."""

    letters: Tensor
    inks: Tensor
    paper: Tensor
    corners: Tensor

    @staticmethod
    def of(prompts: Sequence[str], device: torch.device | str = "cpu") -> ClipScenes:
        """ValueError for a prompt that is not of the grammar of Glyphs-Video."""
        found = [parse_prompt(prompt) for prompt in prompts]
        inks, papers, names = list(INKS), list(PAPERS), list(DIRECTIONS)
        letters = [[LETTERS.index(letter) for letter in scene.word] for scene in found]
        colors = [[inks.index(scene.ink), inks.index(scene.last_ink)] for scene in found]
        actions = torch.tensor([[names.index(action) for action in scene.actions] for scene in found])
        columns = torch.tensor(letters), torch.tensor(colors), torch.tensor([papers.index(s.paper) for s in found])
        return ClipScenes(*(column.to(device) for column in (*columns, paths(actions))))

    @staticmethod
    def cat(parts: Sequence[ClipScenes]) -> ClipScenes:
        """All of them."""
        names = ("letters", "inks", "paper", "corners")
        return ClipScenes(*(torch.cat([vars(part)[name] for part in parts]) for name in names))

    @property
    def places(self) -> Tensor:
        """[N, 9] the letters asked for in the first judged frame, then in the others."""
        return self.letters.repeat(1, len(JUDGED))

    def at(self, rows: Tensor) -> ClipScenes:
        """Those of the rows [n]."""
        return ClipScenes(self.letters[rows], self.inks[rows], self.paper[rows], self.corners[rows])

    def asking(self, letters: Tensor) -> ClipScenes:
        """The same for other letters [N, 3]."""
        return replace(self, letters=letters)


class ClipReader(nn.Module):
    """p(letter that will be read) of each letter in each judged frame of a clip, from its noisy latents.

    A linear map makes pixels of the latents. A prompt says where its word is in every frame, so words are cut out there: each is the same
    picture again, and their mean over all frames has less noise. Of each judged frame, its own word and that mean are read by the
    network of Glyphs' process reward, under the ink that this frame is to have."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv3d(CHANNELS, BLOCK, 1)
        self.letters = LetterReader(6, WORD_HEIGHT + 2 * MARGIN, CELL + 2 * MARGIN)

    def forward(self, x: Tensor, sigma: Tensor, scenes: ClipScenes) -> Tensor:
        """Logits [N, 9, CLASSES] of states x [N, 20, 5, 8, 16] at σ [N], in the order of `ClipScenes.places`."""
        words = cut(frames_of(self.pixels(normalized(x, sigma))), scenes.corners)
        judged = torch.tensor(JUDGED, device=x.device)
        seen = torch.cat([words[:, judged], words.mean(1, keepdim=True).expand(-1, len(judged), -1, -1, -1)], 2)
        strips = seen.flatten(0, 1).unfold(3, CELL + 2 * MARGIN, CELL).permute(0, 3, 1, 2, 4)
        turned = (judged / (FRAMES - 1))[:, None]
        first, last = self.letters.ink(scenes.inks).unbind(1)
        inks = torch.lerp(first[:, None], last[:, None], turned).flatten(0, 1)
        sigma, letters, paper = (
            each.repeat_interleave(len(judged), 0) for each in (sigma, scenes.letters, self.letters.paper(scenes.paper))
        )
        return self.letters.read(strips, sigma, letters, inks, paper).view(len(x), -1, CLASSES)

    def expected(self, x: Tensor, sigma: Tensor, scenes: ClipScenes) -> Tensor:
        """[N] in [0, 1]: the expected score."""
        return self.score_of(self(x, sigma, scenes), scenes)

    @staticmethod
    def score_of(logits: Tensor, scenes: ClipScenes) -> Tensor:
        """[N] of logits [N, 9, CLASSES]: the mean over the frames of the geometric mean probability of a letter that was asked for, as
        rewards.OnFrames(OCR(metric="soft"), frames=3) has it under the recognizer's posterior."""
        found = logits.log_softmax(2).gather(2, scenes.places[..., None])[..., 0]
        return found.unflatten(1, (len(JUDGED), WORD_LENGTH)).mean(2).exp().mean(1)


def frames_of(blocks: Tensor) -> Tensor:
    """Frames [N, FRAMES, 3, 32, 64] of blocks [N, BLOCK, 5, 8, 16], each of (color, frame, row, column); the first one stands for the
    first frame twice."""
    count, _, pairs, rows, columns = blocks.shape
    parts = blocks.view(count, 3, 2, 4, 4, pairs, rows, columns).permute(0, 5, 2, 1, 6, 3, 7, 4)
    return parts.reshape(count, 2 * pairs, 3, 4 * rows, 4 * columns)[:, 1:]


def cut(frames: Tensor, corners: Tensor) -> Tensor:
    """The words [N, F, C, 20, 35] of frames [N, F, C, 32, 64], MARGIN pixels around each, whose corners [N, F, 2] (down, right) are given;
    outside of the frame, its nearest pixel."""
    rows, columns = (
        (corners[..., axis, None] - MARGIN + torch.arange(size + 2 * MARGIN, device=frames.device)).clamp(0, end - 1)
        for axis, size, end in ((0, WORD_HEIGHT, HEIGHT), (1, WORD_WIDTH, WIDTH))
    )
    down, across = one_hot(rows, HEIGHT).to(frames), one_hot(columns, WIDTH).to(frames)
    return down[:, :, None] @ frames @ across.mT[:, :, None]


@dataclass
class GlyphsVideoProcessReward:
    """The expected score of the clip that a noisy state of Glyphs-Video becomes: OCR (metric soft) of its first, middle and last frame.

    A network of 165,000 numbers, trained on states of 1,024 rollouts of the base model by scripts/train_process_reward.py --world glyphs_video
    (7 minutes of one core). Correlation with the outcome on 192 held-out words: .58 at σ = 1, .65 at .75, .78 at .5, .82 at 0 (all of them, and the
    errors: docs/results/glyphs_video_process.md). Differentiable in the latents, for reward guidance (Euphonium 2602.04928).
    Not kept: its mean, which is higher than the outcome's on held-out words (.54 beside .38 at σ = 0). It looks for a word where the prompt says
    that it moves, and reads nothing elsewhere. A policy that has moved away from the base makes clips that it has not seen, and its
    gradient can be climbed without becoming readable: look at the outcome reward.
    weights: a file of its own, by default the shipped."""

    name: str = "process"
    weights: str | None = None
    spec = RewardSpec(inputs=("latents",), scope="latent", differentiable=True, range=(0.0, 1.0), licence="Apache-2.0")
    _network: ClipReader | None = field(default=None, init=False, repr=False)

    def load(self) -> None:
        if self._network is None:
            self._network = read_weights(WEIGHTS if self.weights is None else Path(self.weights), ClipReader())

    def close(self) -> None:
        self._network = None

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.load()
        assert self._network is not None and batch.latents is not None
        return scored(self._network.to(batch.latents.device), ClipScenes.of, batch)
