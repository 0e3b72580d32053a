"""A trainer that uses all of the contract: two optimizers, inner epochs, a calibrated start, roles, a group-level loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.roles import Role
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import AdamWConfig, Measures, Part, Setup, TrainedRole, Update, UpdateEngine, UpdateForecast
from flowalign.trainers.dealt import Dealt
from flowalign.trainers.edge_update import states_of


@dataclass
class FakeTrainer:
    """Pairs in a group: (log-ratio difference - reward difference)², `epochs` times per rollout; "fake" regresses its
    velocity onto that of "sampling" plus 0.1. For chains: one step leaves each state."""

    epochs: int = 2
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    calibrations: int = field(default=0, init=False)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy.optimizer, "fake": self._fake.optimizer}

    def check(self, setup: Setup) -> None: ...

    def roles(self) -> Mapping[str, Role]:
        return {"fake": Role(update="trained")}

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        states = rollout.groups * rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size).edges
        return UpdateForecast(2 * self.epochs, 2 * self.epochs * states, 2 * self.epochs * states)

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        self.task = task
        if state is None:  # a calibration that costs a rollout
            self.calibrations += 1
            state = {"scale": 1.0, "policy": 0, "fake": 0}
            if task.prompts:
                state["scale"] = float(collect(task, task.prompts[:2], -1).scores.std())
        self.scale = state["scale"]
        self._policy, self._fake = (
            TrainedRole.of(task.policy, self.optimizer, role, state[role]) for role in ("policy", "fake")
        )

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "policy": self._policy.updates, "fake": self._fake.updates}

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> ScoredRollout:
        return collect(self.task, records, iteration)

    def updates(self, batch: ScoredRollout) -> Iterable[Update]:
        forest, engine = batch.forest, UpdateEngine(self.task, batch.conditions, batch.images)
        edges = forest.tree.edges
        nodes = forest.tree.parent[edges]
        dealt = Dealt.of(engine, forest, [nodes], edges)
        forest, (deal,) = dealt.forest, dealt.deals
        states = states_of(forest, nodes)
        old = forest.log_prob[edges]

        def log_prob(part: Part) -> Tensor:
            here = edges[part.index]
            velocity = engine.velocity(states.at(part.index))
            return forest.edge_steps(here, velocity, torch.arange(len(here))).log_prob(forest.at(here))

        def regress(part: Part, measures: Measures) -> Tensor:
            velocity = engine.velocity(states.at(part.index), "fake")[: part.real]
            error = velocity - (target.at(part.index[: part.real]) + 0.1)
            return error.square().mean((1, 2, 3)).sum() / len(edges)

        for _ in range(self.epochs):
            yield engine.coupled_update(self._policy, deal, 2, log_prob, partial(self._pairs, batch, old))
            target = engine.frozen(states, "sampling", mine=deal.mine)[0]
            yield engine.update(self._fake, engine.micro_batches(deal, 2), regress)

    def _pairs(self, batch: ScoredRollout, old: Tensor, log_prob: Tensor) -> Tensor:
        tree = batch.forest.tree
        ratio, reward = (log_prob - old) * 1e3, batch.scores[:, 0][tree.leaf_of_edge[1]] / self.scale
        same = tree.group[tree.edges][:, None] == tree.group[tree.edges][None]
        gap = (ratio[:, None] - ratio[None]) - (reward[:, None] - reward[None])
        return (gap.square() * same).sum() / same.sum()
