"""Sizes that cannot fit are refused from arithmetic, before a tree is grown or a model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from flowalign.errors import ConfigError
from flowalign.models.base import Size
from flowalign.rollouts.task import Rollout

MAX_STEPS = 10_000  # schedulers are trained on 1,000 levels
FP32 = 4
NODE = 7 * 8 + 8 + 1  # bytes of the columns of a Tree, per state
JOB = 100  # bytes of a prompt and its number in the list of images to evaluate
OPTIMIZED = 4 * FP32  # a weight, its gradient and AdamW's two moments


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_sizes(
    rollout: Rollout, size: Size, latent_shape: Sequence[int], *, evaluated: int, evaluation_steps: int,
    evaluation_batch: int, lora_numbers: int,
) -> None:  # fmt: skip
    """ConfigError if what a run holds at once, at the least, is more than the machine has: the samples of a rollout, the images
    that are decoded together, the list of evaluated images, the LoRA with its optimizer.

    evaluated: images of an evaluation. lora_numbers: of the policy's LoRA, 0 without one. A lower bound: activations, weights
    and rewards come on top."""
    for key, steps in (("rollout", rollout.num_inference_steps), ("evaluation", evaluation_steps)):
        if steps > MAX_STEPS:
            raise ConfigError(f"got {key}.num_inference_steps={steps}; expected at most {MAX_STEPS:,}")
    latent = FP32 * math.prod(latent_shape)
    pixels = FP32 * 3 * size.height * size.width * size.frames
    samples = rollout.groups * rollout.group_size
    _check(pixels, "policy.height × policy.width × policy.frames", "one sample of these pixels")
    _check(
        samples * (latent + NODE), "rollout.groups × rollout.group_size", f"{samples:,} latents {list(latent_shape)}"
    )
    _check(min(rollout.micro_batch, samples) * pixels, "rollout.micro_batch", "the images that are decoded together")
    _check(min(evaluation_batch, evaluated) * pixels, "evaluation.batch_size", "the images that are decoded together")
    _check(evaluated * JOB, "evaluation.count × evaluation.samples_per_prompt", f"a list of {evaluated:,} images")
    _check(lora_numbers * OPTIMIZED, "policy.lora.rank", f"a LoRA of {lora_numbers:,} numbers with AdamW's moments")


def _check(needed: int, key: str, what: str) -> None:
    available = machine_memory()
    if needed > available:
        raise ConfigError(
            f"got {key}: {what} need at least {needed / 2**30:,.1f} GiB of memory; this machine has {available / 2**30:,.1f} GiB: "
            f"lower {key.replace(' × ', ' or ')}"
        )
