"""What a run evaluates, decodes and scores, in the most expensive case."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.config import TrainConfig
from flowalign.models.checks import rows_per_state
from flowalign.rollouts.completions import cost_of_completions
from flowalign.rollouts.rolling import grow, leaves_per_group


@dataclass(frozen=True)
class RunCounts:
    """Of one iteration, over all processes: images; network rows of its rollouts (sampled), of updates with a backward (trained)
    and without (frozen); decodes of images and reward_calls. Of the whole run: rows and images scored before the first iteration, and
    those of its evaluations, from the first to the last.

    Not kept: what the reward of a reward-guided rollout and the update of a trainer that back-propagates its reward decode."""

    iterations: int
    images: int
    sampled: int
    trained: int
    frozen: int
    decodes: int
    before: int
    before_scored: int
    evaluation_rows: int
    evaluated: int

    @staticmethod
    def of(config: TrainConfig) -> RunCounts:
        rollout, run, policy, evaluation = config.rollout, config.run, config.policy, config.evaluation
        cost = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size)
        update, (samples, probes) = config.trainer.forecast(rollout), leaves_per_group(rollout)
        tree = grow(rollout, 0, 0, [0])
        steps = [reward.spec.completion_steps for reward in config.process_rewards if reward.spec.scope == "completion"]
        rolled, scored = update.rolled, samples + probes + cost.previews
        if rolled is None:
            rolled = rollout.groups * (cost.rollout + sum(cost_of_completions(tree, each)[1] for each in set(steps)))
        scored += sum(cost_of_completions(tree, each)[0] for each in steps)
        guided = rows_per_state(policy.path, rollout.guidance_scale, policy.family)
        scale = rollout.guidance_scale if update.guidance_scale is None else update.guidance_scale
        per_state = rows_per_state(policy.path, scale, policy.family)
        evaluations = 2 + (0 if evaluation.every is None else (run.iterations - 1) // evaluation.every)
        evaluated = evaluations * evaluation.count * evaluation.samples_per_prompt
        per_image = evaluation.num_inference_steps * rows_per_state(
            policy.path, evaluation.guidance_scale, policy.family
        )
        return RunCounts(
            run.iterations, rollout.groups * samples, guided * rolled * (1 + rollout.refill), per_state * update.trained,
            per_state * update.frozen, rollout.groups * scored * (1 + rollout.refill) if rolled else 0, guided * update.before,
            update.before_scored, evaluated * per_image, evaluated,
        )  # fmt: skip
