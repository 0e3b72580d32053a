"""Training of the few-step Glyphs generators: reflow on pairs (start noise, sample) of the base's own guided ODE.

Rectified flow's second round (Liu et al. 2022, arXiv:2209.03003, section 2.2), with guidance in the pairs as InstaFlow
has it (Liu et al. 2023, arXiv:2309.06380, section 3): on the line x_s = (1-s) x0 + s z of a pair the network regresses
z - x0. The lines of pairs cross less than those of independent noise, so few Euler steps follow them. Only the levels
that the generator will step over are trained; with the level 1 alone this is the distillation of one step. All
randomness is keyed by (seed, stage, step), so a resumed training gives the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowalign.glyphs import FEW_STEP_SCHEDULE
from flowalign.glyphs.pretrain import sample_batch
from flowalign.glyphs.progress import Progress
from flowalign.glyphs.schedule import set_rate
from flowalign.glyphs.training import load_training, save_training, train_step
from samplers import generator, normal

Teacher = Callable[[Tensor, Sequence[str]], Tensor]  # start noise [n, *], prompts -> clean latents [n, *]
Student = Callable[[Tensor, Tensor, Sequence[str]], Tensor]  # x [n, *], sigma [n], prompts -> velocity [n, *]


@dataclass(frozen=True)
class FewStepRecipe:
    """The defaults made the shipped generators."""

    seed: int = 0
    pairs: int = 12_288
    shard: int = 64  # pairs made together, a file each
    batch_size: int = 32
    steps: int = 2000  # where training stops
    schedule_steps: int = 3000  # where the cosine ends
    learning_rate: float = 5e-4
    warmup: int = 50
    clip: float = 1.0  # gradient norm
    ema: float = 0.99
    checkpoint_every: int = 100


@dataclass(frozen=True, eq=False)
class Pairs:
    """noise, x0 [N, *]: start noise, and the clean latents to which the teacher takes it under `prompts` [N]."""

    noise: Tensor
    x0: Tensor
    prompts: list[str]


def make_pairs(
    teacher: Teacher, shape: Sequence[int], recipe: FewStepRecipe, folder: Path, progress: Progress
) -> Pairs:
    """The teacher's samples of random scenes whose words are not held out, latents of `shape`. Shards that lie in `folder`
    are read, not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, x0, prompts = [], [], list[str]()
    for number in range(recipe.pairs // recipe.shard):
        scenes = sample_batch(recipe.shard, _generator(recipe.seed, "pairs", number)).prompts
        start = normal((recipe.shard, *shape), recipe.seed, "pairs", number)
        path = folder / f"pairs-{number:04}.safetensors"
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            save_file({"x0": teacher(start, scenes)}, unfinished)
            os.replace(unfinished, path)
        noise.append(start)
        x0.append(load_file(path)["x0"])
        prompts += scenes
        progress("pairs", number + 1, 0.0)
    return Pairs(torch.cat(noise), torch.cat(x0), prompts)


def train_few_step(
    network: nn.Module, velocity: Student, pairs: Pairs, num_inference_steps: int, recipe: FewStepRecipe,
    folder: Path, progress: Progress,
) -> None:  # fmt: skip
    """Trains `network`, which `velocity` calls, to reach x0 in `num_inference_steps` Euler steps; on return it holds the
    averaged weights. Checkpoints lie in `folder`, from which the same call goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    saved, stage = folder / f"steps-{num_inference_steps}.safetensors", f"{num_inference_steps} steps"
    average = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    for step in range(load_training(saved, network, average, optimizer, recipe.steps), recipe.steps):
        set_rate(optimizer, recipe.learning_rate, step, recipe.schedule_steps, recipe.warmup)
        loss = reflow_loss(velocity, pairs, num_inference_steps, recipe, step)
        train_step(loss, optimizer, recipe.clip)
        decay = min(recipe.ema, (1 + step) / (10 + step))
        for name, value in network.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            save_training(saved, step + 1, network, average, optimizer)
        progress(stage, step + 1, loss.item())
    network.load_state_dict(average, strict=False)  # buffers are constants


def reflow_loss(velocity: Student, pairs: Pairs, num_inference_steps: int, recipe: FewStepRecipe, step: int) -> Tensor:
    """Mean of |v(x_s, s) - (z - x0)|^2 over a random batch of pairs, each at a random level of the student's grid."""
    draws = _generator(recipe.seed, f"{num_inference_steps} steps", step)
    rows = torch.randint(len(pairs.prompts), (recipe.batch_size,), generator=draws)
    levels = FEW_STEP_SCHEDULE.sigmas(num_inference_steps, torch.tensor)[:-1]
    sigma = levels[torch.randint(len(levels), (recipe.batch_size,), generator=draws)]
    x0, noise = pairs.x0[rows], pairs.noise[rows]
    x = torch.lerp(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
    return (velocity(x, sigma, [pairs.prompts[row] for row in rows]) - (noise - x0)).square().mean()


def _generator(*key: int | str) -> torch.Generator:
    """torch keeps 32 bits of a seed: a hash of the key."""
    return torch.Generator().manual_seed(int(generator(*key).integers(2**32)))
