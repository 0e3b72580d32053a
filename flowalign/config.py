"""Configuration: YAML files plus dotted overrides -> typed objects; everything that can be checked is, before loading."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from flowalign.config_layers import entries_of, located, merge, read_layer
from flowalign.config_nodes import checked
from flowalign.config_overrides import overridden
from flowalign.config_parser import explain, own_rules
from flowalign.config_sizes import check_sizes
from flowalign.config_types import Parameter
from flowalign.contracts import check_attributes
from flowalign.data import PromptRecord, load_prompts
from flowalign.errors import ConfigError
from flowalign.models.base import Size
from flowalign.models.load import (
    check_checkpoint,
    check_image_size,
    check_lora_folders,
    check_lora_targets,
    count_lora_numbers,
    path_of,
)
from flowalign.models.lora import LoRA
from flowalign.models.roles import Role, check_roles
from flowalign.rollouts.collect import grow
from flowalign.rollouts.sources import check_sources
from flowalign.rollouts.task import Rollout
from flowalign.trainers import Setup, Trainer
from rewards import Reward, channels_of, labels_of, spec_of
from samplers import Schedule, check_schedule, unscored


@dataclass(frozen=True)
class PolicySettings:
    """Which model, and which of its weights are trained (see `load_policy`). family: the import path of a model family of
    your own, such as my_module.FAMILY; null finds it by the pipeline's class. height, width in pixels, frames of a video, fps: how many of
    them a second has."""

    path: str = "glyphs"
    lora: LoRA = field(default_factory=LoRA)
    trainable: Literal["lora", "full"] = "lora"
    dtype: Literal["fp32", "bf16"] = "fp32"
    vae_dtype: Literal["fp32", "bf16"] | None = None
    family: str | None = None
    height: int = 512
    width: int = 512
    frames: int = 1
    max_sequence_length: int | None = None
    negative_prompt: str = ""
    fps: float | None = None
    reference_copy: bool = False
    offload: list[Literal["encoders", "vae"]] = field(default_factory=list)
    decode_batch: int | None = None
    roles: dict[str, Role] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        """What is generated."""
        return Size(self.height, self.width, self.frames)


@dataclass(frozen=True)
class RunSettings:
    """A run: its folder `output`/`name`, its length and what it keeps. `resume`: "auto" goes on with a run of the same
    configuration, up to settings of length, speed and memory; "changed" also with other settings (a wider clip range,
    say), which are noted in provenance.json; "never" refuses a folder that exists. project and tags: for the trackers."""

    name: str
    iterations: int = 100
    seed: int = 0
    output: str = "runs"
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    ema_decay: float | None = None
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    project: str = "flowalign"
    tags: list[str] = field(default_factory=list)
    resume: Literal["auto", "changed", "never"] = "auto"
    gradient_check: bool = True

    def __post_init__(self) -> None:
        for key in ("iterations", "checkpoint_every", "keep_checkpoints"):
            if vars(self)[key] < 1:
                raise ValueError(f"run.{key}={vars(self)[key]}: expected at least 1")
        _check_seed("run.seed", self.seed)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"run.name={self.name!r}: expected letters, digits, '.', '_' and '-', it names a folder")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"run.ema_decay={self.ema_decay}: expected 0 <= decay < 1, or null for none")


@dataclass(frozen=True)
class EvaluationSettings:
    """Base beside tuned on held-out prompts, by the policy's solver, same seeds. The first reward is the one reported.
    training_reward: whether these prompts are scored by the reward that is trained on, too. allow_training_prompts: they may be
    among those that are trained on (the gain is then not of new prompts). `schedule`: the noise levels; null: those of the rollout (samplers.FamilyGrid: the pipeline's own). `every`: also
    evaluate after so many iterations (null: only before and after the run)."""

    prompts: str
    rewards: list[Reward]
    count: int = 256
    samples_per_prompt: int = 1
    num_inference_steps: int = 40
    schedule: Schedule | None = None
    guidance_scale: float = 1.0
    seed: int = 1234
    batch_size: int = 64
    every: int | None = None
    training_reward: bool = True
    allow_training_prompts: bool = False

    def __post_init__(self) -> None:
        for key in ("count", "samples_per_prompt", "num_inference_steps", "batch_size"):
            if vars(self)[key] < 1:
                raise ValueError(f"evaluation.{key}={vars(self)[key]}: expected at least 1")
        _check_seed("evaluation.seed", self.seed)
        names = [label for reward in self.rewards for label in labels_of(reward)]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"evaluation.rewards are named {names}: expected at least one, each with its own `name`")
        if self.every is not None and self.every < 1:
            raise ValueError(f"evaluation.every={self.every}: expected at least 1, or null")


def _check_seed(key: str, seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"{key}={seed}: expected a number from 0 to 2**63 - 1")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training configuration.

    process_rewards: score noisy states of the rollout, by the names of their channels (see flowalign.credit.Process)."""

    run: RunSettings
    prompts: str
    reward: Reward
    trainer: Trainer
    evaluation: EvaluationSettings
    rollout: Rollout
    policy: PolicySettings = field(default_factory=PolicySettings)
    process_rewards: list[Reward] = field(default_factory=list)

    @property
    def roles(self) -> dict[str, Role]:
        """Those that the policy gets: of policy.roles, and of the trainer where no role there has its name. Without the
        reference, which is always there."""
        wanted = {**self.trainer.roles(), **self.policy.roles}
        return {name: role for name, role in wanted.items() if name != "reference"}


def evaluation_schedule(config: TrainConfig) -> Schedule | None:
    """Of evaluations and of the exported call: evaluation.schedule, or where that is not set rollout.schedule."""
    return config.rollout.schedule if config.evaluation.schedule is None else config.evaluation.schedule


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, prog="flowalign train", allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig, as_group=False, fail_untyped=True)
    return parser


def load_config(paths: str | Sequence[str], overrides: Sequence[str] = ()) -> tuple[TrainConfig, dict[str, Any]]:
    """The typed configuration, and as plain data (what is saved and compared on resume; alone it gives the same run).

    paths: one YAML file, or several, later ones over earlier ones (see `flowalign.config_layers.merge`). overrides: key=value,
    over all files, later ones over earlier ones (see `flowalign.config_overrides.overridden`). A run without a name gets those of its files. Raises ConfigError; no model is loaded."""
    paths = [paths] if isinstance(paths, str) else paths
    node, whole = _read(paths), Parameter(TrainConfig)
    given = entries_of(node).get("run")  # what is no mapping is refused below
    if given is None or (isinstance(given[1], yaml.MappingNode) and "name" not in entries_of(given[1])):
        node = overridden(node, f"run.name={'-'.join(Path(path).stem for path in paths)}", whole)
    for override in overrides:
        node = overridden(node, override, whole)
    try:
        text = yaml.serialize(checked(node, whole))
        reader = parser()
        with own_rules():
            namespace = reader.parse_args(["--config", text])
            plain = yaml.safe_load(reader.dump(namespace, skip_unset=False))
            objects = reader.instantiate(namespace)
    except ConfigError as error:
        raise ConfigError(located(str(error), node)) from error
    except Exception as error:  # jsonargparse raises many kinds; each is a fault of the configuration
        raise ConfigError(located(explain(str(error)), node)) from error
    plain.pop("config", None)
    values = objects.as_dict() if isinstance(objects, Namespace) else dict(objects)
    values.pop("config", None)
    config = TrainConfig(**values)
    try:
        check_attributes(config)
        check(config)
    except (ValueError, OSError) as error:
        raise ConfigError(located(str(error), node)) from error
    return config, plain


def _read(paths: Sequence[str]) -> yaml.Node:
    """All files as one."""
    if not paths:
        raise ConfigError("no configuration file was named; expected at least one, such as configs/quickstart.yaml")
    layers: list[yaml.Node] = [read_layer(path) for path in paths]
    return reduce(merge, layers)


def check(config: TrainConfig) -> None:
    """Everything that can be known before a model is loaded."""
    rollout, policy = config.rollout, config.policy
    for key in ("groups", "group_size", "num_inference_steps", "micro_batch"):
        if vars(rollout)[key] < 1:
            raise ConfigError(f"rollout.{key}={vars(rollout)[key]}: expected at least 1")
    for key, scale in (("rollout", rollout.guidance_scale), ("evaluation", config.evaluation.guidance_scale)):
        if not 1 <= scale < math.inf:  # at 0 the prompt would be ignored, where diffusers means no guidance
            raise ConfigError(f"{key}.guidance_scale={scale}: expected a number from 1 (no guidance)")
    if rollout.detach_uncond and rollout.guidance_scale == 1:
        raise ConfigError(
            "got rollout.detach_uncond=true with rollout.guidance_scale=1, which has no unconditional half: it would "
            "silently do nothing; set detach_uncond=false, or a guidance_scale above 1"
        )
    if rollout.branch_scale is not None and not 0 < rollout.branch_scale < math.inf:
        raise ConfigError(f"rollout.branch_scale={rollout.branch_scale}: expected a number above 0, or null")
    for tracker in config.run.trackers:
        if find_spec(tracker) is None:
            raise ConfigError(f"run.trackers names {tracker!r}, which is not installed: install it, or leave it out")
    check_roles(config.roles)
    check_checkpoint(policy.path, policy.family)
    latent_shape = check_image_size(policy.path, policy.size, policy.family)
    if policy.decode_batch is not None and policy.decode_batch < 1:
        raise ConfigError(f"policy.decode_batch={policy.decode_batch}: expected at least 1, or null")
    if policy.max_sequence_length is not None and policy.max_sequence_length < 0:
        raise ConfigError(f"policy.max_sequence_length={policy.max_sequence_length}: expected at least 0, or null")
    lora_numbers = 0
    if policy.trainable == "lora":
        check_lora_targets(policy.path, policy.lora.targets, policy.family)
        lora_numbers = count_lora_numbers(policy.path, policy.lora, policy.family)
    evaluation = config.evaluation
    check_sizes(
        rollout, policy.size, latent_shape, evaluated=evaluation.count * evaluation.samples_per_prompt,
        evaluation_steps=evaluation.num_inference_steps, evaluation_batch=evaluation.batch_size, lora_numbers=lora_numbers,
    )  # fmt: skip
    path = path_of(policy.path, policy.family)
    for key, schedule, steps in (
        ("rollout", rollout.schedule, rollout.num_inference_steps),
        ("evaluation", evaluation_schedule(config), config.evaluation.num_inference_steps),
    ):
        try:
            check_schedule(schedule, steps, path)
        except ValueError as error:
            raise ConfigError(f"{key}.schedule: {error}") from error
    bound = replace(rollout, kernel=rollout.kernel.bind(path))
    state_channels = _check_rewards(config)
    config.trainer.check(Setup(bound, path, channels_of(config.reward), policy.roles, state_channels))
    if policy.trainable == "lora":
        check_lora_folders(policy.path, policy.lora, config.roles, policy.family)
    elif folders := [role.folder for role in config.roles.values() if role.folder is not None]:
        raise ConfigError(
            f"policy.trainable={policy.trainable} with a role that starts from {folders[0]}: expected policy.trainable=lora"
        )
    elif policy.dtype != "fp32":
        raise ConfigError(f"policy.dtype={policy.dtype} with policy.trainable=full: expected fp32 for the optimizer")
    elif "reference" in config.trainer.roles() and not policy.reference_copy:
        raise ConfigError(
            "got policy.trainable=full and a trainer that needs the reference (trainer.regularizers), of which no copy is kept: "
            "set trainer.regularizers={}, or policy.reference_copy=true (it doubles the memory of the network)"
        )
    known = {"policy", *config.roles} | (
        {"reference"} if policy.trainable == "lora" or policy.reference_copy else set()
    )
    check_sources(rollout, grow(rollout, 0, 0, [0]), known, load_prompts(config.prompts))
    held_out = load_prompts(config.evaluation.prompts)
    if config.evaluation.count > len(held_out):
        raise ConfigError(
            f"evaluation.count={config.evaluation.count}: {config.evaluation.prompts} holds {len(held_out)} prompts"
        )
    _check_held_out(config, held_out[: config.evaluation.count])


def _check_held_out(config: TrainConfig, held_out: Sequence[PromptRecord]) -> None:
    """ConfigError for prompts of the evaluation that are trained on, unless that is asked for."""
    trained = {(record.prompt, record.images) for record in load_prompts(config.prompts)}
    shared = [record.prompt for record in held_out if (record.prompt, record.images) in trained]
    if shared and not config.evaluation.allow_training_prompts:
        raise ConfigError(
            f"got {len(shared)} of the {len(held_out)} prompts of evaluation.prompts={config.evaluation.prompts} among those of "
            f"prompts={config.prompts}, such as {shared[0]!r}; expected prompts that are not trained on, or the gain would not be "
            "that of new ones: name others, or set evaluation.allow_training_prompts=true"
        )


def _check_rewards(config: TrainConfig) -> tuple[str, ...]:
    """Each reward is where its scope belongs. Returns the channels of the process rewards."""
    for key, reward, expected in (
        ("reward", config.reward, "terminal"),
        *(("evaluation.rewards", reward, "terminal") for reward in config.evaluation.rewards),
        *(("process_rewards", reward, "latent") for reward in config.process_rewards),
    ):
        if spec_of(reward).scope != expected:
            place = "process_rewards" if expected == "terminal" else "reward, or evaluation.rewards"
            raise ConfigError(
                f"got {key} with {reward.name!r}, whose scope is {spec_of(reward).scope!r}; expected {expected!r}: name it under {place}"
            )
    if config.policy.fps is not None and not 0 < config.policy.fps < math.inf:
        raise ConfigError(f"policy.fps={config.policy.fps}: expected a number above 0, or null")
    if config.policy.frames > 1 and config.policy.fps is None:
        raise ConfigError(f"policy.frames={config.policy.frames} with policy.fps=null: expected frames per second")
    states = tuple(channel for reward in config.process_rewards for channel in channels_of(reward))
    if len(set(states)) < len(states) or set(states) & set(channels_of(config.reward)):
        raise ConfigError(
            f"got process_rewards with the channels {list(states)} beside reward with {list(channels_of(config.reward))}; "
            "expected different names: set `name`"
        )
    several = len(channels_of(config.reward)) > 1
    if several and config.rollout.plan.select(unscored) is not None:
        raise ConfigError(
            f"got a rollout.plan that selects by the reward, which has the channels {list(channels_of(config.reward))}; expected "
            "one score to rank states by: take a plan without samplers.Selected, or rewards.Mix"
        )
    return states
