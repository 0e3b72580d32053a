"""Pipelines whose scheduler is a multistep solver of a flow (Wan: UniPC, SANA: DPM-Solver++): what such a family has to say of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin
from torch import Tensor

from samplers import RectifiedFlow

# options of the released schedulers, whose steps the solvers of `samplers` repeat
RELEASED = {
    "use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2, "lower_order_final": True,
    "final_sigmas_type": "zero", "thresholding": False,
}  # fmt: skip


def flow_multistep_path(scheduler: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> RectifiedFlow:
    """The path of a scheduler's config; ValueError if its class is not `name` or its steps are not those that the family's
    solver repeats, whose options are RELEASED and `own`. An absent option has the class's default."""
    if scheduler.get("_class_name") != name:
        raise ValueError(
            f"got scheduler {scheduler.get('_class_name')}; expected {name}, whose steps the rollout repeats: save the pipeline with "
            "the scheduler of the released checkpoint"
        )
    for option, value in {**RELEASED, **own}.items():
        if option in scheduler and scheduler[option] != value:
            raise ValueError(
                f"got a {name} with {option}={scheduler[option]!r}; expected {value!r}, as released, whose steps the rollout repeats: set "
                "it in the pipeline's scheduler_config.json"
            )
    return RectifiedFlow()


def flow_multistep_sigmas(scheduler: SchedulerMixin, num_inference_steps: int) -> Tensor:
    """[T+1] fp32 on the CPU: the scheduler's own levels. ValueError where `flow_multistep_timestep` of one is not the timestep that
    the pipeline gives the network: the scheduler cuts off 1000·σ before σ is rounded to fp32."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    sigmas: Tensor = scheduler.sigmas.float().clone()
    if bool((wrong := flow_multistep_timestep(sigmas[:-1]) != scheduler.timesteps).any()):
        raise ValueError(
            f"got num_inference_steps={num_inference_steps} with flow_shift={scheduler.config.flow_shift}, where "
            f"σ={float(sigmas[:-1][wrong][0]):.7f} has timestep {int(scheduler.timesteps[wrong][0])}; expected ⌊1000·σ⌋, as with the released "
            "flow_shift of 3 to 12 up to 100 steps: take another number of steps, or set flow_shift in the pipeline's scheduler_config.json"
        )
    return sigmas


def flow_multistep_timestep(sigma: Tensor) -> Tensor:
    """[n] int64: the timesteps that these schedulers give the network, ⌊1000·σ⌋; theirs for shifts of 3 to 12 and up to 100 steps."""
    return (sigma.double() * 1000).floor().long()
