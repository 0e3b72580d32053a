"""Large images through the VAE in overlapping tiles, as diffusers cuts and blends them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DECODES_TILES = ("tiled_decode", "_tiled_decode")


def check_tiling(vae: type) -> None:
    """ValueError for the class of a VAE that diffusers does not decode in tiles; some have the switch and ignore it."""
    if not hasattr(vae, "enable_tiling") or not any(hasattr(vae, name) for name in DECODES_TILES):
        raise ValueError(
            f"got policy.vae_tiling=true for a {vae.__name__}, which diffusers does not decode in tiles; expected false: to save memory "
            "set policy.decode_batch=1"
        )


@contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Inside, an image larger than a tile goes through the VAE in tiles; afterwards as its own switch says."""
    own = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = own
