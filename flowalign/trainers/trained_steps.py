"""Which rollouts give a trainer stochastic steps to train: checks before a model is loaded."""

from __future__ import annotations

import torch

from flowalign.rollouts.rolling import grow, leaves_per_group
from flowalign.rollouts.task import Rollout
from flowalign.trainers.base import Setup
from samplers import unscored


def check_trained_steps(rollout: Rollout) -> None:
    """ValueError for a rollout whose groups have no two samples to compare, or whose steps have no density."""
    if rollout.group_size < 2:
        raise ValueError(
            f"got rollout.group_size={rollout.group_size}; expected at least 2: the advantage compares an image with "
            "others of its prompt"
        )
    if not rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size).edges:
        raise ValueError("got a rollout.plan without a stochastic step, so nothing to train: widen its window")
    samples, _ = leaves_per_group(rollout)
    if samples < 2:
        raise ValueError(
            f"got a rollout.plan that ends in {samples} image of each prompt; expected at least 2, which the advantage "
            "compares: let its selection keep more"
        )
    sigma, sigma_next = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()
    if not bool((rollout.kernel.coefficients(sigma, sigma_next, torch.ones_like(sigma)).std > 0).all()):
        raise ValueError(
            f"got rollout.kernel={rollout.kernel}, which draws no noise, so steps have no log-prob: take FlowSDE, "
            "DanceSDE or CPS with a noise_level above 0"
        )


def check_previews(rollout: Rollout) -> None:
    """ValueError for a selection on the way whose scores would be those of noise."""
    select = rollout.plan.select(unscored)
    if select is not None and not select.preview_steps and min(select.counts) < rollout.num_inference_steps:
        raise ValueError(
            "got rollout.plan.preview_steps=0 with a selection on the way, where the reward would see noise; expected at least "
            "1, the jump to the predicted image: set preview_steps=1, or more"
        )


def check_guidance(setup: Setup) -> None:
    """ValueError for an update of few steps under classifier-free guidance, unless it is asked for; a scale that is an input of the
    network is none."""
    rollout = setup.rollout
    tree = grow(rollout, 0, 0, [0])
    few = len(tree.index[tree.parents_of_edges].unique()) < rollout.num_inference_steps - 1
    if setup.rows_per_state(rollout.guidance_scale) > 1 and few and not rollout.allow_cfg_update:
        raise ValueError(
            f"got rollout.guidance_scale={rollout.guidance_scale} inside a window of few steps, where peers report "
            "collapse: set rollout.guidance_scale=1, or rollout.allow_cfg_update=true to do it all the same"
        )
