"""What can be known of a configuration before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from flowalign.buckets import bucketed
from flowalign.config.reads import check_rewards_read
from flowalign.config.settings import TrainConfig, evaluation_schedule
from flowalign.config.sizes import check_sizes
from flowalign.data import PromptRecord, load_prompts
from flowalign.errors import ConfigError
from flowalign.models.checkpoints import inspect_checkpoint
from flowalign.models.checks import (
    check_checkpoint,
    check_fixed_rows,
    check_image_size,
    check_lora_folders,
    check_one_row,
    check_options,
    check_role_pipelines,
    check_switches,
    check_vae_tiling,
    count_lora_numbers,
    guidance_of,
    path_of,
)
from flowalign.models.family import Family, Guidance, check_negative_prompts, check_source_images
from flowalign.models.quantization import check_quantization
from flowalign.models.roles import check_roles
from flowalign.rollouts.rolling import grow, leaves_per_group
from flowalign.rollouts.sources import check_sources
from flowalign.rollouts.task import Rollout
from flowalign.trainers import Setup
from rewards import channels_of, spec_of
from samplers import check_schedule, unscored


def check(config: TrainConfig) -> None:
    """Everything that can be known before a model is loaded."""
    rollout, policy = config.rollout, config.policy
    _check_numbers(rollout, config.evaluation.guidance_scale)
    for tracker in config.run.trackers:
        if find_spec(tracker) is None:
            raise ConfigError(f"run.trackers names {tracker!r}, which is not installed: install it, or leave it out")
    check_roles(config.roles)
    _check_trained_roles(config)
    family, latent_shape = _check_policy(config)
    guidance = guidance_of(policy.path, policy.family)
    lora_numbers = 0
    if policy.trainable == "lora":
        lora_numbers = count_lora_numbers(policy.path, policy.lora, policy.family)
    evaluation = config.evaluation
    check_sizes(
        rollout, config.largest_size, latent_shape, evaluated=evaluation.count * evaluation.samples_per_prompt,
        evaluation_steps=evaluation.num_inference_steps, evaluation_batch=evaluation.batch_size, lora_numbers=lora_numbers,
    )  # fmt: skip
    path = path_of(policy.path, policy.family)
    for key, schedule, steps in (
        ("rollout", rollout.schedule, rollout.num_inference_steps),
        ("evaluation", evaluation_schedule(config), config.evaluation.num_inference_steps),
    ):
        try:
            check_schedule(schedule, steps, path, family.takes_levels)
        except ValueError as error:
            raise ConfigError(f"{key}.schedule: {error}") from error
    bound = replace(rollout, kernel=rollout.kernel.bind(path))
    state_channels = _check_rewards(config)
    if bound.reward_guidance is not None:
        bound.reward_guidance.check(grow(bound, 0, 0, [0]), bound.kernel, path, config.process_rewards)
    prompts, held_out = _prompts(config, family, guidance)
    check_rewards_read(config, prompts, held_out)
    evaluated = [] if evaluation.allow_training_prompts else held_out[: evaluation.count]
    setup = Setup(
        bound, path, channels_of(config.reward), policy.roles, state_channels, reward=spec_of(config.reward), size=policy.size,
        prompts=prompts, held_out=evaluated, rows_per_state=family.rows_per_state, guidance=guidance,
    )  # fmt: skip
    setup.check_guidance_scale("rollout.guidance_scale", rollout.guidance_scale)
    setup.check_guidance_scale("evaluation.guidance_scale", evaluation.guidance_scale)
    config.trainer.check(setup)
    if policy.trainable == "lora":
        check_lora_folders(policy.path, policy.lora, config.roles, policy.family)
    elif "reference" in config.trainer.roles() and not policy.reference_copy:
        raise ConfigError(
            "got policy.trainable=full and a trainer that needs the reference, of which no copy is kept: set "
            "policy.reference_copy=true (it doubles the memory of the network), or leave out what needs it, such as a KL: "
            "trainer.regularizers={}"
        )
    else:
        check_role_pipelines(policy.path, config.roles, policy.family)
    known = {"policy", *config.roles} | (
        {"reference"} if policy.trainable == "lora" or policy.reference_copy else set()
    )
    check_sources(rollout, grow(rollout, 0, 0, [0]), known, prompts)
    _check_branch_scale(rollout)
    if config.evaluation.count > len(held_out):
        raise ConfigError(
            f"evaluation.count={config.evaluation.count}: {config.evaluation.prompts} holds {len(held_out)} prompts"
        )
    _check_held_out(config, prompts, held_out[: config.evaluation.count])
    _check_one_size(config, held_out[: config.evaluation.count])


def _check_policy(config: TrainConfig) -> tuple[Family, tuple[int, ...]]:
    """What the checkpoint's files and configurations tell of the policy. The family, and the shape of its largest latent."""
    policy, rollout = config.policy, config.rollout
    check_checkpoint(policy.path, policy.family)
    family = inspect_checkpoint(policy.path, policy.family)[1]
    check_options(family, policy.max_sequence_length, policy.options)
    _check_uncond(rollout, family)
    shapes = {size: check_image_size(policy.path, size, policy.family) for size in config.sizes}
    if policy.decode_batch is not None and policy.decode_batch < 1:
        raise ConfigError(f"policy.decode_batch={policy.decode_batch}: expected at least 1, or null")
    if policy.max_sequence_length is not None and policy.max_sequence_length < 0:
        raise ConfigError(f"policy.max_sequence_length={policy.max_sequence_length}: expected at least 0, or null")
    check_quantization(policy.quantization, policy.trainable)
    check_switches(policy.path, policy.switches, policy.family)
    check_vae_tiling(policy.path, policy.vae_tiling, policy.family)
    check_fixed_rows(policy.path, rollout.rows, policy.family)
    return family, shapes[config.largest_size]


def _prompts(config: TrainConfig, family: Family, guidance: Guidance) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Those that are trained on and those of the evaluation; ValueError for one that says what the model would not read."""
    prompts, held_out = config.training_prompts(), load_prompts(config.evaluation.prompts)
    records, own = [*prompts, *held_out], config.policy.negative_prompt
    check_source_images(records, family)
    check_one_row(guidance, own, records)
    check_negative_prompts([own, *(each.negative_prompt for each in records)], family)
    return prompts, held_out


def _check_numbers(rollout: Rollout, evaluation_scale: float) -> None:
    """ConfigError for numbers of the rollout outside their ranges, or for a guidance scale of the evaluation."""
    for key in ("groups", "group_size", "num_inference_steps", "micro_batch"):
        if vars(rollout)[key] < 1:
            raise ConfigError(f"rollout.{key}={vars(rollout)[key]}: expected at least 1")
    if rollout.chunk is not None and rollout.chunk < 1:
        raise ConfigError(f"rollout.chunk={rollout.chunk}: expected at least 1 group, or null for all at once")
    for key, scale in (("rollout", rollout.guidance_scale), ("evaluation", evaluation_scale)):
        if not 1 <= scale < math.inf:  # at 0 the prompt would be ignored, where diffusers means no guidance
            raise ConfigError(f"{key}.guidance_scale={scale}: expected a number from 1 (no guidance)")
    if rollout.branch_scale is not None and not 0 < rollout.branch_scale < math.inf:
        raise ConfigError(f"rollout.branch_scale={rollout.branch_scale}: expected a number above 0, or null")


def _check_uncond(rollout: Rollout, family: Family) -> None:
    """ConfigError for a gradient that is to be kept from an unconditional half which is not there."""
    if rollout.detach_uncond and family.rows_per_state(rollout.guidance_scale) == 1:
        raise ConfigError(
            f"got rollout.detach_uncond=true with rollout.guidance_scale={rollout.guidance_scale} for a {family.pipeline.__name__}, which "
            "evaluates one row per state there and has no unconditional half: it would silently do nothing; set detach_uncond=false, or "
            "take a guidance_scale above 1 where guidance takes two rows"
        )


def _check_branch_scale(rollout: Rollout) -> None:
    """ConfigError for correlated noise of siblings in a plan that has none; where it moves, in eight iterations."""
    if rollout.branch_scale is None:
        return
    trees = (grow(rollout, 0, iteration, [0]) for iteration in range(8))
    if not any(tree.parent[tree.edges].unique().numel() < len(tree.edges) for tree in trees):
        raise ConfigError(
            f"got rollout.branch_scale={rollout.branch_scale} with rollout.plan={rollout.plan}, in which no two stochastic steps leave "
            "one state: it would silently do nothing; leave it out, or take a plan that branches (samplers.Branch, SplitTree, TreeWindow)"
        )


def _check_trained_roles(config: TrainConfig) -> None:
    """ConfigError for a role of the trainer that both the trainer and `update` would change, or neither."""
    for name, wanted in config.trainer.roles().items():
        role = config.policy.roles.get(name, wanted)
        if (role.update == "trained") != (wanted.update == "trained"):
            steps = "steps itself" if wanted.update == "trained" else "does not step"
            raise ConfigError(
                f"got policy.roles.{name}.update={role.update}, a role that {type(config.trainer).__name__} {steps}; expected "
                f"{'trained' if wanted.update == 'trained' else 'frozen, copy or ema'}: set it, or leave the role to the trainer"
            )


def _check_held_out(config: TrainConfig, prompts: Sequence[PromptRecord], held_out: Sequence[PromptRecord]) -> None:
    """ConfigError for prompts of the evaluation that are trained on, unless that is asked for."""
    trained = {(record.prompt, record.images) for record in prompts}
    shared = [record.prompt for record in held_out if (record.prompt, record.images) in trained]
    if shared and not config.evaluation.allow_training_prompts:
        raise ConfigError(
            f"got {len(shared)} of the {len(held_out)} prompts of evaluation.prompts={config.evaluation.prompts} among those of "
            f"prompts={config.prompts}, such as {shared[0]!r}; expected prompts that are not trained on, or the gain would not be "
            "that of new ones: name others, or set evaluation.allow_training_prompts=true"
        )


def _check_one_size(config: TrainConfig, held_out: Sequence[PromptRecord]) -> None:
    """ConfigError for prompts of the evaluation that belong to another bucket than the policy's size: an evaluation has one size."""
    usual = config.policy.size
    others = (
        [each for each in bucketed(held_out, config.sizes, usual) if each.size != usual]
        if config.rollout.buckets
        else []
    )
    if others:
        raise ConfigError(
            f"got {len(others)} of the {len(held_out)} prompts of evaluation.prompts={config.evaluation.prompts} for other buckets than "
            f"policy.height × policy.width = {usual.height}×{usual.width}, such as {others[0].prompt!r} for {others[0].size}; expected "
            "prompts of that size, which an evaluation has: evaluate those alone"
        )


def _check_rewards(config: TrainConfig) -> tuple[str, ...]:
    """Each reward is where its scope belongs. Returns the channels of the process rewards."""
    preview = config.rollout.preview_reward
    for key, reward, terminal in (
        ("reward", config.reward, True),
        *([] if preview is None else [("rollout.preview_reward", preview, True)]),
        *(("evaluation.rewards", reward, True) for reward in config.evaluation.rewards),
        *(("process_rewards", reward, False) for reward in config.process_rewards),
    ):
        if (spec_of(reward).scope == "terminal") != terminal:
            raise ConfigError(
                f"got {key} with {reward.name!r}, whose scope is {spec_of(reward).scope!r}; "
                + ("expected 'terminal': name it under process_rewards" if terminal else
                   "expected a reward of states: name it under reward, or wrap it in rewards.OnCompletion")
            )  # fmt: skip
    _check_groupwise(config)
    _check_overlap(config)
    if config.policy.fps is not None and not 0 < config.policy.fps < math.inf:
        raise ConfigError(f"policy.fps={config.policy.fps}: expected a number above 0, or null")
    if config.policy.frames > 1 and config.policy.fps is None:
        raise ConfigError(
            f"policy.frames={config.policy.frames} with policy.fps=null; expected frames per second: set policy.fps=16, say"
        )
    states = tuple(channel for reward in config.process_rewards for channel in channels_of(reward))
    if len(set(states)) < len(states) or set(states) & set(channels_of(config.reward)):
        raise ConfigError(
            f"got process_rewards with the channels {list(states)} beside reward with {list(channels_of(config.reward))}; "
            "expected different names: set `name`"
        )
    _check_selecting(config)
    return states


def _check_selecting(config: TrainConfig) -> None:
    """ConfigError for a plan that selects by several scores, a preview_reward without such a plan, a refill with one."""
    rollout, ranked_by = config.rollout, config.rollout.preview_reward or config.reward
    selects = rollout.plan.select(unscored) is not None
    if selects and len(channels_of(ranked_by)) > 1:
        raise ConfigError(
            f"got a rollout.plan that selects by {ranked_by.name!r}, which has the channels {list(channels_of(ranked_by))}; expected "
            "one score to rank states by: set rollout.preview_reward, or take rewards.Mix"
        )
    if rollout.preview_reward is not None and not selects:
        raise ConfigError(
            f"got rollout.preview_reward {ranked_by.name!r} with a rollout.plan that selects nothing, which would not ask it: "
            "take a plan with samplers.Selected, or leave it out"
        )
    if rollout.refill < 0 or (rollout.refill and rollout.asks_on_its_way):
        raise ConfigError(
            f"got rollout.refill={rollout.refill}; expected at least 0, and 0 with a plan that selects or with reward_guidance: "
            "their groups are rolled out once"
        )


def _check_overlap(config: TrainConfig) -> None:
    """ConfigError for chunks that are to overlap where they never do."""
    rollout = config.rollout
    if rollout.overlap and (rollout.chunk is None or rollout.chunk >= rollout.groups):
        raise ConfigError(
            f"got rollout.overlap=true with rollout.chunk={'null' if rollout.chunk is None else rollout.chunk} and rollout.groups="
            f"{rollout.groups}, all rolled out at once; expected a chunk of fewer groups: set it, or leave rollout.overlap out"
        )
    if rollout.overlap and (config.process_rewards or rollout.asks_on_its_way):
        raise ConfigError(
            "got rollout.overlap=true; expected no process_rewards, no reward_guidance and no plan that selects, whose rollout decodes "
            "and asks rewards itself: leave rollout.overlap out"
        )


def _check_groupwise(config: TrainConfig) -> None:
    """ConfigError for a groupwise reward among groups of one, or of samples and probes."""
    if spec_of(config.reward).groupwise and leaves_per_group(config.rollout)[1]:
        raise ConfigError(
            f"got a rollout.plan with probes and reward {config.reward.name!r}, which would compare samples with probes of their "
            "prompt; expected a reward of each sample by itself, or a plan without samplers.Probed"
        )
    evaluated = [*config.evaluation.rewards, *([config.reward] if config.evaluation.training_reward else [])]
    for reward in evaluated:
        if spec_of(reward).groupwise and config.evaluation.samples_per_prompt < 2:
            raise ConfigError(
                f"got evaluation.samples_per_prompt={config.evaluation.samples_per_prompt} with {reward.name!r}, which compares the "
                "samples of one prompt; expected at least 2: raise it, or set evaluation.training_reward=false if that is it"
            )
