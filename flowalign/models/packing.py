"""Latents as the tokens of a transformer that reads patches of 2×2, in the layout of FLUX and Qwen-Image."""

from __future__ import annotations

from torch import Tensor


def pack_2x2(latents: Tensor) -> Tensor:
    """Tokens [n, (h/2)·(w/2), 4C], row by row, of latents [n, C, h, w] with even h and w."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, (height // 2) * (width // 2), channels * 4)


def unpack_2x2(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents [n, C, height, width] of their tokens."""
    n, _, channels = tokens.shape
    patches = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, channels // 4, height, width)
