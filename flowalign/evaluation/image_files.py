"""Images and videos as files: PNG, animated WebP, both without loss: these are the pixels that were scored, to be read again."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flowalign.models.images import animation, image_bytes
from flowalign.storage.files import write_atomic


def image_path(folder: Path, uid: int, sample: int, *, video: bool) -> Path:
    """The file of a sample: FOLDER/UID-SAMPLE.png, of a video .webp."""
    return folder / f"{uid}-{sample}.{'webp' if video else 'png'}"


def write_image(path: Path, pixels: Tensor, fps: float | None) -> None:
    """uint8 [3, H, W] as a PNG, or [F, 3, H, W] as an animated WebP of `fps` frames per second, written atomically."""
    if pixels.ndim == 3:
        write_atomic(path, image_bytes(pixels, format="PNG"))
    else:
        assert fps is not None  # rewards of videos ask for it, too
        write_atomic(path, animation(pixels, fps, format="WEBP", lossless=True))
