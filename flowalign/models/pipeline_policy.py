"""A family's model as a policy: encoded prompts, guidance, roles and adapters, the same for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import samplers
from flowalign.models.base import Conditions, Model
from flowalign.models.lora import ADAPTER, adapter_state, save_peft
from flowalign.models.prompt_store import PromptStore
from flowalign.models.roles import Role
from flowalign.models.trained_network import TrainedNetwork


class PipelinePolicy:
    """The policy of a model. Satisfies `flowalign.models.base.Policy`, which documents what is not documented here.

    part: the pipeline's name for the network. Trained is the LoRA if the network has one, else all its weights; in that case
    the role "reference" needs `frozen`, a copy of the network."""

    def __init__(self, model: Model, part: str, *, negative_prompt: str = "", frozen: nn.Module | None = None) -> None:
        self.model = model
        self.part = part
        self.negative_prompt = negative_prompt
        self.evaluations = 0
        self._trained = TrainedNetwork(model.network, frozen)
        self._prompts = PromptStore(model.encode)

    @property
    def network(self) -> nn.Module:
        return self.model.network

    # ------------------------------------------------------------------------------------------ sampling

    @property
    def path(self) -> samplers.Path:
        return self.model.path

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.model.latent_shape(height, width)

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return self.model.sigmas(num_inference_steps, latent_shape)

    def start(self, noise: Tensor) -> Tensor:
        return noise.to(self.model.network.device, torch.float32)

    @property
    def encoded(self) -> int:
        """How many distinct texts went through the encoders."""
        return self._prompts.encoded

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditions:
        return self._prompts.conditions(prompts)

    def velocity(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0,
        detach_uncond: bool = False,
    ) -> Tensor:  # fmt: skip
        """See Policy. With `detach_uncond` (old flow_grpo) the guided velocity is the same to rounding, its gradient is
        guidance_scale · ∂v_c."""
        x = x.to(self.model.network.device, torch.float32)
        if guidance_scale == 1.0:
            return self.model.to_velocity(self._predict(x, sigma, conditions), x, sigma)
        negative = self.encode([self.negative_prompt]).rows(torch.zeros(len(x), dtype=torch.int64))
        if detach_uncond:
            with torch.no_grad():
                unconditional = self._predict(x, sigma, negative)
            conditional = self._predict(x, sigma, conditions)
        else:  # the pipelines' own order: unconditional rows first, one call
            both = self._predict(torch.cat([x, x]), torch.cat([sigma, sigma]), Conditions.cat([negative, conditions]))
            unconditional, conditional = both.chunk(2)
        return self.model.to_velocity(unconditional + guidance_scale * (conditional - unconditional), x, sigma)

    def _predict(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.evaluations += len(x)
        return self.model.predict(self._trained.active, x, sigma, conditions).float()

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        with nullcontext() if grad else torch.no_grad():
            image = self.model.decode(latents)
        return (image.float() * 0.5 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------ training

    def modules(self) -> dict[str, nn.Module]:
        return {self.part: self.model.network}

    def networks(self) -> list[nn.Module]:
        return self._trained.networks()

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        return self._trained.parameters_of("policy")

    def add_roles(self, roles: Mapping[str, Role]) -> None:
        self._trained.add_roles(roles)

    def parameters_of(self, role: str) -> list[tuple[str, Parameter]]:
        return self._trained.parameters_of(role)

    def follow(self, step: int) -> None:
        self._trained.follow(step)

    def role(self, name: str) -> AbstractContextManager[None]:
        return self._trained.role(name)

    def save_lora(self, folder: Path) -> None:
        """pytorch_lora_weights.safetensors with its alpha (for `pipe.load_lora_weights`) and a PEFT folder beside it."""
        network = self.model.network
        if not self._trained.has_lora:
            raise ValueError(
                f"got save_lora of a policy that trains full weights; expected a LoRA: save the {self.part} itself instead"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp*"):  # safetensors writes a temporary file first; a killed save leaves it
            stale.unlink()
        self.model.save_lora(folder, adapter_state(network), network.peft_config[ADAPTER].to_dict())
        save_peft(network, folder)

    def pipeline_setup(self) -> list[str]:
        return self.model.pipeline_setup()

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"negative_prompt": self.negative_prompt, **self.model.pipeline_arguments()}

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return self.model.pipeline_sigmas(sigmas)
