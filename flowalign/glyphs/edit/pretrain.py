"""Pre-training of Glyphs-Edit from random weights: first the VAE, then text encoders and transformer together, by rectified flow
beside the source's latents. A resumed run gives the same weights as an uninterrupted one (see `flowalign.glyphs.training`)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle
from transformers import CLIPTokenizer, T5Tokenizer

from flowalign.glyphs.edit.parts import TOKENS, build_pipeline
from flowalign.glyphs.edit.prompts import Axis, Edit, draw_edits
from flowalign.glyphs.progress import Progress
from flowalign.glyphs.prompts import INKS, PAPERS, Scene
from flowalign.glyphs.prompts import held_out_prompts as held_out_scenes
from flowalign.glyphs.renderer import JITTER, spelled
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
RECIPE = Pretraining(vae_batch_size=32, vae_steps=1000, vae_learning_rate=2e-3, anchor=0.1, steps=3000)
DRAWN: tuple[Axis, ...] = ("ink", "paper", "word", "word", "word", "word")  # colors are learnt soon, letters slowly
GUIDANCE = (1.0, 4.0)  # scales that are drawn: the network learns that they mean nothing


@dataclass(frozen=True)
class Batch:
    """Edits drawn at random: sources and results [N, 3, 24, 48] in [0, 1]."""

    edits: list[Edit]
    sources: Tensor
    results: Tensor

    @property
    def prompts(self) -> list[str]:
        return [edit.instruction for edit in self.edits]


def pretrain(recipe: Pretraining, folder: Path, progress: Progress) -> FluxKontextPipeline:
    """Runs or resumes the recipe with checkpoints in `folder`; returns the pipeline with averaged weights, fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)  # initial weights
    pipeline = build_pipeline()
    train_vae(pipeline.vae, lambda generator: vae_loss(pipeline.vae, recipe, generator), recipe, folder, progress)
    pictures = sample_batch(recipe.statistics, step_generator(recipe.seed, 0, recipe.vae_steps)).sources
    latents = encode_pictures(pipeline.vae, pictures)
    pipeline.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    model = nn.ModuleDict({name: pipeline.components[name] for name in TRAINED})
    train_flow(model, lambda _, generator: flow_loss(pipeline, recipe, generator), recipe, folder, progress)
    return pipeline


def sample_batch(count: int, generator: torch.Generator) -> Batch:
    """Uniformly random scenes of words that are not held out, each with one thing changed."""
    words, inks, papers = other_words(held_out_scenes), list(INKS), list(PAPERS)

    def draw(below: int) -> list[int]:
        numbers: list[int] = torch.randint(below, (count,), generator=generator).tolist()
        return numbers

    old, new = spelled(words[draw(len(words))]), spelled(words[draw(len(words))])
    edits = []
    for word, other, ink, paper, axis, shift in zip(
        old, new, draw(len(inks)), draw(len(papers)), draw(len(DRAWN)), draw(3), strict=True
    ):
        source = Scene(word, inks[ink], papers[paper])
        target = {"ink": inks[(ink + 1 + shift) % 4], "paper": papers[(paper + 1 + shift) % 4], "word": other}
        edits.append(Edit(source, DRAWN[axis], target[DRAWN[axis]]))
    offsets = torch.randint(-JITTER, JITTER + 1, (count, 2), generator=generator)
    sources, results = draw_edits(edits, offsets)
    return Batch(edits, sources, results)


def vae_loss(vae: AutoencoderKL, recipe: Pretraining, generator: torch.Generator) -> Tensor:
    """Mean absolute error of the reconstruction, of pictures in [-1, 1]; latents stay near the pixels."""
    pictures = sample_batch(recipe.vae_batch_size, generator).sources * 2 - 1
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    anchor = (posterior.mean - pixel_unshuffle(pictures, 2)).square().mean()
    return (decoded - pictures).abs().mean() + recipe.anchor * anchor + recipe.kl * posterior.kl().mean()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The VAE's own latents [N, 12, 12, 24] of pictures [N, 3, 24, 48] in [0, 1]."""
    latents: Tensor = vae.encode(pictures * 2 - 1).latent_dist.mode()
    return latents


def flow_loss(pipeline: FluxKontextPipeline, recipe: Pretraining, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity on one random batch."""
    batch, vae = sample_batch(recipe.batch_size, generator), pipeline.vae
    source, x0 = (
        (encode_pictures(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
        for pictures in (batch.sources, batch.results)
    )
    tokens, pooled = encode_text(pipeline, dropped_out(batch.prompts, recipe.prompt_dropout, generator))
    states, sigma, target = noised(x0, recipe, generator)
    low, high = GUIDANCE
    guidance = low + (high - low) * torch.rand(len(x0), generator=generator)
    height, width = x0.shape[-2:]
    places = [pipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32) for _ in range(2)]
    places[1][..., 0] = 1
    hidden = [pipeline._pack_latents(latents, *latents.shape) for latents in (states, source)]
    packed: Tensor = pipeline.transformer(
        hidden_states=torch.cat(hidden, 1), timestep=sigma, guidance=guidance,
        pooled_projections=pooled, encoder_hidden_states=tokens, txt_ids=torch.zeros(TOKENS, 3), img_ids=torch.cat(places),
        return_dict=False,
    )[0]  # fmt: skip
    aim = pipeline._pack_latents(target, *target.shape)
    return (packed[:, : aim.shape[1]] - aim).square().mean()


def encode_text(pipeline: FluxKontextPipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What `FluxKontextPipeline.encode_prompt` gives with max_sequence_length=TOKENS, but with gradients: tokens [N, TOKENS, 64] and
    pooled features [N, 32]."""

    def ids(tokenizer: CLIPTokenizer | T5Tokenizer) -> Tensor:
        found: Tensor = tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        return found

    tokens: Tensor = pipeline.text_encoder_2(ids(pipeline.tokenizer_2))[0]
    pooled: Tensor = pipeline.text_encoder(ids(pipeline.tokenizer)).pooler_output
    return tokens, pooled


@torch.no_grad()
def vae_error(pipeline: FluxKontextPipeline) -> float:
    """Mean absolute reconstruction error of the VAE, for pictures in [-1, 1]."""
    pictures = sample_batch(512, torch.Generator().manual_seed(0)).sources
    decoded = pipeline.vae.decode(encode_pictures(pipeline.vae, pictures)).sample
    return (decoded - (pictures * 2 - 1)).abs().mean().item()
