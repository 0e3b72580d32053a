"""Generated images or videos, with what they show: to look at, to save, to compute with."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from flowalign.storage.files import write_atomic
from flowalign.storage.mp4 import mp4_bytes

# suffix -> arguments of Pillow's save
IMAGE_FILES: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": (JPEG := {"format": "JPEG", "quality": 95, "subsampling": 0}),
    ".jpeg": JPEG,
    ".webp": {"format": "WEBP", "lossless": True},
}
ANIMATIONS: dict[str, dict[str, Any]] = {".webp": IMAGE_FILES[".webp"], ".gif": {"format": "GIF"}}
VIDEO_FILES = (".mp4", *ANIMATIONS)
SHOWN = 384  # pixels of the longer side up to which a notebook enlarges
GAP = 2  # pixels between images in one picture


@dataclass(frozen=True, eq=False)
class Images:
    """N images or videos. pixels: fp32 [N, 3, H, W], of videos [N, F, 3, H, W], in [0, 1] on the CPU; prompts: N texts; fps: frames
    per second of videos, None of images. `images[i]` and slices are Images too. ValueError for parts that do not fit."""

    pixels: Tensor
    prompts: Sequence[str]
    fps: float | None = None

    def __post_init__(self) -> None:
        if (
            self.pixels.ndim not in (4, 5)
            or self.pixels.shape[-3] != 3
            or not len(self.pixels) == len(self.prompts) > 0
        ):
            raise ValueError(
                f"got pixels of shape {tuple(self.pixels.shape)} and {len(self.prompts)} prompts; expected [N, 3, H, W] or "
                "[N, F, 3, H, W], and a prompt for each of at least one image"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int | slice) -> Images:
        rows = range(len(self))[index]
        chosen = [rows] if isinstance(rows, int) else list(rows)
        return replace(self, pixels=self.pixels[chosen], prompts=[self.prompts[row] for row in chosen])

    def __repr__(self) -> str:
        return f"Images {list(self.pixels.shape)} of {list(self.prompts)[:3]}{', …' * (len(self) > 3)}"

    @property
    def pil(self) -> list[Image.Image]:
        """A picture per image; of videos one per frame, video after video."""
        return [picture(pixels) for pixels in self.pixels.flatten(0, -4)]

    def save(self, path: str | Path) -> Path:
        """Writes one file and returns its path: an image at its own size, several side by side in rows.

        Images: .png or .webp (both without loss) or .jpg. Videos: .mp4 (H.264, to look at: lossy, small ones enlarged by a whole
        factor, see `flowalign.storage.mp4`), an animated .webp (without loss: what is to be read again and scored) or .gif.
        ValueError for another suffix, and for videos without `fps`. The file is replaced as a whole, its folder made."""
        path, video = Path(path).expanduser(), self.pixels.ndim == 5
        suffix, known = path.suffix.lower(), VIDEO_FILES if video else tuple(IMAGE_FILES)
        if suffix not in known:
            raise ValueError(
                f"got {str(path)!r} for {'videos' if video else 'images'}; expected a name that ends in {', '.join(known)}"
            )
        if not video:
            write_atomic(path, image_bytes(self._frames()[0], **IMAGE_FILES[suffix]))
            return path
        if self.fps is None:
            raise ValueError("got videos without fps; expected frames per second: dataclasses.replace(images, fps=16)")
        frames = self._frames()
        write_atomic(
            path,
            mp4_bytes(frames, self.fps) if suffix == ".mp4" else animation(frames, self.fps, **ANIMATIONS[suffix]),
        )
        return path

    def _frames(self) -> Tensor:
        """All side by side: uint8 [F, 3, H, W], of images F = 1."""
        frames = self.pixels.transpose(0, 1) if self.pixels.ndim == 5 else self.pixels[None]
        columns = math.ceil(math.sqrt(len(self)))
        return torch.stack(
            [as_bytes(make_grid(frame, columns, GAP, pad_value=1) if len(self) > 1 else frame[0]) for frame in frames]
        )

    def _repr_png_(self) -> bytes:
        """What a notebook shows: all, of videos the first frames; small ones enlarged by a whole factor, each pixel a square."""
        shown = picture(self._frames()[0])
        factor = max(1, SHOWN // max(shown.size))
        file = io.BytesIO()
        shown.resize((factor * shown.width, factor * shown.height), Image.Resampling.NEAREST).save(file, "PNG")
        return file.getvalue()


def as_bytes(pixels: Tensor) -> Tensor:
    """uint8 of what is in [0, 1], on the CPU; uint8 as it is."""
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.detach().cpu()


def picture(pixels: Tensor) -> Image.Image:
    """[3, H, W], uint8 or in [0, 1]."""
    return Image.fromarray(as_bytes(pixels).permute(1, 2, 0).contiguous().numpy())


def image_bytes(pixels: Tensor, **settings: Any) -> bytes:
    """A file of [3, H, W], uint8 or in [0, 1]; settings: of Pillow's save, such as format="PNG"."""
    file = io.BytesIO()
    picture(pixels).save(file, **settings)
    return file.getvalue()


def animation(frames: Tensor, fps: float, **settings: Any) -> bytes:
    """A file that repeats frames [F, 3, H, W], uint8 or in [0, 1], `fps` of them per second; settings: of Pillow's save.
    Not kept: a frame that equals the one before, which is then shown longer instead."""
    file, (first, *others) = io.BytesIO(), [picture(frame) for frame in frames]
    first.save(file, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, **settings)
    return file.getvalue()
