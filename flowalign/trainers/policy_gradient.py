"""The GRPO family: every member is this trainer with other parts (docs/methods.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.advantage import SignalContext
from flowalign.data import PromptRecord
from flowalign.models.roles import Role
from flowalign.objectives import (
    DynamicClip,
    Objective,
    Regularizer,
    StepWeight,
    Supervision,
    Targets,
    Transitions,
    Uniform,
)
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.task import Rollout, Task
from flowalign.selectors import Selector
from flowalign.trainers.base import AdamWConfig, Inspection, Setup, Update, UpdateForecast
from flowalign.trainers.calibration import Calibration, leveled
from flowalign.trainers.dealt import Dealt
from flowalign.trainers.drift import velocity_unit
from flowalign.trainers.dry_run import dry_run
from flowalign.trainers.edge_update import EdgeUpdate, states_of
from flowalign.trainers.pulls import Pulls, pulls_of_edges
from flowalign.trainers.signal import EdgeSignal, Signal
from flowalign.trainers.trained_steps import check_guidance, check_previews, check_trained_steps
from flowalign.trainers.update_engine import TrainedRole, UpdateEngine
from samplers import Forest, Step


@dataclass
class PolicyGradient:
    """Clipped policy gradient on the stochastic steps of a rollout (Flow-GRPO, 2505.05470).

    One forward and backward per distinct state serves all steps that leave it: their log-probs depend on the network only
    through its velocity there, so the gradient is exactly that of one pass per step. Roles that regularizers and
    supervision name are evaluated once, at the states of the rollout.

    signal: from the scores of the leaves to the trained steps and their advantages. objective, step_weight: the loss of a
    step. regularizers: added to it, each towards a role; by name, the metric is loss/<name>. supervision: velocity targets
    at the trained states, by name too.
    calibration: of the noise level of each step, with the base model, in `prepare`; its factors are trainer state.
    dynamic_clip: takes the place of the objective's clip range. updates_per_rollout: updates per iteration, each on its
    share of the groups. micro_batch: states per forward and backward.

    anchor: what the ratio of an update is taken against. "detach": the first update of a rollout against its own log-prob
    without gradient (it is exactly on-policy: ratio 1, whatever batch shapes do to rounding), later ones against the
    rollout's; "rescore": as detach, and later updates against log-probs computed by the update's own path before the
    first one (one more forward for each of their states); "stored": all against the rollout's.
    max_drift: a run stops if an unchanged policy's log-probs differ from the rollout's as if its velocity were off by more
    than this along the noise: not rounding (a bf16 network drifts by less than 1e-3) but another grid, dropout or swapped
    conditions."""

    signal: Signal
    objective: Objective
    step_weight: StepWeight = field(default_factory=Uniform)
    regularizers: dict[str, Regularizer] = field(default_factory=dict)
    supervision: dict[str, Supervision] = field(default_factory=dict)
    calibration: Calibration | None = None
    dynamic_clip: DynamicClip | None = None
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    updates_per_rollout: int = 1
    micro_batch: int = 16
    anchor: Literal["detach", "rescore", "stored"] = "rescore"
    max_drift: float = 0.01

    def __post_init__(self) -> None:
        if self.updates_per_rollout < 1 or self.micro_batch < 1:
            raise ValueError(
                f"got trainer.updates_per_rollout={self.updates_per_rollout}, trainer.micro_batch={self.micro_batch}; "
                "expected both at least 1"
            )
        if not self.max_drift > 0:
            raise ValueError(f"got trainer.max_drift={self.max_drift}; expected a number > 0, such as 0.01")

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy.optimizer}

    @property
    def _active(self) -> dict[str, Regularizer]:
        return {name: term for name, term in self.regularizers.items() if term.active}

    def roles(self) -> Mapping[str, Role]:
        supervised = [part.role for part in self.supervision.values() if part.role is not None]
        return {role: Role() for role in dict.fromkeys([*(term.role for term in self._active.values()), *supervised])}

    def check(self, setup: Setup) -> None:
        """Combinations that cannot work, named before a model is loaded."""
        rollout = setup.rollout
        check_trained_steps(rollout)
        setup.check_equal_parts(self.updates_per_rollout)
        setup.check_micro_batch(self.micro_batch)
        self._check_names()
        self._check_terms(setup)
        self._check_combinations(setup)
        if self.calibration is not None:
            self.calibration.check(setup)
        self.step_weight.check(setup.path)
        dry_run(self.signal, self.step_weight, setup)

    def _check_terms(self, setup: Setup) -> None:
        setup.check_regularizers(self.regularizers)
        for name, part in self.supervision.items():
            part.check(setup.path, setup.channels)
            if part.role is not None:
                setup.check_role(f"trainer.supervision.{name}.role", part.role)
            if part.needs_guidance and setup.rollout.reward_guidance is None:
                raise ValueError(
                    f"got trainer.supervision.{name}, which distills the reward guidance of the rollout, without any: set "
                    "rollout.reward_guidance, or leave the term out"
                )

    def _check_names(self) -> None:
        names = ["policy", *self.regularizers, *self.supervision]
        if twice := sorted(name for name in set(names) if names.count(name) > 1):
            raise ValueError(
                f"got trainer.regularizers {sorted(self.regularizers)} and trainer.supervision {sorted(self.supervision)}; expected "
                f"names of one term of the loss each, beside 'policy', its main one: rename {', '.join(twice)}"
            )
        if self._keeps_velocities and any(term.role == "old" for term in self._active.values()):
            raise ValueError(
                "got trainer.regularizers with role='old', by which name the rollout's own velocities are kept here; expected "
                "another: rename the role, or take trainer.anchor=rescore and no supervision by old velocities"
            )

    @property
    def _keeps_velocities(self) -> bool:
        """Whether the rollout's own velocities are read, under the name "old"."""
        old = self.anchor != "rescore" and self.objective.needs_old_means
        return old or any(part.needs_old for part in self.supervision.values())

    def _check_combinations(self, setup: Setup) -> None:
        check_previews(setup.rollout)
        if self.dynamic_clip is not None and self.objective.clip is None:
            raise ValueError(
                f"got trainer.dynamic_clip with {self.objective}, which has no clip range: set dynamic_clip=null, or take "
                "ClippedRatio or Guard"
            )
        check_guidance(setup)

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        cost, share = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size), self.updates_per_rollout
        states = rollout.groups * cost.train
        rescored = states - states // share if self.anchor == "rescore" else 0
        before, scored = (0, 0) if self.calibration is None else self.calibration.forecast(rollout)
        clip = self.objective.clip if self.dynamic_clip is None else self.dynamic_clip.clip
        inspection = Inspection(replay=self, edges=self, pulls=self.pulls, clip=clip)
        return UpdateForecast(
            share, states, len(self.roles()) * states + rescored, before, scored, inspection=inspection,
            micro_batch=self.micro_batch,
        )  # fmt: skip

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        if state is None:
            state = {"updates": 0, "memory": {}, "factors": None}
            if self.calibration is not None and task.prompts:
                state["factors"] = list(self.calibration.factors(task))
        self._memory, self._factors = state["memory"], state.get("factors")  # a checkpoint of 0.1.0 has none
        self.task = leveled(task, self._factors)
        self._policy = TrainedRole.of(task.policy, self.optimizer, updates=state["updates"])

    def state(self) -> dict[str, Any]:
        return {"updates": self._policy.updates, "memory": self._memory, "factors": self._factors}

    def collect(
        self, records: Sequence[PromptRecord], iteration: int, roll: Callable[..., Forest] | None = None
    ) -> ScoredRollout:
        """See `rollouts.collect.collect`."""
        return collect(self.task, records, iteration, keep_velocities=self._keeps_velocities, roll=roll)

    def edge_signal(self, batch: ScoredRollout, memory: dict[str, Any] | None = None) -> EdgeSignal:
        """The advantages of all edges of a batch, and which of them are trained. memory: running statistics, updated; by
        default a copy of the trainer's own."""
        memory = copy.deepcopy(self._memory) if memory is None else memory
        context = SignalContext(self.task.seed, batch.iteration, batch.uids, memory)
        return self.signal.edges(batch.forest, batch.scores, batch.valid, batch.channels, context)

    def updates(self, batch: ScoredRollout) -> Iterable[Update]:
        """The updates of one rollout."""
        signal, tree = self.edge_signal(batch, self._memory), batch.forest.tree
        batch.metrics["group/zero_std_ratio"] = signal.advantages.zero_std_ratio
        batch.metrics["group/trained_edges"] = int(signal.chosen.sum())
        engine = UpdateEngine(self.task, batch.conditions, batch.images)
        share = self.task.rollout.groups // self.updates_per_rollout
        of_update = [signal.chosen & (tree.group[tree.edges] // share == k) for k in range(self.updates_per_rollout)]
        nodes = [tree.distinct_parents(tree.edges[mine])[0] for mine in of_update]
        dealt = Dealt.of(engine, batch.forest, nodes, tree.edges[signal.chosen])
        forest, frozen_rows = self._with_roles(engine, dealt.forest, tree.edges[signal.chosen], dealt.mine)
        bounds = self.dynamic_clip.bounds(forest, signal.advantages) if self.dynamic_clip else None
        targets = {
            name: (part.scale_at(batch.iteration), self._targets(engine, part, batch, forest, dealt.nodes))
            for name, part in self.supervision.items()
        }
        updates = []
        for number, (mine, deal) in enumerate(zip(of_update, dealt.deals, strict=True)):
            updates.append(
                EdgeUpdate(
                    engine, forest, tree.edges[mine], deal, signal.advantages.values[mine], None if bounds is None else bounds[mine],
                    self.objective, self.step_weight, self._active, targets, self.micro_batch, first=number == 0,
                    anchored=self.anchor != "stored", max_drift=self.max_drift,
                )
            )  # fmt: skip
        if self.anchor == "rescore":
            frozen_rows += sum(later.rescore() for later in updates[1:])
        if frozen_rows:
            batch.metrics["cost/frozen_per_image"] = frozen_rows
        for one in updates:
            yield engine.update(self._policy, one.parts, one.loss, one.metrics, one.check)

    def _with_roles(self, engine: UpdateEngine, forest: Forest, edges: Tensor, mine: Tensor) -> tuple[Forest, float]:
        """The forest with the velocities of every role that a regularizer or a supervision names, at the states that `edges`
        leave, on the process that trains them (of `mine` this one); also the network rows per sample."""
        nodes, total = forest.tree.distinct_parents(edges)[0], 0.0
        states, own = states_of(forest, nodes), torch.searchsorted(nodes, mine)
        for role in self.roles():
            velocities, rows = engine.frozen(states, role, mine=own)
            forest, total = forest.with_role(role, nodes, velocities), total + rows
        return forest, total

    def _targets(
        self, engine: UpdateEngine, part: Supervision, batch: ScoredRollout, forest: Forest, nodes: Sequence[Tensor]
    ) -> Targets:
        """The targets of a supervision, on the process that trains their states; `nodes` of each. Those that are not a role's are
        made where the group was rolled out."""
        targets = part.targets(forest, batch.scores, batch.valid)
        if part.role is not None:
            return targets
        wanted = [torch.isin(targets.nodes, each).nonzero().flatten() for each in nodes]
        return replace(targets, velocity=engine.bring(targets.velocity, forest.tree.group[targets.nodes], wanted))

    # ------------------------------------------------------------------------------------------ inspection

    def drift_limit(self, step: Step, arrived: Tensor) -> Tensor:
        """An update that takes its ratio against the rollout's log-probs must not act on the drift, another only stops where it
        is no rounding."""
        if self.anchor != "stored":
            return self.max_drift * velocity_unit(step)
        if self.dynamic_clip is not None:
            return torch.full((len(arrived),), self.dynamic_clip.low)
        return self.objective.drift_limit(Transitions(step, arrived))

    def allowing(self, drift: float, limit: float) -> str:
        if self.anchor != "stored":
            least = self.max_drift * drift / limit
            return f"which would stop at trainer.max_drift: set it to at least {least:.1e}"
        key = "objective.clip_range to" if self.objective.clip is not None else "objective.max_kl so that the limit is"
        key = key if self.dynamic_clip is None else "dynamic_clip.low to"
        return f"which would stop at the clip range {limit:.1e}: set {key} at least {drift:.1e}"

    def narrowed(self, narrow: Callable[[Selector], Selector]) -> PolicyGradient:
        """Without supervision, which is no sum over steps."""
        signal = replace(self.signal, select=narrow(self.signal.select))
        return replace(self, signal=signal, supervision={}, updates_per_rollout=1)

    def pulls(self, batch: ScoredRollout) -> Pulls:
        return pulls_of_edges(batch.forest, self.objective, self.step_weight, self._active)
