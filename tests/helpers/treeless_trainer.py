"""A trainer that rolls nothing out: it regresses velocities onto a constant, and its batch has what the run reads and no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.conditions import Conditions
from flowalign.models.roles import Role
from flowalign.rollouts.gather import encoded
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import (
    AdamWConfig,
    Measures,
    Part,
    Setup,
    States,
    TrainedRole,
    Update,
    UpdateEngine,
    UpdateForecast,
)  # fmt: skip
from samplers import normal


@dataclass(frozen=True)
class Plain:
    """A batch without a forest."""

    conditions: Conditions
    images: int
    metrics: dict[str, float] = field(default_factory=dict)

    def picture(self) -> bytes | None:
        return None


@dataclass
class Treeless:
    """One update per iteration, on one noisy state of each prompt."""

    optimizer: AdamWConfig = field(default_factory=AdamWConfig)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy.optimizer}

    def check(self, setup: Setup) -> None: ...

    def roles(self) -> Mapping[str, Role]:
        return {}

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        return UpdateForecast(1, rollout.groups, rolled=0)

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        self.task = task
        self._policy = TrainedRole.of(task.policy, self.optimizer, updates=0 if state is None else state["policy"])

    def state(self) -> dict[str, Any]:
        return {"policy": self._policy.updates}

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> Plain:
        return Plain(encoded(self.task, records, negative=False), len(records))

    def updates(self, batch: Plain) -> Iterable[Update]:
        engine, shape = (
            UpdateEngine(self.task, batch.conditions, batch.images),
            self.task.policy.latent_shape(self.task.size),
        )
        x = normal((batch.images, *shape), self.task.seed, "start", "treeless")
        states = States(x, torch.full((batch.images,), 0.5), torch.arange(batch.images))

        def loss(part: Part, measures: Measures) -> Tensor:
            error = engine.velocity(states.at(part.index)) - 1
            return error[: part.real].square().mean((1, 2, 3)).sum() / batch.images

        yield engine.update(self._policy, engine.micro_batches(engine.deal(states.rows), 2), loss)
