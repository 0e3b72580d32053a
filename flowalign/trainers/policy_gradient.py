"""The GRPO family: every member is this trainer with other parts (grpo_family §0.2, §11.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.objectives import (
    DynamicClip,
    KLPenalty,
    LayerTuning,
    Objective,
    StepWeight,
    Targets,
    Transitions,
)
from flowalign.rollouts.collect import ScoredRollout, collect, grow
from flowalign.rollouts.task import Rollout, Task
from flowalign.selectors import SelectionContext
from flowalign.trainers.base import AdamWConfig, Trainer, Update
from flowalign.trainers.dry_run import dry_run
from flowalign.trainers.signal import EdgeSignal, Signal
from samplers import Forest, Path, unscored


@dataclass(frozen=True, eq=False)
class Trained:
    """Trained edges [E] and what belongs to each: advantages [E, C], clip bounds [E, C, 2] where they are dynamic."""

    edges: Tensor
    advantages: Tensor
    bounds: Tensor | None

    def __getitem__(self, mask: Tensor) -> Trained:
        bounds = None if self.bounds is None else self.bounds[mask]
        return Trained(self.edges[mask], self.advantages[mask], bounds)

    def __len__(self) -> int:
        return len(self.edges)


@dataclass(frozen=True, eq=False)
class OneStep:
    """What the micro-batches of one optimizer step share. edges, aimed: how many edges are trained and how many states have
    a target in the whole step, over all processes: what losses are divided by. first: of its rollout. record: what each
    micro-batch measured."""

    batch: ScoredRollout
    targets: Targets | None
    edges: int
    aimed: int
    first: bool
    record: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass
class PolicyGradient:
    """Clipped policy gradient on the stochastic steps of a rollout (Flow-GRPO, 2505.05470).

    One forward and backward per distinct state serves all steps that leave it: their log-probs depend on the network only
    through its velocity there, so the gradient is exactly that of one pass per step. The reference is evaluated once, at
    the states of the rollout.

    signal: from the scores of the leaves to the trained steps and their advantages. objective, step_weight, kl: the loss of
    a step. dynamic_clip: takes the place of the objective's clip range. layer_tuning: adds a supervised
    term on the trained states. updates_per_rollout: optimizer steps per iteration, each on its share of the groups; from
    the second on the ratio is no longer 1. micro_batch: states per forward and backward."""

    signal: Signal
    objective: Objective
    step_weight: StepWeight
    kl: KLPenalty = field(default_factory=KLPenalty)
    dynamic_clip: DynamicClip | None = None
    layer_tuning: LayerTuning | None = None
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
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
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._adamw}

    def check(self, rollout: Rollout, path: Path, reward: str) -> None:
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
        if cost.leaves < 2:
            raise ValueError(
                f"rollout.plan leaves {cost.leaves} image of each prompt: let its selection keep at least 2, the "
                "advantage compares them"
            )
        if not cost.edges:
            raise ValueError("rollout.plan has no stochastic step, so there is nothing to train: widen its window")
        sigma, sigma_next = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()
        if not bool((rollout.kernel.coefficients(sigma, sigma_next, torch.ones_like(sigma)).std > 0).all()):
            raise ValueError(
                f"rollout.kernel={rollout.kernel} draws no noise, so steps have no log-prob: take FlowSDE, DanceSDE or "
                "CPS with a noise_level above 0"
            )
        self._check_combinations(rollout)
        self.step_weight.check(path)
        if self.layer_tuning is not None:
            self.layer_tuning.check(path)
        dry_run(self.signal, rollout, reward, path)

    def _check_combinations(self, rollout: Rollout) -> None:
        select = rollout.plan.select(unscored)
        if select is not None and not select.uses_velocity and min(select.counts) < rollout.num_inference_steps:
            raise ValueError(
                "rollout.plan.uses_velocity=false came with a selection on the way: its previews need the velocities of all "
                "candidates, and the forecast has to count them; set uses_velocity=true"
            )
        if self.dynamic_clip is not None and not self.objective.has_clip_range:
            raise ValueError(
                f"trainer.dynamic_clip came with {self.objective}, which has no clip range: set dynamic_clip=null, or take "
                "ClippedRatio or Guard"
            )
        tree = grow(rollout, 0, 0, [0])
        few = len(tree.index[tree.parents_of_edges].unique()) < rollout.num_inference_steps - 1
        if rollout.guidance_scale != 1 and few and not rollout.allow_cfg_update:
            raise ValueError(
                f"rollout.guidance_scale={rollout.guidance_scale} inside a window of few steps: peers report collapse; "
                "set rollout.guidance_scale=1, or rollout.allow_cfg_update=true to do it all the same"
            )

    def updates_per_iteration(self) -> int:
        return self.updates_per_rollout

    def needs_reference(self) -> bool:
        return self.kl.beta > 0

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        self._task, self._steps = task, 0 if state is None else state["steps"]
        self._adamw = self.optimizer.build([parameter for _, parameter in task.policy.trainable_parameters()])

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def collect(
        self, prompts: Sequence[PromptRecord], iteration: int, roll: Callable[..., Forest] | None = None
    ) -> Any:
        """See `trainers.collect.collect`."""
        aims = self.layer_tuning is not None and self.layer_tuning.needs_old
        return collect(
            self._task, prompts, iteration, keep_velocities=self.objective.needs_old_means or aims, roll=roll
        )

    def edge_signal(self, batch: ScoredRollout) -> EdgeSignal:
        """The advantages of all edges of a batch, and which of them are trained."""
        context = SelectionContext(self._task.seed, batch.iteration, batch.uids)
        return self.signal.edges(batch.forest, batch.scores, batch.valid, batch.channels, context)

    def updates(self, batch: Any) -> Iterable[Update]:
        """The optimizer steps of one rollout."""
        tree = batch.forest.tree
        signal = self.edge_signal(batch)
        advantages, chosen = signal.advantages, signal.chosen
        batch.metrics["group/zero_std_ratio"] = advantages.zero_std_ratio
        batch.metrics["group/trained_edges"] = int(chosen.sum())
        batch = replace(batch, forest=self._with_reference(batch, tree.edges[chosen]))
        bounds = self.dynamic_clip.bounds(batch.forest, advantages) if self.dynamic_clip else None
        trained = Trained(tree.edges, advantages.values, bounds)
        targets = self._targets(batch)
        share = self._task.rollout.groups // self.updates_per_rollout
        for number in range(self.updates_per_rollout):
            mine = chosen & (tree.group[tree.edges] // share == number)
            yield self._update(batch, trained[mine], targets, first=number == 0)

    # ------------------------------------------------------------------------------------------ one step

    def _update(self, batch: ScoredRollout, trained: Trained, targets: Targets | None, *, first: bool) -> Update:
        parents, position = batch.forest.tree.distinct_parents(trained.edges)
        aimed = int(torch.isin(parents, targets.nodes).sum()) if targets else 0
        whole = OneStep(batch, targets, len(trained), aimed, first)
        micro_batches = []
        rows = self._task.processes.deal(len(parents))
        for dealt in rows.split(self.micro_batch) if len(rows) else ():
            real = dealt[dealt >= 0]
            place = torch.full((len(parents),), -1)
            place[real] = torch.arange(len(real))
            mine = place[position] >= 0
            # padding comes last: a state again, without edges, so it weighs nothing
            states = parents[dealt.clamp(min=0)]
            micro_batches.append(partial(self._loss, whole, states, len(real), trained[mine], place[position[mine]]))
        for group in self._adamw.param_groups:
            group["lr"] = self.optimizer.lr_at(self._steps)
        began, before = time.perf_counter(), self._task.policy.evaluations
        return Update(
            self._adamw,
            self.optimizer.max_grad_norm,
            micro_batches,
            partial(self._after, whole, began, before),
        )

    def _loss(self, whole: OneStep, states: Tensor, real: int, trained: Trained, position: Tensor) -> Tensor:
        """The loss of the edges `trained`, of which `position` says which of `states` each leaves. The first `real` states
        are this process's, the others pad."""
        forest, edges = whole.batch.forest, trained.edges
        velocity = self._velocity(whole.batch, states)
        step, arrived = forest.edge_steps(edges, velocity, position), forest.at(edges)
        old_step = forest.role_steps("old", edges) if self.objective.needs_old_means else None
        known = Transitions(step, arrived, old_step, trained.bounds)
        log_prob, old = step.log_prob(arrived), forest.log_prob[edges]
        advantages = trained.advantages.to(log_prob)
        weight = self.step_weight.weigh(step, forest, edges)
        policy = (weight * self.objective.loss(log_prob, old, advantages, known)).sum() / whole.edges
        penalty = policy.new_zeros(())
        if self.kl.beta:
            penalty = self.kl.beta * self.kl(step, forest.role_steps("reference", edges)).sum() / whole.edges
        sft = self._supervised(whole, states[:real], velocity[:real])
        log_ratio = self.objective.log_ratio(log_prob, old, known).detach()
        if whole.first:
            self._check_replay(log_ratio, trained.bounds)
        clipped = self.objective.clipped(log_prob.detach(), old, advantages, known)
        losses = {"policy": policy.detach(), "kl": penalty.detach(), "sft": sft.detach()}
        whole.record.append({"log_ratio": log_ratio, "clipped": clipped, **losses})
        return policy + penalty + sft

    def _supervised(self, whole: OneStep, states: Tensor, velocity: Tensor) -> Tensor:
        """LayerTuning's term."""
        if whole.targets is None or self.layer_tuning is None or not whole.aimed:
            return velocity.new_zeros(())
        scale = self.layer_tuning.scale_at(whole.batch.iteration)
        return scale * whole.targets.loss(states, velocity).sum() / whole.aimed

    def _check_replay(self, log_ratio: Tensor, bounds: Tensor | None) -> None:
        """Invariant I1: an unchanged policy repeats its log-probs."""
        if not len(log_ratio):  # padding only
            return
        limit = self.objective.drift_limit if bounds is None else float(bounds.min())
        drift = float(log_ratio.abs().max())
        if not drift <= limit:
            raise RuntimeError(
                f"replay drift {drift:.2e} exceeds the objective's bound {limit:.2e} before the first step: the update "
                "would clip noise. Widen the bound (clip_range), keep log-probs fp32, or use equal batch shapes"
            )

    def _velocity(self, batch: ScoredRollout, nodes: Tensor) -> Tensor:
        forest = batch.forest
        rows = batch.conditions.rows(forest.tree.group[nodes])
        guidance = self._task.rollout.guidance_scale
        return self._task.policy.velocity(forest.at(nodes), forest.sigma(nodes), rows, guidance_scale=guidance)

    def _targets(self, batch: ScoredRollout) -> Targets | None:
        if self.layer_tuning is None:
            return None
        if len(batch.channels) > 1:
            raise ValueError(
                f"layer_tuning came with the rewards {list(batch.channels)}; expected one to rank leaves by"
            )
        return self.layer_tuning.targets(batch.forest, batch.scores[:, 0], batch.valid[:, 0])

    @torch.no_grad()
    def _with_reference(self, batch: ScoredRollout, edges: Tensor) -> Forest:
        """The forest with the reference's velocities, if the update reads them, each distinct state evaluated once, by
        one process."""
        if not self.kl.beta:
            return batch.forest
        processes, before = self._task.processes, self._task.policy.evaluations
        nodes = batch.forest.tree.distinct_parents(edges)[0]
        share = processes.share(len(nodes))
        own = nodes[share.start : share.stop].split(self._task.rollout.micro_batch)
        with self._task.policy.role("reference"):
            parts = [self._velocity(batch, part) for part in own if len(part)]
        said = torch.cat(parts) if parts else batch.forest.states.new_empty((0, *batch.forest.states.shape[1:]))
        rows = processes.total(self._task.policy.evaluations - before)
        batch.metrics["cost/reference_per_image"] = rows / batch.images
        return batch.forest.with_velocities("reference", nodes, processes.gather(said))

    def _after(self, whole: OneStep, began: float, before: int) -> dict[str, float]:
        """Bookkeeping after a step; the metrics are those of the weights before it."""
        processes, record = self._task.processes, whole.record
        metrics = {
            "time/update": time.perf_counter() - began,
            "cost/trained_per_image": processes.total(self._task.policy.evaluations - before) / whole.batch.images,
            "optim/lr": self._adamw.param_groups[0]["lr"],
        }
        if not record:
            return metrics
        self._steps += 1
        log_ratio = processes.gather(torch.cat([part["log_ratio"] for part in record])).double()
        clipped = processes.gather(torch.cat([part["clipped"] for part in record])).double()
        loss = {name: processes.total(sum(float(part[name]) for part in record)) for name in ("policy", "kl", "sft")}
        metrics |= {
            "ratio/clip_fraction": float(clipped.mean()),
            "ratio/approx_kl": float(0.5 * (log_ratio**2).mean()),
            "loss/policy": loss["policy"],
            "loss/kl": loss["kl"],
        }
        if self.layer_tuning is not None:
            metrics["loss/sft"] = loss["sft"]
        return metrics | ({"ratio/drift_max": float(log_ratio.abs().max())} if whole.first else {})


def as_policy_gradient(trainer: Trainer) -> PolicyGradient | None:
    """`trainer` if its loss is one of transitions, which alone have a replay and siblings to merge; else None."""
    return trainer if isinstance(trainer, PolicyGradient) else None
