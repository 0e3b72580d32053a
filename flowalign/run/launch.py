"""How accelerate launched the run: what it can ask for and the run would not follow is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, compare_versions, is_deepspeed_available
from torch.distributed.fsdp import CPUOffloadPolicy

from flowalign.config import PolicySettings
from flowalign.errors import ConfigError
from flowalign.rollouts.task import Rollout

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "FSDP", "DEEPSPEED")
OLDEST_DEEPSPEED = (
    "0.19.8"  # the first tried; one that lacks a setting of flowalign.distributed.zero2 would ignore it in silence
)
FOLLOWED: dict[str, tuple[Any, ...]] = {  # what accelerate makes of deepspeed_zero2.yaml; all else unset
    "zero_optimization.stage": (2,),
    "zero_optimization.offload_optimizer.device": ("none",),
    "zero_optimization.offload_param.device": ("none",),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (False,),
    "gradient_accumulation_steps": (1, "auto"),
    "gradient_clipping": ("auto",),
    "train_batch_size": ("auto",),
    "train_micro_batch_size_per_gpu": ("auto",),
    "steps_per_print": (float("inf"),),
    "fp16.enabled": (False,),
    "bf16.enabled": (False,),
}


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError for a DeepSpeed that is asked for and not there, before accelerate looks for it."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    if not is_deepspeed_available() or compare_versions("deepspeed", "<", OLDEST_DEEPSPEED):
        raise ConfigError(
            f"accelerate was launched with DeepSpeed, but deepspeed >= {OLDEST_DEEPSPEED} is not installed: "
            "pip install 'flowalign-diffusion[deepspeed]', or launch with configs/accelerate/multi_gpu.yaml"
        )


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """ConfigError for a setting of DeepSpeed, of accelerate's or of a file of its own, that the run would not follow."""
    for name, value in _flat(config):
        expected = FOLLOWED.get(name, (None,))
        if value not in expected:
            raise ConfigError(
                f"DeepSpeed's {name}={value} came; expected {expected[0]}, as in configs/accelerate/deepspeed_zero2.yaml, "
                "and no setting beyond it: gradients are clipped and accumulated as the trainer says"
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_launch(
    kind: DistributedType, mixed_precision: str, plugin: FullyShardedDataParallelPlugin | None, policy: PolicySettings
) -> None:
    """ConfigError for a way to launch that the run would not follow; before the model is loaded."""
    if kind.value not in KINDS:
        raise ConfigError(f"accelerate's distributed_type={kind.value} came; expected one of {', '.join(KINDS)}")
    if mixed_precision != "no":
        raise ConfigError(
            f"accelerate's mixed_precision={mixed_precision} came; expected 'no': policy.dtype says what the frozen "
            "network is, and adapters and log-probs are fp32"
        )
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ConfigError(f"accelerate's fsdp_version={plugin.fsdp_version} came; expected 2 (see fsdp2.yaml)")
    if policy.trainable != "lora":
        raise ConfigError(
            f"policy.trainable={policy.trainable} came with FSDP2, which shards frozen weights only: set "
            "policy.trainable=lora, or launch with configs/accelerate/deepspeed_zero2.yaml"
        )
    unfollowed = {
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,  # text encoders would stay empty off rank 0
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
    }
    for name, given in unfollowed.items():
        if given:
            raise ConfigError(f"accelerate's {name}=true came; expected false, as in configs/accelerate/fsdp2.yaml")


def check_processes(count: int, rollout: Rollout) -> None:
    """ConfigError for a rollout that `count` processes cannot share."""
    if count > rollout.groups:
        raise ConfigError(
            f"{count} processes came for rollout.groups={rollout.groups}: a prompt's tree lives on one process, so launch at "
            "most as many processes as there are groups"
        )
    if count > 1 and rollout.kernel.uses_rows:
        raise ConfigError(
            f"{count} processes came with rollout.kernel={type(rollout.kernel).__name__}, whose steps depend on the row numbers of one "
            "process's own trees: launch one process"
        )
