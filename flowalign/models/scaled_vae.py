"""VAEs whose latents have a scale and no shift: those of Stable Diffusion 1, 2, XL and HunyuanVideo."""

from __future__ import annotations

from diffusers import ModelMixin
from torch import Tensor


def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """What the VAE makes of latents [n, C, *], in [-1, 1] or beyond, with the channels behind the rows; in its dtype."""
    image: Tensor = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return image


def encode(vae: ModelMixin, images: Tensor) -> Tensor:
    """The mean of its posterior, of which `decode` leads back."""
    mean: Tensor = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    return mean * vae.config.scaling_factor
