"""The shipped folders of the worlds are small and load; that of Glyphs spells some of the unseen words."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, StableDiffusion3Pipeline, WanPipeline

from flowalign.glyphs import CALL_ARGS, LOAD_ARGS, PIPELINE, edit, held_out_prompts, video
from flowalign.glyphs.judge import judge, sample_pictures
from flowalign.glyphs.pretrain import encode_text
from flowalign.glyphs.renderer import render


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(PIPELINE, **LOAD_ARGS)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize(
    ("folder", "kind", "load_args"),
    [
        (PIPELINE, StableDiffusion3Pipeline, LOAD_ARGS),
        (edit.PIPELINE, FluxKontextPipeline, {}),
        (video.PIPELINE, WanPipeline, {}),
    ],
    ids=["images", "edits", "clips"],
)
def test_folders_are_small_hold_no_pickle_and_load_in_fp32_without_being_asked(
    folder: Path, kind: type[DiffusionPipeline], load_args: dict[str, None]
) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    parts = [
        part
        for part in kind.from_pretrained(folder, **load_args).components.values()
        if isinstance(part, torch.nn.Module)
    ]
    assert len(parts) >= 3 and {part.dtype for part in parts} == {torch.float32}


@pytest.mark.parametrize(("scale", "low", "high"), [(1.0, 0.2, 0.45), (3.0, 0.42, 0.72)])
def test_base_reads_some_words_not_all_and_its_colors_are_right(
    pipeline: StableDiffusion3Pipeline, scale: float, low: float, high: float
) -> None:
    records = held_out_prompts()[:64]
    figures = judge(sample_pictures(pipeline, [record["prompt"] for record in records], 6, scale), records)
    assert low <= figures.exact <= high  # 31.6 and 59.4 % on 256; the standard error of 64 is 6 %
    assert figures.colors >= 0.9


def test_guidance_and_a_single_prompt_work(pipeline: StableDiffusion3Pipeline) -> None:
    prompt = held_out_prompts()[0]["prompt"]
    latents = torch.randn(1, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    pictures = [
        pipeline(prompt, num_inference_steps=2, guidance_scale=scale, latents=latents, output_type="pt", **CALL_ARGS)
        for scale in (1.0, 3.0)
    ]
    assert pictures[0].images.shape == (1, 3, 24, 48)
    assert not torch.equal(pictures[0].images, pictures[1].images)


def test_text_features_keep_token_identity_and_position(pipeline: StableDiffusion3Pipeline) -> None:
    tokens, _ = encode_text(pipeline, ['the word "ABAB" in red on a white background'])
    letters = tokens[0, 4:8]
    embeddings = [pipeline.text_encoder.text_model.embeddings, pipeline.text_encoder_2.text_model.embeddings]
    places = torch.cat([module.position_embedding.weight[4:8] for module in embeddings], dim=-1)
    torch.testing.assert_close((letters - places)[0], (letters - places)[2])
    assert (letters[0] - letters[2]).norm() > 1


def test_vae_is_near_lossless_with_latents_of_unit_variance(pipeline: StableDiffusion3Pipeline) -> None:
    records = held_out_prompts()[:64]
    pictures = render(*([record[key] for record in records] for key in ("target", "ink", "paper"))) * 2 - 1
    vae = pipeline.vae
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        decoded = vae.decode(latents).sample
    assert (decoded - pictures).abs().mean() <= 0.02
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1
    assert 0.9 < scaled.std() < 1.1
