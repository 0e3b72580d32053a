"""What a policy takes where a call does not say, and the images that it makes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

import flowalign as fa
from flowalign.data import PromptRecord
from flowalign.models.base import Sampling, Size
from flowalign.models.sampling import defaults_of, sample
from flowalign.testing import tiny_pipeline as random_pipeline
from samplers import DPMSolver2M, Kernel, UniPC, normal

PROMPT = 'the word "KITE" in red on a yellow background'


def test_the_defaults_are_those_of_the_pipelines_own_call(tiny_pipeline: Path, tiny_sd15_pipeline: Path) -> None:
    sd15 = fa.load_policy(str(tiny_sd15_pipeline), trainable="none")
    assert sd15.sampling == Sampling(50, 7.5, Size(24, 48))  # sample_size (12, 24), a VAE that halves
    sd3 = fa.load_policy(str(tiny_pipeline), trainable="none")
    assert sd3.sampling == Sampling(28, 7.0, Size(48, 48))  # sample_size 48, a VAE of one level
    assert fa.load_policy("glyphs", trainable="none").sampling == Sampling(6, 1.0, Size(24, 48))
    said = Sampling(2, 1.0, Size(24, 48))
    assert fa.load_policy(str(tiny_pipeline), trainable="none", sampling=said).sampling == said


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [("flux1_dev", 28, 3.5), ("flux1_schnell", 4, 1.0), ("sdxl_turbo", 4, 1.0),
     ("flux2_klein", 4, 1.0), ("flux2_klein_base", 50, 4.0)],
)  # fmt: skip
def test_a_distilled_checkpoint_defaults_to_its_few_steps(name: str, steps: int, guidance: float) -> None:
    """Its pipeline's signature is that of the base model."""
    sampling = fa.load_policy(random_pipeline(name), trainable="none").sampling
    assert sampling is not None and (sampling.num_inference_steps, sampling.guidance_scale) == (steps, guidance)


def test_a_live_pipeline_has_its_defaults_too() -> None:
    from flowalign.glyphs import LOAD_ARGS, PIPELINE

    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE, **LOAD_ARGS)
    assert fa.load_policy(pipeline, trainable="none").sampling == Sampling(6, 1.0, Size(24, 48))


def test_a_pipeline_without_defaults_has_none(tiny_sd15_pipeline: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15_pipeline, safety_checker=None)
    assert defaults_of(pipeline, {"unet": {}}) is None


@pytest.mark.parametrize(
    ("kernel", "scheduler"),
    [(UniPC(), UniPCMultistepScheduler), (DPMSolver2M(), DPMSolverMultistepScheduler)],
    ids=["unipc", "dpm"],
)
def test_a_family_with_a_multistep_solver_samples_as_its_scheduler(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel, scheduler: Any
) -> None:
    """A family returns the kernel from `solver` and the scheduler's own levels from `sigmas`: difference 0."""
    steps = scheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    steps.set_timesteps(5)
    policy: Any = fa.load_policy(str(tiny_pipeline), trainable="none")
    monkeypatch.setattr(policy.model, "solver", lambda: kernel)
    monkeypatch.setattr(policy.model, "sigmas", lambda count, shape: steps.sigmas)
    x = noise = normal((2, *policy.latent_shape(Size(24, 48))), 0, "start")
    conditions = policy.encode([PromptRecord(0, PROMPT), PromptRecord(1, "a word")])
    with torch.no_grad():
        for sigma, timestep in zip(steps.sigmas, steps.timesteps, strict=False):
            x = steps.step(policy.velocity(x, sigma.expand(2), conditions), timestep, x).prev_sample
    assert torch.equal(sample(policy, conditions, noise, 5, 1.0), x)


def test_generate_makes_the_images_that_an_evaluation_scores(tiny_pipeline: Path) -> None:
    policy = fa.load_policy(str(tiny_pipeline), trainable="none", sampling=Sampling(2, 1.0, Size(24, 48)))
    images = policy.generate([PROMPT, "a word", PROMPT], seed=3)
    pixels = images.pixels
    assert pixels.shape == (3, 3, 24, 48) and pixels.dtype == torch.float32 and not pixels.requires_grad
    assert images.prompts == [PROMPT, "a word", PROMPT] and images.fps is None
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert not torch.equal(pixels[0], pixels[2])  # another place, another noise
    result = fa.evaluate(policy, [PROMPT, "a word", PROMPT], [lambda images, prompts: images.mean((1, 2, 3))], seed=3)
    torch.testing.assert_close(result.scores["lambda"], pixels.double().mean((1, 2, 3)), rtol=0, atol=1e-6)
    assert torch.equal(result.pixels, (pixels * 255).round().byte())
    alone, record = policy.generate(PROMPT, seed=3), policy.generate([PromptRecord(0, PROMPT)], seed=3)
    assert torch.equal(alone.pixels, record.pixels)
    one_by_one = policy.generate([PROMPT, "a word"], seed=3, batch_size=1)
    torch.testing.assert_close(one_by_one.pixels, pixels[:2], rtol=0, atol=1e-5)
    small = policy.generate(PROMPT, size=Size(24, 24), num_inference_steps=1, guidance_scale=2.0)
    assert small.pixels.shape == (1, 3, 24, 24)


def test_noise_takes_the_place_of_the_keyed_one(tiny_pipeline: Path) -> None:
    """So an optimized noise can be run with any number of steps; batches see their own rows."""
    policy = fa.load_policy(str(tiny_pipeline), trainable="none", sampling=Sampling(2, 1.0, Size(24, 48)))
    shape, prompts = policy.latent_shape(Size(24, 48)), [PROMPT, "a word", "a fox"]
    noise = torch.stack([normal(shape, 3, "start", "evaluate", place, 0) for place in range(3)])
    for steps in (2, 3):
        keyed = policy.generate(prompts, seed=3, batch_size=2, num_inference_steps=steps).pixels
        given = policy.generate(prompts, seed=4, batch_size=2, num_inference_steps=steps, noise=noise).pixels
        assert torch.equal(given, keyed)
    assert not torch.equal(policy.generate(prompts, batch_size=2, noise=-noise).pixels, given)
    with pytest.raises(
        ValueError, match=re.escape(f"got noise of shape {tuple(shape)}; expected {(3, *shape)}: a start")
    ):
        policy.generate(prompts, noise=noise[0])
    with pytest.raises(ValueError, match=r"got no prompts; expected at least one"):
        policy.generate([])


def test_a_size_that_the_model_cannot_make_is_refused(tiny_pipeline: Path) -> None:
    policy = fa.load_policy(str(tiny_pipeline), trainable="none")
    with pytest.raises(ValueError, match="expected positive multiples of 4"):
        policy.generate(PROMPT, size=Size(25, 48))
