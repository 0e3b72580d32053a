"""Latents as the tokens of a transformer, as FLUX and Qwen-Image lay them out."""

from __future__ import annotations

from torch import Tensor


def pack_2x2(latents: Tensor) -> Tensor:
    """Tokens [n, (h/2)(w/2), 4C] of latents [n, C, h, w] with even h and w: each is a square of 2×2, the channel varies slowest."""
    n, channels, height, width = latents.shape
    squares = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(n, (height // 2) * (width // 2), 4 * channels)


def unpack_2x2(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back: latents [n, C, height, width] of tokens [n, (height/2)(width/2), 4C]."""
    n, _, channels = tokens.shape
    squares = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(n, channels // 4, height, width)
