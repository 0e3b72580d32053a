"""A sharded network beside its unsharded twin, in two processes with different numbers of calls; run by tests/distributed.

`python -m tests.helpers.sharded_network PIPELINE fp32|bf16 OUTPUT [full|hybrid]` writes OUTPUT/<rank>.json: relative errors and
counts. full: all weights are trained, in bf16 as fp32 weights under autocast. hybrid: so, and as if each two processes had a
machine of their own.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowalign.data import as_records
from flowalign.diagnostics.measure import count_calls
from flowalign.distributed.fsdp2 import Lockstep, shard
from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Summed
from flowalign.models import LoRA, Policy, Size, load_policy
from flowalign.models.ema import EMA
from flowalign.models.roles import Role
from flowalign.storage.sharded import whole
from flowalign.trainers import AdamWConfig, TrainedRole

WORDS = ["KITE", "MOON", "LAMP"]


def policy_of(pipeline: str, dtype: str, network_device: str | None = None) -> Policy:
    """LoRA that matters, and a role whose weights differ from the policy's."""
    policy = load_policy(pipeline, lora=LoRA(rank=4, alpha=8), dtype=dtype, network_device=network_device)
    policy.add_roles({"old": Role("copy")})
    generator = torch.Generator().manual_seed(0)
    for role in ("policy", "old"):
        for name, parameter in policy.parameters_of(role):
            if "lora_B" in name and not parameter.is_meta:
                parameter.data.normal_(std=0.05, generator=generator)
    return policy


def velocity(policy: Policy, rows: int) -> Tensor:
    shape = policy.latent_shape(Size(24, 48))
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))
    conditions = policy.encode(as_records(WORDS[:rows]), negative=True)
    return policy.velocity(x, torch.linspace(0.3, 0.9, rows), conditions, guidance_scale=2.0)


@torch.no_grad()
def velocities(policy: Policy, processes: Processes) -> Iterator[Tensor]:
    """Velocities of three roles; the second process evaluates each three times, the first once."""
    for role in ("reference", "old", "policy"):
        with policy.role(role):
            calls = [velocity(policy, 3 - call) for call in range(1 + 2 * (processes.rank % 2))]
        yield processes.gather(calls[0])


def gradient(policy: Policy) -> Tensor:
    velocity(policy, 2).square().mean().backward()
    parameters = [parameter for _, parameter in policy.trainable_parameters()]
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).double().norm() / theirs.double().norm())


def run(pipeline: str, dtype: str, output: Path) -> None:
    accelerator = Accelerator(cpu=True)
    everyone = Processes.of(accelerator)
    twin = policy_of(pipeline, dtype)
    policy = policy_of(pipeline, dtype, "cpu" if everyone.is_main else "meta")  # only the first process reads it
    [network] = policy.modules().values()
    num_frozen = sum(p.numel() for name, p in network.named_parameters() if ".lora_" not in name)
    assert all(p.is_meta != everyone.is_main for name, p in network.named_parameters() if ".lora_" not in name)
    processes = shard(policy, everyone)
    lockstep = processes.level.__self__
    assert isinstance(lockstep, Lockstep)
    frozen = [p for p in network.parameters() if isinstance(p, DTensor)]
    found = {"held": sum(p.to_local().numel() for p in frozen) / num_frozen}
    with count_calls(policy) as calls:
        pairs = zip(velocities(policy, processes), velocities(twin, everyone), strict=True)
        found["velocity"] = max(error(ours, theirs) for ours, theirs in pairs)
        found["gradient"] = error(gradient(policy), gradient(twin))
        if processes.is_main:  # one process evaluates and saves, the other waits
            with torch.no_grad():
                velocity(policy, 1)
            policy.save_lora(output / "lora")
            twin.save_lora(output / "twin")
        processes.wait()
    found |= {"calls": len(calls), "dummy_calls": lockstep.dummy_calls}
    assert all(p.grad is None for p in frozen)
    (output / f"{processes.rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


def full_policy(pipeline: str, dtype: str, network_device: str | None = None) -> Policy:
    """All weights are trained; with a frozen copy, and a role whose weights differ."""
    policy = load_policy(
        pipeline, trainable="full", dtype=dtype, reference_copy=True, network_device=network_device
    )  # fmt: skip
    policy.add_roles({"old": Role("copy")})
    generator = torch.Generator().manual_seed(0)
    for _, parameter in policy.parameters_of("old"):
        if not parameter.is_meta:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return policy


def steps(policy: Policy, processes: Processes, rows: Sequence[int]) -> tuple[list[float], list[Tensor]]:
    """Norms of the gradients of two steps whose loss is the sum over batches of `rows` states, and the weights after them, whole."""
    trained = TrainedRole.of(
        policy, AdamWConfig(lr=1e-2, eps=1e-5, max_grad_norm=1.0)
    )  # of a gradient that is rounding alone no whole step is taken
    ema, stepper = EMA(policy.trainable_parameters(), 0.5), Summed(trained.optimizer, processes)
    norms = []
    for _ in range(2):
        for count in rows:
            stepper.backward(velocity(policy, count).square().mean())
        assert all(p.grad.dtype == torch.float32 for _, p in policy.trainable_parameters() if p.grad is not None)
        norms.append(stepper.step(1.0))
        ema.update()
        policy.follow(1)
    held = [*(p for _, p in policy.trainable_parameters()), *ema.tensors().values()]
    return norms, [whole(tensor.detach()) for tensor in held]


def run_full(pipeline: str, dtype: str, output: Path) -> None:
    """Each process takes one of two batches; the twin, which is not sharded, those of all."""
    accelerator = Accelerator(cpu=True)
    everyone = Processes.of(accelerator)
    twin, policy = full_policy(pipeline, dtype), full_policy(pipeline, dtype, "cpu" if everyone.is_main else "meta")
    size = sum(p.numel() for network in policy.networks() for p in network.parameters())
    compute = {"fp32": None, "bf16": torch.bfloat16}[dtype]
    processes = shard(policy, everyone, compute=compute)
    held = [p for network in policy.networks() for p in network.parameters()]
    found: dict[str, Any] = {"held": sum(p.to_local().numel() for p in held) / size}
    pairs = zip(velocities(policy, processes), velocities(twin, everyone), strict=True)
    found["velocity"] = max(error(ours, theirs) for ours, theirs in pairs)
    found["norms"], ours = steps(policy, processes, [2 + processes.rank % 2])
    found["expected"], theirs = steps(twin, Processes(), [2, 3] * (everyone.count // 2))
    found["weights"] = max(error(*pair) for pair in zip(ours, theirs, strict=True))
    found["moved"] = error(torch.cat([p.flatten() for p in theirs]), torch.cat([
        p.detach().flatten() for _ in range(2) for _, p in full_policy(pipeline, dtype).trainable_parameters()
    ]))  # fmt: skip
    policy.save_networks(output / "ours", processes.is_main)
    if processes.is_main:
        twin.save_networks(output / "twin")
    (output / f"{processes.rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    if sys.argv[4:] == ["hybrid"]:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    (run_full if sys.argv[4:] else run)(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    os._exit(0)  # torch's threads sometimes abort the interpreter's own way out, after all is done
