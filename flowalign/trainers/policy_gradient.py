"""The GRPO family: every member is this trainer with other parts (grpo_family §0.2, §11.2)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.advantage import Advantage
from flowalign.credit import Credit
from flowalign.data import PromptRecord
from flowalign.objectives import KLPenalty, Objective, Selector, StepWeight
from flowalign.trainers.base import AdamW, Rollout, Task, Update
from flowalign.trainers.collect import Collected, collect


@dataclass
class PolicyGradient:
    """Clipped policy gradient on the stochastic steps of a rollout (Flow-GRPO, 2505.05470).

    One forward and backward per distinct parent state serves all its children: their log-probs depend on the network
    only through the same mean, so the gradient is exactly that of one pass per edge. `updates_per_rollout` splits the
    iteration by groups, never the children of one state; from the second on the ratio leaves 1. The reference's
    velocities are evaluated once, at the rollout's states. `micro_batch` counts states."""

    credit: Credit
    advantage: Advantage
    select: Selector
    objective: Objective
    step_weight: StepWeight
    kl: KLPenalty = field(default_factory=KLPenalty)
    optimiser: AdamW = field(default_factory=AdamW)
    updates_per_rollout: int = 1
    micro_batch: int = 16

    def __post_init__(self) -> None:
        if self.updates_per_rollout < 1 or self.micro_batch < 1:
            raise ValueError(
                f"trainer.updates_per_rollout={self.updates_per_rollout}, trainer.micro_batch={self.micro_batch}: "
                "expected both at least 1"
            )
        self._steps = 0

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._adamw}

    def check(self, rollout: Rollout) -> None:
        """Combinations that cannot work, named before a model is loaded."""
        if rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size={rollout.group_size}: expected at least 2, the advantage compares an image with "
                "others of its prompt"
            )
        if rollout.groups % self.updates_per_rollout:
            raise ValueError(
                f"rollout.groups={rollout.groups} cannot be split into trainer.updates_per_rollout="
                f"{self.updates_per_rollout} equal parts: choose a divisor"
            )
        cost = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size)
        if not cost.edges:
            raise ValueError("rollout.plan has no stochastic step, so there is nothing to train: widen its window")
        sigma, sigma_next = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()
        if not bool((rollout.kernel.coefficients(sigma, sigma_next, torch.ones_like(sigma)).std > 0).all()):
            raise ValueError(
                f"rollout.kernel={rollout.kernel} draws no noise, so steps have no log-prob: take FlowSDE, DanceSDE or "
                "CPS with a noise_level above 0"
            )
        few = cost.edges < rollout.group_size * (rollout.num_inference_steps - 1)
        if rollout.guidance_scale != 1 and few and not rollout.allow_cfg_update:
            raise ValueError(
                f"rollout.guidance_scale={rollout.guidance_scale} inside a window of few steps: peers report collapse; "
                "set rollout.guidance_scale=1, or rollout.allow_cfg_update=true to do it all the same"
            )

    def updates_per_iteration(self) -> int:
        return self.updates_per_rollout

    def needs_reference(self) -> bool:
        return self.kl.beta > 0

    def prepare(self, task: Task) -> None:
        self._task = task
        self._adamw = self.optimiser.build([parameter for _, parameter in task.policy.trainable_parameters()])

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]

    def collect(self, prompts: Sequence[PromptRecord], iteration: int) -> Any:
        return collect(self._task, prompts, iteration)

    def updates(self, batch: Any) -> Iterable[Update]:
        """The optimiser steps of one rollout."""
        forest, tree = batch.forest, batch.forest.tree
        advantages = self.advantage.compare(
            forest, self.credit.assign(forest, batch.scores, batch.valid, batch.channels)
        )
        batch.metrics["group/zero_std_ratio"] = advantages.zero_std_ratio
        chosen = self.select.choose(forest, advantages) & advantages.valid.any(1)
        batch.metrics["group/trained_edges"] = int(chosen.sum())
        reference = self._reference(batch, tree.edges[chosen]) if self.kl.beta else {}
        share = self._task.rollout.groups // self.updates_per_rollout
        for number in range(self.updates_per_rollout):
            mine = chosen & (tree.group[tree.edges] // share == number)
            yield self._update(batch, tree.edges[mine], advantages.values[mine], reference, first=number == 0)

    # ------------------------------------------------------------------------------------------ one step

    def _update(
        self, batch: Collected, edges: Tensor, advantages: Tensor, reference: dict[int, Tensor], *, first: bool
    ) -> Update:
        parents, position = batch.forest.tree.distinct_parents(edges)
        record: list[dict[str, Tensor]] = []
        micro_batches = []
        for start in range(0, len(parents), self.micro_batch):
            rows = parents[start : start + self.micro_batch]
            mine = (position >= start) & (position < start + self.micro_batch)
            micro_batches.append(
                partial(
                    self._loss,
                    batch,
                    rows,
                    edges[mine],
                    position[mine] - start,
                    advantages[mine],
                    reference,
                    len(edges),
                    record,
                    first,
                )
            )
        for group in self._adamw.param_groups:
            group["lr"] = self.optimiser.lr_at(self._steps)
        began, before = time.perf_counter(), self._task.policy.evaluations
        return Update(
            self._adamw,
            self.optimiser.max_grad_norm,
            micro_batches,
            partial(self._after, batch, record, first, began, before),
        )

    def _loss(
        self, batch: Collected, parents: Tensor, edges: Tensor, position: Tensor, advantages: Tensor,
        reference: dict[int, Tensor], count: int, record: list[dict[str, Tensor]], first: bool,
    ) -> Tensor:  # fmt: skip
        """The loss of some states: all their trained children, divided by the number of edges of the whole step."""
        forest = batch.forest
        velocity = self._velocity(batch, parents)
        step = forest.edge_steps(edges, velocity, position)
        log_prob, old = step.log_prob(forest.at(edges)), forest.log_prob[edges]
        weight = self.step_weight.weigh(step, forest)
        policy = (weight * self.objective.loss(log_prob, old, advantages.to(log_prob))).sum() / count
        penalty = policy.new_zeros(())
        if self.kl.beta:
            known = torch.stack([reference[node] for node in parents.tolist()])
            penalty = self.kl.beta * self.kl(step, forest.edge_steps(edges, known, position)).sum() / count
        log_ratio = (log_prob - old).detach()
        if first:
            self._check_replay(log_ratio)
        record.append({"log_ratio": log_ratio, "policy": policy.detach(), "kl": penalty.detach()})
        return policy + penalty

    def _check_replay(self, log_ratio: Tensor) -> None:
        """Invariant I1: an unchanged policy repeats its log-probs."""
        drift, clip = float(log_ratio.abs().max()), min(self._bounds())
        if not drift <= clip:
            raise RuntimeError(
                f"replay drift {drift:.2e} exceeds the clip range {clip:.2e} before the first step: the update would "
                "clip noise. Widen objective.clip_range, keep log-probs fp32, or use equal batch shapes"
            )

    def _bounds(self) -> tuple[float, float]:
        clip = self.objective.clip_range
        return clip if isinstance(clip, tuple) else (clip, clip)

    def _velocity(self, batch: Collected, nodes: Tensor) -> Tensor:
        forest = batch.forest
        rows = batch.conditions.rows(forest.tree.group[nodes])
        guidance = self._task.rollout.guidance_scale
        return self._task.policy.velocity(forest.at(nodes), forest.sigma(nodes), rows, guidance_scale=guidance)

    @torch.no_grad()
    def _reference(self, batch: Collected, edges: Tensor) -> dict[int, Tensor]:
        """{state: velocity of the frozen reference}, each distinct state once."""
        known: dict[int, Tensor] = {}
        parents, _ = batch.forest.tree.distinct_parents(edges)
        before = self._task.policy.evaluations
        with self._task.policy.role("reference"):
            for nodes in parents.split(self._task.rollout.micro_batch):
                known |= dict(zip(nodes.tolist(), self._velocity(batch, nodes), strict=True))
        batch.metrics["cost/reference_per_image"] = (self._task.policy.evaluations - before) / batch.images
        return known

    def _after(
        self, batch: Collected, record: list[dict[str, Tensor]], first: bool, began: float, before: int
    ) -> dict[str, float]:
        """Bookkeeping after a step; the metrics are those of the state before it."""
        rows = self._task.policy.evaluations - before
        metrics = {
            "time/update": time.perf_counter() - began,
            "cost/trained_per_image": rows / batch.images,
            "optim/lr": self._adamw.param_groups[0]["lr"],
        }
        if not record:
            return metrics
        self._steps += 1
        log_ratio = torch.cat([part["log_ratio"] for part in record]).double()
        below, above = self._bounds()
        ratio = log_ratio.exp()
        metrics |= {
            "ratio/clip_fraction": float(((ratio < 1 - below) | (ratio > 1 + above)).double().mean()),
            "ratio/approx_kl": float(0.5 * (log_ratio**2).mean()),
            "loss/policy": float(sum(part["policy"] for part in record)),
            "loss/kl": float(sum(part["kl"] for part in record)),
        }
        return metrics | ({"ratio/drift_max": float(log_ratio.abs().max())} if first else {})
