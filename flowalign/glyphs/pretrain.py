"""Pre-training of the Glyphs pipeline from random weights: first the VAE, then text encoders and transformer together.

The flow model is trained as Stable Diffusion 3 was (rectified flow, Esser et al. 2024, arXiv:2403.03206, section 3): x_s = (1-s) x0 + s e,
target e - x0, s logit-normal. A resumed run gives the same weights as an uninterrupted one (see `flowalign.glyphs.training`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from flowalign.glyphs.parts import TOKENS, build_pipeline
from flowalign.glyphs.progress import Progress
from flowalign.glyphs.prompts import INKS, PAPERS, held_out_prompts, make_prompt
from flowalign.glyphs.renderer import JITTER, draw, palette, spelled
from flowalign.glyphs.training import (
    Pretraining,
    dropped_out,
    noised,
    other_words,
    step_generator,
    train_flow,
    train_vae,
)

TRAINED = ("transformer", "text_encoder", "text_encoder_2")
RECIPE = Pretraining()


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
    train_vae(pipeline.vae, lambda generator: vae_loss(pipeline.vae, recipe, generator), recipe, folder, progress)
    pictures = sample_batch(recipe.statistics, step_generator(recipe.seed, 0, recipe.vae_steps)).pictures
    latents = _encode_pictures(pipeline.vae, pictures)
    pipeline.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    model = nn.ModuleDict({name: pipeline.components[name] for name in TRAINED})
    train_flow(model, lambda _, generator: flow_loss(pipeline, recipe, generator), recipe, folder, progress)
    return pipeline


def sample_batch(count: int, generator: torch.Generator) -> Batch:
    """Uniformly random words that are not held out, colors and offsets."""
    words = other_words(held_out_prompts)
    letters = words[torch.randint(len(words), (count,), generator=generator)]
    ink = torch.randint(len(INKS), (count,), generator=generator)
    paper = torch.randint(len(PAPERS), (count,), generator=generator)
    offsets = torch.randint(-JITTER, JITTER + 1, (count, 2), generator=generator)
    pictures = draw(letters, palette(INKS)[ink], palette(PAPERS)[paper], offsets)
    inks, papers = list(INKS), list(PAPERS)
    prompts = [
        make_prompt(word, inks[i], papers[p])
        for word, i, p in zip(spelled(letters), ink.tolist(), paper.tolist(), strict=True)
    ]
    return Batch(pictures * 2 - 1, prompts)


def vae_loss(vae: AutoencoderKL, recipe: Pretraining, generator: torch.Generator) -> Tensor:
    """Mean absolute error of the reconstruction, of pictures in [-1, 1]; latents stay near the pixels."""
    pictures = sample_batch(recipe.vae_batch_size, generator).pictures
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    anchor = (posterior.mean - pictures).square().mean()
    return (decoded - pictures).abs().mean() + recipe.anchor * anchor + recipe.kl * posterior.kl().mean()


def flow_loss(pipeline: StableDiffusion3Pipeline, recipe: Pretraining, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity on one random batch."""
    batch = sample_batch(recipe.batch_size, generator)
    x0 = scaled_latents(pipeline.vae, batch.pictures)
    tokens, pooled = encode_text(pipeline, dropped_out(batch.prompts, recipe.prompt_dropout, generator))
    states, sigma, target = noised(x0, recipe, generator)
    velocity = pipeline.transformer(states, tokens, pooled, sigma * 1000, return_dict=False)[0]
    return (velocity - target).square().mean()


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
