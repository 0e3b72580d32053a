"""What a checkpoint holds of a run: the weights of every role, the optimizers, the average, the trainer's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from flowalign.models import Policy
from flowalign.models.ema import EMA
from flowalign.storage.checkpoint import Tensors
from flowalign.storage.named_tensors import pack_optimizer, pack_parameters, restore_optimizer, restore_parameters


def pack(
    policy: Policy, roles: Sequence[str], optimizers: Mapping[str, Optimizer], ema: EMA | None
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Sections of tensors, and JSON."""
    named = {role: policy.parameters_of(role) for role in ("policy", *roles)}
    every = [pair for pairs in named.values() for pair in pairs]
    tensors = {f"role_{role}": pack_parameters(pairs) for role, pairs in named.items()}
    state = {}
    for name, optimizer in optimizers.items():
        tensors[f"optimizer_{name}"], state[name] = pack_optimizer(optimizer, every)
    if ema is not None:
        tensors["ema"] = ema.tensors()
    return tensors, {"optimizers": state}


def restore(
    policy: Policy,
    roles: Sequence[str],
    optimizers: Mapping[str, Optimizer],
    ema: EMA | None,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    place: torch.device | None = None,
) -> None:
    """Puts back what `pack` gave, bit for bit; the optimizers' state on `place`, or beside the parameters. Raises
    CheckpointError naming what differs."""
    named = {role: policy.parameters_of(role) for role in ("policy", *roles)}
    every = [pair for pairs in named.values() for pair in pairs]
    for role, pairs in named.items():
        restore_parameters(pairs, tensors[f"role_{role}"])
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, every, tensors[f"optimizer_{name}"], state["optimizers"][name], place)
    if ema is not None:
        ema.restore(tensors["ema"])
