"""Pre-training of the Glyphs pipeline from random weights: first the VAE, then text encoders and transformer together.

The flow model is trained as Stable Diffusion 3 was (rectified flow, Esser et al. 2024, arXiv:2403.03206, section 3):
x_s = (1-s) x0 + s e, target e - x0, s logit-normal. All randomness of a step is keyed by (seed, stage, step), so a
resumed run gives the same weights as an uninterrupted one on one machine with one number of threads.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowalign.glyphs.parts import TOKENS, build_pipeline
from flowalign.glyphs.progress import Progress
from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS, WORD_LENGTH, held_out_prompts, make_prompt
from flowalign.glyphs.renderer import JITTER, draw
from flowalign.glyphs.schedule import set_rate

TRAINED = ("transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Pretraining:
    """The recipe. The defaults made the shipped pipeline."""

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


@dataclass(frozen=True)
class Batch:
    """Scenes drawn at random: pictures [N, 3, 24, 48] in [-1, 1] and their prompts."""

    pictures: Tensor
    prompts: list[str]


def pretrain(recipe: Pretraining, folder: Path, progress: Progress) -> StableDiffusion3Pipeline:
    """Runs or resumes the recipe with checkpoints in `folder`; returns the pipeline with averaged weights, fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)  # initial weights
    pipeline = build_pipeline()
    train_vae(pipeline.vae, recipe, folder, progress)
    train_flow(pipeline, recipe, folder, progress)
    return pipeline


def sample_batch(count: int, generator: torch.Generator) -> Batch:
    """Uniformly random words that are not held out, colors and offsets."""
    codes = _allowed_codes()
    code = codes[torch.randint(len(codes), (count,), generator=generator)]
    letters = torch.stack([code // 26**place % 26 for place in range(WORD_LENGTH)], dim=1)
    ink = torch.randint(len(INKS), (count,), generator=generator)
    paper = torch.randint(len(PAPERS), (count,), generator=generator)
    offsets = torch.randint(-JITTER, JITTER + 1, (count, 2), generator=generator)
    pictures = draw(letters, _palette(INKS)[ink], _palette(PAPERS)[paper], offsets)
    inks, papers = list(INKS), list(PAPERS)
    prompts = [
        make_prompt("".join(LETTERS[letter] for letter in word), inks[i], papers[p])
        for word, i, p in zip(letters.tolist(), ink.tolist(), paper.tolist(), strict=True)
    ]
    return Batch(pictures * 2 - 1, prompts)


def train_vae(vae: AutoencoderKL, recipe: Pretraining, folder: Path, progress: Progress) -> None:
    """Trains the VAE in place, then sets scaling and shift so that its latents have mean 0 and variance 1."""
    saved = folder / "vae.safetensors"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_learning_rate, weight_decay=0.0, fused=True)
    first = load_training(saved, vae, None, optimizer, recipe.vae_steps)
    for step in range(first, recipe.vae_steps):
        set_rate(optimizer, recipe.vae_learning_rate, step, recipe.vae_steps, recipe.warmup)
        generator = _generator(recipe.seed, 0, step)
        pictures = sample_batch(recipe.vae_batch_size, generator).pictures
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        reconstruction = (decoded - pictures).abs().mean()
        anchor = (posterior.mean - pictures).square().mean()
        loss = reconstruction + recipe.anchor * anchor + recipe.kl * posterior.kl().mean()
        train_step(loss, optimizer, recipe.clip)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.vae_steps:
            save_training(saved, step + 1, vae, None, optimizer)
        progress("vae", step + 1, reconstruction.item())
    vae.requires_grad_(False)
    latents = _encode_pictures(
        vae, sample_batch(recipe.statistics, _generator(recipe.seed, 0, recipe.vae_steps)).pictures
    )
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train_flow(pipeline: StableDiffusion3Pipeline, recipe: Pretraining, folder: Path, progress: Progress) -> None:
    """Trains transformer and text encoders in place; on return they hold the averaged weights."""
    saved = folder / "flow.safetensors"
    model = nn.ModuleDict({name: pipeline.components[name] for name in TRAINED})
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    first = load_training(saved, model, average, optimizer, recipe.steps)
    for step in range(first, recipe.steps):
        set_rate(optimizer, recipe.learning_rate, step, recipe.schedule_steps, recipe.warmup)
        loss = flow_loss(pipeline, recipe, _generator(recipe.seed, 1, step))
        train_step(loss, optimizer, recipe.clip)
        decay = min(recipe.ema, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            save_training(saved, step + 1, model, average, optimizer)
        progress("flow", step + 1, loss.item())
    model.load_state_dict(average, strict=False)  # buffers are constants


def flow_loss(pipeline: StableDiffusion3Pipeline, recipe: Pretraining, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity on one random batch."""
    batch = sample_batch(recipe.batch_size, generator)
    x0 = scaled_latents(pipeline.vae, batch.pictures)
    dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.prompt_dropout
    prompts = ["" if drop else prompt for drop, prompt in zip(dropped.tolist(), batch.prompts, strict=True)]
    tokens, pooled = encode_text(pipeline, prompts)
    sigma = (torch.randn(recipe.batch_size, generator=generator) + recipe.sigma_logit).sigmoid()
    noise = torch.randn(x0.shape, generator=generator)
    noised = torch.lerp(x0, noise, sigma[:, None, None, None])
    velocity = pipeline.transformer(noised, tokens, pooled, sigma * 1000, return_dict=False)[0]
    return (velocity - (noise - x0)).square().mean()


def encode_text(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` gives with max_sequence_length=0, but with gradients.

    Token features [N, 16, 128] and pooled features [N, 128].
    """
    tokens, pooled = [], []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        encoded = encoder(ids, output_hidden_states=True)
        tokens.append(encoded.hidden_states[-2])
        pooled.append(encoded.text_embeds)
    return torch.cat(tokens, dim=-1), torch.cat(pooled, dim=-1)


@torch.no_grad()
def vae_error(pipeline: StableDiffusion3Pipeline) -> float:
    """Mean absolute reconstruction error of the VAE, for pictures in [-1, 1]."""
    pictures = sample_batch(512, torch.Generator().manual_seed(0)).pictures
    return (pipeline.vae.decode(_encode_pictures(pipeline.vae, pictures)).sample - pictures).abs().mean().item()


@torch.no_grad()
def _encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    return vae.encode(pictures).latent_dist.mode()


def scaled_latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    return (_encode_pictures(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor


@cache
def _allowed_codes() -> Tensor:
    """Every word that is not held out, as its number in base 26, first letter least significant."""
    codes = torch.ones(26**WORD_LENGTH, dtype=torch.bool)
    for record in held_out_prompts():
        codes[sum(LETTERS.index(letter) * 26**place for place, letter in enumerate(record["target"]))] = False
    return codes.nonzero().squeeze(1)


def _palette(colors: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(colors.values()), dtype=torch.float32) / 255


def _generator(seed: int, stage: int, step: int) -> torch.Generator:
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
