"""Images and videos as files: PNG, animated WebP, both without loss."""

from __future__ import annotations

import io
from pathlib import Path

from torch import Tensor

from flowalign.models.images import picture
from flowalign.storage.files import write_atomic


def image_path(folder: Path, uid: int, sample: int, *, video: bool) -> Path:
    """The file of a sample: FOLDER/UID-SAMPLE.png, of a video .webp."""
    return folder / f"{uid}-{sample}.{'webp' if video else 'png'}"


def write_image(path: Path, pixels: Tensor, fps: float | None) -> None:
    """uint8 [3, H, W] as a PNG, or [F, 3, H, W] as an animated WebP of `fps` frames per second, written atomically."""
    videos = pixels[None] if pixels.ndim == 3 else pixels
    first, *others = map(picture, videos)
    buffer = io.BytesIO()
    if pixels.ndim == 3:
        first.save(buffer, "PNG")
    else:
        assert fps is not None  # rewards of videos ask for it, too
        first.save(
            buffer, "WEBP", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, lossless=True
        )
    write_atomic(path, buffer.getvalue())
