"""Reinforcement of a generator of few steps by rewards without a gradient: a surrogate of the reward is learned beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from flowalign.advantage import Normalized, SignalContext
from flowalign.data import PromptRecord
from flowalign.models.conditions import Conditions
from flowalign.models.roles import Role
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.gather import encoded
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers.base import AdamWConfig, Setup, Update, UpdateForecast
from flowalign.trainers.boundaries import Boundaries
from flowalign.trainers.few_step_updates import Directions, FewStepUpdates, Surrogate
from flowalign.trainers.samples import Places
from flowalign.trainers.signal import Signal
from flowalign.trainers.update_engine import TrainedRole, UpdateEngine
from samplers import ShiftedUniform, TransitionContext, generator, rollout, unscored

TRAINED = ("policy", "fake", "surrogate")


@dataclass
class FewStep:
    """TDM-R1 (2603.07700): a few-step generator keeps being distilled from its teacher (TDM, 2503.06674) while it climbs a
    surrogate of the reward, a diffusion model that learns which samples of a prompt are better (DGPO, 2510.08425).

    A rollout is the deterministic trajectory of the generator. Its reward is known at every state of it, since what follows
    has no randomness: the same group advantage holds at each. A state between two steps is noised again, exactly
    (`Path.bridge`), and there three networks are updated, each once per rollout, at `boundaries` random steps:
    "fake" regresses onto the generator's own predictions, so that it is the score of what the generator makes;
    "surrogate" is trained by the preference of the group, with noise that the group shares (`surrogate`);
    the generator's predicted image is moved towards the teacher's and away from fake's, along the teacher's guidance, and
    along what the surrogate has learned beyond the teacher (`directions`).

    teacher: the model of many steps that the generator was distilled from, which stays as it is. "reference": the policy
    without training, which is it where the policy is a LoRA on the teacher (policy.lora.init). Else what a Role starts from;
    with full weights a pipeline, such as glyphs or a hub id. fake and surrogate start from it too.
    shift, margin: of the noise levels, which are uniform in un-shifted time, see ShiftedUniform; the shift is the schedule's.
    fake_kl: weight of ⟨(v_fake − v_teacher)²⟩ in the loss of fake. fake_updates, surrogate_updates: of each per rollout, with
    draws of their own (ours: the code has one). optimizer: of the generator.

    Not kept: the importance weights of TDM's demo; the dynamic reference that the paper describes (its code has the frozen
    one); a surrogate of another architecture."""

    signal: Signal = field(default_factory=lambda: Signal(Normalized(within="prompt", std="batch")))
    surrogate: Surrogate = field(default_factory=Surrogate)
    directions: Directions = field(default_factory=Directions)
    teacher: str = "reference"
    boundaries: int = 2
    shift: float = 3.0
    margin: float = 0.02
    fake_kl: float = 0.02
    fake_updates: int = 1
    surrogate_updates: int = 1
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=7.5e-5, betas=(0.0, 0.999)))
    fake_optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=3e-4, betas=(0.0, 0.999)))
    surrogate_optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=3e-4))
    micro_batch: int = 16

    def __post_init__(self) -> None:
        for key in ("boundaries", "fake_updates", "surrogate_updates", "micro_batch"):
            if vars(self)[key] < 1:
                raise ValueError(f"got trainer.{key}={vars(self)[key]}; expected at least 1")
        if self.fake_kl < 0:
            raise ValueError(f"got trainer.fake_kl={self.fake_kl}; expected at least 0")

    # ------------------------------------------------------------------------------------------ contract

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: trained.optimizer for name, trained in self._trained.items()}

    @property
    def _real(self) -> str:
        """The role that is the teacher."""
        return "reference" if self.teacher == "reference" else "teacher"

    def roles(self) -> Mapping[str, Role]:
        start = self.teacher
        return {
            self._real: Role(init=start),
            "fake": Role(init=start, update="trained"),
            "surrogate": Role(init=start, update="trained"),
            # TDM-R1's code: decay min(0.3, 0.001 + 0.001·step), step 0 the first
            "surrogate_ema": Role(
                init=start, update="ema", of="surrogate", decay=0.3, rate=0.001, offset=0.001, start=1
            ),
        }

    def check(self, setup: Setup) -> None:
        settings = setup.rollout
        setup.check_micro_batch(self.micro_batch)
        if self.boundaries > settings.num_inference_steps:
            raise ValueError(
                f"got trainer.boundaries={self.boundaries} for {settings.num_inference_steps} steps; expected at most one for each"
            )
        if setup.rows_per_state(settings.guidance_scale) > 1:
            raise ValueError(
                f"got rollout.guidance_scale={settings.guidance_scale}; expected 1: a few-step generator has the guidance in its "
                "weights, and the teacher's is trainer.directions.guidance_scale"
            )
        for name in ("guidance_scale", "reward_guidance_scale"):
            setup.check_guidance_scale(f"trainer.directions.{name}", vars(self.directions)[name])
        setup.check_process_rewards_unread("FewStep")
        tree = grow(settings, 0, 0, [0])
        if len(tree.edges) or len(tree.leaves) != tree.num_roots or settings.plan.select(unscored) is not None:
            raise ValueError(
                f"got rollout.plan={settings.plan}; expected samplers.Deterministic: the reward of a sample is that of the states "
                "on its way only where no noise is added"
            )
        if not setup.path.rectified or not _is_euler(setup):
            raise ValueError(
                f"got rollout.kernel={settings.kernel} on {type(setup.path).__name__}; expected Euler's steps of a rectified flow, from "
                "which a state's prediction is read: take samplers.ODE and a flow model"
            )
        self._dry_run(setup)
        lowest = max(self.surrogate.min_sigma, self.directions.min_sigma)
        ShiftedUniform(lowest, self.shift, self.margin)

    def _dry_run(self, setup: Setup) -> None:
        """ValueError if the signal compares no two samples, or does not fit the channels."""
        places = Places.of(grow(setup.rollout, 0, 0, range(min(2, setup.rollout.groups))))
        scores = torch.from_numpy(generator(0, "data", "dry_run").random((len(places), len(setup.channels))))
        valid = torch.ones_like(scores, dtype=torch.bool)
        found = self.signal.edges(places.one_step_each(), scores, valid, setup.channels, SignalContext())
        if not bool(found.chosen.any()):
            raise ValueError(
                f"nothing would be learned from the reward: trainer.signal={self.signal} compares no two samples of "
                f"rollout.group_size={setup.rollout.group_size}; take groups of at least 2, Normalized(within=prompt) and AllEdges"
            )

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        """Rows of a sample and step, "F" without gradient. fake: teacher F. surrogate: teacher, its average and the gate's
        pass, 3 F. generator: fake, teacher with and without prompt, 3 F; surrogate with and without and teacher, 3 F."""
        states = rollout.groups * rollout.group_size * self.boundaries
        rewarded = rollout.groups * rollout.group_size * min(self.boundaries, self.directions.steps)
        updates = self.fake_updates + self.surrogate_updates + 1
        frozen = states * (self.fake_updates + 3 * self.surrogate_updates + 3) + 3 * rewarded
        note = (
            f"a generator of {rollout.num_inference_steps} steps is evaluated as it is rolled out only with "
            f"evaluation.num_inference_steps={rollout.num_inference_steps}, evaluation.guidance_scale=1 and the schedule of the rollout"
        )
        return UpdateForecast(updates, states * updates, frozen, notes=(note,), micro_batch=self.micro_batch)

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        state = state or {"memory": {}, **dict.fromkeys(TRAINED, 0)}
        self.task, self._memory = task, state["memory"]
        configs = dict(zip(TRAINED, (self.optimizer, self.fake_optimizer, self.surrogate_optimizer), strict=True))
        self._trained = {
            role: TrainedRole.of(task.policy, config, role, state[role]) for role, config in configs.items()
        }

    def state(self) -> dict[str, Any]:
        return {"memory": self._memory, **{role: trained.updates for role, trained in self._trained.items()}}

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> ScoredRollout:
        """Every state is stored; the conditions of the prompts are followed by those of the negative prompts, P rows each."""
        batch = collect(self.task, records, iteration, roll=partial(rollout, keep="all"))
        both = encoded(self.task, records, negative=True)
        assert both.negative is not None
        return replace(batch, conditions=Conditions.cat([replace(both, negative=None), both.negative]))

    def updates(self, batch: ScoredRollout) -> Iterable[Update]:
        context = SignalContext(self.task.seed, batch.iteration, batch.uids, self._memory)
        places = Places.of(batch.forest.tree)
        found = self.signal.edges(places.one_step_each(), batch.scores, batch.valid, batch.channels, context)
        batch.metrics["group/zero_std_ratio"] = found.advantages.zero_std_ratio
        advantages = found.advantages.values.sum(1) * found.chosen
        engine = UpdateEngine(self.task, batch.conditions, batch.images, groups=len(batch.uids))
        trajectories = Boundaries.of(batch, self.task.seed, self.task.policy.path, self.shift, self.margin)
        deal = engine.deal(trajectories.group.repeat(self.boundaries))
        wanted = deal.wanted(torch.arange(len(trajectories)).repeat(self.boundaries))
        nodes = [trajectories.nodes[each].flatten() for each in wanted]
        moved = engine.bring_states(batch.forest, nodes, [each[:0] for each in nodes])
        update = FewStepUpdates(
            engine, replace(trajectories, forest=moved), deal, advantages, self._real, self.surrogate, self.directions,
            trajectories.random_steps(self.boundaries), self.fake_kl, self.micro_batch,
        )  # fmt: skip
        for number in range(self.fake_updates):
            yield update.fake(self._trained["fake"], number)
        for number in range(self.surrogate_updates):
            yield update.surrogate_reward(self._trained["surrogate"], number)
        yield update.generator(self._trained["policy"])


def _is_euler(setup: Setup) -> bool:
    """Whether the kernel's deterministic step is x − h·v and passes nothing on."""
    x, v = torch.tensor([[1.0]]).double(), torch.tensor([[3.0]]).double()
    sigma, sigma_next = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()
    step = setup.rollout.kernel(x, v, sigma, sigma_next, TransitionContext(level=0.0, step=torch.tensor([1])))
    return step.carry is None and torch.allclose(step.mean, x - 0.25 * v)
