"""Two optimizers under ZeRO-2 beside their plain twins, in two processes; run by tests/distributed.

`python -m tests.helpers.zero_steps OUTPUT` writes OUTPUT/<rank>.json: relative errors, norms, sizes.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from flowalign.distributed.processes import Processes
from flowalign.distributed.zero2 import Zero2
from flowalign.errors import ConfigError
from flowalign.storage.named_tensors import pack_optimizer, restore_optimizer
from flowalign.trainers import AdamWConfig

deepspeed.ops.__compatible_ops__ = {}  # or it compiles an all-reduce for CPUs
SETTINGS = AdamWConfig(lr=1e-2, weight_decay=0.1, warmup=2)
CLIP = 0.5


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 3))  # an odd number of parameters


def loss(network: nn.Module, row: int, step: int) -> Tensor:
    x = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(1))
    return (network(x[row + step]) - 1.0).square().sum()


def sharded_step(network: nn.Module, zero: Zero2, processes: Processes, step: int, scale: float = 1.0) -> float:
    """Five rows for two processes: three micro-batches each, one of them with weight 0."""
    deal = processes.deal(torch.arange(5) % 2)
    for number, row in enumerate(deal.padded[deal.rank].tolist()):
        zero.backward(scale * (number < len(deal.mine)) * loss(network, row, step))
    return zero.step(CLIP)


def plain_step(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    sum(loss(network, row, step) for row in range(5)).backward()
    norm = float(clip_grad_norm_(network.parameters(), CLIP, foreach=False))
    optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def error(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    one, two = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (ours, theirs))
    return float((one - two).norm() / two.norm())


def run(output: Path) -> None:
    accelerator = Accelerator(cpu=True)
    processes = Processes.of(accelerator)
    ours, theirs = [network(0), network(1)], [network(0), network(1)]  # two roles
    optimizers, plain = ([SETTINGS.build(n.parameters()) for n in networks] for networks in (ours, theirs))
    zeros = [Zero2(optimizer) for optimizer in optimizers]
    found: dict[str, Any] = {"norms": [], "weights": []}
    for step in range(4):
        for optimizer in (*optimizers, *plain):
            optimizer.param_groups[0]["lr"] = SETTINGS.lr_at(step)
        for mine, zero, twin, optimizer in zip(ours, zeros, theirs, plain, strict=True):
            norms = sharded_step(mine, zero, processes, step), plain_step(twin, optimizer, step)
            found["norms"].append(norms)
            found["weights"].append(error(mine.parameters(), twin.parameters()))
    [mine, _], [zero, _] = ours, zeros
    found["held"] = sum(p.numel() for p in optimizers[0].param_groups[0]["params"])

    full, facts = pack_optimizer(zero.full_optimizer(keep=True), mine.named_parameters())
    expected, expected_facts = pack_optimizer(plain[0], theirs[0].named_parameters())
    assert full.keys() == expected.keys()
    assert facts == expected_facts
    found["state"] = error(full.values(), [expected[name] for name in full])
    found["kept elsewhere"] = len(zero.full_optimizer(keep=False).state)

    before = [p.detach().clone() for p in mine.parameters()]
    found["broken"] = str(sharded_step(mine, zero, processes, 4, scale=float("nan")))
    found["moved"] = error(mine.parameters(), before)

    copy = network(0)  # resumed, with a state that never lies on the GPU as a full
    copy.load_state_dict(mine.state_dict())
    optimizer = SETTINGS.build(copy.parameters())
    restore_optimizer(optimizer, copy.named_parameters(), full, facts, torch.device("cpu"))
    resumed = Zero2(optimizer)
    for step in (4, 3):
        sharded_step(mine, zero, processes, step)
        sharded_step(copy, resumed, processes, step)
    found["resumed"] = error(copy.parameters(), mine.parameters())
    found["went on"] = error(copy.parameters(), before)

    uneven = SETTINGS.build(network(0).parameters())
    first = uneven.param_groups[0]["params"][0]
    first.grad = torch.ones_like(first)
    uneven.step()
    try:
        Zero2(uneven)
    except ConfigError as refused:
        found["uneven"] = str(refused)
    (output / f"{processes.rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    os._exit(0)  # torch's threads sometimes abort the interpreter's own way out, after all is done
