"""Training of the inverse dynamics models of Glyphs-Video: rendered words on random walks, spoilt as generated clips are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS
from flowalign.glyphs.renderer import indexed, palette
from flowalign.glyphs.schedule import set_rate
from flowalign.glyphs.training import other_words, step_generator, train_step
from flowalign.glyphs.video.inverse_dynamics import NETWORKS, Weights
from flowalign.glyphs.video.pretrain import encode_clips
from flowalign.glyphs.video.prompts import DIRECTIONS, FRAMES, held_out_prompts, parse_prompt
from flowalign.glyphs.video.renderer import draw, ink_of_frames, paths, render

RECONSTRUCTED = 768  # clips
STILL = -1  # in place of an action: the word does not move
Degradation = Callable[
    [Tensor, torch.Generator], Tensor
]  # clips [N, F, 3, H, W] in [0, 1]; what comes may leave [0, 1]


@dataclass(frozen=True, eq=False)
class Walks:
    """Clips [N, F, 3, H, W] in [0, 1] and what the word does between a frame and the next [N, F - 1]: a number of DIRECTIONS, or STILL."""

    clips: Tensor
    actions: Tensor


def sample_walks(count: int, words: Tensor, stay: float, generator: torch.Generator, changing: float = 0.3) -> Walks:
    """Words on random walks: an action is the one before with probability `stay`, else any; colors and turns are random.

    words: letter indices [W, 3]. changing: the share of the clips whose letters are replaced now and then, the share whose word becomes
    another, and the share whose ink fades, frame by frame; a third of it stands still now and then."""
    fresh, same = _integers(4, (count, FRAMES - 1), generator), _chance(stay, (count, FRAMES - 1), generator)
    since = torch.arange(FRAMES - 1).expand(count, -1).masked_fill(same, 0).cummax(1).values
    moves = fresh.gather(1, since)
    places = paths(moves, torch.rand(count, 2, generator=generator))
    halting = _chance(changing / 3, (count, 1), generator) & _chance(0.4, (count, FRAMES - 1), generator)
    done = torch.cat([torch.zeros(count, 1, dtype=torch.long), (~halting).long().cumsum(1)], 1)  # moves before a frame
    places = places.gather(1, done[..., None].expand(-1, -1, 2))
    actions = moves.gather(1, done[:, :-1].clamp(max=FRAMES - 2)).masked_fill(halting, STILL)

    replaced = _chance(changing, (count, 1, 1), generator) & _chance(0.15, (count, FRAMES, 3), generator)
    first, last = (words[_integers(len(words), (count,), generator)][:, None].expand(-1, FRAMES, -1) for _ in "01")
    first = torch.where(replaced, _integers(len(LETTERS), (count, FRAMES, 3), generator), first)
    begin, end = (palette(INKS)[_integers(len(INKS), (count,), generator)] for _ in "01")
    inks = ink_of_frames(begin, end)
    papers = palette(PAPERS)[_integers(len(PAPERS), (count,), generator)][:, None].expand(-1, FRAMES, -1)
    fading = _chance(changing, (count, 1, 1), generator) * torch.rand(count, FRAMES, 1, generator=generator)
    inks = torch.lerp(inks, papers, 0.75 * fading)
    shown, other = (_draw_frames(letters, inks, papers, places) for letters in (first, last))
    becoming = _chance(changing, (count, 1), generator) * torch.linspace(0, 1, FRAMES)
    return Walks(torch.lerp(shown, other, becoming[..., None, None, None]), actions)


def held_out_walks(count: int) -> Walks:
    """The clips that the first held-out prompts ask for."""
    scenes = [parse_prompt(record["prompt"]) for record in held_out_prompts()[:count]]
    names = list(DIRECTIONS)
    return Walks(render(scenes), torch.tensor([[names.index(action) for action in scene.actions] for scene in scenes]))


def _draw_frames(letters: Tensor, inks: Tensor, papers: Tensor, places: Tensor) -> Tensor:
    """As `draw`, with letters [N, F, 3] and papers [N, F, 3] of each frame."""
    each = (letters.flatten(0, 1), inks.flatten(0, 1)[:, None], papers.flatten(0, 1), places.flatten(0, 1)[:, None])
    return draw(*each).unflatten(0, letters.shape[:2])[:, :, 0]


def _integers(high: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(high, tuple(size), generator=generator)


def _chance(probability: float, size: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(tuple(size), generator=generator) < probability


def grain(clips: Tensor, generator: torch.Generator) -> Tensor:
    """White noise of a deviation of up to 0.25."""
    level = 0.25 * torch.rand(len(clips), 1, 1, 1, 1, generator=generator)
    return clips + level * torch.randn(clips.shape, generator=generator)


def blur(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Partly the mean of 3x3 pixels."""
    smooth = avg_pool2d(clips.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(clips)
    return torch.lerp(clips, smooth, torch.rand(len(clips), 1, 1, 1, 1, generator=generator))


def tint(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Other colors: each channel by a gain and a shift of its own."""
    gain = 0.5 + torch.rand(len(clips), 1, 3, 1, 1, generator=generator)
    return clips * gain + 0.15 * torch.randn(len(clips), 1, 3, 1, 1, generator=generator)


def exposure(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame brighter or darker."""
    return clips + 0.1 * torch.randn(*clips.shape[:2], 1, 1, 1, generator=generator)


def patches(clips: Tensor, generator: torch.Generator) -> Tensor:
    """In a third of the frames a plain rectangle of any color."""
    count, frames, _, height, width = clips.shape
    inside = _chance(1 / 3, (count, frames, 1, 1, 1), generator)
    for axis, size in ((3, height), (4, width)):
        shape = [size if place == axis else 1 for place in range(5)]
        begin = _integers(size, (count, frames, 1, 1, 1), generator)
        pixel = torch.arange(size).view(shape)
        inside = inside & (pixel >= begin) & (pixel < begin + size // 3)
    return torch.where(inside, torch.rand(count, frames, 3, 1, 1, generator=generator), clips)


def blobs(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Smooth noise of a deviation of up to 0.2: 8x16 numbers a frame, as wide as what one latent paints."""
    count, frames, channels, height, width = clips.shape
    noise = torch.randn(count * frames, channels, height // 4, width // 4, generator=generator)
    level = 0.3 * torch.rand(count, 1, 1, 1, 1, generator=generator)
    return clips + level * interpolate(noise, (height, width), mode="bilinear").view_as(clips)


def coarse(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Partly in half the resolution."""
    half = interpolate(avg_pool2d(clips.flatten(0, 1), 2), scale_factor=2.0, mode="bilinear").view_as(clips)
    return torch.lerp(clips, half, torch.rand(len(clips), 1, 1, 1, 1, generator=generator))


def crossfade(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Up to a third of the frame before in each."""
    weight = torch.rand(len(clips), 1, 1, 1, 1, generator=generator) / 3
    return torch.lerp(clips, torch.cat([clips[:, :1], clips[:, :-1]], 1), weight)


@torch.no_grad()
def reconstructed(walks: Walks, vae: AutoencoderKLWan, generator: torch.Generator) -> Walks:
    """Walks as the pipeline's VAE decodes them, with noise of up to 0.7 deviations in their latents: smeared as generated clips are."""
    parts = []
    for clips in walks.clips.split(32):
        latents = encode_clips(vae, clips)
        level = 0.7 * torch.rand(len(clips), 1, 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator) * latents.std((0, 2, 3, 4), keepdim=True)
        parts.append(vae.decode(latents + level * noise).sample.transpose(1, 2) / 2 + 0.5)
    return Walks(torch.cat(parts).clamp(0, 1), walks.actions)


@dataclass(frozen=True)
class Law:
    """Which clips a model is trained on: see `sample_walks`. Half of them are `reconstructed`; each degradation is of half of them."""

    seed: int
    stay: float
    degradations: tuple[Degradation, ...]
    batch: int
    steps: int
    rate: float

    def walk(self, count: int, words: Tensor, generator: torch.Generator) -> Walks:
        """Before any degradation."""
        return sample_walks(count, words, self.stay, generator)

    def degrade(self, walks: Walks, generator: torch.Generator) -> Walks:
        """By some of the degradations."""
        clips = walks.clips
        for degradation in self.degradations:
            chosen = _chance(0.5, (len(clips), 1, 1, 1, 1), generator)
            clips = torch.where(chosen, degradation(clips, generator), clips)
        return Walks(clips.clamp(0, 1), walks.actions)


LAWS: Final[dict[Weights, Law]] = {
    "reward": Law(1, 0.25, (blur, tint, exposure, patches, grain), batch=24, steps=1200, rate=3e-3),
    "held_out": Law(2, 0.6, (coarse, crossfade, tint, blobs), batch=12, steps=1200, rate=3e-3),
}


def train(weights: Weights, vae: AutoencoderKLWan, progress: Callable[[int, float], None]) -> nn.Module:
    """The network of one law, by cross entropy. Where a word stands still, no direction is more probable than another.

    vae: of the pipeline; RECONSTRUCTED clips go through it once, since it is slow, and are degraded anew each time."""
    law, words = LAWS[weights], other_words(held_out_prompts)
    once = step_generator(law.seed, 1, 0)
    pool = reconstructed(law.walk(RECONSTRUCTED, words, once), vae, once)
    torch.manual_seed(law.seed)  # initial weights
    network = NETWORKS[weights]()
    optimizer = torch.optim.AdamW(network.parameters(), lr=law.rate, weight_decay=0.01)
    for step in range(law.steps):
        set_rate(optimizer, law.rate, step, law.steps, warmup=50)
        generator = step_generator(law.seed, 0, step)
        fresh, rows = law.walk(law.batch // 2, words, generator), _integers(RECONSTRUCTED, (law.batch // 2,), generator)
        both = Walks(torch.cat([fresh.clips, pool.clips[rows]]), torch.cat([fresh.actions, pool.actions[rows]]))
        walks = law.degrade(both, generator)
        loss = entropy(network(walks.clips), walks.actions)
        train_step(loss, optimizer, clip=1.0)
        progress(step + 1, loss.item())
    return network.eval().requires_grad_(False)


def entropy(logits: Tensor, actions: Tensor) -> Tensor:
    """Mean cross entropy of logits [n, F - 1, 4] against actions [n, F - 1], even over all directions for STILL."""
    even = torch.full((len(DIRECTIONS),), 1 / len(DIRECTIONS))
    wanted = torch.where((actions == STILL)[..., None], even, torch.eye(len(DIRECTIONS))[actions.clamp(min=0)])
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))


@torch.no_grad()
def accuracy(network: nn.Module, walks: Walks) -> float:
    """Share of the actions that are recovered, of those that move."""
    moving = walks.actions != STILL
    found = torch.cat([network(clips).argmax(2) for clips in walks.clips.split(64)])
    return (found == walks.actions)[moving].float().mean().item()


def held_out_words() -> Tensor:
    """[W, 3]"""
    return indexed(record["target"] for record in held_out_prompts())
