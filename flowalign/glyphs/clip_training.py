"""Training of the Glyphs CLIP: the renderer's pictures and their captions, with near misses and damaged pictures as
negatives.

Contrastive as CLIP is (Radford et al. 2021, arXiv:2103.00020, figure 3), with three changes that make its cosine
useful as a reward. A batch holds scenes that differ in one letter or one color, since random captions are soon told
apart. Each caption must prefer its picture to a damaged copy of it, which no caption describes. And a part of the
pictures are a policy's samples, captioned by what OCR reads in them: else their half-drawn letters would be unknown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS, WORD_LENGTH, held_out_prompts, make_prompt, parse_prompt
from flowalign.glyphs.renderer import HEIGHT, JITTER, WIDTH, draw, palette, spelled
from flowalign.glyphs.schedule import set_rate

SIZES = torch.tensor([len(LETTERS)] * WORD_LENGTH + [len(INKS), len(PAPERS)])  # of the columns of scenes [N, 6]
MAX_SCALE = 30.0  # of the logits: a sharper softmax would be content with neighbours whose cosines nearly tie
Progress = Callable[[int, float, float], None]  # steps done, loss, share of captions whose picture is the nearest


@dataclass(frozen=True)
class Stage:
    """What a batch holds up to step `until`: families, each of a scene and neighbours that differ from it in one
    column; lines, each of all scenes that differ in the same column (26 letters of one place, or 4 colors); samples
    of the policy, each with `wrong` captions that differ from its own in one column."""

    families: int
    neighbours: int
    lines: int
    samples: int
    wrong: int
    until: int


@dataclass(frozen=True)
class ClipRecipe:
    """The defaults made the shipped network. Stages: at first a batch is mostly captions that are easy to tell apart;
    once they are, only near misses still teach."""

    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(14, 4, 0, 26, 0, until=1400),
        Stage(2, 4, 4, 20, 6, until=1800),
        Stage(2, 4, 2, 48, 5, until=3000),
    )
    steps: int = 3000  # where training stops
    schedule_steps: int = 3000  # where the cosine ends
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.02
    clip: float = 1.0  # gradient norm
    checkpoint_every: int = 100


@dataclass(frozen=True, eq=False)
class Samples:
    """M samples of a policy. pictures [M, 3, 24, 48] in [0, 1]; asked [M, 6]: the scenes of their prompts; read [M, 6]:
    the scenes with the letters that OCR reads; trusted [M]: whether it read four letters, with confidence, and not a
    held-out word."""

    pictures: Tensor
    asked: Tensor
    read: Tensor
    trusted: Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """scenes [N, 6]; intact, damaged [N, 3, 24, 48]: a picture of each scene, and one that shows it worse; wrong
    [M, K, 6]: of each of the last M scenes, K that its picture does not show."""

    scenes: Tensor
    intact: Tensor
    damaged: Tensor
    wrong: Tensor


def train_clip(
    network: Any, tokens: Callable[[list[str]], Tensor], pixels: Callable[[Tensor], Tensor], samples: Samples,
    recipe: ClipRecipe, file: Path, progress: Progress,
) -> None:  # fmt: skip
    """Trains an open_clip.CLIP in place, or resumes from the checkpoint `file`. tokens: captions -> [N, L]; pixels:
    pictures in [0, 1] -> [N, 3, S, S]. All randomness of a step is keyed by (seed, step)."""
    matrices, others = ([each for each in network.parameters() if (each.ndim > 1) == kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    first = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        first = saved["step"]
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(first, recipe.steps):
        set_rate(optimizer, recipe.learning_rate, step, recipe.schedule_steps, recipe.warmup)
        stage = next(stage for stage in recipe.stages if step < stage.until)
        examples = draw_examples(stage, samples, torch.Generator().manual_seed((recipe.seed << 32) + step))
        pictures = torch.cat([examples.intact, examples.damaged])
        scenes = torch.cat([examples.scenes, examples.wrong.flatten(0, 1)])
        loss, found = contrast(network, pixels(pictures), tokens(captions(scenes)), len(examples.wrong))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        network.logit_scale.data.clamp_(0, math.log(MAX_SCALE))
        progress(step + 1, loss.item(), found)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            state = {"step": step + 1, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)


def contrast(network: Any, pixels: Tensor, tokens: Tensor, samples: int = 0) -> tuple[Tensor, float]:
    """Symmetric InfoNCE of n pictures and captions. pixels [2n, *]: n pictures and their damaged copies, each one
    more candidate for its own caption; tokens [n + samples · K, L]: n captions, and K wrong ones of each of the last
    `samples`, more candidates for its picture. Also the share of pictures that prefer their caption to all others."""
    count = len(pixels) // 2
    images, texts = network.encode_image(pixels, normalize=True), network.encode_text(tokens, normalize=True)
    scale, targets = network.logit_scale.exp(), torch.arange(count)
    logits = scale * images[:count] @ texts[:count].T
    wrong = logits.new_full((count, (len(texts) - count) // max(samples, 1)), -math.inf)
    shown = images[count - samples : count, None]
    wrong[count - samples :] = scale * (shown * texts[count:].view(samples, wrong.shape[1], texts.shape[1])).sum(2)
    damaged = scale * (images[count:] * texts[:count]).sum(1, keepdim=True)
    by_image, by_text = torch.cat([logits, wrong], 1), torch.cat([logits.T, damaged], 1)
    loss = (F.cross_entropy(by_image, targets) + F.cross_entropy(by_text, targets)) / 2
    return loss, float((by_image.argmax(1) == targets).float().mean())


def draw_examples(stage: Stage, samples: Samples, generator: torch.Generator) -> Examples:
    """Families of drawn scenes, and scenes of the policy's samples. A sample whose reading is trusted is a picture of
    what is read; one that is not shows what was asked for worse than the renderer does."""
    rows = torch.randint(len(samples.asked), (stage.samples,), generator=generator)
    shown, trusted = samples.pictures[rows], samples.trusted[rows]
    of_samples = torch.where(trusted[:, None], samples.read[rows], samples.asked[rows])
    families = draw_families(stage.families, stage.neighbours, generator)
    scenes = torch.cat([families, draw_lines(stage.lines, generator), of_samples])
    offsets = torch.randint(-JITTER, JITTER + 1, (len(scenes), 2), generator=generator)
    intact, other = _draw(scenes, offsets), _draw(change_one(scenes, generator), offsets)
    first = len(scenes) - len(rows)
    intact[first:][trusted] = shown[trusted]
    damaged = damage(intact, other, generator)
    damaged[first:][~trusted] = shown[~trusted]
    intact, damaged = roughen(intact, generator), roughen(damaged, generator)
    wrong = change_one(of_samples.repeat_interleave(stage.wrong, 0), generator)
    return Examples(scenes, intact, damaged, wrong.view(len(rows), stage.wrong, 6))


def draw_families(families: int, neighbours: int, generator: torch.Generator) -> Tensor:
    """Distinct scenes [N, 6] (four letters, ink, paper) without held-out words: random ones, each with `neighbours`
    scenes that differ from it in one column. N is a little below families · (1 + neighbours) where a draw had to be
    dropped."""
    first = torch.stack([torch.randint(size, (families,), generator=generator) for size in SIZES.tolist()], 1)
    scenes = torch.cat([first, change_one(first.repeat(neighbours, 1), generator)]).unique(dim=0)
    return scenes[~is_held_out(scenes)]


def draw_lines(lines: int, generator: torch.Generator) -> Tensor:
    """Scenes [N, 6] of `lines` random lines: all that differ from a random one in a random column, without held-out
    words."""
    drawn = []
    for column in torch.randint(len(SIZES), (lines,), generator=generator).tolist():
        scene = torch.stack([torch.randint(size, (1,), generator=generator) for size in SIZES.tolist()], 1)
        line = scene.repeat(int(SIZES[column]), 1)
        line[:, column] = torch.arange(len(line))
        drawn.append(line)
    scenes = torch.cat([*drawn, torch.empty(0, len(SIZES), dtype=torch.long)])
    return scenes[~is_held_out(scenes)]


def change_one(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """The scenes [N, 6], each with another letter in one place, or another ink or paper (one in six each); with
    another paper where the word would be a held-out one."""
    rows = torch.arange(len(scenes))
    column = torch.randint(len(SIZES), (len(scenes),), generator=generator)
    sizes = SIZES[column]
    by = 1 + (torch.rand(len(scenes), generator=generator) * (sizes - 1)).long()
    changed, paper = scenes.clone(), scenes.clone()
    changed[rows, column] = (scenes[rows, column] + by) % sizes
    paper[:, -1] = (scenes[:, -1] + 1) % SIZES[-1]
    return torch.where(is_held_out(changed)[:, None], paper, changed)


def captions(scenes: Tensor) -> list[str]:
    """The prompts of scenes [N, 6]."""
    inks, papers = list(INKS), list(PAPERS)
    return [
        make_prompt(word, inks[ink], papers[paper])
        for word, (ink, paper) in zip(spelled(scenes[:, :WORD_LENGTH]), scenes[:, WORD_LENGTH:].tolist(), strict=True)
    ]


def damage(pictures: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures [N, 3, 24, 48], each in one of four ways no longer what its caption says: mixed with `other`, the
    picture of a scene that differs in one column; cut along a row, with `other` below; blurred; or a box of it blank
    paper."""
    count = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator)

    mixed = torch.lerp(pictures, other, uniform(0.3, 0.7))
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)
    cut = torch.where(rows < uniform(9, 16), pictures, other)
    blurred = torch.lerp(gaussian_blur(pictures, 5, 1.0), gaussian_blur(pictures, 9, 2.5), uniform(0, 1))
    top, left = uniform(4, 14), uniform(1, 38)
    box = (rows >= top) & (rows < top + uniform(5, 14)) & (columns >= left) & (columns < left + uniform(5, 12))
    blank = torch.where(box, pictures[:, :, :1, :1], pictures)
    kind = torch.randint(4, (count,), generator=generator)
    return torch.stack([mixed, cut, blurred, blank])[kind, torch.arange(count)]


def roughen(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A little blur, noise and a shift of the colors, as a generator's pictures have."""
    shape = (len(pictures), 1, 1, 1)
    blurred = torch.lerp(pictures, gaussian_blur(pictures, 3, 0.8), torch.rand(shape, generator=generator))
    noise = torch.randn(pictures.shape, generator=generator) * 0.08 * torch.rand(shape, generator=generator)
    return blurred + noise + torch.randn(len(pictures), 3, 1, 1, generator=generator) * 0.03


def scenes_of(prompts: Sequence[str]) -> Tensor:
    """The scenes [N, 6] of prompts, the inverse of `captions`."""
    found = [parse_prompt(prompt) for prompt in prompts]
    return torch.tensor(
        [[*map(LETTERS.index, each.word), list(INKS).index(each.ink), list(PAPERS).index(each.paper)] for each in found]
    )


def is_held_out(scenes: Tensor) -> Tensor:
    """[N]: whether the word of a scene [N, 6] is one of those that training must not see."""
    return torch.isin(_codes(scenes), _held_out())


def _draw(scenes: Tensor, offsets: Tensor) -> Tensor:
    inks, papers = palette(INKS), palette(PAPERS)
    return draw(scenes[:, :WORD_LENGTH], inks[scenes[:, -2]], papers[scenes[:, -1]], offsets)


def _codes(scenes: Tensor) -> Tensor:
    """The words of scenes as numbers in base 26."""
    return (scenes[:, :WORD_LENGTH] * len(LETTERS) ** torch.arange(WORD_LENGTH)).sum(1)


@cache
def _held_out() -> Tensor:
    return _codes(scenes_of([record["prompt"] for record in held_out_prompts()]))
