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

# suffix -> arguments of Pillow's save
IMAGE_FILES: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": (JPEG := {"format": "JPEG", "quality": 95, "subsampling": 0}),
    ".jpeg": JPEG,
    ".webp": {"format": "WEBP", "lossless": True},
}
VIDEO_FILES: dict[str, dict[str, Any]] = {".webp": {"format": "WEBP", "quality": 90}, ".gif": {"format": "GIF"}}
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

        Images: .png or .webp (both without loss) or .jpg; videos: an animated .webp or .gif. ValueError for another suffix, and
        for videos without `fps`. The file is replaced as a whole, its folder made."""
        path = Path(path).expanduser()
        known = IMAGE_FILES if self.pixels.ndim == 4 else VIDEO_FILES
        if path.suffix.lower() not in known:
            kind = "images" if self.pixels.ndim == 4 else "videos"
            raise ValueError(f"got {str(path)!r} for {kind}; expected a name that ends in {', '.join(known)}")
        first, *others = self._pictures()
        arguments = known[path.suffix.lower()]
        if self.pixels.ndim == 5:
            if self.fps is None:
                raise ValueError(
                    "got videos without fps; expected frames per second: dataclasses.replace(images, fps=16)"
                )
            arguments = {**arguments, "save_all": True, "append_images": others, "duration": 1000 / self.fps, "loop": 0}
        file = io.BytesIO()
        first.save(file, **arguments)
        write_atomic(path, file.getvalue())
        return path

    def _pictures(self) -> list[Image.Image]:
        """All side by side: one picture, of videos one per frame."""
        frames = self.pixels.transpose(0, 1) if self.pixels.ndim == 5 else self.pixels[None]
        columns = math.ceil(math.sqrt(len(self)))
        return [picture(make_grid(frame, columns, GAP, pad_value=1) if len(self) > 1 else frame[0]) for frame in frames]

    def _repr_png_(self) -> bytes:
        """What a notebook shows: all, of videos the first frames; small ones enlarged by a whole factor, each pixel a square."""
        picture = self._pictures()[0]
        factor = max(1, SHOWN // max(picture.size))
        file = io.BytesIO()
        picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST).save(file, "PNG")
        return file.getvalue()


def picture(pixels: Tensor) -> Image.Image:
    """[3, H, W], uint8 or in [0, 1]."""
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.detach().cpu().permute(1, 2, 0).contiguous().numpy())
