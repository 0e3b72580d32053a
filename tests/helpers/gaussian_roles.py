"""A policy whose networks are Gaussians: what a few-step generator makes of noise and the exact velocities of its teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from flowalign.data import PromptRecord
from flowalign.distributed.processes import Processes
from flowalign.models import Conditions, Size
from flowalign.models.base import Sampling
from flowalign.rollouts.task import Rollout, Task
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import ODE, Deterministic, RectifiedFlow, plain_sigmas
from tests.helpers.roles import switch_role

SHAPE = (1, 2, 3)


def clean_mean(x: Tensor, sigma: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x0 | x_σ = x] of data N(mean, std²): m + (1−σ)s²/V·(x − (1−σ)m), V = (1−σ)²s² + σ²."""
    sigma = sigma.to(x).view(-1, *[1] * (x.ndim - 1))
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    return mean + (1 - sigma) * std**2 / variance * (x - (1 - sigma) * mean)


@dataclass
class GaussianRoles:
    """laws: by role, (mean, std) of what its network knows, float64 and trained. "policy" takes noise z along straight lines to
    mean + std·z, in any number of steps; every other role is the exact velocity of data N(mean, std²), whose mean is lower by
    `negative` under the negative prompt."""

    laws: dict[str, Parameter]
    negative: float = 0.0
    evaluations: int = 0
    padded: int = 0
    sampling: Sampling | None = None
    path: RectifiedFlow = field(default_factory=RectifiedFlow)
    active: str = "policy"

    @staticmethod
    def of(negative: float = 0.0, **laws: tuple[float, float]) -> GaussianRoles:
        return GaussianRoles({name: Parameter(torch.tensor(law).double()) for name, law in laws.items()}, negative)

    def parameters_of(self, role: str) -> list[tuple[str, Parameter]]:
        return [(role, self.laws[role])]

    role = switch_role

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return SHAPE

    def rows_per_state(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def encode(
        self,
        records: Sequence[PromptRecord],
        *,
        negative: bool = False,
        together: bool = False,
        size: Size | None = None,
    ) -> Conditions:
        rows = torch.zeros(len(records), 1).double()
        return Conditions({"shift": rows}, Conditions({"shift": rows - self.negative}) if negative else None)

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return plain_sigmas(num_inference_steps)

    def start(self, noise: Tensor) -> Tensor:
        return noise.double()

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        *,
        guidance_scale: float = 1.0,
        detach_uncond: bool = False,
    ) -> Tensor:
        self.evaluations += len(x)
        mean, std = self.laws[self.active]
        level = sigma.to(x).view(-1, *[1] * (x.ndim - 1))
        if self.active == "policy":
            noise = (x - (1 - level) * mean) / ((1 - level) * std + level)
            return noise - mean - std * noise
        shift = conditions.tensors["shift"].view(level.shape)
        return (x - clean_mean(x, sigma, mean + shift, std)) / level

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        return latents.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Largest:
    """The mean of a latent."""

    name: str = "largest"
    spec = RewardSpec(("latents",))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(batch.latents.flatten(1).mean(1).float(), torch.ones(len(batch.latents), dtype=torch.bool))


def task_of(policy: GaussianRoles, groups: int, group_size: int, steps: int) -> Task:
    """Rolled out by the ODE on the policy's own grid."""
    rollout = Rollout(Deterministic(), ODE(), groups, group_size, steps)
    return Task(policy, Largest(), rollout, 0, Size(1, 1), Processes())
