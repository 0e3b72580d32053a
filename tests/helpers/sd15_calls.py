"""What the SD1.5 tests share: prompts, noise, diffusers' pipeline under DDIM, and a deterministic rollout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from flowalign.data import as_records
from flowalign.models import Policy
from samplers import chain, rollout

PROMPTS = ['the word "KITE" in red on a yellow background', "a word", "the word"]
SHAPE = (4, 12, 24)


def noise_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def ddim_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def deterministic(policy: Policy, kernel: Any, noise: Tensor, steps: int, guidance: float) -> Tensor:
    one, conditions = chain(steps, len(noise)), policy.encode(as_records(PROMPTS), negative=guidance != 1)
    tree = replace(one, level=torch.zeros_like(one.level))
    forest = rollout(
        lambda x, sigma, root: policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance),
        policy.start(noise), policy.sigmas(steps, noise.shape[1:]), tree, kernel, lambda tree, nodes: pytest.fail("asked for noise"),
    )  # fmt: skip
    return forest.at(tree.leaves)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
