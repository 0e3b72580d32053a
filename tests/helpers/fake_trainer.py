"""A trainer that uses all of the contract: two optimizers, inner epochs, a calibrated start, roles, a group-level loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.objectives import scalar_adjoint
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import Update
from flowalign.trainers.base import AdamWConfig
from samplers import Path


@dataclass
class FakeTrainer:
    """Pairs in a group: (log-ratio difference - reward difference)², `epochs` times per rollout; "fake" regresses the
    policy's velocity as seen by "sampling"."""

    epochs: int = 2
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    calibrations: int = field(default=0, init=False)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy, "fake": self._fake}

    def check(
        self, rollout: Rollout, path: Path, channels: tuple[str, ...], state_channels: tuple[str, ...] = ()
    ) -> None: ...

    def updates_per_iteration(self) -> int:
        return 2 * self.epochs

    def needs_reference(self) -> bool:
        return False

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        self.task = task
        self._policy = self.optimizer.build([p for _, p in task.policy.parameters_of("policy")])
        self._fake = self.optimizer.build([p for _, p in task.policy.parameters_of("fake")])
        if state is None:  # a calibration that costs a rollout
            self.calibrations += 1
            probe = collect(task, [PromptRecord(0, "a word")] * 2, -1)
            state = {"scale": float(probe.scores.std())}
        self.scale = state["scale"]

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def collect(self, prompts: Sequence[PromptRecord], iteration: int) -> Any:
        return collect(self.task, prompts, iteration)

    def updates(self, batch: Any) -> Iterable[Update]:
        forest = batch.forest
        old = forest.log_prob[forest.tree.edges]
        for epoch in range(self.epochs):
            with torch.no_grad():
                now = old if epoch == 0 else self._log_prob(batch, forest.tree.edges)
            _, adjoint = scalar_adjoint(now, partial(self._pairs, batch, old))
            pieces = forest.tree.edges.split(2)
            losses = [
                partial(self._piece, batch, edges, part) for edges, part in zip(pieces, adjoint.split(2), strict=True)
            ]
            yield Update(self._policy, 1.0, losses, dict)
            yield Update(self._fake, 1.0, [partial(self._regress, batch)], self._after, role="fake")

    def _pairs(self, batch: ScoredRollout, old: Tensor, log_prob: Tensor) -> Tensor:
        tree = batch.forest.tree
        ratio, reward = (log_prob - old) * 1e3, batch.scores[:, 0][tree.leaf_of_edge[1]] / self.scale
        same = tree.group[tree.edges][:, None] == tree.group[tree.edges][None]
        gap = (ratio[:, None] - ratio[None]) - (reward[:, None] - reward[None])
        return (gap.square() * same).sum() / same.sum()

    def _log_prob(self, batch: ScoredRollout, edges: Tensor) -> Tensor:
        forest, policy = batch.forest, self.task.policy
        parents, position = forest.tree.distinct_parents(edges)
        rows = batch.conditions.rows(forest.tree.group[parents])
        velocity = policy.velocity(forest.at(parents), forest.sigma(parents), rows)
        return forest.edge_steps(edges, velocity, position).log_prob(forest.at(edges))

    def _piece(self, batch: ScoredRollout, edges: Tensor, adjoint: Tensor) -> Tensor:
        return (adjoint * self._log_prob(batch, edges)).sum()

    def _regress(self, batch: ScoredRollout) -> Tensor:
        forest, policy = batch.forest, self.task.policy
        nodes = forest.tree.parents_of_edges
        rows, call = batch.conditions.rows(forest.tree.group[nodes]), (forest.at(nodes), forest.sigma(nodes))
        with torch.no_grad(), policy.role("sampling"):
            target = policy.velocity(*call, rows) + 0.1
        with policy.role("fake"):
            return (policy.velocity(*call, rows) - target).square().mean()

    def _after(self) -> dict[str, float]:
        return {"time/update": 0.0, "cost/trained_per_image": 1.0}
