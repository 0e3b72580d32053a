"""How gradients of all processes become one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from flowalign.distributed.processes import Processes


class Stepper(Protocol):
    """Takes the steps of one optimizer. Every method is collective."""

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients; the sum over micro-batches and processes is the loss of the step."""
        ...

    def step(self, max_grad_norm: float) -> float:
        """Clips and steps; the norm before clipping. If that is not finite, no weight has changed."""
        ...

    def full_optimizer(self, keep: bool) -> Optimizer:
        """The optimizer with its whole state, for a checkpoint; it may be empty unless `keep`."""
        ...


@dataclass(frozen=True)
class Summed:
    """The optimizer whole on every process; gradients are added up once per step, so numbers of backwards may differ."""

    optimizer: Optimizer
    processes: Processes

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_grad_norm: float) -> float:
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.processes.sum_gradients(trained)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm, foreach=False))
        if norm < float("inf"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def full_optimizer(self, keep: bool) -> Optimizer:
        return self.optimizer
