"""Clips as H.264 in an MP4 file, which players and browsers show; to look at, since it is lossy."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
from torch import Tensor

SHOWN = 384  # pixels of the longer side up to which a small clip is enlarged
QUALITY = 16  # x264's constant rate factor: 0 lossless, 51 worst; below about 18 a difference is hard to see


def mp4_bytes(frames: Tensor, fps: float, quality: int = QUALITY) -> bytes:
    """The file of uint8 frames [F, 3, H, W], `fps` of them per second; equal frames give equal bytes.

    H.264 keeps colors at half the height and width (yuv420p): a small clip is enlarged by an even whole factor, up to SHOWN pixels, so
    that each of its pixels keeps its own. Sides must be even: an odd one that is not enlarged repeats its last row or column.
    quality: x264's constant rate factor. Not kept: the exact pixels. What is read again and scored belongs into WebP or PNG."""
    import av  # half a second, which most uses of flowalign need not wait
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    pixels = np.ascontiguousarray(frames.permute(0, 2, 3, 1).cpu().numpy())
    height, width = pixels.shape[1:3]
    factor = enlarged(height, width)
    pixels = pixels.repeat(factor, 1).repeat(factor, 2)
    pixels = np.pad(pixels, ((0, 0), (0, factor * height % 2), (0, factor * width % 2), (0, 0)), "edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", Fraction(fps).limit_denominator(1001), options={"crf": str(quality), "preset": "medium"}
        )
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        stream.thread_count = 1  # by their number the bytes would differ
        # said, since players guess otherwise by the height
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        stream.colorspace, stream.color_range = Colorspace.ITU709, ColorRange.MPEG
        for image in pixels:
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def enlarged(height: int, width: int) -> int:
    """The even factor by which a clip is enlarged, or 1."""
    return max(1, SHOWN // max(height, width) // 2 * 2)
