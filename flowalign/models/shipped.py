"""The pipelines that come with flowalign, by name."""

from __future__ import annotations

import os

from flowalign.glyphs import FEW_STEP, PIPELINE, edit, video

SHIPPED = {
    "glyphs": PIPELINE, "glyphs-video": video.PIPELINE, "glyphs-edit": edit.PIPELINE,
    **{f"glyphs-{steps}step": folder for steps, folder in FEW_STEP.items()},
}  # fmt: skip


def resolve(path: str) -> str:
    """A name of SHIPPED as its folder; anything else is a folder (~ is the home) or a hub id."""
    return str(SHIPPED[path]) if path in SHIPPED else os.path.expanduser(path)
