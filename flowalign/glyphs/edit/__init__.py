"""Glyphs-Edit: a tiny world of image edits: instructions that change ink, paper or word of a picture of Glyphs, and a real
FLUX.1 Kontext pipeline folder."""

from pathlib import Path
from typing import Any, Final

from flowalign.glyphs.edit.prompts import held_out_prompts, train_prompts

__all__ = ["CALL_ARGS", "PIPELINE", "STEPS", "held_out_prompts", "train_prompts"]

PIPELINE: Final = Path(__file__).parent / "pipeline"
# Left alone, Kontext generates about 1024² pixels, and makes the source image one of 17 sizes.
CALL_ARGS: Final[dict[str, Any]] = {
    "height": 24, "width": 48, "max_sequence_length": 12, "max_area": 24 * 48, "_auto_resize": False,
}  # fmt: skip
# What a call takes that does not say. The guidance scale is an input that means nothing here.
STEPS: Final = 8
