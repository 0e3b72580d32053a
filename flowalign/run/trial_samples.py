"""The samples that a reward is tried on (trial_result.SAMPLES): two of noise that differ, and an empty one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowalign.config import TrainConfig
from flowalign.models import Policy, Size
from flowalign.run.trial_result import SAMPLES
from rewards import RewardSpec, pictures

COUNT, NOISE = len(SAMPLES), SAMPLES.count("noise")  # the first NOISE of COUNT samples are noise
CELLS = 8  # of the noise along a side, and at most 4 in time: between them it is smooth


def sample_pictures(size: Size, fps: float | None, device: torch.device | str) -> dict[str, Any]:
    """Images, or videos of more than one frame, as fields of a RewardBatch: the same in every run."""
    cells = torch.rand(NOISE, 3, min(4, size.frames), CELLS, CELLS, generator=_generator())
    shape = (size.frames, size.height, size.width)
    noise = interpolate(cells, shape, mode="trilinear", align_corners=True).clamp(0, 1).transpose(1, 2)
    pixels = _with_empty(noise if size.frames > 1 else noise[:, 0]).to(device)
    return pictures(pixels, fps)


def sample_latents(config: TrainConfig, spec: RewardSpec, device: torch.device | str, policy: Policy) -> dict[str, Any]:
    """Latents of N(0, 1) and of zeros: pure noise for a reward of noisy states, else data, decoded if it reads that too."""
    noise = torch.randn(NOISE, *policy.latent_shape(config.policy.size), generator=_generator())
    latents = _with_empty(noise).to(device)
    sigma = torch.full((COUNT,), float(spec.scope == "latent"), device=device)
    decoded = {"images", "videos"} & set(spec.inputs)
    made = pictures(policy.decode(latents), config.policy.fps) if decoded else {}
    return {"latents": latents, "sigma": sigma, **made}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _with_empty(noise: Tensor) -> Tensor:
    return torch.cat([noise, torch.zeros_like(noise[:1])]).contiguous()
