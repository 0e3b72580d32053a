"""Forward-process objectives: regression at noised clean samples, without log-probs of trajectories."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowalign.advantage import SignalContext
from flowalign.data import PromptRecord
from flowalign.models.roles import Role
from flowalign.objectives import Anchor, Predictions, StateObjective
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers.base import AdamWConfig, EndpointDraws, Inspection, Setup, Update, UpdateForecast
from flowalign.trainers.dry_run import ITERATIONS
from flowalign.trainers.pulls import Pulls, pulls_of_draws
from flowalign.trainers.samples import FromRollout, SampleBatch, Samples, SampleSource
from flowalign.trainers.signal import Signal
from flowalign.trainers.state_update import Draws, StateUpdate, roles_of
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine
from samplers import GridSigma, SampleKeys, SigmaLaw, even_sigmas, generator

PULLED_DRAWS = 32  # at which the doctor measures anchors
LEVELS = 6  # at which it measures samples


@dataclass
class ForwardProcess:
    """Regression of velocities at noised clean samples (DiffusionNFT 2509.16117, AWM 2509.25050, RAM 2605.10759, …).

    One iteration: `source` gives clean samples x0 with scores. `signal` makes one advantage of the scores of each sample, and
    chooses which samples are trained. Each of these is noised `draws` times, x = a·x0 + b·ε, with σ drawn by `law` and ε keyed
    to the sample. `objective` says, at each draw, the numbers c and κ of

        c·⟨(v − u)²⟩ + Σ κ·⟨(v − v_role)²⟩

    v the policy's velocity at x, u the path's own (ε − x0 for a rectified flow). The loss is the mean over draws of that and of
    the `anchors`, each towards a role; by name, the metric is loss/<name>. No log-prob is needed, so samples may come from an
    ODE (samplers.Deterministic), or from any plan.

    shared_draws: all samples of a group have the same σ and ε at each draw. Objectives that compare the members of a group are
    refused without it; for others it changes the variance only (share both or neither, and stratify σ).
    updates_per_rollout: updates on equal shares of the groups; epochs: how often all of them pass, with new draws each time. A role
    that must be the one which sampled may change only when all updates of a rollout are done (its `every`).
    guidance_scale: of the velocities in the update; 1 (none) by default, whatever the rollout has. The samples of a guided rollout
    are not those of the velocity that is regressed; only the centering of the advantages then holds its mean.

    The minimum of the regression, and for which objectives it is the tilt by e^{r/β}, stands with each objective; draws/curvature_*
    say how much of the batch pushes away from its target."""

    signal: Signal
    objective: StateObjective
    anchors: dict[str, Anchor] = field(default_factory=dict)
    source: SampleSource = field(default_factory=FromRollout)
    law: SigmaLaw = field(default_factory=GridSigma)
    draws: int = 4
    shared_draws: bool = False
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    updates_per_rollout: int = 1
    epochs: int = 1
    micro_batch: int = 16
    guidance_scale: float = 1.0
    _note: str = field(init=False, default="", repr=False)  # by `check`, for the forecast
    _chosen: int | None = field(init=False, default=None, repr=False)  # samples of a group that are trained, at most

    def __post_init__(self) -> None:
        for name in ("draws", "updates_per_rollout", "epochs", "micro_batch"):
            if vars(self)[name] < 1:
                raise ValueError(f"got trainer.{name}={vars(self)[name]}; expected at least 1")
        if not self.guidance_scale >= 1:
            raise ValueError(
                f"got trainer.guidance_scale={self.guidance_scale}; expected a number from 1 (no guidance)"
            )

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy.optimizer}

    @property
    def _active(self) -> dict[str, Anchor]:
        return {name: anchor for name, anchor in self.anchors.items() if anchor.active}

    def roles(self) -> Mapping[str, Role]:
        """The role that samples is, if it is not configured, a copy of the policy, taken when all updates of a rollout are done."""
        wanted = [
            *roles_of(self.objective, self._active.values()),
            *([] if self.source.role is None else [self.source.role]),
        ]
        copied = Role(update="copy", every=self.updates_per_rollout * self.epochs)
        return {name: Role() if name == "reference" else copied for name in wanted if name != "policy"}

    def check(self, setup: Setup) -> None:
        """Combinations that cannot work, named before a model is loaded."""
        rollout = setup.rollout
        self.source.check(setup)
        setup.check_process_rewards_unread("ForwardProcess")
        setup.check_micro_batch(self.micro_batch)
        if rollout.detach_uncond and setup.rows_per_state(self.guidance_scale) == 1:
            raise ValueError(
                f"got rollout.detach_uncond=true with trainer.guidance_scale={self.guidance_scale}, which has no unconditional half; expected false"
            )
        setup.check_equal_parts(self.updates_per_rollout)
        if setup.rows_per_state(self.guidance_scale) > setup.rows_per_state(rollout.guidance_scale):
            raise ValueError(
                f"got trainer.guidance_scale={self.guidance_scale} with rollout.guidance_scale={rollout.guidance_scale}, whose prompts have no negatives and "
                "whose samples are not those of a guided velocity; expected 1 too, or a guided rollout"
            )
        if setup.guidance == "embedded" and self.guidance_scale == 1 != rollout.guidance_scale:
            raise ValueError(
                f"got trainer.guidance_scale=1 with rollout.guidance_scale={rollout.guidance_scale:g} for a model whose scale is an input of its network, "
                "for which 1 is not 'none', so that another velocity would be trained than samples; expected that of the rollout: set "
                f"trainer.guidance_scale={rollout.guidance_scale:g}"
            )
        self._check_anchors(setup)
        self._check_objective(setup)
        self._check_sampler_stays(setup)
        self._dry_run(setup)

    def _check_anchors(self, setup: Setup) -> None:
        """ValueError for a name that the metrics already have, and for a role that is the policy or that nobody configured."""
        if "policy" in self.anchors:
            raise ValueError("got an anchor named 'policy', as the main term of the loss is: rename it")
        for name, anchor in self.anchors.items():
            if anchor.role == "policy":
                raise ValueError(
                    f"got trainer.anchors.{name}.role=policy, which is at no distance from itself: name another role"
                )
            if anchor.role != self.source.role:
                setup.check_role(f"trainer.anchors.{name}.role", anchor.role)

    def _check_objective(self, setup: Setup) -> None:
        """ValueError for samples, roles, groups or draws with which the formula of the objective does not hold."""
        made_by = self.objective.sampled_by
        if made_by is not None and self.source.role is not None and made_by != self.source.role:
            raise ValueError(
                f"got trainer.objective with old={made_by!r} and samples of trainer.source.role={self.source.role!r}; expected one "
                "role for both: the objective holds for samples of the role that it calls old"
            )
        for role in self.objective.needs:
            if role != self.source.role:
                setup.check_role("a role of trainer.objective", role)
        if self.objective.coupled and setup.rollout.group_size < 2:
            raise ValueError(
                f"got rollout.group_size={setup.rollout.group_size} with {self.objective}; expected groups of at least 2"
            )
        if self.objective.coupled and not self.shared_draws:
            raise ValueError(
                f"got trainer.shared_draws=false with {self.objective}, which compares the members of a group at one (σ, ε); with one "
                "for each what all have in common does not cancel: set trainer.shared_draws=true"
            )
        if made_by == "policy" and self.updates_per_rollout * self.epochs > 1:
            raise ValueError(
                f"got trainer.objective with old=policy and {self.updates_per_rollout * self.epochs} updates per rollout, in the "
                "later ones of which the policy is no longer the one that sampled; expected a role: set old and source.role to "
                "'old', or one update"
            )

    def _check_sampler_stays(self, setup: Setup) -> None:
        """ValueError if a role that must be the one which sampled changes between the updates of a rollout."""
        count, source = self.updates_per_rollout * self.epochs, self.source.role
        held = {self.objective.sampled_by, *(anchor.role for anchor in self._active.values())}
        role = setup.roles.get(source) if source is not None and source in held else None
        if role is not None and role.follows and role.every % count:
            raise ValueError(
                f"got policy.roles.{source}.every={role.every} with {count} updates per rollout; expected a multiple of {count}: in "
                "later updates the role that sampled would be another, for which neither the formulas nor the samples hold: set "
                f"policy.roles.{source}.every={count}"
            )

    def _dry_run(self, setup: Setup) -> None:
        """Signal and law on random scores. ValueError if nothing would be trained."""
        rollout, reason = setup.rollout, ""
        grid = even_sigmas(rollout.num_inference_steps, setup.path)
        SampleKeys(0, 0, ((0, 0, 0),)).sigmas(self.law, self.draws, grid, setup.path)
        for iteration in range(ITERATIONS):
            places = self.source.places(rollout, iteration, min(2, rollout.groups))
            channels = self.source.channels(setup.channels)
            scores = torch.from_numpy(generator(0, "data", "dry_run", iteration).random((len(places), len(channels))))
            valid, forest = torch.ones_like(scores, dtype=torch.bool), places.one_step_each()
            found = self.signal.edges(forest, scores, valid, channels, SignalContext(0, iteration))
            if bool(found.chosen.any()):
                other = self.signal.edges(forest, 1 - scores, valid, channels, SignalContext(0, iteration))
                if self.source.rolled and torch.equal(found.advantages.values, other.advantages.values):
                    raise ValueError(
                        f"got trainer.signal.advantage={self.signal.advantage}, which gives rollout.group_size={rollout.group_size} "
                        "samples the same weights whatever they score; expected weights that follow the reward, such as fewer best ones "
                        "than a group has samples"
                    )
                self._note = self._curvature(found.advantages.values.sum(1)[found.chosen])
                self._chosen = int(places.group[found.chosen].bincount().max())
                return
            if bool(found.advantages.valid.any()):
                reason = f"trainer.signal.select={self.signal.select} leaves out every sample: take AllEdges"
            else:
                reason = f"trainer.signal.advantage={self.signal.advantage} compares no two samples: take within=prompt"
        raise ValueError(f"nothing would be trained: {reason}")

    def _curvature(self, advantage: Tensor) -> str:
        """A line of the forecast on where the regression may have no minimum, "" where it always has one. advantage [n]: of
        random scores."""
        anchors = sum(float(anchor.curvature(torch.ones(1))) for anchor in self._active.values())
        curvature = self.objective.curvature(advantage.double()) + anchors
        low, mean, share = float(curvature.min()), float(curvature.mean()), float((curvature <= 0).double().mean())
        if low > 0:
            return ""
        named = f"curvature K of a draw: from {low:.3g}, mean {mean:.3g}, {share:.0%} not above 0"
        if anchors == 0 and mean < 1e-6:
            return f"{named}; the regression has no minimum, advantages push without bound: end the run in time, or add trainer.anchors"
        return f"{named}; the regression has a minimum only where the mean K at a state is above 0: watch draws/curvature_*"

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        chosen = len(self.source.places(rollout, 0, 1)) if self._chosen is None else self._chosen
        count = chosen * rollout.groups * self.draws * self.epochs
        frozen = count * (len(roles_of(self.objective, self._active.values())) + int(self.objective.coupled))
        notes = (*self.source.notes(), *((self._note,) if self._note else ()), *self._guided(rollout))
        updates, rolled = self.updates_per_rollout * self.epochs, None if self.source.rolled else 0
        return UpdateForecast(
            updates, count, frozen, rolled=rolled, guidance_scale=self.guidance_scale, notes=notes,
            inspection=Inspection(pulls=self.pulls, endpoints=self.endpoints), micro_batch=self.micro_batch,
        )  # fmt: skip

    def _guided(self, rollout: Rollout) -> tuple[str, ...]:
        """A line of the forecast on samples that are not those of the velocity that is regressed, () where they are."""
        if not self.source.rolled or rollout.guidance_scale == self.guidance_scale:
            return ()
        return (
            f"samples have guidance {rollout.guidance_scale:g}, the velocity that is regressed {self.guidance_scale:g}: they are not its "
            "own, as most of these methods take them to be (doctor: canonical); without guidance: "
            f"rollout.guidance_scale={self.guidance_scale:g}",
        )

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        digest = self.source.digest()
        state = {"updates": 0, "memory": {}, "source": digest} if state is None else state
        if state["source"] != digest:
            raise ValueError(
                f"the data of trainer.source={self.source} have changed since the checkpoint: restore them, or choose another run.name"
            )
        self.task, self._memory = task, state["memory"]
        self.source.prepare(task)
        self._policy = TrainedRole.of(task.policy, self.optimizer, updates=state["updates"])

    def state(self) -> dict[str, Any]:
        return {"updates": self._policy.updates, "memory": self._memory, "source": self.source.digest()}

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> SampleBatch:
        return self.source.collect(self.task, records, iteration)

    # ------------------------------------------------------------------------------------------ updates

    def updates(self, batch: SampleBatch) -> Iterable[Update]:
        samples = batch.samples
        context = SignalContext(self.task.seed, batch.iteration, samples.uids, self._memory)
        signal = samples.signal(self.signal, context)
        batch.metrics["group/zero_std_ratio"] = signal.advantages.zero_std_ratio
        batch.metrics["group/trained_samples"] = int(signal.chosen.sum())
        engine = self._engine(batch)
        share = self.task.rollout.groups // self.updates_per_rollout
        for epoch in range(self.epochs):
            for number in range(self.updates_per_rollout):
                chosen = (signal.chosen & (samples.places.group // share == number)).nonzero().flatten()
                if not len(chosen):
                    yield engine.update(self._policy, [], _nothing)
                    continue
                draws = self.drawn(engine, samples, chosen, signal.advantages.values.sum(1)[chosen], epoch)
                yield StateUpdate(engine, draws, self.objective, self._active, self.micro_batch).update(self._policy)

    def drawn(self, engine: UpdateEngine, samples: Samples, chosen: Tensor, advantage: Tensor, epoch: int = 0) -> Draws:
        """The draws of the samples `chosen` [n] with their advantages [n]: draw 0 of all, then draw 1, …"""
        path, keys = self.task.policy.path, samples.keys.at(chosen)
        keys = keys.shared() if self.shared_draws else keys
        again = "" if epoch == 0 else f" {epoch}"
        sigma = keys.sigmas(self.law, self.draws, samples.sigmas, path, f"sigma{again}").T
        latents, group = samples.latents.pick(chosen), samples.places.group[chosen]
        return Draws.of(latents, group, advantage, keys, sigma, path, engine, f"renoise{again}")

    # ------------------------------------------------------------------------------------------ inspection

    def pulls(self, batch: SampleBatch) -> Pulls:
        """At draws of all samples, spread evenly over their levels."""
        engine = self._engine(batch)
        draws = self._unweighted(engine, batch.samples)
        order = draws.states.sigma.argsort(stable=True)
        index = order[torch.linspace(0, len(order) - 1, min(PULLED_DRAWS, len(order))).round().long()]
        states = draws.states.at(index)
        roles = {
            role: engine.frozen(states, role)[0].values for role in roles_of(self.objective, self._active.values())
        }
        live = engine.frozen(states, "policy")[0].values
        target, noise = draws.target.at(index), draws.noise[index].to(live.device)
        return pulls_of_draws(self.objective, self._active, states.sigma, Predictions(live, roles, target, noise))

    def endpoints(self, batch: SampleBatch) -> EndpointDraws:
        """At levels that part those of the draws into equal shares, under the role that sampled.

        Nothing is assumed of them where they are nobody's (images of files), or where they only weigh a regression: none of
        them negatively, and without the residual of a role. Its minimum is the velocity of the weighted samples, whoever
        made them."""
        samples = batch.samples
        context = SignalContext(self.task.seed, batch.iteration, samples.uids, copy.deepcopy(self._memory))
        weights = samples.signal(self.signal, context).advantages.values
        regresses = self.objective.sampled_by is None and not self.objective.coupled
        trained = self._unweighted(self._engine(batch), samples).states.sigma.double()
        sigma = (
            trained.quantile((torch.arange(LEVELS) + 0.5).double() / LEVELS, interpolation="nearest").unique().float()
        )
        path, latents, keys = self.task.policy.path, samples.latents.at(torch.arange(len(samples.places))), samples.keys
        rolled = self.task.rollout.guidance_scale if self.source.rolled else self.guidance_scale
        scales = dict.fromkeys((self.guidance_scale, rolled))
        engines = [UpdateEngine(self.task, samples.conditions, batch.images, scale) for scale in scales]
        found: list[tuple[Tensor, ...]] = []
        for number, level in enumerate(sigma):
            at = level.expand(len(latents))
            noise = keys.noise(latents.shape[1:], number, "endpoints").to(latents)
            states = States(path.add_noise(latents, noise, at), at, samples.places.group)
            velocities = [engine.frozen(states, self.source.role or "policy")[0].values for engine in engines]
            found.append((states.x, path.velocity(latents, noise, at), *velocities))
        state, target, *velocity = (torch.stack(column) for column in zip(*found, strict=True))
        assumed = self.source.role is not None and not (regresses and bool((weights >= 0).all()))
        return EndpointDraws(sigma, state, target, velocity[0], assumed, velocity[1] if velocity[1:] else None)

    def _unweighted(self, engine: UpdateEngine, samples: Samples) -> Draws:
        """Those of all samples, with advantage 0."""
        return self.drawn(engine, samples, torch.arange(len(samples.places)), torch.zeros(len(samples.places)))

    def _engine(self, batch: SampleBatch) -> UpdateEngine:
        return UpdateEngine(self.task, batch.samples.conditions, batch.images, self.guidance_scale)


def _nothing(part: Part, measures: Measures) -> Tensor:
    raise AssertionError("an update without micro-batches has no loss")
