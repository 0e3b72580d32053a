"""A model in two dimensions: four Gaussians with their exact velocity, and a small network that is trained on top of it.

The pipeline is one of a family of its own, saved in a folder, so that configurations, checks, rollouts, updates, evaluations
and the main loop are the real ones. A latent is [2, 1, 1]; a prompt names one of the four means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from flowalign.data import PromptRecord
from flowalign.models import Conditions, Family, Size
from flowalign.models.base import Network
from flowalign.models.family import Configs, prompts_and_negatives
from flowalign.models.guidance import classifier_free, classifier_free_rows
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import ODE, RectifiedFlow

MEANS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
SPREAD = 0.25  # standard deviation of each Gaussian
NAMES = ("north east", "south east", "north west", "south west")


def train_prompts() -> list[str]:
    """One prompt per mean."""
    return list(NAMES)


def held_out_prompts() -> list[str]:
    """The same means, said otherwise."""
    return [f"the {name}" for name in NAMES]


def target_of(prompt: str) -> Tensor:
    """[2] the mean that a prompt names; 0 for a prompt without one."""
    return next((mean for name, mean in zip(NAMES, MEANS, strict=True) if prompt.endswith(name)), torch.zeros(2))


def exact_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """v* = E[ε − x0 | x] [n, 2] of the mixture: with V = (1−σ)²δ² + σ² the mean over the modes' posterior of
    −m + (σ − (1−σ)δ²)/V · (x − (1−σ)m)."""
    sigma = sigma[:, None].to(x)
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    gap = x[:, None] - (1 - sigma)[..., None] * MEANS  # [n, 4, 2]
    posterior = (-gap.square().sum(2) / (2 * variance)).softmax(1)
    each = -MEANS + ((sigma - (1 - sigma) * SPREAD**2) / variance)[..., None] * gap
    return (posterior[..., None] * each).sum(1)


class BedNetwork(ModelMixin, ConfigMixin):
    """The exact velocity plus a trained correction of (x, σ, target), which is 0 at first."""

    @register_to_config
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, width)
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
        flat = x.flatten(1)
        inputs = torch.cat([flat, sigma[:, None].to(flat), target], 1)
        return (exact_velocity(flat, sigma) + self.out(torch.tanh(self.hidden(inputs)))).reshape(x.shape)


class BedDecoder(ModelMixin, ConfigMixin):
    """In place of a VAE: a pixel whose red and green are the place in [-2, 2]², its blue one half."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, latents: Tensor) -> Tensor:
        place = latents * self.scale
        return torch.cat([place, torch.zeros_like(place[:, :1])], 1)


class BedPipeline(DiffusionPipeline):
    """Parts only: the family does the rest."""

    def __init__(
        self, network: BedNetwork, vae: BedDecoder, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(network=network, vae=vae, scheduler=scheduler)


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """Saves the pipeline, with a hidden layer drawn from `seed`, and returns the folder."""
    torch.manual_seed(seed)
    BedPipeline(BedNetwork(), BedDecoder(), FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    for name in ("network", "vae"):  # diffusers writes the folder of this file instead of its module
        index[name][0] = __name__
    file.write_text(json.dumps(index))
    return folder


class BedModel:
    """Satisfies `flowalign.models.Model`."""

    path = RectifiedFlow()

    def __init__(self, pipeline: BedPipeline, max_sequence_length: int | None = None) -> None:
        self.pipeline = pipeline
        self.networks = {"network": pipeline.network}
        self.vae = pipeline.vae
        self.encoders: list[nn.Module] = []

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        self.pipeline.scheduler.set_timesteps(num_inference_steps, device="cpu")
        return self.pipeline.scheduler.sigmas.float().clone()

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        return Conditions({"target": torch.stack([target_of(record.prompt) for record in records])})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        predict = partial(self._predict, networks["network"])
        return classifier_free(predict, x, sigma, conditions, negative, guidance_scale, detach_uncond)

    def _predict(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        velocity: Tensor = network(x, sigma, conditions.tensors["target"])
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        image: Tensor = self.vae(latents)
        return image

    def encode_images(self, images: Tensor) -> Tensor:
        return images[:, :2] / self.vae.scale

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {}

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        return prompts_and_negatives(records, negatives)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return [], {"sigmas": sigmas[:-1].tolist()}


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    return (2, size.height, size.width)


FAMILY = Family(
    pipeline=BedPipeline,
    model=BedModel,
    networks={"network": BedNetwork},
    targets=("hidden",),
    path=lambda scheduler: RectifiedFlow(),
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
)


@dataclass(frozen=True)
class Nearness:
    """exp(−|x − m|²/2), m the mean that the prompt names: between 0 and 1, and smooth. constant: the same for every sample."""

    name: str = "nearness"
    constant: bool = False
    spec = RewardSpec(("latents",), differentiable=True)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        gap = batch.latents.flatten(1) - torch.stack([target_of(prompt) for prompt in batch.prompts])
        scores = (-gap.square().sum(1) / 2).exp()
        scores = 0.5 + 0 * scores if self.constant else scores  # still with a gradient, of 0
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


@dataclass(frozen=True)
class Hit:
    """1 for a sample within 0.7 of the mean that the prompt names, else 0: without a gradient."""

    name: str = "hit"
    spec = RewardSpec(("latents",))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        gap = batch.latents.flatten(1) - torch.stack([target_of(prompt) for prompt in batch.prompts])
        return RewardOutput((gap.norm(dim=1) < 0.7).float(), torch.ones(len(gap), dtype=torch.bool))


@dataclass(frozen=True)
class Potential:
    """A process reward: −|x − (1 − σ)m|²/2, so that its gradient points at where the state of a clean m would be."""

    name: str = "potential"
    constant: bool = False
    spec = RewardSpec(("latents",), "latent", differentiable=True)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        targets = torch.stack([target_of(prompt) for prompt in batch.prompts])
        gap = batch.latents.flatten(1) - (1 - batch.sigma)[:, None] * targets
        scores = -gap.square().sum(1) / 2
        scores = 0 * scores if self.constant else scores  # still with a gradient, of 0
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))
