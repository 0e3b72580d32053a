"""Reward-difference prediction: the policy regresses the reward differences of pairs of trajectories (PRDP)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.roles import Role
from flowalign.objectives.reward_difference import pairs_of
from flowalign.objectives.transitions import ClipRange, check_elements, scale_of_clip_range
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.rolling import grow, leaves_per_group
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers.base import AdamWConfig, Inspection, Setup, Update, UpdateForecast
from flowalign.trainers.dealt import Dealt
from flowalign.trainers.edge_update import states_of
from flowalign.trainers.pair_regression import PairRegression
from flowalign.trainers.trained_steps import check_guidance, check_previews, check_trained_steps
from flowalign.trainers.trajectories import REFERENCE, Replay, Trajectories
from flowalign.trainers.update_engine import Measures, TrainedRole, UpdateEngine
from samplers import Forest
from samplers.noise import generator, visits


@dataclass
class RewardDifference:
    """PRDP (2402.08714): KL-regularized reward maximization as a regression, with black-box rewards.

    The optimum of E[r] − β·KL(π ‖ reference) over trajectories x̄ is π* ∝ reference·exp(r/β), so the implicit reward
    R̂ = log π/reference of a path satisfies β·(R̂_a − R̂_b) = r_a − r_b for any two samples a, b of a prompt:

        loss = mean over prompts of the mean over pairs of max(e², e_clip²),  e = R̂_a − R̂_b − (r_a − r_b)/β      (eq. 15, 21)

    Every pair of a prompt counts once, ties and samples without a score not at all; a prompt without a pair counts as 0.
    R̂ is the sum, or the mean, of the log-ratios of the stochastic steps of a path (`over_steps`); siblings share those of their
    common steps, which cancel. e_clip has each step's log-ratio within ±clip_range of that under the rollout's weights.

    beta, clip_range: in the unit of a step's log-ratio, which is the kernel's `reduce`. With means over the D elements and the T
    steps (the paper's code averages over steps; over elements is our reading, as its clip ranges of 1e-6 and 1e-4 say) the
    coefficient of the KL in nats is beta/(T·D), so paper values of beta are far from the optimum and only weigh R̂ against r.
    T: the stochastic steps of the longest path. elements: as in ClippedRatio, the latents that clip_range was found for.

    Both samples of a pair start from noise that no policy chooses: the loss reaches 0 only where they share it
    (`rollout.plan.shared_start`). Else 2·Var(log Z(start)) stays, which on fresh samples does not move the optimum; `pair/floor` estimates it where a
    start has several samples.

    updates_per_rollout: all on the whole batch (K of the paper; with 1 nothing is ever clipped, and the gradient is that of
    REINFORCE on r − β·R̂ with the prompt's mean as baseline). steps_per_update: each update sends its gradient through so many random
    steps of each prompt, the same for all of its samples; the residuals are those of all steps, so the gradient is right in
    expectation (ours; the paper trains all). None: all.
    anchor: what the clip range lies around in later updates. "rescore": log-ratios computed by the update's own path before the first
    (one more forward for each state); "detach": the rollout's, and a run stops where they drift by more than a tenth of
    clip_range. The first update takes the rollout's as its first pass. max_drift: as in PolicyGradient.
    Memory: two velocities per state, the rollout's and the reference's, and the graph of one micro-batch."""

    beta: float = 3e-6
    clip_range: float = 1e-4
    elements: int | None = None
    over_steps: Literal["mean", "sum"] = "mean"
    steps_per_update: int | None = None
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    updates_per_rollout: int = 1
    micro_batch: int = 16
    anchor: Literal["rescore", "detach"] = "rescore"
    max_drift: float = 0.01

    def __post_init__(self) -> None:
        for name in ("beta", "clip_range", "max_drift"):
            if not 0 < vars(self)[name] < math.inf:
                raise ValueError(f"got trainer.{name}={vars(self)[name]}; expected a finite number above 0")
        for name in ("updates_per_rollout", "micro_batch", "steps_per_update"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"got trainer.{name}={vars(self)[name]}; expected at least 1")
        for name, choices in (("over_steps", ("mean", "sum")), ("anchor", ("rescore", "detach"))):
            if vars(self)[name] not in choices:
                raise ValueError(f"got trainer.{name}={vars(self)[name]!r}; expected one of {', '.join(choices)}")
        check_elements(self.elements)

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy.optimizer}

    def roles(self) -> Mapping[str, Role]:
        return {REFERENCE: Role()}

    def check(self, setup: Setup) -> None:
        rollout = setup.rollout
        setup.check_micro_batch(self.micro_batch)
        check_trained_steps(rollout)
        check_previews(rollout)
        check_guidance(setup)
        if rollout.kernel.constants != "full":
            raise ValueError(
                f"got rollout.kernel={rollout.kernel}, whose log-probs have no constants, so that their differences are no log "
                "density ratios and the optimum is another: set its constants=full"
            )
        if len(setup.channels) != 1:
            raise ValueError(
                f"got a reward with the channels {list(setup.channels)}; expected one, whose differences are regressed: take "
                "rewards.Mix"
            )
        for given, name in (
            (setup.state_channels, "process_rewards"),
            (rollout.sources, "rollout.sources"),
            (rollout.reward_guidance, "rollout.reward_guidance"),
            (leaves_per_group(rollout)[1], "a rollout.plan with probes"),
        ):
            if given:
                raise ValueError(
                    f"got {name} with RewardDifference, which compares the final scores of samples that the policy drew from its "
                    "own steps: leave it out"
                )
        steps = len(_trained_steps(rollout))
        if self.steps_per_update is not None and self.steps_per_update > steps:
            raise ValueError(
                f"got trainer.steps_per_update={self.steps_per_update} with {steps} stochastic steps in rollout.plan; expected at "
                "most as many, or null for all"
            )

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        cost = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size)
        count, every, chosen = self.updates_per_rollout, cost.train, cost.train
        if self.steps_per_update is not None:
            chosen = min(chosen, self.steps_per_update * cost.leaves)
        passes = count + (count > 1 and self.anchor == "rescore")  # the reference, later first passes, the anchor
        groups = rollout.groups
        return UpdateForecast(
            count, groups * count * chosen, groups * passes * every, notes=_notes(rollout), micro_batch=self.micro_batch,
            inspection=Inspection(clip=ClipRange(self.clip_range, self.elements)),
        )  # fmt: skip

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        self.task = task
        self._policy = TrainedRole.of(task.policy, self.optimizer, updates=0 if state is None else state["updates"])

    def state(self) -> dict[str, Any]:
        return {"updates": self._policy.updates}

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> ScoredRollout:
        """See `rollouts.collect.collect`; the forest keeps the rollout's velocities."""
        return collect(self.task, records, iteration, keep_velocities=True)

    def updates(self, batch: ScoredRollout) -> Iterable[Update]:
        """The updates of one rollout, each on all of its pairs."""
        tree, rewards = batch.forest.tree, batch.scores[:, 0].cpu()
        pairs = pairs_of(rewards, batch.valid[:, 0].cpu(), tree.group[tree.leaves])
        engine = UpdateEngine(self.task, batch.conditions, batch.images)
        edges = _edges_above(batch.forest, pairs.samples)
        dealt = Dealt.of(engine, batch.forest, [tree.distinct_parents(edges)[0]], edges)
        forest, frozen = _with_reference(engine, dealt, edges)
        steps = Trajectories(engine, forest, edges, dealt.deals[0], self.micro_batch)
        regression = PairRegression(steps, pairs, rewards, self.beta, self._clip_range(forest), self.over_steps)
        later = self.updates_per_rollout > 1
        limit = regression.clip_range / 10 if later and self.anchor == "detach" else None
        replay, old = Replay(steps, limit, self.max_drift, Measures(self.task.processes)), steps.rolled
        rescored = later and self.anchor == "rescore"
        if rescored:
            old, rows = replay.rescored()
            frozen += rows
        batch.metrics.update({**regression.of_rollout(), "cost/frozen_per_image": frozen})
        for number in range(self.updates_per_rollout):
            unchanged = number == 0
            yield engine.coupled_update(
                self._policy, steps.deal, self.micro_batch,
                replay.numbers if unchanged and not rescored else steps.numbers,
                partial(regression.loss, old), owner=steps.owner, known=old if unchanged else None,
                weight=self._weight(batch, edges, number),
                metrics=partial(regression.metrics, old=old, replay=replay if unchanged else None),
                check=replay.check,
                measures=replay.measures if unchanged else None,
            )  # fmt: skip

    def _clip_range(self, forest: Forest) -> float:
        """For latents of this size."""
        return self.clip_range * scale_of_clip_range(self.elements, forest.states, forest.kernel.reduce)

    def _weight(self, batch: ScoredRollout, edges: Tensor, number: int) -> Tensor | None:
        """[E] of each of `edges` in update `number`: T/n on n of the T steps of its prompt, 0 on the others. None: all count."""
        if self.steps_per_update is None:
            return None
        tree, weight = batch.forest.tree, torch.zeros(len(edges), dtype=torch.float64)
        step, group = tree.index[tree.parent[edges]], tree.group[edges]
        for one, (uid, visit) in enumerate(zip(batch.uids, visits(batch.uids), strict=True)):
            steps = step[group == one].unique()
            key = (self.task.seed, "pair_steps", batch.iteration, uid, visit, number)
            drawn = steps[torch.from_numpy(generator(*key).permutation(len(steps))[: self.steps_per_update])]
            weight[(group == one) & torch.isin(step, drawn)] = len(steps) / max(len(drawn), 1)
        return weight


def _edges_above(forest: Forest, samples: Tensor) -> Tensor:
    """The stochastic steps on the paths to the leaves `samples`, positions in `tree.leaves`."""
    tree = forest.tree
    edge, leaf = tree.leaf_of_edge
    return tree.edges[edge[torch.isin(leaf, samples)].unique()]


def _with_reference(engine: UpdateEngine, dealt: Dealt, edges: Tensor) -> tuple[Forest, float]:
    """The forest with the reference's velocities at the states that `edges` leave, on the process that trains them, and the network
    rows per sample."""
    nodes = dealt.forest.tree.distinct_parents(edges)[0]
    velocities, rows = engine.frozen(states_of(dealt.forest, nodes), REFERENCE, mine=dealt.deals[0].mine)
    return dealt.forest.with_role(REFERENCE, nodes, velocities), rows


def _trained_steps(rollout: Rollout) -> Tensor:
    """The grid steps that are stochastic in a group of the first iteration."""
    tree = grow(rollout, 0, 0, [0])
    return tree.index[tree.parents_of_edges].unique()


def _notes(rollout: Rollout) -> tuple[str, ...]:
    if grow(rollout, 0, 0, [0]).num_roots == 1:
        return ()
    return (
        "pairs: samples of a prompt do not share their start noise, so the loss does not fall to 0 but to 2·Var(log Z(start)); the "
        "optimum is the same (rollout.plan.shared_start=true takes the noise out of it)",
    )
