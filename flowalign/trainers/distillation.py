"""On-policy distillation: the student goes its own way and is pulled, at each state it visits, to the teacher of its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.distributed.deal import Deal
from flowalign.models.conditions import Conditions
from flowalign.models.guidance import classifier_free_rows
from flowalign.models.roles import Role
from flowalign.objectives import Gate, Match, Pull
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.gather import encoded
from flowalign.rollouts.task import Rollout, Task
from flowalign.rollouts.unscored import BetaStep, Sampler, Stopping, roll_out
from flowalign.trainers.base import AdamWConfig, Setup, Update, UpdateForecast
from flowalign.trainers.cold_start import ColdStart
from flowalign.trainers.dealt import Dealt
from flowalign.trainers.distillation_checks import check_combinations
from flowalign.trainers.edge_update import states_of
from flowalign.trainers.pull_update import PullUpdate
from flowalign.trainers.teachers import ManifoldAnchor, Route, Teacher, Teachers
from flowalign.trainers.update_engine import TrainedRole, UpdateEngine
from flowalign.trainers.visits import Visits, future
from samplers import Deterministic, Forest, Held, Plan, rollout, sampled


@dataclass(frozen=True, eq=False)
class Distilled:
    """A rollout of the student, or in a cold start of its teachers. teachers: the role that teaches each group. conditions: with
    negatives if a role needs them. scored: the rollout with its scores, if it was scored. cold: whether it is of a cold start."""

    forest: Forest
    conditions: Conditions
    teachers: tuple[str, ...]
    uids: tuple[int, ...]
    iteration: int
    metrics: dict[str, float]
    scored: ScoredRollout | None = None
    cold: bool = False

    @property
    def images(self) -> int:
        """How many samples there are, finished or not."""
        tree = self.forest.tree
        return int(sampled(tree).sum()) or len(tree) - len(tree.evaluated)

    def picture(self) -> bytes | None:
        """The tree, colored by the first reward; None without scores."""
        return None if self.scored is None else self.scored.picture()


@dataclass
class Distillation:
    """On-policy distillation (Flow-OPD 2605.08063, DiffusionOPD 2605.15055, DanceOPD 2606.27377; guidance as a teacher).

    One iteration: the policy, the student, rolls out the prompts. At the states of its own rollout the loss is w·⟨(v − v_m)²⟩, v
    its velocity there and v_m that of the prompt's teacher, evaluated once. No reward is needed.

    teachers: roles of policy.roles, or "reference", with their guidance. route: which of them teaches a prompt, by a label in
    its metadata; None: the only one. match: w, the exact KL of a step by default. query: one state of each rollout, which
    stops there; None: all states (with form=kl those that a stochastic step leaves). The loss is the mean over steps and
    trajectories.
    horizon: "myopic" has the gradient of each state's term with the state held fixed. "full" that of the expected sum over the
    whole trajectory: each step also gets the cost that follows it, its own excluded, as a score-function term, less the mean
    over the other samples of the group. A state's own term, detached, times its own step's score has expectation 0: there is
    no such option.
    anchor: a second role at all states. gate: only samples of at least a reward; the rest of the loss, the anchor, counts all.
    cold_start: the first iterations learn from the teachers' images.
    split: what one optimizer step takes: "groups", an equal part of them, all teachers together (DiffusionOPD), or "teacher",
    the groups of one teacher after those of another (DanceOPD). updates_per_rollout: with "groups"; the states of later updates
    are those of the policy before the first. score_images: finished samples are decoded and scored, for the log.
    guidance_scale: of the student, in its rollout and its updates; None: that of the rollout. A student at 1 of teachers with
    guidance absorbs it: sample and evaluate it at 1 then. micro_batch: states per forward and backward."""

    teachers: dict[str, Teacher]
    route: Route | None = None
    match: Match = field(default_factory=Match)
    query: BetaStep | None = None
    horizon: Literal["myopic", "full"] = "myopic"
    anchor: ManifoldAnchor | None = None
    gate: Gate | None = None
    cold_start: ColdStart | None = None
    split: Literal["groups", "teacher"] = "groups"
    updates_per_rollout: int = 1
    score_images: bool = True
    guidance_scale: float | None = None
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    micro_batch: int = 16

    def __post_init__(self) -> None:
        if self.updates_per_rollout < 1 or self.micro_batch < 1:
            raise ValueError(
                f"got trainer.updates_per_rollout={self.updates_per_rollout}, trainer.micro_batch={self.micro_batch}; "
                "expected both at least 1"
            )
        Teacher(self.guidance_scale)
        if self.horizon not in ("myopic", "full") or self.split not in ("groups", "teacher"):
            raise ValueError(
                f"got trainer.horizon={self.horizon!r}, trainer.split={self.split!r}; expected 'myopic' or 'full', and 'groups' or "
                "'teacher'"
            )

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy.optimizer}

    @property
    def _teachers(self) -> Teachers:
        return Teachers(self.teachers, self.route)

    def _own(self, rollout: Rollout) -> Rollout:
        """The rollout with the student's guidance."""
        return rollout if self.guidance_scale is None else replace(rollout, guidance_scale=self.guidance_scale)

    def roles(self) -> Mapping[str, Role]:
        anchors = [] if self.anchor is None else [self.anchor.role]
        return {name: Role() for name in dict.fromkeys([*self.teachers, *anchors])}

    def check(self, setup: Setup) -> None:
        """Combinations that cannot work, named before a model is loaded."""
        setup.check_process_rewards_unread("Distillation")
        setup.check_micro_batch(self.micro_batch)
        scales = {name: teacher.guidance_scale for name, teacher in self.teachers.items()}
        for key, scale in {
            "guidance_scale": self.guidance_scale,
            **{f"teachers.{k}.guidance_scale": v for k, v in scales.items()},
        }.items():
            setup.check_guidance_scale(f"trainer.{key}", scale)
        self._teachers.check(self._own(setup.rollout), setup.roles, setup.prompts)
        if self.anchor is not None:
            setup.check_role("trainer.anchor.role", self.anchor.role)
        scale = self._own(setup.rollout).guidance_scale
        if setup.rollout.detach_uncond and setup.rows_per_state(scale) == 1:
            raise ValueError(
                f"got rollout.detach_uncond=true with trainer.guidance_scale={scale}, which has no unconditional half; expected false"
            )
        check_combinations(self, setup)

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        """The costlier of a cold start's iteration, in which the teachers' rollouts count as frozen, and of one after it."""
        cost, own = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size), self._own(rollout)
        images, rolled = rollout.groups * rollout.group_size, rollout.groups * cost.rollout
        states = rollout.groups * (cost.train if self.match.stochastic_only else cost.rollout)
        if self.query is not None:
            states, rolled = images, images * (rollout.num_inference_steps - 1)
        updates = self.updates_per_rollout
        if self.split == "teacher":
            updates = min(len(self.teachers), rollout.groups)
        rows = self._teachers.rows(own)
        frozen = states * (
            rows + (0 if self.anchor is None else Teachers({self.anchor.role: self.anchor.teacher}, None).rows(own))
        )
        if self.cold_start is not None:
            states = max(states, images * self.cold_start.draws)
            frozen = max(frozen, images * rollout.num_inference_steps * rows)
        # what is not the rollout's own guidance is told in its rows
        rolled = -(-rolled * classifier_free_rows(own.guidance_scale) // classifier_free_rows(rollout.guidance_scale))
        return UpdateForecast(
            updates, states, frozen, rolled=rolled, guidance_scale=self.guidance_scale, notes=self._notes(own),
            micro_batch=self.micro_batch,
        )  # fmt: skip

    def _notes(self, rollout: Rollout) -> tuple[str, ...]:
        scales = [teacher.scale(rollout) for teacher in self.teachers.values()]
        absorbed = [scale for scale in scales if scale != rollout.guidance_scale]
        if not absorbed:
            return ()
        return (
            f"the student learns guidance {max(absorbed):g} at its own {rollout.guidance_scale:g}: sample and evaluate it there "
            f"(evaluation.guidance_scale={rollout.guidance_scale:g})",
        )

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        for record in task.prompts:
            self._teachers.of(record)
        self.task = replace(task, rollout=self._own(task.rollout))
        self._policy = TrainedRole.of(task.policy, self.optimizer, updates=0 if state is None else state["updates"])

    def state(self) -> dict[str, Any]:
        """A cold start is counted in iterations, so there is nothing of it to keep."""
        return {"updates": self._policy.updates}

    # ------------------------------------------------------------------------------------------ rollout

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> Distilled:
        """The student's rollout; of a cold start, the teachers' images of their own prompts."""
        if self.cold_start is not None and iteration < self.cold_start.iterations:
            return self._cold(records, iteration)
        keep: Literal["edges", "all"] = "edges" if self.match.stochastic_only and self.query is None else "all"
        roll, full = partial(rollout, keep=keep), self.horizon == "full"
        if self.score_images:
            scored = collect(self.task, records, iteration, keep_velocities=full, roll=roll)
            return self._distilled(scored.forest, scored.metrics, records, iteration, scored)
        plan = self.task.rollout.plan
        plan = plan if self.query is None else Stopping(plan, self.query)
        samplers = [Sampler("policy", self.task.rollout.guidance_scale)] * len(records)
        return self._rolled(records, iteration, plan, samplers, "rollout", roll=roll, keep_velocities=full)

    def _cold(self, records: Sequence[PromptRecord], iteration: int) -> Distilled:
        """Without noise on the way; counted as what frozen roles cost."""
        samplers = self._teachers.samplers(self.task.rollout, records)
        return self._rolled(records, iteration, Deterministic(), samplers, "frozen", cold=True)

    def _rolled(
        self, records: Sequence[PromptRecord], iteration: int, plan: Plan, samplers: Sequence[Sampler], counted: str,
        *, cold: bool = False, **how: Any,
    ) -> Distilled:  # fmt: skip
        """A rollout without scores, whose network rows are cost/<counted>_per_image."""
        task = replace(self.task, rollout=replace(self.task.rollout, plan=plan))
        forest, rows, seconds = roll_out(task, records, iteration, samplers, **how)
        found = self._distilled(forest, {"time/rollout": seconds}, records, iteration, None, cold)
        found.metrics.update({f"cost/{name}_per_image": 0.0 for name in ("rollout", "decodes", "reward_calls")})
        found.metrics[f"cost/{counted}_per_image"] = rows / found.images
        return found

    def _distilled(
        self, forest: Forest, metrics: dict[str, float], records: Sequence[PromptRecord], iteration: int,
        scored: ScoredRollout | None, cold: bool = False,
    ) -> Distilled:  # fmt: skip
        rollout = self.task.rollout
        scales = [rollout.guidance_scale, *self._scales(rollout).values()]
        scales += [] if self.anchor is None else [self.anchor.teacher.scale(rollout)]
        conditions = encoded(
            self.task, records, negative=any(self.task.policy.rows_per_state(scale) > 1 for scale in scales)
        )
        teachers = tuple(self._teachers.of(record) for record in records)
        uids = tuple(record.uid for record in records)
        return Distilled(forest, conditions, teachers, uids, iteration, metrics, scored, cold)

    def _scales(self, rollout: Rollout) -> dict[str, float]:
        """The guidance scale of each teacher."""
        return {role: teacher.scale(rollout) for role, teacher in self.teachers.items()}

    # ------------------------------------------------------------------------------------------ update

    def updates(self, batch: Distilled) -> Iterable[Update]:
        """The updates of one rollout."""
        engine = UpdateEngine(self.task, batch.conditions, batch.images)
        if batch.cold and self.cold_start is not None:
            for chosen in self._shares(batch):
                start = self.cold_start
                one = start.update(engine, batch.forest, batch.iteration, batch.uids, chosen, self.micro_batch)
                yield one.update(self._policy)
            return
        visits, kept = Visits.of(batch.forest, self.match, stopped=self.query is not None), None
        if self.gate is not None and batch.scored is not None:
            column = self.gate.column(batch.scored.channels)
            kept = self.gate.keeps(batch.scored.scores[:, column], batch.scored.valid[:, column])
            batch.metrics["distill/kept"] = float(kept.double().mean())
            visits = visits.gated(batch.forest.tree, kept, drop=self.anchor is None)
        tree, shares = batch.forest.tree, list(self._shares(batch))
        nodes = [visits.of_groups(tree, chosen)[0].nodes for chosen in shares]
        dealt = Dealt.of(engine, batch.forest, nodes, tree.edges if self.horizon == "full" else tree.edges[:0])
        states, mine = states_of(dealt.forest, visits.nodes), torch.searchsorted(visits.nodes, dealt.mine)
        roles = [batch.teachers[group] for group in states.rows.tolist()]
        taught, rows = engine.frozen(states, roles, self._scales(self.task.rollout), mine)
        anchored = None
        if self.anchor is not None:
            scale = self.anchor.teacher.scale(self.task.rollout)
            anchored, more = engine.frozen(states, self.anchor.role, {self.anchor.role: scale}, mine)
            rows += more
        batch.metrics["cost/frozen_per_image"] = rows
        batch = replace(batch, forest=dealt.forest)
        for chosen, deal in zip(shares, dealt.deals, strict=True):
            yield self._matching(engine, batch, visits, taught, anchored, chosen, deal).update(self._policy)

    def _shares(self, batch: Distilled) -> Iterator[Tensor]:
        """[G] the groups of each update."""
        if self.split == "teacher":
            teachers = [name for name in self.teachers if name in batch.teachers]
            yield from (torch.tensor([each == name for each in batch.teachers]) for name in teachers)
            return
        share = len(batch.teachers) // self.updates_per_rollout
        for number in range(self.updates_per_rollout):
            yield torch.arange(len(batch.teachers)) // share == number

    def _matching(
        self, engine: UpdateEngine, batch: Distilled, visits: Visits, taught: Held, anchored: Held | None, chosen: Tensor,
        deal: Deal,
    ) -> PullUpdate:  # fmt: skip
        """The update on the groups `chosen` [G]; velocities of teachers and anchor at `visits.nodes`."""
        forest, path = batch.forest, self.task.policy.path
        own, index = visits.of_groups(forest.tree, chosen)
        least = 1 if self.gate is None else self.gate.least
        pulls = {"policy": Pull(taught.pick(index), own.weight(forest, path, self.match, least), self.match)}
        if self.anchor is not None and anchored is not None:
            weight = self.anchor.scale * own.everywhere().weight(forest, path, self.anchor.match)
            pulls["anchor"] = Pull(anchored.pick(index), weight, self.anchor.match)
        after = future(forest, own, pulls, deal, engine.task.processes) if self.horizon == "full" else None
        step, group = forest.tree.index[own.nodes], forest.tree.group[own.nodes]
        masks = {f"step_{int(k)}": step == k for k in step.unique()}
        if len(self.teachers) > 1:
            taught_by = [batch.teachers[each] for each in group.tolist()]
            masks |= {name: torch.tensor([each == name for each in taught_by]) for name in self.teachers}
        return PullUpdate(engine, states_of(forest, own.nodes), deal, pulls, self.micro_batch, after, masks=masks)
