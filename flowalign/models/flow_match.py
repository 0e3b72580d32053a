"""Pipelines whose scheduler is FlowMatchEulerDiscreteScheduler: their levels, and what else such a family has to say of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from samplers import RectifiedFlow

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# option of the scheduler -> what the pipeline would do that the rollout does not
NOT_FOLLOWED = {
    "stochastic_sampling": "every step of the pipeline would add fresh noise",
    "invert_sigmas": "the levels would rise from 0 to 1",
}
# options of the scheduler under which its set_timesteps(sigmas=...) keeps the levels bit for bit
UNCHANGED_LEVELS = {
    "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip


def flow_match_path(scheduler: dict[str, Any]) -> RectifiedFlow:
    """The path of a scheduler's config; ValueError if the scheduler's step is not the Euler step of the rollout. Options
    that only move the levels (shifts, Karras, exponential) are followed, since the scheduler is asked for them."""
    name = scheduler.get("_class_name")
    if name != SCHEDULER:
        raise ValueError(
            f"got scheduler {name}; expected {SCHEDULER}, whose step is the Euler step of the rollout: save the "
            "pipeline with that one"
        )
    for option, effect in NOT_FOLLOWED.items():
        if scheduler.get(option):
            raise ValueError(
                f"got a scheduler with {option}=true; expected false, since {effect} and the rollout would not: set it "
                "to false in the pipeline's scheduler_config.json"
            )
    return RectifiedFlow()


def flow_match_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, *, mu: float | None, linear: bool
) -> Tensor:
    """[T+1] fp32: the scheduler's own levels. mu: the shift of a latent's size, used where the scheduler shifts by it. linear: it
    is given 1 … 1/T in equal steps, as most pipelines do; else it chooses where to begin, as SD3's. ValueError: see `levels_from`."""
    if linear:
        return levels_from(scheduler, np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist(), mu)
    return levels_from(scheduler, num_inference_steps, mu)


def levels_from(scheduler: FlowMatchEulerDiscreteScheduler, given: int | list[float], mu: float | None) -> Tensor:
    """[T+1] fp32: the scheduler's own levels for a number of steps, or from levels [T] that it shifts. mu: see `flow_match_sigmas`.
    ValueError for one step where the scheduler moves the last level (shift_terminal): there the first is the last, and 0/0 comes of it."""
    if scheduler.config.shift_terminal and (given if isinstance(given, int) else len(given)) == 1:
        raise ValueError(
            f"got num_inference_steps=1 with a scheduler that has shift_terminal={scheduler.config.shift_terminal}; expected at least 2 "
            "steps, since its only level would be 1 and the terminal one: take more, or a schedule"
        )
    scheduler = copy.deepcopy(scheduler)
    name = "num_inference_steps" if isinstance(given, int) else "sigmas"
    shift = {"mu": mu} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(device="cpu", **{name: given}, **shift)
    return scheduler.sigmas.float().clone()


def flow_match_call(sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
    """`Model.pipeline_sigmas` of a pipeline that takes `sigmas`. Its scheduler would shift the levels it is given again, so its
    shift is set to 1."""
    options = ", ".join(f"{name}={value}" for name, value in UNCHANGED_LEVELS.items())
    setup = (
        f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, {options})  # takes `sigmas` as they are"
    )
    # str: the shortest exact digits
    return [setup], {"sigmas": [float(str(level)) for level in sigmas[:-1].numpy()]}
