"""Validates accelerate's launch settings; any that flowalign would ignore is an error. Builds what a run needs of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, compare_versions, is_deepspeed_available
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer

from flowalign.config import PolicySettings, TrainConfig
from flowalign.distributed.fsdp2 import shard
from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Sharding, Stepper, Summed
from flowalign.distributed.zero2 import Zero2
from flowalign.errors import ConfigError
from flowalign.models import Policy
from flowalign.rollouts.task import Rollout

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "FSDP", "DEEPSPEED")
# the oldest that was tested; one that lacks a setting of flowalign.distributed.zero2 would silently ignore it
OLDEST_DEEPSPEED = "0.19.8"
SUPPORTED: dict[str, tuple[Any, ...]] = {  # what accelerate makes of deepspeed_zero2.yaml; everything else is unset
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


@dataclass(frozen=True, eq=False)
class Launch:
    """The run's accelerator, and how weights and optimizer steps are shared out over its processes.

    fsdp: the plugin if the networks are sharded, else None. deepspeed: whether ZeRO-2 takes the optimizer steps. compute: the dtype
    in which sharded weights that are trained are called, where it is not their own."""

    accelerator: Accelerator
    fsdp: FullyShardedDataParallelPlugin | None
    deepspeed: bool
    compute: torch.dtype | None = None

    @staticmethod
    def of(config: TrainConfig, folder: Path) -> Launch:
        """Asks accelerate how this process was launched. ConfigError for settings that would be ignored."""
        check_environment()
        check_devices()
        accelerator = Accelerator(log_with=list(config.run.trackers) or None, project_dir=str(folder / "logs"))
        kind = accelerator.distributed_type
        fsdp = accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
        check_launch(kind, accelerator.mixed_precision, fsdp, config.policy)
        if kind == DistributedType.DEEPSPEED:
            check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
        check_processes(accelerator.num_processes, config.rollout)
        compute = torch.bfloat16 if config.policy.dtype == "bf16" else None
        return Launch(accelerator, fsdp, kind == DistributedType.DEEPSPEED, compute)

    @property
    def sharding(self) -> Sharding:
        """What the processes share out."""
        if self.deepspeed:
            return "optimizer"
        return "none" if self.fsdp is None else "networks"

    @property
    def network_device(self) -> str | None:
        """Where the network is loaded, if not on the accelerator's device: FSDP2 moves it there block by block, from the first
        process; the others have shapes alone before."""
        if self.fsdp is None:
            return None
        return "cpu" if self.accelerator.is_main_process else "meta"

    @property
    def optimizer_device(self) -> torch.device | None:
        """Where the optimizer state of a checkpoint goes, if not beside the parameters: ZeRO-2 takes each process's part
        from there."""
        return torch.device("cpu") if self.deepspeed else None

    def shard(self, policy: Policy, processes: Processes) -> Processes:
        """Shards the policy's networks under FSDP2; the processes to use from then on."""
        if self.fsdp is None:
            return processes
        return shard(policy, processes, self.fsdp.reshard_after_forward, self.compute)

    def steppers(self, optimizers: Iterable[Optimizer], processes: Processes) -> dict[Optimizer, Stepper]:
        """The Stepper of each optimizer. Weights and optimizer state must be final: ZeRO-2 copies them."""
        return {each: Zero2(each) if self.deepspeed else Summed(each, processes) for each in optimizers}


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError if DeepSpeed was asked for and is not installed, before accelerate imports it."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    if not is_deepspeed_available() or compare_versions("deepspeed", "<", OLDEST_DEEPSPEED):
        raise ConfigError(
            f"accelerate was launched with DeepSpeed, but deepspeed >= {OLDEST_DEEPSPEED} is not installed: "
            "pip install 'flowalign-diffusion[deepspeed]', or launch with configs/accelerate/multi_gpu.yaml"
        )


def check_devices(environment: Mapping[str, str] = os.environ, devices: int | None = None) -> None:
    """ConfigError if more processes were launched on this machine than it has devices (None: asks torch); accelerate would
    run each of them as if it were alone."""
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    found = torch.accelerator.device_count() if devices is None else devices
    if processes > max(1, found) and environment.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        raise ConfigError(
            f"got {processes} processes on this machine, which has {found} GPUs; expected one each: launch with "
            f"--num_processes {max(1, found)}, without a GPU with --cpu and none of configs/accelerate"
        )


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """ConfigError for a DeepSpeed setting, from accelerate or from a DeepSpeed file, that the run would ignore."""
    for name, value in _flat(config):
        expected = SUPPORTED.get(name, (None,))
        if value not in expected:
            raise ConfigError(
                f"got DeepSpeed's {name}={value}; expected {expected[0]}, as in configs/accelerate/deepspeed_zero2.yaml, "
                "and no further setting: the trainer says how gradients are clipped and accumulated"
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
    """ConfigError for launch settings that the run would ignore; before the model is loaded."""
    if kind.value not in KINDS:
        raise ConfigError(f"got accelerate's distributed_type={kind.value}; expected one of {', '.join(KINDS)}")
    if mixed_precision != "no":
        raise ConfigError(
            f"got accelerate's mixed_precision={mixed_precision}; expected 'no': policy.dtype says what the network "
            "multiplies in, and what is trained is fp32"
        )
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ConfigError(f"got accelerate's fsdp_version={plugin.fsdp_version}; expected 2 (see fsdp2.yaml)")
    if policy.quantization is not None:
        raise ConfigError(
            f"got policy.quantization={policy.quantization} with FSDP2, which shards weights of floats; expected null, or a launch with "
            "configs/accelerate/multi_gpu.yaml, where each GPU holds the quantized network"
        )
    ignored = {
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,  # only rank 0 would get its text encoders
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
    }
    for name, is_set in ignored.items():
        if is_set:
            raise ConfigError(f"got accelerate's {name}=true; expected false, as in configs/accelerate/fsdp2.yaml")


def check_processes(count: int, rollout: Rollout) -> None:
    """ConfigError for a rollout that `count` processes cannot share."""
    if count > rollout.groups:
        raise ConfigError(
            f"got {count} processes for rollout.groups={rollout.groups}; expected at most one per group, since a prompt's "
            "tree lives on one process: launch fewer processes, or raise rollout.groups"
        )
    if count > 1 and rollout.kernel.uses_roots:
        raise ConfigError(
            f"got {count} processes with rollout.kernel={type(rollout.kernel).__name__}; expected one, since its steps depend "
            "on row numbers within one process: launch one process"
        )
