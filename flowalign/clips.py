"""Images and clips to train on, as tensors: from image files, animated ones, videos, and folders of frames."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from flowalign.media import Place, content_of, digest_of_file, picture_of

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")  # read by PyAV, all else by Pillow


def read_sample(place: Place) -> Tensor:
    """uint8 RGB in 0..255 (alpha is dropped): [3, H, W] of an image, [F, 3, H, W] of a clip, which is a video, an animated .gif or .webp, or
    a folder of frames, "2.png" before "10.png".

    All frames are taken, none is resized. ValueError for what is damaged, empty, or has frames of several sizes. Not kept: how many
    frames pass in a second."""
    if place.is_dir():
        frames = [pixels for file in _frames(place) for pixels in _decoded(file)]
    else:
        frames = list(_decoded(place))
    sizes = {tuple(frame.shape) for frame in frames}
    if len(sizes) != 1:
        found = "no frames" if not sizes else f"frames of {len(sizes)} sizes"
        raise ValueError(
            f"got the clip {place} with {found}; expected some, of one size: replace it, or leave its row out"
        )
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return clip if place.is_dir() or len(clip) > 1 else clip[0]


def missing(place: Place) -> str | None:
    """What a sample lacks, such as "does not exist"; None if it is there. It is not decoded."""
    if place.is_dir():
        return None if _frames(place) else "is a folder without files"
    return None if place.is_file() else "does not exist"


def digest_of_sample(place: Place) -> str:
    """SHA-256 of a file's content, or of those of a folder's frames."""
    if not place.is_dir():
        return digest_of_file(place)
    return hashlib.sha256(repr([digest_of_file(file) for file in _frames(place)]).encode()).hexdigest()


def _frames(folder: Place) -> list[Place]:
    """Its files, numbers in their names in the order of numbers; hidden ones are no frames."""
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    return sorted(files, key=lambda file: [(part.isdigit(), part.zfill(20)) for part in re.split(r"(\d+)", file.name)])


def _decoded(file: Place) -> Iterator[np.ndarray]:
    """Frames [H, W, 3] uint8."""
    import av  # half a second, which most uses need not wait

    try:
        content = content_of(file)
        if Path(file.name).suffix.lower() not in VIDEOS:
            with picture_of(content) as picture:
                for frame in ImageSequence.Iterator(picture):
                    yield np.array(frame.convert("RGB"))
            return
        with av.open(io.BytesIO(content), "r") as container:
            for image in container.decode(container.streams.video[0]):
                if image.rotation:
                    raise ValueError(f"it is to be shown turned by {image.rotation}°, which is not done here")
                yield image.to_ndarray(format="rgb24")
    except (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError, av.FFmpegError) as error:
        raise ValueError(
            f"got {file}, which cannot be read ({error}); expected a whole image or clip: replace it, or leave its row out"
        ) from error
