"""The optimizer step of all processes: gradients are summed, clipped and applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flowalign.distributed.processes import Processes
from flowalign.storage.sharded import whole

# what lies in equal parts on the devices: gradients and optimizer state (ZeRO-2), or the networks and all that follows (FSDP2)
Sharding = Literal["none", "optimizer", "networks"]


class Stepper(Protocol):
    """Takes the steps of one optimizer. Every method is collective."""

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients; the sum over micro-batches and processes is the loss of the step."""
        ...

    def step(self, max_grad_norm: float, read: Callable[[Tensor], float] = float) -> float:
        """Clips and steps; the norm before clipping. If that is not finite, no weight has changed. read: how a number of the
        device is read, once, before the step; nothing is stepped if it raises."""
        ...

    def full_optimizer(self, keep: bool) -> Optimizer:
        """The optimizer with its full state, for a checkpoint; the state may be empty unless `keep`."""
        ...


@dataclass(frozen=True)
class Summed:
    """Every process holds the full optimizer. Gradients are summed once per step, so processes may run different numbers of
    backwards. Of sharded parameters (see flowalign.distributed.fsdp2) it holds its part, which each backward sums."""

    optimizer: Optimizer
    processes: Processes

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_grad_norm: float, read: Callable[[Tensor], float] = float) -> float:
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.processes.sum_gradients(parameter for parameter in trained if not isinstance(parameter, DTensor))
        self.processes.level()
        norm = read(whole(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm, foreach=False)))
        if norm < float("inf"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def full_optimizer(self, keep: bool) -> Optimizer:
        return self.optimizer
