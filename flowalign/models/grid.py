"""The grid that a policy samples on, and the call of its pipeline that makes the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.base import Policy, Sampling
from samplers import Schedule, sigmas_of


def grid(policy: Policy, schedule: Schedule | None, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
    """[T+1] fp32 on the CPU; schedule None: the family's own."""
    return sigmas_of(schedule, num_inference_steps, partial(policy.sigmas, latent_shape=latent_shape))


def pipeline_call(policy: Policy, sampling: Sampling) -> tuple[list[str], dict[str, Any]]:
    """(setup lines, arguments but prompts and images) of the pipeline for the same deterministic samples: `pipeline_setup` and
    `pipeline_arguments`, and where the grid is not the scheduler's own `pipeline_sigmas`."""
    steps, latent_shape = sampling.num_inference_steps, policy.latent_shape(sampling.size)
    setup = policy.pipeline_setup()
    arguments = {"num_inference_steps": steps, **policy.pipeline_arguments(sampling.guidance_scale, sampling.size)}
    sigmas = grid(policy, sampling.schedule, steps, latent_shape)
    if not torch.equal(sigmas, policy.sigmas(steps, latent_shape)):
        more_setup, more_arguments = policy.pipeline_sigmas(sigmas)
        setup, arguments = [*setup, *more_setup], {**arguments, **more_arguments}
    return setup, arguments


def pipeline_latents(
    pipeline: DiffusionPipeline, policy: Policy, records: Sequence[PromptRecord], noise: Tensor, sampling: Sampling
) -> Tensor:
    """The latents after the last step of the call of `pipeline_call`, from unit noise [n, *latent_shape], a row per record, in
    fp32; the pipeline is set up already. Not what the call gives: some denormalize that, which cannot be undone exactly."""
    _, arguments = pipeline_call(policy, sampling)
    inputs = policy.pipeline_inputs(records, sampling.guidance_scale, sampling.size)
    found: dict[str, Tensor] = {}

    def keep(pipeline: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found.update(tensors)
        return {}

    pipeline(
        **{**arguments, **inputs}, latents=policy.to_pipeline(noise), output_type="latent", return_dict=False,
        callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"],
    )  # fmt: skip
    return policy.from_pipeline(found["latents"], sampling.size).float()
