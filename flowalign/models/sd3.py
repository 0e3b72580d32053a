"""Stable Diffusion 3 and 3.5: a StableDiffusion3Pipeline as a policy. Timesteps 0…1000 live only here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import Parameter

from flowalign.models.base import Conditions, Family, check_size
from flowalign.models.lora import ADAPTER, SD3_TARGETS, adapter_state, save_peft
from flowalign.models.parts import PromptStore, TrainedNetwork
from flowalign.models.roles import Role
from samplers import RectifiedFlow


class SD3Policy:
    """The policy of an SD3-family pipeline. Satisfies `flowalign.models.base.Policy`.

    Trained: the LoRA if the transformer has one, else all its weights; then "reference" needs `frozen`, a copy.
    max_sequence_length: of the T5 part; None = 256, and 0 for a pipeline without T5."""

    path = RectifiedFlow()

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        negative_prompt: str = "",
        max_sequence_length: int | None = None,
        frozen: nn.Module | None = None,
    ) -> None:
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"scheduler {type(pipeline.scheduler).__name__} came; expected FlowMatchEulerDiscreteScheduler, "
                "whose deterministic step is the Euler step of the rollout: load the pipeline with that one"
            )
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.dtype: torch.dtype = pipeline.vae.dtype
        self.negative_prompt = negative_prompt
        length = 0 if pipeline.text_encoder_3 is None else 256
        self.max_sequence_length = length if max_sequence_length is None else max_sequence_length
        self.evaluations = 0
        self._trained = TrainedNetwork(self.transformer, frozen)
        self._prompts = PromptStore(self._encode)

    # ------------------------------------------------------------------------------------------ shapes and grids

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        check_size(height, width, _unit(self.transformer.config, factor))
        return (self.transformer.config.in_channels, height // factor, width // factor)

    def sigmas(self, num_inference_steps: int) -> Tensor:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        if scheduler.config.use_dynamic_shifting:
            raise ValueError(
                "a scheduler with use_dynamic_shifting came; expected SD3's static shift: set it false in the "
                "scheduler's config"
            )
        scheduler.set_timesteps(num_inference_steps, device="cpu")
        return scheduler.sigmas.float().clone()

    def start(self, noise: Tensor) -> Tensor:
        return noise.to(self.transformer.device, torch.float32)

    # ------------------------------------------------------------------------------------------ prompts

    @property
    def encoded(self) -> int:
        return self._prompts.encoded

    def encode(self, prompts: Sequence[str]) -> Conditions:
        return self._prompts.conditions(prompts)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Conditions:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=texts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditions({"embeds": embeds, "pooled": pooled})

    # ------------------------------------------------------------------------------------------ the network

    def velocity(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0,
        detach_uncond: bool = False,
    ) -> Tensor:  # fmt: skip
        """See Policy. `detach_uncond`: no gradient through the unconditional half (old flow_grpo); the guided velocity
        is the same to rounding, its gradient guidance_scale · ∂v_c."""
        if guidance_scale == 1.0:
            return self._forward(x, sigma, conditions)
        negative = self.encode([self.negative_prompt]).rows(torch.zeros(len(x), dtype=torch.int64))
        if detach_uncond:
            with torch.no_grad():
                unconditional = self._forward(x, sigma, negative)
            return self.guide(self._forward(x, sigma, conditions), unconditional, guidance_scale)
        # the pipeline's own order: unconditional rows first, one call
        both = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), Conditions.cat([negative, conditions]))
        unconditional, conditional = both.chunk(2)
        return self.guide(conditional, unconditional, guidance_scale)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """v_u + w (v_c − v_u)."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.evaluations += len(x)
        device = self.transformer.device
        velocity = self._trained.active(
            hidden_states=x.to(device, self.dtype),
            timestep=sigma.to(device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditions.tensors["embeds"].to(device, self.dtype),
            pooled_projections=conditions.tensors["pooled"].to(device, self.dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        vae = self.pipeline.vae
        with nullcontext() if grad else torch.no_grad():
            latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            image = vae.decode(latents, return_dict=False)[0]
        return (image.float() * 0.5 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------ training

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

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

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def save_lora(self, folder: Path) -> None:
        """pytorch_lora_weights.safetensors with its alpha (for `pipe.load_lora_weights`) and a PEFT folder beside it."""
        if not self._trained.has_lora:
            raise ValueError("the policy trains full weights and has no LoRA to save; save the transformer instead")
        folder.mkdir(parents=True, exist_ok=True)
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=adapter_state(self.transformer),
            transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),
        )
        save_peft(self.transformer, folder)


def _absent(index: dict[str, Any]) -> dict[str, Any]:
    """T5 may be missing; diffusers wants to be told."""
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}


def _path(scheduler: dict[str, Any]) -> RectifiedFlow:
    return RectifiedFlow()


def _unit(transformer: dict[str, Any], factor: int) -> int:
    return factor * transformer["patch_size"]


FAMILY = Family(
    policy=SD3Policy,
    part="transformer",
    network=SD3Transformer2DModel,
    targets=SD3_TARGETS,
    path=_path,
    unit=_unit,
    load_arguments=_absent,
)
