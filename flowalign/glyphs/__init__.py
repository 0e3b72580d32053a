"""Glyphs: a tiny text-to-image world for alignment on a CPU: prompts, a renderer, a real Stable Diffusion 3 pipeline folder,
and what made it (parts, pretrain, judge, make, export, card). Beside it, what made small rewards of it: process_*, clip_*, edit_*."""

from pathlib import Path
from typing import Final, TypedDict

from flowalign.glyphs.prompts import held_out_prompts, make_prompt, parse_prompt, train_prompts
from samplers import PlainShift

__all__ = [
    "CALL_ARGS",
    "FEW_STEP",
    "FEW_STEP_SCHEDULE",
    "GUIDANCE_SCALE",
    "LOAD_ARGS",
    "PIPELINE",
    "STEPS",
    "CallArgs",
    "LoadArgs",
    "held_out_prompts",
    "make_prompt",
    "parse_prompt",
    "train_prompts",
]


class CallArgs(TypedDict):
    """The arguments that every call of the pipeline needs."""

    height: int
    width: int
    max_sequence_length: int


class LoadArgs(TypedDict):
    """The arguments that `StableDiffusion3Pipeline.from_pretrained` needs."""

    text_encoder_3: None
    tokenizer_3: None


PIPELINE: Final = Path(__file__).parent / "pipeline"
# Generators of few steps, made from it by scripts/train_few_step_glyphs.py: by their number of steps. They step over the grid
# `FEW_STEP_SCHEDULE` and know no other level.
FEW_STEP: Final = {4: Path(__file__).parent / "pipeline_4step", 1: Path(__file__).parent / "pipeline_1step"}
FEW_STEP_SCHEDULE: Final = PlainShift()
# There is no T5; diffusers loads without it only if told so.
LOAD_ARGS: Final = LoadArgs(text_encoder_3=None, tokenizer_3=None)
# Without max_sequence_length=0, SD3 would append 256 zero tokens in place of the absent T5.
CALL_ARGS: Final = CallArgs(height=24, width=48, max_sequence_length=0)
# What a call takes that does not say; the figures of the model card and of the quickstart are at these.
STEPS: Final = 6
GUIDANCE_SCALE: Final = 1.0
