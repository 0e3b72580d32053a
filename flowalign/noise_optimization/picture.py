"""How noise optimization went, as a picture: the rewards over the iterations above a strip of images."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flowalign.picture_style import INK, LINE, RULE, SOFT, STYLE


def progress_figure(title: str, history: Mapping[str, Tensor], start: float, strip: Mapping[str, Tensor]) -> Figure:
    """history: {name: [steps]}, nan is a gap; the first is drawn with its best so far and `start`, its value before the
    iterations. strip: {title: uint8 [3, h, w]}."""
    with matplotlib.rc_context(STYLE):
        tall = max(1.2, min(2.4, max(pixels.shape[1] / pixels.shape[2] for pixels in strip.values())))  # inches
        figure = Figure(figsize=(max(6.5, 1.1 * len(strip)), 1.5 * len(history) + tall + 0.6), layout="constrained")
        heights = [1.5] * len(history) + [tall]
        grid = figure.add_gridspec(len(heights), len(strip), height_ratios=heights)
        for row, (name, values) in enumerate(history.items()):
            _curve(figure.add_subplot(grid[row, :]), name, values, start if row == 0 else None)
        figure.axes[-1].set_xlabel("iteration (bold: the best so far; dotted: the start)")
        figure.suptitle(title, fontsize=9, color=INK, wrap=True, parse_math=False)
        for column, (label, pixels) in enumerate(strip.items()):
            axis = figure.add_subplot(grid[-1, column])
            axis.imshow(
                pixels.permute(1, 2, 0).numpy(), interpolation="nearest" if max(pixels.shape) < 128 else "antialiased"
            )
            axis.set_title(label, fontsize=8)
            axis.set_axis_off()
    return figure


def _curve(axis: Axes, name: str, values: Tensor, start: float | None) -> None:
    axis.plot(values.tolist(), color=LINE, linewidth=1, alpha=1.0 if start is None else 0.4)
    if start is not None:
        best = values.nan_to_num(-torch.inf).cummax(0).values
        axis.plot(torch.where(best.isinf(), torch.nan, best).tolist(), color=LINE, linewidth=1.6)
        axis.axhline(start, color=SOFT, linewidth=0.8, linestyle=":")
    axis.set_ylabel(name, color=INK, parse_math=False)
    axis.grid(axis="y", color=RULE, linewidth=0.6)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()
