"""A latent process reward of Glyphs: the OCR score that a noisy state's finished picture is expected to have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS, WORD_LENGTH, parse_prompt
from flowalign.glyphs.renderer import CELL, HEIGHT
from rewards import RewardBatch, RewardOutput, RewardSpec

WEIGHTS: Final = Path(__file__).parent / "process_reward.safetensors"
SLOT = CELL + 3  # columns that a letter can reach: its cell, moved by one pixel to either side
WAVES = 8  # sines and cosines of σ
HIDDEN, CHANNELS, WIDE = 96, 32, 64
CLASSES = len(LETTERS) + 1  # the last one: no letter, or several


@dataclass(frozen=True, eq=False)
class Scenes:
    """What N prompts ask for, as numbers: letters [N, 4], ink [N], paper [N]."""

    letters: Tensor
    ink: Tensor
    paper: Tensor

    @staticmethod
    def of(prompts: Sequence[str], device: torch.device | str = "cpu") -> Scenes:
        """ValueError for a prompt that is not of the Glyphs grammar."""
        found = [parse_prompt(prompt) for prompt in prompts]
        letters = [[LETTERS.index(letter) for letter in scene.word] for scene in found]
        inks, papers = [list(INKS).index(scene.ink) for scene in found], [list(PAPERS).index(s.paper) for s in found]
        return Scenes(*(torch.tensor(column, device=device) for column in (letters, inks, papers)))

    @staticmethod
    def cat(parts: Sequence[Scenes]) -> Scenes:
        """All of them."""
        return Scenes(*(torch.cat([vars(part)[name] for part in parts]) for name in ("letters", "ink", "paper")))

    @property
    def places(self) -> Tensor:
        """[N, 4] the letter asked for at each place that is read."""
        return self.letters

    def at(self, rows: Tensor) -> Scenes:
        """Those of the rows [n]."""
        return Scenes(self.letters[rows], self.ink[rows], self.paper[rows])

    def asking(self, letters: Tensor) -> Scenes:
        """The same for other letters [N, 4]."""
        return replace(self, letters=letters)


class LetterReader(nn.Module):
    """p(letter that will be read) of each of the four places of a picture, from its noisy latents.

    Every place is a strip of the latents (Glyphs' VAE keeps the pixels' grid), read by the same small network, which σ and
    the two colors modulate. The letter that the prompt asks for adds to its own logit by σ: at σ = 1 the latents say
    nothing, and what the policy draws is mostly what it was asked for."""

    def __init__(self, channels: int = 3, rows: int = HEIGHT, columns: int = SLOT) -> None:
        """Of strips [channels, rows, columns], one letter in each; the defaults are those of Glyphs' latents."""
        super().__init__()
        self.first = nn.Conv2d(channels, CHANNELS, 5, stride=2, padding=2)
        self.second = nn.Conv2d(CHANNELS, WIDE, 3, stride=2, padding=1)
        self.hidden = nn.Linear(WIDE * ((rows + 3) // 4) * ((columns + 3) // 4), HIDDEN)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(HIDDEN, CLASSES)
        self.ink, self.paper = nn.Embedding(len(INKS), 16), nn.Embedding(len(PAPERS), 16)
        self.level = nn.Linear(2 * WAVES + 1, 32)
        self.modulate = nn.Linear(64, 2 * (CHANNELS + WIDE))
        self.asked = nn.Linear(32, len(LETTERS))

    def forward(self, x: Tensor, sigma: Tensor, scenes: Scenes) -> Tensor:
        """Logits [N, 4, CLASSES] of states x [N, 3, 24, 48] at σ [N]."""
        strips = normalized(x, sigma).unfold(3, SLOT, CELL)[:, :, :, :WORD_LENGTH].permute(0, 3, 1, 2, 4)
        return self.read(strips, sigma, scenes.letters, self.ink(scenes.ink), self.paper(scenes.paper))

    def read(self, strips: Tensor, sigma: Tensor, letters: Tensor, ink: Tensor, paper: Tensor) -> Tensor:
        """Logits [M, L, CLASSES] of the strips [M, L, channels, rows, columns] of M pictures of L letters each, at σ [M].

        letters [M, L]: asked for; ink and paper [M, 16]: embeddings of the two colors."""
        count, length = letters.shape
        level = silu(self.level(_waves(sigma)))
        given = torch.cat([level, ink, paper], 1)
        scale1, shift1, scale2, shift2 = (
            self.modulate(given)
            .repeat_interleave(length, 0)[..., None, None]
            .split([CHANNELS, CHANNELS, WIDE, WIDE], 1)
        )
        seen = silu(self.first(strips.flatten(0, 1)) * (1 + scale1) + shift1)
        seen = silu(self.second(seen) * (1 + scale2) + shift2)
        logits = self.out(self.dropout(silu(self.hidden(self.dropout(seen.flatten(1)))))).view(count, length, CLASSES)
        wanted = one_hot(letters, CLASSES).to(logits)
        bonus = self.asked(level)[:, None].expand(-1, length, -1).gather(2, letters[..., None])
        return logits + wanted * bonus

    def expected(self, x: Tensor, sigma: Tensor, scenes: Scenes) -> Tensor:
        """[N] in [0, 1]: the expected score."""
        return self.score_of(self(x, sigma, scenes), scenes)

    @staticmethod
    def score_of(logits: Tensor, scenes: Scenes) -> Tensor:
        """[N] of logits [N, 4, CLASSES]: the geometric mean probability of a letter that was asked for, as rewards.OCR has it
        under the recognizer's posterior (metric "soft")."""
        return logits.log_softmax(2).gather(2, scenes.letters[..., None])[..., 0].mean(1).exp()


@dataclass
class GlyphsProcessReward:
    """The expected OCR score (rewards.OCR, metric soft) of the picture that a noisy state of Glyphs becomes.

    A network of 185,000 numbers, trained on states of 1,920 rollouts of the base model by scripts/train_process_reward.py
    (2.5 minutes of one core). Correlation with the outcome on 256 held-out words: .49 at σ = 1 (some words are harder than
    others), .52 at .75, .58 at .6, .65 at .375, .68 at 0; along Euphonium's SDE .46, .48, .54 (.68), .65 (.36), .67.
    Differentiable in the latents, for reward guidance (Euphonium 2602.04928).
    Not kept: a policy that has moved away from the base draws pictures that it has not seen, and its gradient can be
    climbed without becoming readable: look at the outcome reward. weights: a file of its own, by default the shipped."""

    name: str = "process"
    weights: str | None = None
    spec = RewardSpec(inputs=("latents",), scope="latent", differentiable=True, range=(0.0, 1.0), licence="Apache-2.0")
    _network: LetterReader | None = field(default=None, init=False, repr=False)

    def load(self) -> None:
        if self._network is None:
            self._network = read_weights(WEIGHTS if self.weights is None else Path(self.weights), LetterReader())

    def close(self) -> None:
        self._network = None

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.load()
        assert self._network is not None and batch.latents is not None
        return scored(self._network.to(batch.latents.device), Scenes.of, batch)


class Expects(Protocol):
    """A network of some world as a process reward asks it."""

    def expected(self, x: Tensor, sigma: Tensor, scenes: Any) -> Tensor: ...


def scored(
    network: Expects, scenes_of: Callable[[Sequence[str], torch.device], Any], batch: RewardBatch
) -> RewardOutput:
    """The expected scores of the states of a batch, with a graph to their latents."""
    assert batch.latents is not None and batch.sigma is not None
    x = batch.latents.float()
    scores = network.expected(x, batch.sigma.to(x), scenes_of(batch.prompts, x.device)).clamp(0, 1)
    return RewardOutput(scores, torch.ones(len(batch), dtype=torch.bool, device=scores.device))


Network = TypeVar("Network", bound=nn.Module)


def read_weights(path: Path, network: Network) -> Network:
    """The network with the weights of a file, in fp32 without gradients of its own."""
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.eval().requires_grad_(False)


def normalized(x: Tensor, sigma: Tensor) -> Tensor:
    """States x [N, *] at σ [N] with about unit variance."""
    size = ((1 - sigma) ** 2 + sigma**2).sqrt()
    return x / size.reshape(-1, *[1] * (x.ndim - 1))


def _waves(sigma: Tensor) -> Tensor:
    """[N, 2·WAVES + 1]: σ, and sines and cosines of its halvings."""
    angles = sigma[:, None] * _frequencies().to(sigma)
    return torch.cat([sigma[:, None], angles.sin(), angles.cos()], 1)


@cache
def _frequencies() -> Tensor:
    return torch.pi * 2.0 ** (torch.arange(WAVES) / 2 - 1)
