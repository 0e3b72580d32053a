"""What a policy takes where a call does not say, and the images that it makes."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

import flowalign as fa
from flowalign.data import PromptRecord
from flowalign.models.base import Sampling, Size
from flowalign.models.sampling import defaults_of

PROMPT = 'the word "KITE" in red on a yellow background'


def test_the_defaults_are_those_of_the_pipelines_own_call(tiny_pipeline: Path, tiny_sd15_pipeline: Path) -> None:
    sd15 = fa.load_policy(str(tiny_sd15_pipeline), trainable="none")
    assert sd15.sampling == Sampling(50, 7.5, Size(24, 48))  # sample_size (12, 24), a VAE that halves
    sd3 = fa.load_policy(str(tiny_pipeline), trainable="none")
    assert sd3.sampling == Sampling(28, 7.0, Size(48, 48))  # sample_size 48, a VAE of one level
    assert fa.load_policy("glyphs", trainable="none").sampling == Sampling(6, 1.0, Size(24, 48))
    said = Sampling(2, 1.0, Size(24, 48))
    assert fa.load_policy(str(tiny_pipeline), trainable="none", sampling=said).sampling == said


def test_a_live_pipeline_has_its_defaults_too() -> None:
    from flowalign.glyphs import LOAD_ARGS, PIPELINE

    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE, **LOAD_ARGS)
    assert fa.load_policy(pipeline, trainable="none").sampling == Sampling(6, 1.0, Size(24, 48))


def test_a_pipeline_without_defaults_has_none(tiny_sd15_pipeline: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15_pipeline, safety_checker=None)
    assert defaults_of(pipeline, {"unet": {}}) is None


def test_generate_makes_the_images_that_an_evaluation_scores(tiny_pipeline: Path) -> None:
    policy = fa.load_policy(str(tiny_pipeline), trainable="none", sampling=Sampling(2, 1.0, Size(24, 48)))
    images = policy.generate([PROMPT, "a word", PROMPT], seed=3)
    assert images.shape == (3, 3, 24, 48) and images.dtype == torch.float32 and not images.requires_grad
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert not torch.equal(images[0], images[2])  # another place, another noise
    result = fa.evaluate(policy, [PROMPT, "a word", PROMPT], [lambda images, prompts: images.mean((1, 2, 3))], seed=3)
    torch.testing.assert_close(result.scores["lambda"], images.double().mean((1, 2, 3)), rtol=0, atol=1e-6)
    assert torch.equal(result.pixels, (images * 255).round().byte())
    assert torch.equal(policy.generate(PROMPT, seed=3), policy.generate([PromptRecord(0, PROMPT)], seed=3))
    torch.testing.assert_close(policy.generate([PROMPT, "a word"], seed=3, batch_size=1), images[:2], rtol=0, atol=1e-5)
    assert policy.generate(PROMPT, size=Size(24, 24), num_inference_steps=1, guidance_scale=2.0).shape == (1, 3, 24, 24)


def test_a_size_that_the_model_cannot_make_is_refused(tiny_pipeline: Path) -> None:
    policy = fa.load_policy(str(tiny_pipeline), trainable="none")
    with pytest.raises(ValueError, match="expected positive multiples of 4"):
        policy.generate(PROMPT, size=Size(25, 48))
