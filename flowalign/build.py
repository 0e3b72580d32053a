"""The policy and the task of a configuration, the same for a run, the doctor and the benchmark."""

from __future__ import annotations

from dataclasses import replace

import torch

from flowalign.config import PolicySettings, TrainConfig, evaluation_schedule
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.models import Policy, Sampling, load_policy
from flowalign.rollouts.task import Task


def policy_of(
    config: TrainConfig, device: str | torch.device, network_device: str | torch.device | None = None
) -> Policy:
    """The policy with its roles, which generates as the evaluations do; see load_policy. ConfigError for weights that cannot be
    loaded, for an image size it cannot make, or for nothing to train."""
    settings, evaluation = config.policy, config.evaluation
    sampling = Sampling(
        evaluation.num_inference_steps,
        evaluation.guidance_scale,
        settings.size,
        evaluation_schedule(config),
        settings.fps,
    )
    try:
        policy = from_settings(
            settings, sampling, device, network_device, seed=config.run.seed, fixed_rows=config.rollout.rows
        )
        for size in config.sizes:
            policy.latent_shape(size)
        policy.add_roles(config.roles)
    except ValueError as error:  # what only the weights can tell
        raise ConfigError(str(error)) from error
    if not policy.trainable_parameters():
        raise ConfigError("got a policy without trainable parameters: check policy.trainable and policy.lora.targets")
    return policy


def from_settings(
    settings: PolicySettings, sampling: Sampling, device: str | torch.device,
    network_device: str | torch.device | None = None, *, seed: int = 0, fixed_rows: int | None = None,
) -> Policy:  # fmt: skip
    """The policy without roles beside its own and the reference; see load_policy. ConfigError for what cannot be loaded."""
    try:
        return _load(settings, sampling, device, network_device, seed, fixed_rows)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the pipeline policy.path={settings.path} cannot be loaded: {error}") from error


def _load(
    settings: PolicySettings, sampling: Sampling, device: str | torch.device, network_device: str | torch.device | None,
    seed: int, fixed_rows: int | None,
) -> Policy:  # fmt: skip
    return load_policy(
        settings.path, lora=settings.lora, trainable=settings.trainable, dtype=settings.dtype,
        vae_dtype=settings.vae_dtype, family=settings.family, max_sequence_length=settings.max_sequence_length, options=settings.options,
        negative_prompt=settings.negative_prompt, reference_copy=settings.reference_copy, device=device,
        network_device=network_device, offload=settings.offload, decode_batch=settings.decode_batch, sampling=sampling,
        seed=seed, gradient_checkpointing=settings.gradient_checkpointing, compile=settings.compile, attention=settings.attention,
        fixed_rows=fixed_rows, quantization=settings.quantization, vae_tiling=settings.vae_tiling,
    )  # fmt: skip


def task_of(
    config: TrainConfig, policy: Policy, *, groups: int | None = None, processes: Processes | None = None
) -> Task:
    """What the trainer is given. groups: number of prompts, by default the configuration's. processes: by default one."""
    rollout = replace(
        config.rollout, kernel=config.rollout.kernel.bind(policy.path), groups=groups or config.rollout.groups
    )
    return Task(
        policy, config.reward, rollout, config.run.seed, config.policy.size, processes or Processes(), config.process_rewards,
        config.policy.fps, config.training_prompts(),
    )  # fmt: skip
