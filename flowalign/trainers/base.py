"""The trainer contract: what a trainer is given, and what the loop asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from flowalign.data import PromptRecord
from flowalign.models.base import Size
from flowalign.models.family import Guidance
from flowalign.models.guidance import classifier_free_rows
from flowalign.models.roles import Role
from flowalign.objectives import ClipRange, Regularizer
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.task import Rollout, Task
from flowalign.selectors import Selector
from flowalign.trainers.pulls import Pulls
from flowalign.trainers.signal import EdgeSignal
from rewards import RewardSpec
from samplers import Forest, Path, Step, fetch


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW and its schedule; defaults of flow_grpo (2505.05470) for SD3.5 with LoRA.

    lr rises linearly over `warmup` updates, then stays, or halves with every `half_life` updates: lr · 2^(−update/half_life).
    Gradients are clipped to norm `max_grad_norm`."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup: int = 0
    half_life: int | None = None

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)) or self.max_grad_norm <= 0 or self.warmup < 0:
            raise ValueError(f"got {self}; expected lr > 0, max_grad_norm > 0 and warmup >= 0")
        if self.half_life is not None and self.half_life < 1:
            raise ValueError(f"got half_life={self.half_life}; expected updates >= 1, or None for a constant lr")
        if not all(0 <= beta < 1 for beta in self.betas) or self.weight_decay < 0 or self.eps < 0:
            raise ValueError(f"got {self}; expected 0 <= betas < 1, weight_decay >= 0 and eps >= 0")

    def build(self, parameters: Iterable[Parameter]) -> torch.optim.AdamW:
        # foreach=False: one code path on every device, and the same order of operations after a resume
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, foreach=False
        )

    def lr_at(self, update: int) -> float:
        """The learning rate of update number `update` (0 is the first)."""
        decay = 1.0 if self.half_life is None else 0.5 ** (update / self.half_life)
        return self.lr * decay * min(1.0, (update + 1) / (self.warmup + 1))


@dataclass(frozen=True, eq=False)
class Update:
    """One optimizer step.

    micro_batches: each, when called, returns its part of the loss: the parts of all micro-batches and processes add up to
    the loss of the update, so they are already divided by the global count. All processes have equally many, and call the
    network equally often in each. read: called with tensors once the micro-batches are done and before the step; returns them on
    the host, where what was measured goes with them: only there the host waits for a device. RunError where the step must not
    be taken. after: called after the step, or in its place if there are no micro-batches; returns metrics. role: whose weights
    are stepped, see Policy.parameters_of.

    The backward may run under any role: what policy.gradient_checkpointing computes again is computed under the role of its
    forward. A recomputation of a trainer's own opens the role inside (`UpdateEngine.velocity` does)."""

    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    micro_batches: Sequence[Callable[[], Tensor]]
    after: Callable[[], dict[str, float]]
    role: str = "policy"
    read: Callable[[Sequence[Tensor]], list[Tensor]] = fetch


@dataclass(frozen=True)
class UpdateForecast:
    """Of one iteration: how many updates, how many states with forward and backward, and how many more network rows
    without gradient (roles, rescoring). Once, in `prepare`: states evaluated before the first iteration, and images that
    are decoded and scored there. rolled: network rows of its rollouts, where they are not those of the plan (an offline
    trainer has none); None: the plan's. guidance_scale: of the updates; None: that of the rollout. notes: what a user should
    know before the run, such as a regression without a minimum, a line each. reward_gradient: whether updates go through the
    reward, whose scores then need a graph. For the forecast of memory: micro_batch: states or samples per forward
    and backward, the field of this name of the trainer, a dataclass (None: it has none; what it holds is not known, and left out
    there); held, decoded: for each of them, states whose activations are there at the same time, and images decoded with a graph.
    inspection: see there."""

    updates: int
    trained: int
    frozen: int = 0
    before: int = 0
    before_scored: int = 0
    guidance_scale: float | None = None
    notes: tuple[str, ...] = ()
    rolled: int | None = None
    reward_gradient: bool = False
    micro_batch: int | None = None
    held: int = 1
    decoded: int = 0
    inspection: Inspection = field(default_factory=lambda: Inspection(), compare=False)


class Batch(Protocol):
    """What the run reads of what `collect` returned, and nothing else."""

    @property
    def metrics(self) -> dict[str, float]:
        """Of the rollout; the run adds those of the updates."""
        ...

    @property
    def images(self) -> int:
        """Samples; probes are none."""
        ...

    def picture(self) -> bytes | None:
        """A PNG for the report, such as the tree."""
        ...


@dataclass(frozen=True)
class Setup:
    """What a trainer may know before a model is loaded.

    rollout: with its kernel bound to `path`, the noising law of the policy. channels: of the reward. roles: those that
    the configuration gives the policy (policy.roles), by name. state_channels: of the process rewards, in Forest.scores.
    reward: what the reward says of itself. size: of what the policy makes. prompts: the training set. held_out: what is
    evaluated and must not be trained on; empty where that is allowed. rows_per_state: see Policy. guidance: what the guidance
    scale is to the policy."""

    rollout: Rollout
    path: Path
    channels: tuple[str, ...]
    roles: Mapping[str, Role] = field(default_factory=dict)
    state_channels: tuple[str, ...] = ()
    reward: RewardSpec = field(default_factory=RewardSpec)
    size: Size = field(default_factory=lambda: Size(0, 0))
    held_out: Sequence[PromptRecord] = ()
    prompts: Sequence[PromptRecord] = ()
    rows_per_state: Callable[[float], int] = classifier_free_rows
    guidance: Guidance = "classifier_free"

    def check_guidance_scale(self, key: str, scale: float | None) -> None:
        """ValueError for a scale, given as `key`, that the policy's networks ignore; None and 1 ask for none."""
        if self.guidance == "none" and scale not in (None, 1):
            raise ValueError(
                f"got {key}={scale:g} for a model that was distilled without guidance and ignores its scale, so that it would silently do "
                "nothing; expected 1: set it to 1, or take a model that is not distilled"
            )

    def check_role(self, key: str, role: str) -> None:
        """ValueError unless `role`, given as `key`, is the reference or configured."""
        if role not in ("reference", *self.roles):
            raise ValueError(
                f"got {key}={role!r}; expected 'reference' or one of policy.roles {sorted(self.roles)}: add it there"
            )

    def check_process_rewards_unread(self, trainer: str) -> None:
        """ValueError for process rewards, which `trainer` does not read; the only one may guide the rollout."""
        guidance = self.rollout.reward_guidance
        if self.state_channels and (guidance is None or guidance.reward is not None):
            raise ValueError(
                f"got process_rewards {list(self.state_channels)}, which {trainer} does not read; expected none: leave them out"
            )

    def check_equal_parts(self, updates_per_rollout: int) -> None:
        """ValueError unless the groups of a rollout can be dealt to `updates_per_rollout` updates, equally many to each."""
        if self.rollout.groups % updates_per_rollout:
            raise ValueError(
                f"got rollout.groups={self.rollout.groups} for trainer.updates_per_rollout={updates_per_rollout}; expected equal "
                "parts: choose a divisor"
            )

    def check_micro_batch(self, micro_batch: int) -> None:
        """ValueError for states per network call of the updates that rollout.fixed_rows would pad or split each time."""
        rows = self.rollout.rows
        if rows is not None and micro_batch != rows:
            raise ValueError(
                f"got trainer.micro_batch={micro_batch} with rollout.fixed_rows=true and rollout.micro_batch={rows}, to which every "
                "network call is filled up; expected equal ones: set trainer.micro_batch to that of the rollout"
            )

    def check_regularizers(self, regularizers: Mapping[str, Regularizer]) -> None:
        """ValueError for one that does not fit the kernel, or whose role is not configured."""
        for name, term in regularizers.items():
            try:
                term.check(self.rollout.kernel)
            except ValueError as error:
                raise ValueError(f"trainer.regularizers.{name}: {error}") from error
            self.check_role(f"trainer.regularizers.{name}.role", term.role)


class Trainer(Protocol):
    """A kind of trainer. Everything that must survive a resume is in `optimizers` and `state`."""

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...

    def check(self, setup: Setup) -> None:
        """ValueError for combinations that cannot work; called before any model is loaded."""
        ...

    def roles(self) -> Mapping[str, Role]:
        """The roles it will ask the policy for, by name; the run adds them, or takes those of the same name that the
        configuration gives in policy.roles. "reference" is always there, up to the copy that full weights need."""
        ...

    def forecast(self, rollout: Rollout) -> UpdateForecast:
        """What its updates cost in one iteration, at most."""
        ...

    def prepare(self, task: Task, state: dict[str, Any] | None) -> None:
        """Builds the optimizers, and whatever comes before the first iteration (calibration, cold start): `state` is None
        in a new run, else what `state()` gave for the checkpoint, which takes the place of that work. Weights and
        optimizers are put back afterwards. Without `task.prompts` that work is left out."""
        ...

    def collect(self, records: Sequence[PromptRecord], iteration: int) -> Any:
        """Rolls out and scores; what it returns is passed to `updates`, and read as a Batch."""
        ...

    def updates(self, batch: Any) -> Iterable[Update]: ...

    def state(self) -> dict[str, Any]:
        """Everything else that must survive a stop, as JSON."""
        ...


# ------------------------------------------------------------------------------------------ for the doctor and the benchmark


@dataclass(frozen=True)
class Inspection:
    """What can be measured of a trainer beside its updates; each is None where there is no such thing. All are asked of a batch
    of `collect`, after `prepare`.

    replay: of one whose losses read log-probs of the steps of a rollout. edges: of one whose loss is a sum over such steps.
    pulls: how strong its anchors are beside its signal. endpoints: of one that regresses velocities at noised samples. clip: of
    the ratios of steps."""

    replay: Replayed | None = None
    edges: EdgeTrainer | None = None
    pulls: Callable[[Any], Pulls] | None = None
    endpoints: Callable[[Any], EndpointDraws] | None = None
    clip: ClipRange | None = None


class Replayed(Protocol):
    """Reads the log-probs of a `ScoredRollout`, which is what its `collect` returns."""

    @property
    def micro_batch(self) -> int:
        """States per network call of its updates."""
        ...

    def drift_limit(self, step: Step, arrived: Tensor) -> Tensor:
        """[E] how far the log-probs of an unchanged policy may be from the rollout's. step: the transitions as they are scored now,
        to `arrived` [E, *]."""
        ...

    def allowing(self, drift: float, limit: float) -> str:
        """Which setting allows a drift of `drift` where `limit` was the least allowed, and what to set it to."""
        ...


class EdgeTrainer(Trainer, Protocol):
    """Its loss is a sum over stochastic steps, of which a selector chooses some."""

    def collect(
        self, records: Sequence[PromptRecord], iteration: int, roll: Callable[..., Forest] | None = None
    ) -> ScoredRollout:
        """roll: another engine, see `rollouts.collect.collect`."""
        ...

    def edge_signal(self, batch: ScoredRollout) -> EdgeSignal:
        """The advantages of all edges, and which of them are trained."""
        ...

    def narrowed(self, narrow: Callable[[Selector], Selector]) -> EdgeTrainer:
        """A copy, still to be prepared, that trains what `narrow` of its selector chooses, in one update of these steps alone."""
        ...


@dataclass(frozen=True, eq=False)
class EndpointDraws:
    """Each of N samples noised once at each of L levels: sigma [L]; state, target, velocity [L, N, *], the velocity that of the role
    which made the samples, as the update evaluates it. assumed: whether the objective takes velocity for E[target | state].
    guided [L, N, *]: its velocity with the guidance of the rollout; None where that is the update's."""

    sigma: Tensor
    state: Tensor
    target: Tensor
    velocity: Tensor
    assumed: bool
    guided: Tensor | None = None
