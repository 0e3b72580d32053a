"""A policy whose one-step sample is a linear function of the noise, and a reward whose optimum is known."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.models.base import Sampling, Size
from flowalign.models.conditions import Conditions
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import ODE, RectifiedFlow


@dataclass
class LinearPolicy:
    """v(x, σ) = x − W x for latents [1, 1, d] flattened: one Euler step from 1 to 0 leads to W x exactly. Its image is the
    latent as three equal channels; float64 states stay."""

    weight: Tensor
    evaluations: int = 0
    padded: int = 0
    encoded: int = 0
    sampling: Sampling | None = None
    path: RectifiedFlow = field(default_factory=RectifiedFlow)

    def __post_init__(self) -> None:
        self.sampling = self.sampling or Sampling(1, 1.0, Size(1, len(self.weight)))

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return (1, 1, len(self.weight))

    def rows_per_state(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def encode(self, records, *, negative=False, together=False, size=None) -> Conditions:
        self.encoded += len(records)
        return Conditions({"row": torch.zeros(len(records), 1)})

    def solver(self) -> ODE:
        return ODE().bind(self.path)

    def sigmas(self, num_inference_steps, latent_shape) -> Tensor:
        return torch.linspace(1, 0, num_inference_steps + 1)

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def velocity(self, x, sigma, conditions, *, guidance_scale=1.0, detach_uncond=False) -> Tensor:
        self.evaluations += len(x)
        return x - (x.flatten(1) @ self.weight.T.to(x)).view_as(x)

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def encode_images(self, images: Tensor) -> Tensor:
        return images[:, :1]

    def checkpointed(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(eq=False)
class Nearness:
    """−½‖latents − y‖² of each sample, with y = `target` [d]; samples of the prompt `unscorable` have no score."""

    target: Tensor
    differentiable: bool = True
    unscorable: str = ""
    name: str = "nearness"
    asked: list[int] = field(default_factory=list)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(inputs=("latents",), differentiable=self.differentiable, licence="none")

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.asked.append(len(batch))
        scores = -0.5 * (batch.latents.flatten(1) - self.target.to(batch.latents)).square().sum(1)
        return RewardOutput(scores, torch.tensor([prompt != self.unscorable for prompt in batch.prompts]))
