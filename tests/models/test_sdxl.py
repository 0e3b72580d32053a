"""What SDXL does beside the contract of all families: empty negative prompts, the ancestral scheduler, and schedulers that it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models import Sampling, load_policy, path_of
from flowalign.models.checks import check_checkpoint
from flowalign.models.grid import pipeline_latents
from flowalign.models.load import read_pipeline
from flowalign.models.sampling import sample
from flowalign.testing import tiny_pipeline
from tests.helpers.families import Subject, subject


def changed(name: str, folder: Path, file: str, **values: Any) -> Subject:
    """The tiny pipeline with other values in one of its configurations."""
    shutil.copytree(subject(name).folder, folder, dirs_exist_ok=True)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return Subject(name, str(folder))


def sampled(family: Subject, sampling: Sampling, negative_prompt: str) -> tuple[Any, Tensor, Tensor]:
    """The policy, noise, and what the policy makes of it for three prompts."""
    policy = family.policy(trainable="none", sampling=sampling, negative_prompt=negative_prompt)
    noise = torch.randn(3, *policy.latent_shape(sampling.size), generator=torch.Generator().manual_seed(0))
    conditions = policy.encode(family.records(), negative=sampling.guidance_scale > 1, together=True)
    return policy, noise, sample(policy, conditions, noise, sampling.num_inference_steps, sampling.guidance_scale)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("zeros", [True, False])
def test_the_negative_prompt_is_empty_as_in_the_pipelines_call_without_one(zeros: bool, tmp_path: Path) -> None:
    """Zeros where the checkpoint says so, else the encoded ""; the call of the report says the same, and a prompt "" is encoded."""
    family = changed("sdxl", tmp_path / "pipe", "model_index.json", force_zeros_for_empty_prompt=zeros)
    sampling = Sampling(3, 4.0, family.size)
    policy, noise, ours = sampled(family, sampling, "")
    pipeline = family.pipeline(policy.pipeline_setup(), policy)
    call = {
        "prompt": [record.prompt for record in family.records()], "latents": noise, "height": 32, "width": 64,
        "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        default, encoded = (pipeline(**call, **given)[0] for given in ({}, {"negative_prompt": [""] * 3}))
        reported = pipeline_latents(pipeline, policy, family.records(), noise, sampling)
    assert relative(ours, default) <= 1e-6 and torch.equal(reported, default)
    assert (relative(ours, encoded) > 1e-4) == zeros
    (empty,) = policy.encode([replace(family.records()[0], prompt="")]).tensors["embeds"]
    assert float(empty.norm()) > 0


def test_one_call_cannot_have_empty_negative_prompts_beside_others() -> None:
    policy = subject("sdxl").policy(trainable="none", negative_prompt="")
    first, *others = subject("sdxl").records()
    with pytest.raises(ValueError, match='got negative prompts "" beside others'):
        policy.pipeline_inputs([replace(first, negative_prompt="a word"), *others], 4.0, subject("sdxl").size)
    assert policy.pipeline_inputs([first], 4.0, subject("sdxl").size)["negative_prompt"] is None
    assert policy.pipeline_inputs([replace(first, negative_prompt="a word")], 4.0, subject("sdxl").size)[
        "negative_prompt"
    ] == ["a word"]


def test_one_step_is_that_of_the_released_ancestral_scheduler() -> None:
    """Its own call, without the setup; in two steps it adds noise."""
    family = subject("sdxl_turbo")
    for steps, bound in ((1, 1e-6), (2, None)):
        sampling = Sampling(steps, 1.0, family.size)
        policy, noise, ours = sampled(family, sampling, "")
        with torch.no_grad():
            theirs = pipeline_latents(read_pipeline(family.folder), policy, family.records(), noise, sampling)
        assert relative(ours, theirs) <= bound if bound else relative(ours, theirs) > 0.01


def test_the_pipelines_start_is_less_than_the_noise_with_trailing_timesteps_alone() -> None:
    """init_noise_sigma there is √(1-ᾱ)/√ᾱ in place of 1/√ᾱ."""
    for name in ("sdxl", "sdxl_turbo"):
        policy = subject(name).policy(trainable="none")
        kept = 1.0 if name == "sdxl" else float((1 - policy.path.alphas_cumprod[-1]) ** 0.5)
        one = torch.ones(1, dtype=torch.float64)
        assert float(1 / policy.to_pipeline(one)) == pytest.approx(kept, abs=1e-7) and (kept < 0.998) == (kept < 1)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_is_followed(zero_snr: bool, tmp_path: Path) -> None:
    values = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing"}
    family = changed("sdxl", tmp_path / "pipe", "scheduler/scheduler_config.json", **values)
    sampling = Sampling(4, 4.0, family.size)
    policy, noise, ours = sampled(family, sampling, "a word")
    with torch.no_grad():
        theirs = pipeline_latents(
            family.pipeline(policy.pipeline_setup(), policy), policy, family.records(), noise, sampling
        )
    assert relative(ours, theirs) <= (1e-4 if zero_snr else 2e-6)  # Euler's states are 4096 times as large there


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True; expected False"),
        ({"interpolation_type": "log_linear"}, "interpolation_type=log_linear; expected linear"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type=sigma_min; expected zero"),
        ({"prediction_type": "sample"}, "prediction_type=sample"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_rollout_would_not_follow_is_refused_before_loading(
    values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    family = changed("sdxl", tmp_path / "pipe", "scheduler/scheduler_config.json", **values)
    check_checkpoint(family.folder)
    with pytest.raises(ValueError, match=said):
        path_of(family.folder)


def test_timesteps_in_between_are_refused(tmp_path: Path) -> None:
    family = changed("sdxl", tmp_path / "pipe", "scheduler/scheduler_config.json", timestep_spacing="linspace")
    policy = family.policy(trainable="none")
    assert policy.sigmas(28, (4, 4, 8)).shape == (29,)  # 999 / 27 is whole
    with pytest.raises(ValueError, match="num_inference_steps=5 with timestep_spacing=linspace"):
        policy.sigmas(5, (4, 4, 8))


def test_a_vae_that_overflows_in_fp16_is_refused() -> None:
    """The pipeline's own call would decode in fp32."""
    pipe = tiny_pipeline("sdxl")
    assert pipe.vae.config.force_upcast
    pipe.vae.to(torch.float16)
    with pytest.raises(ValueError, match=r"got a VAE in fp16 .*expected fp32 or bf16"):
        load_policy(pipe, trainable="none")
    pipe.vae.to(torch.bfloat16)
    load_policy(pipe, trainable="none")
