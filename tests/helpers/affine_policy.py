"""A policy whose velocity is affine in the state, with a slope and a shift per step, label and role: everything has a closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from flowalign.data import PromptRecord
from flowalign.models.base import Sampling, Size
from flowalign.models.conditions import Conditions
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import Trainer
from samplers import Chain, FlowSDE, RectifiedFlow
from tests.helpers.plain_rewards import Plain, brightness
from tests.helpers.roles import switch_role

MEAN, SPREAD = 0.7, 0.5  # of the Gaussian data of which the exact velocity is
LABELS = ("a", "b", "")  # the last one: of the negative prompt


def exact(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """A, C [T] of v* = A·x + C at the levels [T], of data N(MEAN, SPREAD²)."""
    variance = (1 - sigmas) ** 2 * SPREAD**2 + sigmas**2
    slope = (sigmas - (1 - sigmas) * SPREAD**2) / variance
    return slope, -slope * (1 - sigmas) * MEAN - MEAN


@dataclass(eq=False)
class AffinePolicy:
    """v = (A_k + slope_k)·x + C_k + shift_k of the label, one coordinate at the level of step k; guidance mixes the label's with
    that of the negative prompt. slopes [T], shifts [T, 3]: by role; those of "policy" are trained."""

    steps: int
    slopes: dict[str, Tensor]
    shifts: dict[str, Tensor]
    active: str = "policy"
    evaluations: int = 0
    padded: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)
    sampling: Sampling | None = None
    path: RectifiedFlow = field(default_factory=RectifiedFlow)

    @staticmethod
    def of(steps: int, **shifts: float | Sequence[float]) -> AffinePolicy:
        """By role the shift of all steps, one number or one per label; slopes are 0."""
        rows = {
            role: torch.as_tensor(value).double().expand(steps, len(LABELS)).clone() for role, value in shifts.items()
        }
        slopes = {role: torch.zeros(steps).double() for role in rows}
        rows["policy"], slopes["policy"] = Parameter(rows["policy"]), Parameter(slopes["policy"])
        return AffinePolicy(steps, slopes, rows)

    @property
    def grid(self) -> Tensor:
        return torch.linspace(1, 0, self.steps + 1).double()

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return (1, 1, 1)

    def encode(
        self,
        records: Sequence[PromptRecord],
        *,
        negative: bool = False,
        together: bool = False,
        size: Size | None = None,
    ) -> Conditions:
        rows = Conditions({"label": torch.tensor([LABELS.index(record.metadata["task"]) for record in records])})
        none = Conditions({"label": torch.full((len(records),), len(LABELS) - 1)})
        return Conditions(rows.tensors, none if negative else None)

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return self.grid.float()

    def rows_per_state(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def velocity(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0, detach_uncond: bool = False
    ) -> Tensor:  # fmt: skip
        step = ((1 - sigma.double()) * self.steps).round().long().clamp(max=self.steps - 1)
        label, rows = conditions.tensors["label"], len(x)
        shift = self.shifts[self.active][step, label]
        if guidance_scale != 1:
            none = self.shifts[self.active][step, conditions.negative.tensors["label"]]
            shift, rows = none + guidance_scale * (shift - none), 2 * len(x)
        self.evaluations += rows
        self.calls.append((self.active, rows))
        slope, constant = exact(self.grid[:-1])
        flat = (slope[step] + self.slopes[self.active][step]) * x.double().flatten(1)[:, 0] + constant[step] + shift
        return flat.reshape(x.shape).to(x)

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    role = switch_role

    def parameters_of(self, role: str) -> list[tuple[str, Parameter]]:
        return [("shift", self.shifts[role]), ("slope", self.slopes[role])]


def records(*labels: str) -> list[PromptRecord]:
    """A prompt for each label, under the key task."""
    return [PromptRecord(uid, f"prompt {uid}", {"task": label}) for uid, label in enumerate(labels)]


def rollout(groups: int, group_size: int, steps: int, **changes) -> Rollout:
    settings = {"plan": Chain(train_last=True), "kernel": FlowSDE(0.7), **changes}
    return Rollout(groups=groups, group_size=group_size, num_inference_steps=steps, micro_batch=4096, **settings)


def prepared(policy: AffinePolicy, trainer: Trainer, settings: Rollout, reward=None, processes=None) -> Trainer:
    """The trainer, ready to collect."""
    more = {} if processes is None else {"processes": processes}
    trainer.prepare(Task(policy, reward or Plain(brightness), settings, 0, Size(1, 1), **more), None)
    return trainer


def gradient(trainer: Trainer, prompts: Sequence[PromptRecord], iteration: int = 0) -> tuple[Tensor, Tensor]:
    """(∂ loss/∂ shift [T, 3], ∂ loss/∂ slope [T]) summed over the updates of an iteration."""
    return gradient_of(trainer, trainer.collect(prompts, iteration))


def gradient_of(trainer: Trainer, batch) -> tuple[Tensor, Tensor]:
    """The same, of a batch."""
    parameters = [parameter for _, parameter in trainer.task.policy.parameters_of("policy")]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for update in trainer.updates(batch):
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        update.after()
    return tuple(parameter.grad.clone() for parameter in parameters)
