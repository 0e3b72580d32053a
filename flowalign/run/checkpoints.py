"""What a checkpoint holds of a run (weights of every role, optimizers, average, the trainer's own state), and how it is
put back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from flowalign.config import TrainConfig
from flowalign.config.settings import RunSettings
from flowalign.models import Policy
from flowalign.models.ema import EMA
from flowalign.run.preflight import Saved
from flowalign.storage import checkpoint
from flowalign.storage.checkpoint import Tensors
from flowalign.storage.named_tensors import pack_optimizer, pack_parameters, restore_optimizer, restore_parameters
from flowalign.storage.sharded import whole


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    updates: of the policy. reached: whether a gradient was above 0. totals: over all iterations. training: seconds
    of all iterations. seconds: run time before this launch; began: time.monotonic() at this launch."""

    updates: int = 0
    reached: bool = False
    totals: dict[str, float] = field(default_factory=lambda: {"images": 0, "rollout": 0.0, "update": 0.0, "drift": 0.0})
    training: float = 0.0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Run time over all launches, in seconds."""
        return self.seconds + time.monotonic() - self.began

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {
            "updates": self.updates, "reached": self.reached, "totals": dict(self.totals), "time/seconds": self.elapsed,
            "time/training": self.training,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over `state()` of a checkpoint."""
        self.updates, self.reached = state["updates"], state["reached"]
        self.totals, self.seconds = state["totals"], state["time/seconds"]
        self.training = state.get("time/training", self.seconds)  # a checkpoint of 0.1.0 has no such count

    def is_spent(self, step: int, run: RunSettings) -> bool:
        """Whether another iteration like the `step` so far would go beyond the limits of the run."""
        counts = (
            (self.totals["rollout"] + self.totals["update"], run.max_evaluations), (self.training, run.max_seconds)
        )  # fmt: skip
        return any(limit is not None and count * (step + 1) > limit * step for count, limit in counts)


@dataclass
class Checkpoints:
    """Saves the run and puts it back.

    digests: of the prompts. found: what an earlier launch saved, read before the model was loaded. saved: the checkpoint to
    resume from; None in a new run, and once it is restored (it is as large as what is trained). latest: the iteration of
    the latest checkpoint, 0 without one."""

    config: TrainConfig
    folder: Path
    policy: Policy
    ema: EMA | None
    progress: Progress
    digests: dict[str, str]
    found: InitVar[Saved]
    saved: Saved | None = field(init=False)
    latest: int = field(init=False)

    def __post_init__(self, found: Saved) -> None:
        self.saved, self.latest = found if found.state else None, found.iteration

    @property
    def trainer_state(self) -> dict[str, Any] | None:
        """Trainer state from the checkpoint to resume from; None in a new run, and once it is restored."""
        return None if self.saved is None else self.saved.state["trainer"]

    def save(self, iteration: int, optimizers: Mapping[str, Optimizer], *, write: bool) -> None:
        """After `iteration` iterations. Packing is collective; one process writes."""
        tensors, state = pack(self.policy, list(self.config.roles), optimizers, self.ema)
        state |= {**self.progress.state(), "trainer": self.config.trainer.state(), "prompts": self.digests}
        tensors = {
            name: {key: whole(tensor, keep=write) for key, tensor in section.items()}
            for name, section in tensors.items()
        }
        if write:
            checkpoint.save(self.folder, iteration, tensors, state, keep=self.config.run.keep_checkpoints)
        self.latest = iteration

    def restore(self, optimizer_device: torch.device | None) -> bool:
        """Puts the saved checkpoint back, if there is one. optimizer_device: see `unpack`."""
        if self.saved is None:
            return False
        roles, optimizers = list(self.config.roles), self.config.trainer.optimizers
        unpack(self.policy, roles, optimizers, self.ema, self.saved.tensors, self.saved.state, optimizer_device)
        self.progress.restore(self.saved.state)
        self.saved = None
        return True


def pack(
    policy: Policy, roles: Sequence[str], optimizers: Mapping[str, Optimizer], ema: EMA | None
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Sections of tensors, and JSON."""
    named = {role: policy.parameters_of(role) for role in ("policy", *roles)}
    all_named = [pair for pairs in named.values() for pair in pairs]
    tensors = {f"role_{role}": pack_parameters(pairs) for role, pairs in named.items()}
    state = {}
    for name, optimizer in optimizers.items():
        tensors[f"optimizer_{name}"], state[name] = pack_optimizer(optimizer, all_named)
    if ema is not None:
        tensors["ema"] = ema.tensors()
    return tensors, {"optimizers": state}


def unpack(
    policy: Policy,
    roles: Sequence[str],
    optimizers: Mapping[str, Optimizer],
    ema: EMA | None,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    device: torch.device | None = None,
) -> None:
    """Puts back what `pack` gave, bit for bit. device: of the optimizers' state, by default that of the parameters.

    Hyper-parameters other than the learning rate, which trainers set before each update, are those the optimizers were
    built with: in a resumed run the same, unless its configuration was changed. CheckpointError naming what differs."""
    named = {role: policy.parameters_of(role) for role in ("policy", *roles)}
    all_named = [pair for pairs in named.values() for pair in pairs]
    for role, pairs in named.items():
        restore_parameters(pairs, tensors[f"role_{role}"])
    for name, optimizer in optimizers.items():
        built = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
        restore_optimizer(optimizer, all_named, tensors[f"optimizer_{name}"], state["optimizers"][name], device)
        for group, hyper in zip(optimizer.param_groups, built, strict=True):
            group.update(hyper)
    if ema is not None:
        ema.restore(tensors["ema"])
