"""Back-propagation of differentiable rewards: every member is this trainer with another truncation (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flowalign.data import PromptRecord
from flowalign.models.conditions import Conditions
from flowalign.models.grid import grid
from flowalign.models.roles import Role
from flowalign.objectives import Negative, Regularizer, RewardLoss
from flowalign.rollouts.gather import encoded
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers.base import AdamWConfig, Setup, Update, UpdateForecast
from flowalign.trainers.reward_update import RewardUpdate, divergences
from flowalign.trainers.update_engine import TrainedRole, UpdateEngine
from flowalign.truncations import Chains, LastSteps, Truncation
from samplers import Tree, even_sigmas, unscored
from samplers.noise import generator

DRY_RUNS = 8  # draws of a truncation that are tried before a model is loaded


@dataclass(frozen=True, eq=False)
class Unsampled:
    """The samples of one iteration before they are made: the update makes them, with graph. prompts, conditions: one per
    group. tree: independent chains."""

    prompts: Sequence[PromptRecord]
    conditions: Conditions
    tree: Tree
    iteration: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.tree.num_roots

    def picture(self) -> bytes | None:
        return None


@dataclass
class BackPropagation:
    """Descends the loss of a reward through the decoder and some steps of the sampler.

    truncation: which steps carry gradient and what the reward sees: ReFL, DRaFT, DRaFT-K, DRaFT-LV, AlignProp, DRTune, SRPO,
    LeapAlign and FlowBP-Sparse are the choices. loss: of a sample's reward. regularizers: β·divergence from a role, the mean
    over the network calls with graph, by name, the metric is loss/<name>; for DRaFT+'s ⟨(v − v_ref)²⟩ take form=velocity; the
    KL of a path of K stochastic steps is K times that of form=exact. Where a call's input carries gradient, so does the role's,
    so the gradient is exact.

    One update per iteration. Its micro-batches roll out `micro_batch` samples each, with the graph of the active steps only, so
    that no state is evaluated twice; rollout.kernel's noise is keyed and reparametrized. checkpoint: activations of one step
    at a time, computed again in the backward; else those of all active steps.

    A sample without a score adds nothing to the gradient and leaves reward/mean; the sum over the others is divided by the
    number of all, since how many fail is only known when the last micro-batch is done. Not kept: several updates per
    rollout, an estimate where the reward has no gradient."""

    truncation: Truncation = field(default_factory=LastSteps)
    loss: RewardLoss = field(default_factory=Negative)
    regularizers: dict[str, Regularizer] = field(default_factory=dict)
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    micro_batch: int = 4
    checkpoint: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"got trainer.micro_batch={self.micro_batch}; expected at least 1")
        if {"policy"} & self.regularizers.keys():
            raise ValueError(
                "got a trainer.regularizers named 'policy', as the main term of the loss is; expected another name: rename it"
            )

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self._policy.optimizer}

    @property
    def _active(self) -> dict[str, Regularizer]:
        return {name: term for name, term in self.regularizers.items() if term.active}

    def roles(self) -> Mapping[str, Role]:
        return {term.role: Role() for term in self._active.values()}

    def check(self, setup: Setup) -> None:
        """Combinations that cannot work, named before a model is loaded."""
        _check_reward(setup)
        _check_rollout(setup.rollout)
        setup.check_micro_batch(self.micro_batch)
        setup.check_regularizers(self.regularizers)
        self._dry_run(setup)

    def _dry_run(self, setup: Setup) -> None:
        """ValueError for what the truncation or a regularizer cannot work with: some chains of one number, without network."""
        rollout, path = setup.rollout, setup.path
        steps = rollout.num_inference_steps
        tree = grow(rollout, 0, 0, [0])
        self.truncation.passes(steps)
        x, sigmas = torch.zeros(1, 1), even_sigmas(steps, path)
        noise = {int(tree.index[tree.parent[node]]): x for node in tree.edges.tolist()}
        chains = Chains(lambda x, sigma, row: x, x, sigmas, rollout.kernel, path, lambda number: x, noise)
        for number in range(DRY_RUNS):
            outcome = self.truncation.run(chains, generator(0, "truncation", number))
            for name, term in self._active.items():
                try:
                    divergences(term, rollout.kernel, outcome.visits, [visit.v for visit in outcome.visits])
                except ValueError as error:
                    raise ValueError(
                        f"trainer.regularizers.{name}: {error}. {self.truncation} reaches deterministic steps: take form=velocity"
                    ) from error

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        """At most: a random truncation may cost less."""
        passes, samples = self.truncation.passes(rollout.num_inference_steps), rollout.groups * rollout.group_size
        more = [("decoded", passes.decodes), ("given to the reward", passes.scores)]
        notes = tuple(f"images {verb}: {count} per sample" for verb, count in more if count != 1)
        trained, rolled = samples * passes.graph, samples * passes.without
        frozen = trained * len(self._active)
        return UpdateForecast(
            1, trained, frozen, notes=notes, rolled=rolled, reward_gradient=True,
            micro_batch=self.micro_batch, held=1 if self.checkpoint else passes.graph, decoded=passes.decodes,
        )  # fmt: skip

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        self.task = task
        self._policy = TrainedRole.of(task.policy, self.optimizer, updates=0 if state is None else state["updates"])

    def state(self) -> dict[str, Any]:
        return {"updates": self._policy.updates}

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> Unsampled:
        """Encodes the prompts; the update samples and scores, and has the metrics of both."""
        settings = self.task.rollout
        conditions = encoded(self.task, records, negative=self.task.policy.rows_per_state(settings.guidance_scale) > 1)
        return Unsampled(records, conditions, grow(settings, self.task.seed, iteration, range(len(records))), iteration)

    def updates(self, batch: Unsampled) -> Iterable[Update]:
        """The one update of the iteration."""
        task, engine = self.task, UpdateEngine(self.task, batch.conditions, batch.images)
        shape, steps = task.policy.latent_shape(task.size_of(batch.prompts)), task.rollout.num_inference_steps
        update = RewardUpdate(
            engine, self.truncation, self.loss, self._active, batch.prompts, batch.tree, batch.iteration,
            grid(task.policy, task.rollout.schedule, steps, shape), shape, self.checkpoint,
        )  # fmt: skip
        deal = engine.deal(batch.tree.group[: batch.images])
        parts = engine.micro_batches(deal, self.micro_batch)
        yield engine.update(self._policy, parts, update.loss_of, update.metrics)


def _check_reward(setup: Setup) -> None:
    """ValueError for a reward without gradient to what it scores, sample by sample, as one number."""
    spec, names = setup.reward, ", ".join(setup.channels)
    if spec.elsewhere:
        raise ValueError(
            f"got the reward {names!r}, which another process computes, so that no gradient comes back; expected one of this "
            "process: name it without rewards.Remote or a worker"
        )
    if not spec.differentiable:
        raise ValueError(
            f"got the reward {names!r}, which has no gradient, for trainer=flowalign.trainers.BackPropagation; expected a "
            "differentiable one: rewards.CLIPScore (model glyphs on Glyphs), PickScore, HPSv2, ImageReward or Aesthetic, or "
            "rewards.FunctionReward with differentiable=true; or take PolicyGradient, which needs scores only"
        )
    if spec.groupwise or len(setup.channels) > 1:
        raise ValueError(
            f"got the reward {names!r}, which scores {'groups' if spec.groupwise else 'several channels'}; expected one number "
            "of each sample by itself: sum channels in rewards.Mix"
        )
    setup.check_process_rewards_unread("BackPropagation")


def _check_rollout(rollout: Rollout) -> None:
    """ValueError for a plan that is not one of independent chains, all with the same stochastic steps, and for settings of a
    rollout that would do nothing here."""
    idle = {
        "sources": bool(rollout.sources), "hint_key": rollout.hint_key is not None, "refill": bool(rollout.refill),
        "reward_guidance": rollout.reward_guidance is not None, "preview_reward": rollout.preview_reward is not None,
        "branch_scale": rollout.branch_scale is not None, "allow_cfg_update": rollout.allow_cfg_update,
    }  # fmt: skip
    if named := [f"rollout.{key}" for key, used in idle.items() if used]:
        raise ValueError(f"got {', '.join(named)}, which BackPropagation would not follow; expected none: leave it out")
    for iteration in range(DRY_RUNS):
        groups = min(2, rollout.groups)
        tree, size = grow(rollout, 0, iteration, range(groups)), groups * rollout.group_size
        rows = [tree.level[nodes] for nodes in tree.generations[1:]]
        chains = len(rows) == tree.num_steps and all(len(row) == size for row in [tree.generations[0], *rows])
        same = chains and all(bool((row == row[0]).all()) and float(row[0]) in (0.0, 1.0) for row in rows)
        if not same or rollout.plan.select(unscored) is not None or bool(tree.source.any()):
            raise ValueError(
                f"got rollout.plan={rollout.plan} with rollout.draw={rollout.draw}; expected independent chains that all have the "
                "same steps at noise level 0 or 1: take samplers.Deterministic or samplers.Chain, a plan with "
                "shared_start=false, or draw=iteration where it is random"
            )
