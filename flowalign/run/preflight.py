"""What a run will cost, said before anything is loaded."""

from __future__ import annotations

from flowalign.config import TrainConfig
from flowalign.rollouts.collect import leaves_per_group


def forecast(config: TrainConfig) -> str:
    """The batch arithmetic and the network evaluations of one iteration and of the run, in the most expensive case."""
    rollout, run, evaluation = config.rollout, config.run, config.evaluation
    cost = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size)
    guided = 2 if rollout.guidance_scale != 1 else 1
    samples, probes = leaves_per_group(rollout)
    images = rollout.groups * samples
    updates = config.trainer.updates_per_iteration()
    sample, train = (guided * rollout.groups * rows for rows in (cost.rollout, cost.train))
    reference = train if config.trainer.needs_reference() else 0
    notes = []
    if probes:
        notes.append(f"probes: {probes / samples:.2f} per image, decoded and scored but not counted as images")
    if rollout.guidance_scale != evaluation.guidance_scale:
        notes.append(
            f"guidance: rollout.guidance_scale={rollout.guidance_scale:g}, "
            f"evaluation.guidance_scale={evaluation.guidance_scale:g}; evaluations do not sample as the rollout does"
        )
    return "\n".join(
        [
            f"run {run.name}: {run.iterations} iterations × {rollout.groups} prompts × {samples} images = "
            f"{run.iterations * images:,} images",
            f"per iteration: {images} images, at most {cost.edges * rollout.groups} trained steps at "
            f"{cost.train * rollout.groups} distinct states, {updates} optimizer step(s) of "
            f"{rollout.groups // updates} prompts",
            f"network evaluations per image: rollout {sample / images:.2f}, update at most {train / images:.2f} "
            "forward and backward" + (f", reference at most {reference / images:.2f}" if reference else ""),
            f"whole run: at most {run.iterations * (sample + reference):,} forwards, {run.iterations * train:,} with backward",
            *notes,
        ]
    )
