"""Glyphs-Video: a tiny text-to-video world: words that move and change their color, and a real Wan pipeline folder."""

from pathlib import Path
from typing import Final, TypedDict

from flowalign.glyphs.video.prompts import FRAMES, held_out_prompts, make_prompt, parse_prompt, train_prompts

__all__ = ["CALL_ARGS", "FPS", "PIPELINE", "STEPS", "held_out_prompts", "make_prompt", "parse_prompt", "train_prompts"]


class CallArgs(TypedDict):
    """The arguments that every call of the pipeline needs."""

    height: int
    width: int
    num_frames: int
    max_sequence_length: int


PIPELINE: Final = Path(__file__).parent / "pipeline"
CALL_ARGS: Final = CallArgs(height=32, width=64, num_frames=FRAMES, max_sequence_length=20)
FPS: Final = 8.0
# What a call takes that does not say, without guidance.
STEPS: Final = 8
