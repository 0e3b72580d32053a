"""Grids of noise levels: fp32 tensors [T+1], from 1 (or just below) down to exactly 0.

Store the grid that was used: a rollout and its update must never use two different ones.
"""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Levels = TypeVar("Levels", float, np.ndarray, Tensor)


def shift(u: Levels, k: float) -> Levels:
    """f_k(u) = k·u / (1 + (k-1)·u): moves levels in [0, 1] towards noise for k > 1 (SD3 and FLUX 3, video 5)."""
    return k * u / (1 + (k - 1) * u)


def plain_sigmas(num_steps: int, k: float = 3.0) -> Tensor:
    """σ_i = f_k(1 - i/T), i = 0..T: the grid of DanceGRPO, MixGRPO, BranchGRPO. Computed in float64."""
    _check(num_steps, k)
    return torch.from_numpy(shift(1.0 - np.arange(num_steps + 1) / num_steps, k)).to(torch.float32)


def diffusers_sigmas(num_steps: int, k: float = 3.0, num_train: int = 1000) -> Tensor:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler(shift=k), bit for bit: it shifts TWICE.

    The constructor shifts `num_train` levels; set_timesteps spaces T points between the largest and the smallest of
    these and shifts again (diffusers issue 13243). The last step before 0 is therefore nearly empty (0.0089 at k=3).
    """
    _check(num_steps, k)
    train = torch.arange(num_train, 0, -1, dtype=torch.float32) / num_train
    once = shift(train, k)
    points = np.linspace(once[0].item() * num_train, once[-1].item() * num_train, num_steps) / num_train
    return _append_zero(torch.from_numpy(shift(points, k)).to(torch.float32))


def dynamic_sigmas(
    num_steps: int,
    image_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> Tensor:
    """FLUX's grid, bit for bit its pipeline's: u = linspace(1, 1/T, T), σ = e^m/(e^m + 1/u - 1), then 0.

    m grows linearly with the number of image tokens; e^m takes the place of k. Some repositories write 1.16 for 1.15.
    """
    _check(num_steps, 1.0)
    if image_tokens < 1:
        raise ValueError(f"got image_tokens={image_tokens}; expected the number of latent patches, (h/16)·(w/16)")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    m = image_tokens * slope + (base_shift - slope * base_tokens)
    u = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
    return _append_zero(torch.from_numpy(math.exp(m) / (math.exp(m) + (1 / u - 1))).to(torch.float32))


def stopped(sigmas: Tensor, step: int) -> Tensor:
    """The first `step`+1 levels of a grid, then 0: its last step jumps from level `step` to the predicted clean data x̂0.

    What ReFL (2304.05977) and DRTune score. ValueError for a step outside 0..T-1."""
    if not 0 <= step < len(sigmas) - 1:
        raise ValueError(f"got step={step}; expected a number inside 0..{len(sigmas) - 2}, a step of the grid")
    return torch.cat([sigmas[: step + 1], sigmas.new_zeros(1)])


def check_sigmas(sigmas: Tensor) -> None:
    """A grid is one-dimensional, of at least two levels, strictly decreasing inside [0, 1]."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise ValueError(f"got sigmas {sigmas.dtype}{list(sigmas.shape)}; expected floating point [T+1] with T >= 1")
    if not (bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) >= 0.0 and float(sigmas[0]) <= 1.0):
        raise ValueError(
            f"got sigmas {sigmas[:12].tolist()}; expected strictly decreasing levels inside [0, 1], from noise to "
            "data: check for a reversed grid or for timesteps 0..1000 passed as sigmas"
        )


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1)])


def _check(num_steps: int, k: float) -> None:
    if num_steps < 1:
        raise ValueError(f"got num_steps={num_steps}; expected at least 1 denoising step")
    if not k > 0:
        raise ValueError(f"got shift k={k}; expected a number > 0 (1 = no shift)")
