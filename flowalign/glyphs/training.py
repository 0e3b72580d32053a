"""What the pre-trainings of the Glyphs worlds share: the recipe, a stage with its checkpoints, and words drawn at random.

All randomness of a step is keyed by (seed, stage, step), so a resumed run gives the same weights as an uninterrupted one on one
machine with one number of threads.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowalign.glyphs.progress import Progress
from flowalign.glyphs.prompts import LETTERS
from flowalign.glyphs.schedule import set_rate


@dataclass(frozen=True)
class Pretraining:
    """The recipe of a world. The defaults made the shipped pipeline of Glyphs."""

    seed: int = 0
    batch_size: int = 32
    vae_batch_size: int = 64
    vae_steps: int = 200
    vae_learning_rate: float = 1e-3
    anchor: float = 1.0  # weight of |mu - pixels|^2: latents stay pictures, so denoising them is as easy
    kl: float = 1e-6
    statistics: int = 1024  # pictures whose latents set scaling and shift
    steps: int = 1100  # where training stops: short of perfect, so that alignment has something to improve
    schedule_steps: int = 4000  # where the cosine ends
    sigma_logit: float = 1.0  # mean; at 0, as in SD3, letters are learnt far later: only high noise asks for them
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm
    prompt_dropout: float = 0.1  # prompts replaced by "", for guidance
    ema: float = 0.98  # a longer mean lags while letters are being learnt
    checkpoint_every: int = 100


Loss = Callable[[torch.Generator], Tensor]


def train_vae(vae: nn.Module, loss: Loss, recipe: Pretraining, folder: Path, progress: Progress) -> None:
    """Trains a VAE in place and freezes it."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_learning_rate, weight_decay=0.0, fused=True)
    saved = folder / "vae.safetensors"
    for step in range(load_training(saved, vae, None, optimizer, recipe.vae_steps), recipe.vae_steps):
        set_rate(optimizer, recipe.vae_learning_rate, step, recipe.vae_steps, recipe.warmup)
        value = loss(step_generator(recipe.seed, 0, step))
        train_step(value, optimizer, recipe.clip)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.vae_steps:
            save_training(saved, step + 1, vae, None, optimizer)
        progress("vae", step + 1, value.item())
    vae.requires_grad_(False)


def train_flow(
    model: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    recipe: Pretraining,
    folder: Path,
    progress: Progress,
) -> None:
    """Trains what `model` holds in place, by the loss of each step; on return it has the averaged weights."""
    saved = folder / "flow.safetensors"
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    for step in range(load_training(saved, model, average, optimizer, recipe.steps), recipe.steps):
        set_rate(optimizer, recipe.learning_rate, step, recipe.schedule_steps, recipe.warmup)
        value = loss(step, step_generator(recipe.seed, 1, step))
        train_step(value, optimizer, recipe.clip)
        decay = min(recipe.ema, (1 + step) / (10 + step))
        for name, weight in model.named_parameters():
            average[name].lerp_(weight.detach(), 1 - decay)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            save_training(saved, step + 1, model, average, optimizer)
        progress("flow", step + 1, value.item())
    model.load_state_dict(average, strict=False)  # buffers are constants


def noised(x0: Tensor, recipe: Pretraining, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_s, s [N], target e - x0) of rectified flow, s logit-normal (arXiv:2403.03206, section 3)."""
    sigma = (torch.randn(len(x0), generator=generator) + recipe.sigma_logit).sigmoid()
    noise = torch.randn(x0.shape, generator=generator)
    level = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - level) * x0 + level * noise, sigma, noise - x0


def dropped_out(prompts: Sequence[str], share: float, generator: torch.Generator) -> list[str]:
    """The prompts, each "" with probability `share`."""
    dropped = torch.rand(len(prompts), generator=generator) < share
    return ["" if drop else prompt for drop, prompt in zip(dropped.tolist(), prompts, strict=True)]


class Targeted(TypedDict):
    """A prompt and the word that it asks for."""

    target: str


@cache
def other_words(held_out_prompts: Callable[[], Sequence[Targeted]]) -> Tensor:
    """Every word of that length that is the target of no held-out prompt, as letter indices [words, letters]."""
    held_out = [record["target"] for record in held_out_prompts()]
    length = len(held_out[0])
    allowed = torch.ones(26**length, dtype=torch.bool)
    for word in held_out:
        allowed[sum(LETTERS.index(letter) * 26**place for place, letter in enumerate(word))] = False
    codes = allowed.nonzero()
    return codes // 26 ** torch.arange(length) % 26


def step_generator(seed: int, stage: int, step: int) -> torch.Generator:
    """One generator per step, so that only the step number must be saved."""
    return torch.Generator().manual_seed((seed << 40) + (stage << 32) + step)


def train_step(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            yield f"optimizer/{index}/{name}", value


def save_training(
    path: Path, step: int, model: nn.Module, average: dict[str, Tensor] | None, optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint atomically."""
    tensors = {"step": torch.tensor(step)}
    tensors |= {f"model/{name}": value for name, value in model.named_parameters()}
    tensors |= {f"average/{name}": value for name, value in (average or {}).items()}
    tensors |= dict(_optimizer_tensors(optimizer))
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished)
    os.replace(unfinished, path)


def load_training(
    path: Path, model: nn.Module, average: dict[str, Tensor] | None, optimizer: torch.optim.Optimizer, steps: int
) -> int:
    """Restores a checkpoint of at most `steps` steps in place; returns the number of its steps, 0 without one."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
        for name, mean in (average or {}).items():
            mean.copy_(tensors[f"average/{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    step = int(tensors["step"])
    if step > steps:
        raise ValueError(f"got {path} with {step} steps; expected at most {steps}: raise the steps or use a new folder")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
