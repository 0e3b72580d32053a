"""DeepSpeed's ZeRO-2: gradients and optimizer state of the trained weights, partitioned over the processes.

One engine per optimizer, around its parameters alone: the network is not wrapped, so rollouts and roles work as without
DeepSpeed. Each backward sums its gradients over the processes, and each process keeps only its part of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowalign.errors import ConfigError

BUCKET = 50_000_000  # elements of gradients sent in one message, at most


class Zero2:
    """Satisfies `flowalign.distributed.stepper.Stepper`, which documents its methods. State that `optimizer` has is kept.

    From now on `optimizer` holds this process's part; learning rates set in it take effect. A parameter that no backward
    reaches has gradient 0, so weight decay and momentum move it; without DeepSpeed it is not stepped."""

    def __init__(self, optimizer: Optimizer) -> None:
        import deepspeed

        self._optimizer = optimizer
        self._members = [list(group["params"]) for group in optimizer.param_groups]
        all_parameters = [parameter for members in self._members for parameter in members]
        size = sum(parameter.numel() for parameter in all_parameters)
        state = dict(optimizer.state)
        optimizer.state.clear()
        self._engine = deepspeed.initialize(
            model=nn.ParameterList(all_parameters),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # DeepSpeed demands it, nothing reads it
                "zero_optimization": {"stage": 2, "reduce_bucket_size": min(BUCKET, size)},
                "gradient_allreduce_op": "sum",  # losses are divided by the global count already
                "managed_gradient_accumulation": False,  # any number of backwards before a step
            },
        )[0]
        if state:
            self._load_state(state)

    def backward(self, loss: Tensor) -> None:
        """All processes make equally many calls, which reach the same parameters."""
        self._engine.backward(loss)

    def step(self, max_grad_norm: float, read: Callable[[Tensor], float] = float) -> float:
        read(torch.zeros(()))  # the norm is known after the step only
        self._engine.optimizer.clip_grad = max_grad_norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def full_optimizer(self, keep: bool) -> Optimizer:
        """The optimizer as without DeepSpeed, its full state on the CPU; empty unless `keep`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer_class: Any = type(self._optimizer)
        groups = list(zip(self._optimizer.param_groups, self._members, strict=True))
        full: Optimizer = optimizer_class([{**group, "params": members} for group, members in groups])
        for group, members in groups:
            [part] = group["params"]
            for parameter in members:
                for name, value in self._optimizer.state.get(part, {}).items():
                    moment = value.shape == part.shape
                    found = safe_get_full_optimizer_state(parameter, name) if moment else value.clone()
                    if keep:  # one at a time: the full state is never on a GPU
                        full.state[parameter][name] = found.cpu()
        return full

    @torch.no_grad()
    def _load_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        steps = {float(state[p]["step"]) if p in state else 0.0 for members in self._members for p in members}
        if len(steps) > 1:
            raise ConfigError(
                f"got an optimizer whose parameters took {sorted(steps)} steps; expected one number, which ZeRO-2 keeps for all: "
                "resume with the launch configuration that wrote the checkpoint"
            )
        for group, members in zip(self._optimizer.param_groups, self._members, strict=True):
            [part] = group["params"]
            for name, value in state[members[0]].items():
                moment = value.shape == members[0].shape
                self._optimizer.state[part][name] = torch.zeros_like(part) if moment else value.clone()
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()  # what it does itself after its first step
        for parameter, entries in state.items():
            for name, value in entries.items():
                if value.shape == parameter.shape:
                    safe_set_full_optimizer_state(parameter, value, name)
