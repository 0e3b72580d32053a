"""The settings of a training run, as typed objects."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from flowalign.buckets import bucketed
from flowalign.data import PromptRecord, load_prompts
from flowalign.media import Size
from flowalign.models.lora import LoRA
from flowalign.models.quantization import Quantization
from flowalign.models.roles import Role
from flowalign.models.switches import Switches
from flowalign.rollouts.task import Rollout
from flowalign.trainers import Trainer
from rewards import Reward, labels_of
from samplers import Schedule


@dataclass(frozen=True)
class PolicySettings:
    """Which model, and which of its weights are trained (see `load_policy`). family: the import path of a model family of
    your own, such as my_module.FAMILY; null finds it by the pipeline's class. options: those of the family's own, such as guidance_scale_2 of Wan 2.2. height, width in pixels, frames of a video, fps: how many of
    them a second has. attention: one of diffusers' attention back-ends, such as flash; null: the network's own."""

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
    options: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str = ""
    fps: float | None = None
    reference_copy: bool = False
    offload: list[Literal["encoders", "vae"]] = field(default_factory=list)
    decode_batch: int | None = None
    vae_tiling: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: str | None = None
    quantization: Quantization | None = None
    roles: dict[str, Role] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        """What is generated."""
        return Size(self.height, self.width, self.frames)

    @property
    def master_weights(self) -> bool:
        """Whether the networks keep fp32 weights and multiply in bf16, under autocast: those that are trained themselves."""
        return self.trainable == "full" and self.dtype == "bf16"

    @property
    def switches(self) -> Switches:
        """Of the networks."""
        return Switches(self.gradient_checkpointing, self.compile, self.attention)


@dataclass(frozen=True)
class RunSettings:
    """A run: its folder `output`/`name`, its length and what it keeps. `resume`: "auto" goes on with a run of the same
    configuration, up to settings of length, speed and memory; "changed" also with other settings (a wider clip range,
    say), which are noted in provenance.json; "never" refuses a folder that exists. project and tags: for the trackers.

    max_evaluations, in `summary.evaluation_unit`, and max_seconds of iterations (evaluations on the way are not counted): the
    run ends before an iteration that would go beyond, if it costs what the iterations so far cost on average; the first is
    always run. null: no limit.

    device_memory: GiB of one device, and device_count: how many there are, for which memory and hours are forecast, on whatever
    machine; a configuration that cannot fit is refused. null: those of the launch (a CPU refuses nothing)."""

    name: str
    iterations: int = 100
    max_evaluations: int | None = None
    max_seconds: float | None = None
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
    device_memory: float | None = None
    device_count: int | None = None

    def __post_init__(self) -> None:
        for key in ("iterations", "checkpoint_every", "keep_checkpoints"):
            if vars(self)[key] < 1:
                raise ValueError(f"run.{key}={vars(self)[key]}: expected at least 1")
        for key in ("max_evaluations", "max_seconds", "device_memory", "device_count"):
            limit = vars(self)[key]
            if limit is not None and not limit > 0:
                raise ValueError(f"run.{key}={limit}: expected more than 0, or null for no limit")
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

    process_rewards: score states of the rollout, by the names of their channels (see flowalign.credit.Process)."""

    run: RunSettings
    prompts: str
    reward: Reward
    trainer: Trainer
    evaluation: EvaluationSettings
    rollout: Rollout
    policy: PolicySettings = field(default_factory=PolicySettings)
    process_rewards: list[Reward] = field(default_factory=list)

    @property
    def sizes(self) -> list[Size]:
        """Of what is trained on: of the rollout's buckets, or the policy's alone."""
        return self.rollout.sizes(self.policy.size)

    @property
    def largest_size(self) -> Size:
        """The one of `sizes` that takes the most memory."""
        return max(self.sizes, key=lambda size: size.pixels)

    def training_prompts(self) -> list[PromptRecord]:
        """`prompts`, each with the size of its bucket where there are buckets; errors as of load_prompts and bucketed."""
        records = load_prompts(self.prompts)
        return bucketed(records, self.sizes, self.policy.size) if self.rollout.buckets else records

    def largest_prompts(self) -> list[PromptRecord]:
        """Those of `training_prompts` of the largest size that any has."""
        sized = [(record, record.size or self.policy.size) for record in self.training_prompts()]
        largest = max((size for _, size in sized), key=lambda size: size.pixels)
        return [record for record, size in sized if size == largest]

    @property
    def roles(self) -> dict[str, Role]:
        """Those that the policy gets: of policy.roles, and of the trainer where no role there has its name; without
        the reference, which is always there."""
        wanted = {name: role for name, role in self.trainer.roles().items() if name != "reference"}
        return {**wanted, **self.policy.roles}

    @property
    def guiding_rewards(self) -> dict[str, Reward]:
        """The rewards that a rollout has of its own, to guide it or to select in it, by key."""
        guidance = self.rollout.reward_guidance
        found = {
            "rollout.reward_guidance.reward": None if guidance is None else guidance.reward,
            "rollout.preview_reward": self.rollout.preview_reward,
        }
        return {key: reward for key, reward in found.items() if reward is not None}

    @property
    def rollout_rewards(self) -> list[Reward]:
        """All that a rollout asks: about samples, about states, and on its way."""
        return [self.reward, *self.process_rewards, *self.guiding_rewards.values()]


def evaluation_schedule(config: TrainConfig) -> Schedule | None:
    """Of evaluations and of the exported call: evaluation.schedule, or where that is not set rollout.schedule."""
    return config.rollout.schedule if config.evaluation.schedule is None else config.evaluation.schedule
