"""UNets that predict ε or v at the discrete timesteps of a noise table: what Stable Diffusion 1, 2 and XL share.

Timesteps 0…K-1 are used only here and in these families: the level σ = (t+1)/K is timestep t, and σ = 0 is clean data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from flowalign.models.base import Size
from flowalign.models.family import Configs, check_image, vae_reduction
from samplers import VariancePreserving

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PREDICTIONS = ("epsilon", "v_prediction")


def check_scheduler(config: Mapping[str, Any], known: Sequence[str], to: str) -> None:
    """ValueError unless the scheduler of this config (with "_class_name") is one of the classes `known`, whose levels the class
    `to` repeats."""
    name = config.get("_class_name")
    if name not in known:
        raise ValueError(
            f"got scheduler {name}; expected one of {', '.join(known)}: save the pipeline with "
            f"{to}.from_config(pipe.scheduler.config)"
        )


def check_prediction(scheduler: Any) -> None:
    """ValueError unless the network predicts ε or v, and ε only where it says something of the data."""
    settings = scheduler.config
    if settings.prediction_type not in PREDICTIONS:
        raise ValueError(
            f"got prediction_type={settings.prediction_type}; expected one of {', '.join(PREDICTIONS)}: take a checkpoint "
            "that predicts one of them"
        )
    # EulerDiscreteScheduler writes 2⁻²⁴ where DDIMScheduler has 0
    if settings.prediction_type == "epsilon" and float(scheduler.alphas_cumprod.min()) <= 2**-24:
        raise ValueError("got ε-prediction with a level of ᾱ = 0 (rescale_betas_zero_snr); expected ᾱ > 0, since at pure "
                         "noise ε says nothing of the data: set rescale_betas_zero_snr=false, or use a v-prediction model")  # fmt: skip


def check_unet(unet: ModelMixin, tokens: int, max_sequence_length: int | None) -> None:
    """ValueError for a distilled network, or a length of prompts other than the encoder's own."""
    if max_sequence_length is not None:
        raise ValueError(
            f"got max_sequence_length={max_sequence_length}; expected null, since the CLIP text encoder of this "
            f"family always reads {tokens} tokens: leave it out"
        )
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError("got a UNet that takes the guidance scale as an input (time_cond_proj_dim, LCM); expected one "
                         "of Stable Diffusion 1.x, 2.x or XL: take a checkpoint that is not distilled so")  # fmt: skip


def levels(timesteps: Sequence[int], known: int) -> Tensor:
    """[T] fp32: σ of timesteps; -1 is clean data."""
    return (torch.tensor(timesteps, dtype=torch.float64) + 1).div(known).float()


def timestep(sigma: Tensor, known: int) -> Tensor:
    """[n] int64: the timesteps of levels σ [n]."""
    return (sigma.double() * known).round().long() - 1


def velocity_of(path: VariancePreserving, x: Tensor, prediction: Tensor, sigma: Tensor, scheduler: Any) -> Tensor:
    """√ᾱ·ε - √(1-ᾱ)·x0 [n, *] from what the network predicts at x; v is this itself."""
    if scheduler.config.prediction_type == "v_prediction":
        return prediction
    return path.velocity_from_noise(x, prediction, sigma)


def latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    """`Family.latent_shape`; the pipelines themselves ask for multiples of 8 pixels."""
    factor = vae_reduction(configs["vae"])
    check_image(size, math.lcm(8, factor))
    return (configs["unet"]["in_channels"], size.height // factor, size.width // factor)
