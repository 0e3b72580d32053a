"""The GRPO family: every member is this trainer with other parts (docs/methods.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.objectives import DynamicClip, KLPenalty, LayerTuning, Objective, StepWeight, Targets, Transitions
from flowalign.rollouts.collect import ScoredRollout, collect, grow, leaves_per_group
from flowalign.rollouts.task import Rollout, Task
from flowalign.selectors import SelectionContext
from flowalign.trainers.base import AdamWConfig, Trainer, Update
from flowalign.trainers.dry_run import dry_run
from flowalign.trainers.signal import EdgeSignal, Signal
from samplers import Forest, Path, unscored


@dataclass(frozen=True, eq=False)
class EdgeBatch:
    """Edges [E], their advantages [E, C], and their clip bounds [E, C, 2] where they are dynamic."""

    edges: Tensor
    advantages: Tensor
    bounds: Tensor | None

    def __getitem__(self, mask: Tensor) -> EdgeBatch:
        bounds = None if self.bounds is None else self.bounds[mask]
        return EdgeBatch(self.edges[mask], self.advantages[mask], bounds)

    def __len__(self) -> int:
        return len(self.edges)


@dataclass(frozen=True, eq=False)
class UpdateContext:
    """What the micro-batches of one update share.

    num_edges, num_targets: trained edges and states with a target in the whole update, over all processes: what losses are
    divided by. first: whether it is the first update of its rollout. record: what each micro-batch measured."""

    batch: ScoredRollout
    targets: Targets | None
    num_edges: int
    num_targets: int
    first: bool
    record: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass
class PolicyGradient:
    """Clipped policy gradient on the stochastic steps of a rollout (Flow-GRPO, 2505.05470).

    One forward and backward per distinct state serves all steps that leave it: their log-probs depend on the network only
    through its velocity there, so the gradient is exactly that of one pass per step. The reference is evaluated once, at
    the states of the rollout.

    signal: from the scores of the leaves to the trained steps and their advantages. objective, step_weight, kl: the loss of
    a step. dynamic_clip: takes the place of the objective's clip range. layer_tuning: adds a supervised term on the trained
    states. updates_per_rollout: updates per iteration, each on its share of the groups; from the second on the ratio is
    no longer 1. micro_batch: states per forward and backward."""

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
                f"got trainer.updates_per_rollout={self.updates_per_rollout}, trainer.micro_batch={self.micro_batch}; "
                "expected both at least 1"
            )
        self._num_updates = 0

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._adamw}

    def check(
        self, rollout: Rollout, path: Path, channels: tuple[str, ...], state_channels: tuple[str, ...] = ()
    ) -> None:
        """Combinations that cannot work, named before a model is loaded."""
        if rollout.group_size < 2:
            raise ValueError(
                f"got rollout.group_size={rollout.group_size}; expected at least 2: the advantage compares an image with "
                "others of its prompt"
            )
        if rollout.groups % self.updates_per_rollout:
            raise ValueError(
                f"got rollout.groups={rollout.groups} for trainer.updates_per_rollout={self.updates_per_rollout}; expected "
                "equal parts: choose a divisor"
            )
        if not rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size).edges:
            raise ValueError("got a rollout.plan without a stochastic step, so nothing to train: widen its window")
        samples, _ = leaves_per_group(rollout)
        if samples < 2:
            raise ValueError(
                f"got a rollout.plan that ends in {samples} image of each prompt; expected at least 2, which the advantage "
                "compares: let its selection keep more"
            )
        sigma, sigma_next = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()
        if not bool((rollout.kernel.coefficients(sigma, sigma_next, torch.ones_like(sigma)).std > 0).all()):
            raise ValueError(
                f"got rollout.kernel={rollout.kernel}, which draws no noise, so steps have no log-prob: take FlowSDE, "
                "DanceSDE or CPS with a noise_level above 0"
            )
        self._check_combinations(rollout, channels)
        self.step_weight.check(path)
        if self.layer_tuning is not None:
            self.layer_tuning.check(path)
        dry_run(self.signal, rollout, channels, path, state_channels)

    def _check_combinations(self, rollout: Rollout, channels: tuple[str, ...]) -> None:
        if self.layer_tuning is not None and len(channels) > 1:
            raise ValueError(
                f"got trainer.layer_tuning with the channels {list(channels)}; expected one, to rank leaves by: set "
                "layer_tuning=null, or take a reward of one channel (rewards.Mix)"
            )
        select = rollout.plan.select(unscored)
        if select is not None and not select.uses_velocity and min(select.counts) < rollout.num_inference_steps:
            raise ValueError(
                "got rollout.plan.uses_velocity=false with a selection on the way, whose previews need the velocities of all "
                "candidates, so the forecast has to count them: set uses_velocity=true"
            )
        if self.dynamic_clip is not None and not self.objective.has_clip_range:
            raise ValueError(
                f"got trainer.dynamic_clip with {self.objective}, which has no clip range: set dynamic_clip=null, or take "
                "ClippedRatio or Guard"
            )
        self.kl.check(rollout.kernel)
        tree = grow(rollout, 0, 0, [0])
        few = len(tree.index[tree.parents_of_edges].unique()) < rollout.num_inference_steps - 1
        if rollout.guidance_scale != 1 and few and not rollout.allow_cfg_update:
            raise ValueError(
                f"got rollout.guidance_scale={rollout.guidance_scale} inside a window of few steps, where peers report "
                "collapse: set rollout.guidance_scale=1, or rollout.allow_cfg_update=true to do it all the same"
            )

    def updates_per_iteration(self) -> int:
        return self.updates_per_rollout

    def needs_reference(self) -> bool:
        return self.kl.beta > 0

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        self.task, self._num_updates = task, 0 if state is None else state["updates"]
        self._adamw = self.optimizer.build([parameter for _, parameter in task.policy.trainable_parameters()])

    def state(self) -> dict[str, Any]:
        return {"updates": self._num_updates}

    def collect(
        self, prompts: Sequence[PromptRecord], iteration: int, roll: Callable[..., Forest] | None = None
    ) -> Any:
        """See `rollouts.collect.collect`."""
        needs_old = self.objective.needs_old_means or (self.layer_tuning is not None and self.layer_tuning.needs_old)
        return collect(self.task, prompts, iteration, keep_velocities=needs_old, roll=roll)

    def edge_signal(self, batch: ScoredRollout) -> EdgeSignal:
        """The advantages of all edges of a batch, and which of them are trained."""
        context = SelectionContext(self.task.seed, batch.iteration, batch.uids)
        return self.signal.edges(batch.forest, batch.scores, batch.valid, batch.channels, context)

    def updates(self, batch: Any) -> Iterable[Update]:
        """The updates of one rollout."""
        tree = batch.forest.tree
        signal = self.edge_signal(batch)
        advantages, chosen = signal.advantages, signal.chosen
        batch.metrics["group/zero_std_ratio"] = advantages.zero_std_ratio
        batch.metrics["group/trained_edges"] = int(chosen.sum())
        batch = replace(batch, forest=self._with_reference(batch, tree.edges[chosen]))
        bounds = self.dynamic_clip.bounds(batch.forest, advantages) if self.dynamic_clip else None
        edges = EdgeBatch(tree.edges, advantages.values, bounds)
        targets = self._targets(batch)
        share = self.task.rollout.groups // self.updates_per_rollout
        for number in range(self.updates_per_rollout):
            in_update = chosen & (tree.group[tree.edges] // share == number)
            yield self._update(batch, edges[in_update], targets, first=number == 0)

    # ------------------------------------------------------------------------------------------ one update

    def _update(self, batch: ScoredRollout, trained: EdgeBatch, targets: Targets | None, *, first: bool) -> Update:
        parents, position = batch.forest.tree.distinct_parents(trained.edges)
        num_targets = int(torch.isin(parents, targets.nodes).sum()) if targets else 0
        context = UpdateContext(batch, targets, len(trained), num_targets, first)
        micro_batches = []
        rows = self.task.processes.deal(len(parents))
        for dealt in rows.split(self.micro_batch) if len(rows) else ():
            real = dealt[dealt >= 0]
            place = torch.full((len(parents),), -1)
            place[real] = torch.arange(len(real))
            mine = place[position] >= 0
            # -1 pads: state 0 again, without an edge, so it adds no loss and all processes call the network equally often
            states = parents[dealt.clamp(min=0)]
            micro_batches.append(partial(self._loss, context, states, len(real), trained[mine], place[position[mine]]))
        for group in self._adamw.param_groups:
            group["lr"] = self.optimizer.lr_at(self._num_updates)
        began, before = time.perf_counter(), self.task.policy.evaluations
        after = partial(self._after, context, began, before)
        return Update(self._adamw, self.optimizer.max_grad_norm, micro_batches, after)

    def _loss(self, context: UpdateContext, states: Tensor, real: int, trained: EdgeBatch, position: Tensor) -> Tensor:
        """The loss of the edges `trained` [E], of which `position` [E] says which of `states` each leaves. The first `real`
        states are this process's, the others pad."""
        forest, edges = context.batch.forest, trained.edges
        velocity = self._velocity(context.batch, states)
        step, arrived = forest.edge_steps(edges, velocity, position), forest.at(edges)
        old_step = forest.role_steps("old", edges) if self.objective.needs_old_means else None
        transitions = Transitions(step, arrived, old_step, trained.bounds)
        log_prob, old = step.log_prob(arrived), forest.log_prob[edges]
        advantages = trained.advantages.to(log_prob)
        weight = self.step_weight.weigh(step, forest, edges)
        policy = (weight * self.objective.loss(log_prob, old, advantages, transitions)).sum() / context.num_edges
        penalty = policy.new_zeros(())
        if self.kl.beta:
            penalty = self.kl.beta * self.kl(step, forest.role_steps("reference", edges)).sum() / context.num_edges
        sft = self._supervised(context, states[:real], velocity[:real])
        log_ratio = self.objective.log_ratio(log_prob, old, transitions).detach()
        if context.first:
            self._check_replay(log_ratio, transitions)
        clipped = self.objective.clipped(log_prob.detach(), old, advantages, transitions)
        losses = {"policy": policy.detach(), "kl": penalty.detach(), "sft": sft.detach()}
        context.record.append({"log_ratio": log_ratio, "clipped": clipped, **losses})
        return policy + penalty + sft

    def _supervised(self, context: UpdateContext, states: Tensor, velocity: Tensor) -> Tensor:
        """LayerTuning's term."""
        if context.targets is None or self.layer_tuning is None or not context.num_targets:
            return velocity.new_zeros(())
        scale = self.layer_tuning.scale_at(context.batch.iteration)
        return scale * context.targets.loss(states, velocity).sum() / context.num_targets

    def _check_replay(self, log_ratio: Tensor, transitions: Transitions) -> None:
        """An unchanged policy repeats its log-probs. RuntimeError if they drift so far that the update would act on it."""
        if not len(log_ratio):  # padding only
            return
        drift = log_ratio.abs()
        limit = self.objective.drift_limit(transitions).to(drift)
        if not bool((drift <= limit).all()):
            worst = int((drift / limit).nan_to_num(nan=torch.inf).argmax())
            raise RuntimeError(
                f"got a replay drift of {float(drift[worst]):.2e} before the first update; expected at most "
                f"{float(limit[worst]):.2e}, or the update would act on rounding: widen the objective's bound (clip_range, "
                "max_kl) and resume with run.resume=changed, or use equal batch shapes (trainer.micro_batch)"
            )

    def _velocity(self, batch: ScoredRollout, nodes: Tensor) -> Tensor:
        forest, rollout = batch.forest, self.task.rollout
        return self.task.policy.velocity(
            forest.at(nodes), forest.sigma(nodes), batch.conditions.rows(forest.tree.group[nodes]),
            guidance_scale=rollout.guidance_scale, detach_uncond=rollout.detach_uncond,
        )  # fmt: skip

    def _targets(self, batch: ScoredRollout) -> Targets | None:
        if self.layer_tuning is None:
            return None
        return self.layer_tuning.targets(batch.forest, batch.scores[:, 0], batch.valid[:, 0])

    @torch.no_grad()
    def _with_reference(self, batch: ScoredRollout, edges: Tensor) -> Forest:
        """The forest with the reference's velocities, if the update reads them, each distinct state evaluated once, by
        one process."""
        if not self.kl.beta:
            return batch.forest
        processes, before = self.task.processes, self.task.policy.evaluations
        nodes = batch.forest.tree.distinct_parents(edges)[0]
        share = processes.share(len(nodes))
        own = nodes[share.start : share.stop].split(self.task.rollout.micro_batch)
        with self.task.policy.role("reference"):
            parts = [self._velocity(batch, part) for part in own if len(part)]
        velocities = torch.cat(parts) if parts else batch.forest.states[:0]
        rows = processes.total(self.task.policy.evaluations - before)
        batch.metrics["cost/reference_per_image"] = rows / batch.images
        return batch.forest.with_velocities("reference", nodes, processes.gather(velocities))

    def _after(self, context: UpdateContext, began: float, before: int) -> dict[str, float]:
        """Metrics of an update once its step is taken; they are those of the weights before it."""
        processes, record = self.task.processes, context.record
        metrics = {
            "time/update": time.perf_counter() - began,
            "cost/trained_per_image": processes.total(self.task.policy.evaluations - before) / context.batch.images,
            "optim/lr": self._adamw.param_groups[0]["lr"],
        }
        if not record:
            return metrics
        self._num_updates += 1
        log_ratio = processes.gather(torch.cat([part["log_ratio"] for part in record])).double()
        clipped = processes.gather(torch.cat([part["clipped"] for part in record])).double()
        loss = {name: processes.total(sum(float(part[name]) for part in record)) for name in ("policy", "kl", "sft")}
        return metrics | {
            "ratio/clip_fraction": float(clipped.mean()),
            "ratio/approx_kl": float(0.5 * (log_ratio**2).mean()),
            "loss/policy": loss["policy"],
            "loss/kl": loss["kl"],
            **({"loss/sft": loss["sft"]} if self.layer_tuning is not None else {}),
            **({"ratio/drift_max": float(log_ratio.abs().max())} if context.first else {}),
        }


def as_policy_gradient(trainer: Trainer) -> PolicyGradient | None:
    """`trainer` if it is a policy gradient, which alone has a replay and siblings to merge; else None."""
    return trainer if isinstance(trainer, PolicyGradient) else None
