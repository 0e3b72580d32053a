"""How a policy samples by its solver: the settings that a call need not say, and the samples themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.glyphs import CALL_ARGS, FEW_STEP, FEW_STEP_SCHEDULE, GUIDANCE_SCALE, PIPELINE, STEPS, edit, video
from flowalign.models.base import Policy, Sampling, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Distilled
from flowalign.models.grid import grid
from samplers import Schedule, Tree, normal, rollout, scattered

Job = tuple[PromptRecord, int]  # a prompt, and the number of its sample


def settle(
    default: Sampling | None, *, num_inference_steps: int | None = None, guidance_scale: float | None = None,
    size: Size | None = None, schedule: Schedule | None = None, fps: float | None = None,
) -> Sampling:  # fmt: skip
    """What a call says, and `default`, a policy's own sampling, where it says None. ValueError for what neither says, or for what
    cannot be."""
    said: dict[str, Any] = {
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "size": size, "schedule": schedule,
        "fps": fps,
    }  # fmt: skip
    given = {name: value for name, value in said.items() if value is not None}
    if default is None:
        needed = [name for name in ("num_inference_steps", "guidance_scale", "size") if name not in given]
        if needed:
            raise ValueError(
                f"got no {', '.join(needed)} for a policy whose pipeline has no defaults for its call; expected them: say them "
                "in the call, or set policy.sampling"
            )
        return Sampling(**given)
    return replace(default, **given)


def defaults_of(pipeline: DiffusionPipeline, networks: Configs, distilled: Distilled | None = None) -> Sampling | None:
    """What the pipeline's own call does unless told otherwise, by its signature and its configurations; None if it has no such
    defaults. networks: configurations of the trained ones, by name. distilled: the signature is that of the base model: one of few
    steps takes as many as it was distilled for, without guidance."""
    if (own := shipped_sampling(str(pipeline.name_or_path))) is not None:
        return own
    parameters = inspect.signature(type(pipeline).__call__).parameters
    call: dict[str, Any] = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    steps = call.get("num_inference_steps")
    guidance = call.get("guidance_scale") or call.get("true_cfg_scale")  # that of Qwen-Image, which ignores the other
    own = vars(pipeline)
    latent = next((config["sample_size"] for config in networks.values() if config.get("sample_size")), None)
    latent, factor = latent or own.get("default_sample_size"), own.get("vae_scale_factor")
    sides = list(latent) if isinstance(latent, list | tuple) else [latent] * 2
    pixels = [side * factor if side and factor else None for side in sides]
    height, width = call.get("height") or pixels[0], call.get("width") or pixels[1]
    if steps is None or guidance is None or height is None or width is None:
        return None
    if distilled is not None and distilled.steps is not None:
        steps, guidance = min(steps, distilled.steps), 1.0
    return Sampling(steps, float(guidance), Size(height, width, call.get("num_frames") or 1))


def shipped_sampling(folder: str) -> Sampling | None:
    """How a pipeline that comes with flowalign samples; None for another folder. Its `sample_size` is the larger of two sides."""
    size = Size(CALL_ARGS["height"], CALL_ARGS["width"])
    if folder == str(PIPELINE):
        return Sampling(STEPS, GUIDANCE_SCALE, size)
    if folder == str(edit.PIPELINE):
        return Sampling(edit.STEPS, GUIDANCE_SCALE, size)
    if folder == str(video.PIPELINE):
        call = video.CALL_ARGS
        return Sampling(
            video.STEPS, GUIDANCE_SCALE, Size(call["height"], call["width"], call["num_frames"]), fps=video.FPS
        )
    steps = next((steps for steps, own in FEW_STEP.items() if folder == str(own)), None)
    return None if steps is None else Sampling(steps, GUIDANCE_SCALE, size, FEW_STEP_SCHEDULE)


@torch.no_grad()
def sample(
    policy: Policy,
    conditions: Conditions,
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    schedule: Schedule | None = None,
) -> Tensor:
    """Clean latents [n, *] by the deterministic sampler (the solver of the policy's scheduler), from unit noise [n, *]."""
    tree = scattered(num_inference_steps, len(noise), (), shared_start=False)  # no step has noise

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance_scale)

    sigmas = grid(policy, schedule, num_inference_steps, noise.shape[1:])
    forest = rollout(velocity, policy.start(noise), sigmas, tree, policy.solver(), _no_noise)
    return forest.at(tree.leaves)


def start_noise(shape: Sequence[int], seed: int, record: PromptRecord, number: int) -> Tensor:
    """The start noise of a prompt's sample `number`, of `shape`: a function of the seed, the prompt's uid and the number alone."""
    return normal(shape, seed, "start", "evaluate", record.uid, number)


@torch.no_grad()
def in_batches(
    policy: Policy,
    jobs: Sequence[Job],
    settings: Sampling,
    seed: int,
    batch_size: int,
    noise: Tensor | None = None,
) -> Iterator[tuple[Sequence[Job], Tensor, Tensor]]:
    """Batch by batch the jobs, their latents [n, *] and what the policy decodes from them, [n, 3, H, W] or [n, F, 3, H, W].

    The start noise of a job is `start_noise`, or its row of `noise` [len(jobs), *]; ValueError for one of another shape."""
    shape = policy.latent_shape(settings.size)
    if noise is not None and noise.shape != (len(jobs), *shape):
        raise ValueError(
            f"got noise of shape {tuple(noise.shape)}; expected {(len(jobs), *shape)}: a start for each of the {len(jobs)} images "
            f"of {settings.size}"
        )
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        if noise is None:
            start = torch.stack([start_noise(shape, seed, record, number) for record, number in batch])
        else:
            start = noise[first : first + batch_size]
        conditions = policy.encode(
            [record for record, _ in batch],
            negative=policy.rows_per_state(settings.guidance_scale) > 1,
            size=settings.size,
        )
        latents = sample(
            policy, conditions, start, settings.num_inference_steps, settings.guidance_scale, settings.schedule
        )
        yield batch, latents, policy.decode(latents)


def _no_noise(tree: Tree, nodes: Tensor) -> Tensor:
    raise AssertionError("a deterministic rollout asked for noise")
