"""The grid that a policy samples on, and the pipeline call that samples on the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.models.base import Policy
from samplers import Schedule, sigmas_of


def grid(policy: Policy, schedule: Schedule | None, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
    """[T+1] fp32 on the CPU; schedule None: the family's own."""
    return sigmas_of(schedule, num_inference_steps, partial(policy.sigmas, latent_shape=latent_shape))


def pipeline_call(
    policy: Policy, schedule: Schedule | None, num_inference_steps: int, latent_shape: Sequence[int]
) -> tuple[list[str], dict[str, Any]]:
    """(setup lines, arguments) of the pipeline for the same deterministic samples: `pipeline_setup` and
    `pipeline_arguments`, and where the grid is not the scheduler's own `pipeline_sigmas`."""
    setup, arguments = policy.pipeline_setup(), policy.pipeline_arguments()
    sigmas = grid(policy, schedule, num_inference_steps, latent_shape)
    if not torch.equal(sigmas, policy.sigmas(num_inference_steps, latent_shape)):
        more_setup, more_arguments = policy.pipeline_sigmas(sigmas)
        setup, arguments = [*setup, *more_setup], {**arguments, **more_arguments}
    return setup, arguments
