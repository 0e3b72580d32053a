"""Clips as MP4: the right frames at the right speed, in colors that a player gets back."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace
from torch import Tensor

from flowalign.storage.mp4 import mp4_bytes


def decoded(content: bytes) -> tuple[np.ndarray, Fraction | None]:
    """Frames uint8 [F, H, W, 3] and frames per second."""
    with av.open(io.BytesIO(content)) as container:
        frames = [
            frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709).to_ndarray()
            for frame in container.decode(video=0)
        ]
        return np.stack(frames), container.streams.video[0].average_rate


def pixels(*shape: int) -> Tensor:
    """Saturated colors that change from pixel to pixel, which half the resolution of colors would mix."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8) * 255


@pytest.mark.parametrize(("size", "factor"), [((8, 16), 24), ((7, 11), 34), ((32, 64), 6)])
def test_each_pixel_of_a_small_clip_keeps_its_color(size: tuple[int, int], factor: int) -> None:
    clip = pixels(5, 3, *size)
    frames, fps = decoded(mp4_bytes(clip, 8.0))
    assert frames.shape == (5, factor * size[0], factor * size[1], 3) and fps == 8
    seen = frames.reshape(5, size[0], factor, size[1], factor, 3).mean((2, 4))
    error = np.abs(seen - clip.permute(0, 2, 3, 1).numpy())
    assert error.mean() < 12 and np.percentile(error, 99) < 50  # not enlarged 70 and 255


def test_a_large_clip_keeps_its_size_but_for_odd_sides() -> None:
    shades = torch.linspace(0, 255, 401).round().to(torch.uint8).expand(3, 3, 301, 401)
    frames, fps = decoded(mp4_bytes(shades, 24000 / 1001))
    assert frames.shape == (3, 302, 402, 3) and fps == Fraction(24000, 1001)
    assert np.abs(frames[:, :301, :401].astype(int) - shades.permute(0, 2, 3, 1).numpy()).max() <= 4
    assert np.abs(frames[:, :, 401].astype(int) - 255).max() <= 4


def test_equal_frames_give_equal_bytes_and_less_quality_less_bytes() -> None:
    clip = pixels(4, 3, 32, 64)
    assert mp4_bytes(clip, 8.0) == mp4_bytes(clip, 8.0)
    assert len(mp4_bytes(clip, 8.0, quality=40)) < 0.7 * len(mp4_bytes(clip, 8.0))
