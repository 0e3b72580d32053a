"""Images and clips to train on, as tensors: from image files, animated ones, videos, and folders of frames."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ImageSequence
from torch import Tensor

from flowalign.media import UNREADABLE, Place, digest_of_file, opened, picture_of

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
    try:
        with opened(file) as stream:
            if Path(file.name).suffix.lower() in VIDEOS:
                yield from _frames_of_video(stream)
            else:
                with picture_of(stream) as picture:
                    for frame in ImageSequence.Iterator(picture):
                        yield np.array(frame.convert("RGB"))
    except UNREADABLE as error:
        raise ValueError(
            f"got {file}, which cannot be read ({error}); expected a whole image or clip: replace it, or leave its row out"
        ) from error


def _frames_of_video(stream: BinaryIO) -> Iterator[np.ndarray]:
    import av  # half a second, which most uses need not wait

    try:
        with av.open(stream, "r") as container:
            for frame in container.decode(video=0):
                if frame.rotation:
                    raise ValueError(f"it is to be shown turned by {frame.rotation}°, which is not done here")
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:  # IndexError: no stream of pictures
        raise ValueError(str(error)) from error
