"""Methods on the bed of tests/helpers/bed.py: a configuration made into a task, and the main loop without a run folder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.buckets import prompts_of_iteration
from flowalign.build import policy_of, task_of
from flowalign.config import TrainConfig, load_config
from flowalign.data import load_prompts
from flowalign.distributed.stepper import Summed
from flowalign.evaluation.evaluate import evaluate
from flowalign.models import Policy
from flowalign.rollouts.task import Task
from flowalign.trainers import Trainer
from rewards import Reward
from tests.helpers.policy_gradient import run_updates

CONFIG = "tests/data/bed.yaml"


@dataclass(frozen=True)
class Iteration:
    """An iteration: its batch, the network rows of its rollout and of all of it, what was scored, metrics of each update.

    batch: what the trainer collected, read as a `Batch`; a policy gradient's is a ScoredRollout."""

    batch: Any
    rolled: int
    evaluations: int
    reward_calls: int
    updates: list[dict[str, float]]

    def cost(self, name: str) -> float:
        """The metric cost/<name>_per_image of the batch and of all updates, of all its images."""
        rows = (self.batch.metrics, *self.updates)
        return float(self.batch.images * sum(row.get(f"cost/{name}_per_image", 0.0) for row in rows))


@dataclass(eq=False)
class Bed:
    """A configuration with its policy loaded and its trainer prepared."""

    config: TrainConfig
    policy: Policy
    task: Task
    trainer: Trainer
    steps: int = 0  # of the policy's optimizer, which its roles follow

    @staticmethod
    def of(pipeline: Path, layers: Sequence[str], *overrides: str) -> Bed:
        """layers: files below the bed's own."""
        config, _ = load_config([*layers, CONFIG], [f"policy.path={pipeline}", *overrides])
        policy = policy_of(config, "cpu")
        task = task_of(config, policy)
        config.trainer.prepare(task, None)
        return Bed(config, policy, task, config.trainer)

    def rewarded(self, reward: Reward, process: Sequence[Reward]) -> Bed:
        """The same weights and trainer state with a new optimizer, trained with other rewards."""
        task = replace(self.task, reward=reward, process_rewards=process)
        self.trainer.prepare(task, copy.deepcopy(self.trainer.state()))
        return Bed(self.config, self.policy, task, self.trainer)

    def iteration(self, number: int) -> Iteration:
        """As the main loop has it."""
        before, calls = self.policy.evaluations, self.task.counts.reward_calls
        records = prompts_of_iteration(list(self.task.prompts), self.task.rollout.groups, self.task.seed, number)
        batch, updates = self.trainer.collect(records, number), []
        rolled = self.policy.evaluations - before
        steppers = {each: Summed(each, self.task.processes) for each in self.trainer.optimizers.values()}
        for update in self.trainer.updates(batch):
            for micro_batch in update.micro_batches:
                steppers[update.optimizer].backward(micro_batch())
            norm = steppers[update.optimizer].step(update.max_grad_norm) if update.micro_batches else 0.0
            for optimizer in steppers:
                optimizer.zero_grad(set_to_none=True)
            if update.role == "policy":
                self.steps += 1
                self.policy.follow(self.steps)
            updates.append({**update.after(), "norm": norm})
        evaluations, calls = self.policy.evaluations - before, self.task.counts.reward_calls - calls
        return Iteration(batch, rolled, evaluations, calls, updates)

    def gradient(self, number: int = 0) -> tuple[Any, Tensor]:
        """An iteration's batch, and the sum of the gradients of its updates [n]; no weight is stepped."""
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        batch = self.trainer.collect(list(self.task.prompts)[: self.task.rollout.groups], number)
        run_updates(self.trainer, batch)
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
