"""VAEs whose latents have one scale, and perhaps a shift: those of Stable Diffusion, FLUX.1, Z-Image and HunyuanVideo; and the
statistics of those whose channels have their own: of Wan and Qwen-Image."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import Tensor


def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """What the VAE makes of latents [n, C, *], in [-1, 1] or beyond, with the channels behind the rows; in its dtype."""
    scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    image: Tensor = vae.decode(scaled + _shift(vae), return_dict=False)[0]
    return image


def encode(vae: ModelMixin, images: Tensor) -> Tensor:
    """The mean of its posterior, of which `decode` leads back."""
    mean: Tensor = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    return (mean - _shift(vae)) * vae.config.scaling_factor


def _shift(vae: ModelMixin) -> float:
    return vae.config.get("shift_factor") or 0.0


def channel_statistics(vae: ModelMixin, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels, [C, 1, 1, 1] beside `like`, rounded as the pipelines of Wan and Qwen-Image round them."""
    mean, std = (
        torch.tensor(vae.config[key]).view(-1, 1, 1, 1).to(like.device, like.dtype)
        for key in ("latents_mean", "latents_std")
    )
    return mean, std
