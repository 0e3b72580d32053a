"""Pre-training of Glyphs-Video from random weights: first the VAE, then text encoder and transformer together, by rectified
flow. A resumed run gives the same weights as an uninterrupted one (see `flowalign.glyphs.training`)."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from flowalign.glyphs.progress import Progress
from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import palette, spelled
from flowalign.glyphs.training import (
    Pretraining,
    dropped_out,
    noised,
    other_words,
    step_generator,
    train_flow,
    train_vae,
)
from flowalign.glyphs.video.parts import CHANNELS, TOKENS, build_pipeline, latent_statistics
from flowalign.glyphs.video.prompts import DIRECTIONS, FRAMES, Scene, held_out_prompts, make_prompt
from flowalign.glyphs.video.renderer import draw, ink_of_frames, paths

LETTERS_FIRST = (
    2000  # steps in which most batches are images: letters are learnt there first, and how they move afterwards
)
MISTOLD_FROM = 3000  # step from which a share of the clips has a caption that tells other directions, as captions from the web may:
MISTOLD = 0.2  # so the base follows an action mostly, and alignment has something to improve
VAE_FRAMES = 5  # of a clip that the VAE is trained on: it sees no further than that anyway
TRAINED = ("transformer", "text_encoder")
RECIPE = Pretraining(
    vae_batch_size=8,
    vae_steps=1500,
    vae_learning_rate=2e-3,
    anchor=0.3,
    statistics=128,
    steps=5000,
    schedule_steps=7000,
)


@dataclass(frozen=True)
class Batch:
    """Scenes drawn at random: clips [N, F, 3, 32, 64] in [0, 1] and their prompts; actions [N, F - 1] as numbers of DIRECTIONS."""

    clips: Tensor
    prompts: list[str]
    actions: Tensor


def pretrain(recipe: Pretraining, folder: Path, progress: Progress) -> WanPipeline:
    """Runs or resumes the recipe with checkpoints in `folder`; returns the pipeline with averaged weights, fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)  # initial weights
    pipeline = build_pipeline()
    train_vae(pipeline.vae, lambda generator: vae_loss(pipeline.vae, recipe, generator), recipe, folder, progress)
    clips = sample_batch(recipe.statistics, step_generator(recipe.seed, 0, recipe.vae_steps)).clips
    latent_statistics(pipeline.vae, encode_clips(pipeline.vae, clips))
    model = nn.ModuleDict({name: pipeline.components[name] for name in TRAINED})
    train_flow(model, lambda step, generator: flow_loss(pipeline, recipe, step, generator), recipe, folder, progress)
    return pipeline


def sample_batch(count: int, generator: torch.Generator, still: bool = False, mistold: float = 0.0) -> Batch:
    """Uniformly random words that are not held out, colors, turns and directions. still: clips of one frame. mistold: the share of
    the clips whose prompts name two directions drawn anew."""
    words = other_words(held_out_prompts)
    letters = words[torch.randint(len(words), (count,), generator=generator)]
    ink, paper, last = (
        torch.randint(len(names), (count,), generator=generator).tolist() for names in (INKS, PAPERS, INKS)
    )
    turns = (torch.rand(count, generator=generator) < 0.5).tolist()
    last = [other if turn else own for other, turn, own in zip(last, turns, ink, strict=True)]
    halves = torch.randint(len(DIRECTIONS), (count, 2), generator=generator)
    inks, papers, names = list(INKS), list(PAPERS), list(DIRECTIONS)
    scenes = [
        Scene(word, inks[i], inks[end], papers[p], names[a], names[b])
        for word, i, end, p, (a, b) in zip(spelled(letters), ink, last, paper, halves.tolist(), strict=True)
    ]
    actions = torch.tensor([[names.index(action) for action in scene.actions] for scene in scenes])
    colors = ink_of_frames(palette(INKS)[ink], palette(INKS)[last])
    places = paths(actions)
    if still:
        colors, places = colors[:, :1], places[:, :1]
    clips = draw(letters, colors, palette(PAPERS)[paper], places)
    if mistold:
        drawn = torch.randint(len(DIRECTIONS), (count, 2), generator=generator).tolist()
        wrong = (torch.rand(count, generator=generator) < mistold).tolist()
        scenes = [
            scene._replace(first=names[a], second=names[b]) if other else scene
            for scene, (a, b), other in zip(scenes, drawn, wrong, strict=True)
        ]
    return Batch(clips, [make_prompt(scene) for scene in scenes], actions)


def vae_loss(vae: AutoencoderKLWan, recipe: Pretraining, generator: torch.Generator) -> Tensor:
    """Mean absolute and squared error of the reconstruction, of parts of clips in [-1, 1], and a little KL."""
    clips = sample_batch(recipe.vae_batch_size, generator).clips.transpose(1, 2) * 2 - 1
    first = int(torch.randint(FRAMES - VAE_FRAMES + 1, (), generator=generator))
    clips = clips[:, :, first : first + VAE_FRAMES]
    posterior = vae.encode(clips).latent_dist
    error = decoded(vae, posterior.sample(generator)) - clips
    anchor = (posterior.mean - principal_components(clips)).square().mean()
    return error.abs().mean() + error.square().mean() + recipe.anchor * anchor + recipe.kl * posterior.kl().mean()


def principal_components(clips: Tensor) -> Tensor:
    """What latents are drawn towards, without which encoder and decoder find each other slowly: [N, CHANNELS, F', h, w], the
    coefficients of each block of 4x4 pixels and two frames (of the first frame, itself twice) of clips [N, 3, F, H, W]."""
    mean, basis = components()
    return torch.einsum("nbfhw,cb->ncfhw", _blocks(clips) - mean[:, None, None, None], basis)


@cache
def components() -> tuple[Tensor, Tensor]:
    """(mean [96], basis [CHANNELS, 96]) of the blocks of some clips; each coefficient has variance 1."""
    blocks = _blocks(sample_batch(64, torch.Generator().manual_seed(0)).clips.transpose(1, 2) * 2 - 1)
    rows = blocks.transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    values, vectors = torch.linalg.eigh((rows - mean[:, None]) @ (rows - mean[:, None]).T / rows.shape[1])
    return mean, (vectors / values.sqrt())[:, -CHANNELS:].T.flip(0)


def _blocks(clips: Tensor) -> Tensor:
    """[N, 96, F', h, w] of clips [N, 3, F, H, W]."""
    pairs = torch.cat([clips[:, :, :1], clips], 2)
    count, colors, frames, height, width = pairs.shape
    parts = pairs.reshape(count, colors, frames // 2, 2, height // 4, 4, width // 4, 4)
    return parts.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(count, -1, frames // 2, height // 4, width // 4)


def decoded(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """What `vae.decode` gives, before it is clamped: papers are saturated, and a clamped pixel would have no gradient."""
    vae.clear_cache()
    frames = vae.post_quant_conv(latents).split(1, dim=2)
    chunks = []
    for number, frame in enumerate(frames):
        vae._conv_idx = [0]
        chunks.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=number == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), vae.config.patch_size)


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """The VAE's own latents [N, C, F', h, w] of clips [N, F, 3, H, W] in [0, 1]."""
    latents: Tensor = vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode()
    return latents


def scaled_latents(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Latents as the transformer sees them."""
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (encode_clips(vae, clips) - mean) / std


def flow_loss(pipeline: WanPipeline, recipe: Pretraining, step: int, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity on one random batch of clips, or of twice as many images: three of four batches until
    LETTERS_FIRST, one of five afterwards. Wan was trained on both, too."""
    if torch.rand((), generator=generator) < (0.75 if step < LETTERS_FIRST else 0.2):
        batch = sample_batch(2 * recipe.batch_size, generator, still=True)
    else:
        batch = sample_batch(recipe.batch_size, generator, mistold=MISTOLD if step >= MISTOLD_FROM else 0.0)
    x0 = scaled_latents(pipeline.vae, batch.clips)
    texts = encode_text(pipeline, dropped_out(batch.prompts, recipe.prompt_dropout, generator))
    states, sigma, target = noised(x0, recipe, generator)
    velocity: Tensor = pipeline.transformer(states, sigma * 1000, texts, return_dict=False)[0]
    return (velocity - target).square().mean()


def encode_text(pipeline: WanPipeline, prompts: list[str]) -> Tensor:
    """What `WanPipeline.encode_prompt` gives with max_sequence_length=TOKENS, but with gradients: [N, TOKENS, 64], 0 after the end."""
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt")
    embeds: Tensor = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return embeds * tokens.attention_mask[..., None]


@torch.no_grad()
def vae_error(pipeline: WanPipeline) -> float:
    """Mean absolute reconstruction error of the VAE, for clips in [-1, 1]."""
    clips = sample_batch(64, torch.Generator().manual_seed(0)).clips
    found = pipeline.vae.decode(encode_clips(pipeline.vae, clips)).sample.transpose(1, 2)
    return (found - (clips * 2 - 1)).abs().mean().item()
