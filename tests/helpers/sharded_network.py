"""A sharded network beside its unsharded twin, in two processes with different numbers of calls; run by tests/distributed.

`python -m tests.helpers.sharded_network PIPELINE fp32|bf16 OUTPUT` writes OUTPUT/<rank>.json: relative errors and counts.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowalign.data import as_records
from flowalign.diagnostics.measure import count_calls
from flowalign.distributed.fsdp2 import Lockstep, shard
from flowalign.distributed.processes import Processes
from flowalign.models import LoRA, Policy, Size, load_policy
from flowalign.models.roles import Role

WORDS = ["KITE", "MOON", "LAMP"]


def policy_of(pipeline: str, dtype: str) -> Policy:
    """LoRA that matters, and a role whose weights differ from the policy's."""
    policy = load_policy(pipeline, lora=LoRA(rank=4, alpha=8), dtype=dtype)
    policy.add_roles({"old": Role("copy")})
    generator = torch.Generator().manual_seed(0)
    for role in ("policy", "old"):
        for name, parameter in policy.parameters_of(role):
            if "lora_B" in name:
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
            calls = [velocity(policy, 3 - call) for call in range(1 + 2 * processes.rank)]
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
    twin, policy = policy_of(pipeline, dtype), policy_of(pipeline, dtype)
    [network] = policy.modules().values()
    num_frozen = sum(p.numel() for name, p in network.named_parameters() if ".lora_" not in name)
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


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    os._exit(0)  # torch's threads sometimes abort the interpreter's own way out, after all is done
