"""Pipelines of flows whose scheduler is UniPCMultistepScheduler: their levels and integer timesteps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from samplers import RectifiedFlow

SCHEDULER = "UniPCMultistepScheduler"
# options of the scheduler with which its steps are those of samplers.UniPC; the rest only moves the levels, for which it is asked
STEPS = {
    "use_flow_sigmas": True, "prediction_type": "flow_prediction", "predict_x0": True, "solver_order": 2, "solver_type": "bh2",
    "lower_order_final": True, "disable_corrector": [], "solver_p": None, "thresholding": False, "final_sigmas_type": "zero",
    "use_dynamic_shifting": False, "num_train_timesteps": 1000,
}  # fmt: skip


def unipc_path(scheduler: Mapping[str, Any]) -> RectifiedFlow:
    """The path of a scheduler's config; ValueError for a scheduler whose steps are not those of `samplers.UniPC`."""
    name = scheduler.get("_class_name")
    if name != SCHEDULER:
        raise ValueError(
            f"got scheduler {name}; expected {SCHEDULER}, whose steps the rollout repeats: save the pipeline with that one"
        )
    settings = UniPCMultistepScheduler.from_config(dict(scheduler)).config
    if wrong := {name: settings[name] for name, value in STEPS.items() if settings[name] != value}:
        expected = ", ".join(f"{name}={STEPS[name]}" for name in wrong)
        found = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise ValueError(
            f"got a scheduler with {found}; expected {expected}, as Wan's: set it in the pipeline's scheduler_config.json"
        )
    return RectifiedFlow()


def unipc_sigmas(scheduler: UniPCMultistepScheduler, num_inference_steps: int) -> Tensor:
    """[T+1] fp32: the scheduler's own levels, from about 1 - 1e-6 to 0. ValueError where `unipc_timesteps` of one is not the
    timestep that the pipeline's call gives the network, such as on many grids of flow_shift=1."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    sigmas = scheduler.sigmas.float().clone()
    if (wrong := unipc_timesteps(sigmas[:-1]) != scheduler.timesteps).any():
        raise ValueError(
            f"got num_inference_steps={num_inference_steps} with flow_shift={scheduler.config.flow_shift}, where the timestep of "
            f"σ={float(sigmas[:-1][wrong][0]):.7f} is {int(scheduler.timesteps[wrong][0])}, not its floor; expected grids such as those of the "
            "released flow_shift (3, 5, 8, 12): change the number of steps, or the flow_shift in scheduler_config.json"
        )
    return sigmas


def unipc_timesteps(sigma: Tensor) -> Tensor:
    """int64 [n] of levels [n]: what the network sees. The scheduler cuts off 1000·σ of its float64 levels."""
    return (sigma.double() * 1000).floor().to(torch.int64)
