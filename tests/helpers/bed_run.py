"""Methods on the bed: a configuration made into a task, the main loop without a run folder, and what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flowalign.build import policy_of, task_of
from flowalign.config import TrainConfig, load_config
from flowalign.data import load_prompts, prompts_of_iteration
from flowalign.distributed.stepper import Summed
from flowalign.evaluation.evaluate import evaluate
from flowalign.models import Policy
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.task import Task
from flowalign.trainers import Trainer
from rewards import Reward

CONFIG = "tests/data/bed.yaml"


@dataclass(eq=False)
class Bed:
    """A configuration with its policy loaded and its trainer prepared. rows: metrics of each update so far."""

    config: TrainConfig
    policy: Policy
    task: Task
    trainer: Trainer

    @staticmethod
    def of(pipeline: Path, layers: Sequence[str], *overrides: str) -> Bed:
        """layers: files below the bed's own."""
        config, _ = load_config([*layers, CONFIG], [f"policy.path={pipeline}", *overrides])
        return Bed.prepared(config)

    @staticmethod
    def prepared(config: TrainConfig) -> Bed:
        policy = policy_of(config, "cpu")
        task = task_of(config, policy)
        config.trainer.prepare(task, None)
        return Bed(config, policy, task, config.trainer)

    def with_rewards(self, reward: Reward, process: Sequence[Reward] = ()) -> Bed:
        """The same weights, trained with another reward."""
        task = replace(self.task, reward=reward, process_rewards=process)
        self.trainer.prepare(task, None)
        return Bed(self.config, self.policy, task, self.trainer)

    def iteration(self, number: int) -> list[dict[str, float]]:
        """As the main loop has it. Returns the metrics of each update, with those of the rollout and the counted network rows."""
        before = self.policy.evaluations
        batch = self.trainer.collect(
            prompts_of_iteration(list(self.task.prompts), self.task.rollout.groups, self.task.seed, number), number
        )
        rolled, rows = self.policy.evaluations - before, []
        steppers = {
            optimizer: Summed(optimizer, self.task.processes) for optimizer in self.trainer.optimizers.values()
        }
        for update in self.trainer.updates(batch):
            for micro_batch in update.micro_batches:
                loss = micro_batch()
                with self.policy.role(update.role):
                    steppers[update.optimizer].backward(loss)
            norm = steppers[update.optimizer].step(update.max_grad_norm) if update.micro_batches else 0.0
            self.policy.follow(number + 1)
            rows.append({"rolled": rolled, "norm": norm, **update.after()})
        return [{**batch.metrics, **row} for row in rows]

    def gradient(self, number: int = 0) -> tuple[ScoredRollout, Tensor]:
        """An iteration's batch, and the sum of the gradients of its updates [n]; no weight is stepped."""
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        batch = self.trainer.collect(list(self.task.prompts)[: self.task.rollout.groups], number)
        for update in self.trainer.updates(batch):
            for micro_batch in update.micro_batches:
                loss = micro_batch()
                with self.policy.role(update.role):
                    loss.backward()
            update.after()
        found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        return batch, found

    def weights(self) -> Tensor:
        """All trained weights [n], a copy."""
        return torch.cat([p.detach().flatten().clone() for _, p in self.policy.trainable_parameters()])

    def reward(self) -> float:
        """The mean score of 256 samples of the deterministic sampler, always from the same start noise."""
        settings = self.config.evaluation
        result = evaluate(
            self.policy, load_prompts(settings.prompts), settings.rewards, samples_per_prompt=settings.samples_per_prompt,
            batch_size=settings.batch_size, seed=settings.seed,
        )  # fmt: skip
        return float(next(iter(result.scores.values())).mean())
