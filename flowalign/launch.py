"""How accelerate launched the run: what it can ask for and the run would not follow is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from flowalign.config import ConfigError, PolicySettings

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "FSDP")


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError for DeepSpeed, before accelerate looks for it."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "accelerate was launched with DeepSpeed; its engine would have to own the one optimiser, where a trainer here "
            "has one per role. What ZeRO-2 shards, gradients and optimiser state, is small with LoRA: take "
            "configs/accelerate/multi_gpu.yaml, or fsdp2.yaml to shard the frozen weights"
        )


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
            "policy.trainable=lora, or launch with configs/accelerate/multi_gpu.yaml"
        )
    unfollowed = {
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,  # text encoders would stay empty off rank 0
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
    }
    for name, given in unfollowed.items():
        if given:
            raise ConfigError(f"accelerate's {name}=true came; expected false, as in configs/accelerate/fsdp2.yaml")
