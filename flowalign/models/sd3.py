"""Stable Diffusion 3 and 3.5: a StableDiffusion3Pipeline as a policy. Timesteps 0…1000 live only here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import Parameter

from flowalign.models.base import Conditions
from flowalign.models.lora import ADAPTER, adapter_state, adapters_off, save_peft


class SD3Policy:
    """The policy of an SD3-family pipeline. Satisfies `flowalign.models.base.Policy`.

    Trained: the LoRA if the transformer has one, else all its weights; then "reference" needs `frozen`, a copy."""

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        negative_prompt: str = "",
        max_sequence_length: int = 256,
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
        self.max_sequence_length = max_sequence_length
        self.evaluations = 0
        self.encoded = 0  # distinct texts that went through the encoders
        self._network: nn.Module = self.transformer
        self._frozen = frozen
        self._store: dict[str, Conditions] = {}

    # ------------------------------------------------------------------------------------------ shapes and grids

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        unit = self.pipeline.vae_scale_factor * self.transformer.config.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            raise ValueError(f"image size {height}×{width} came; expected positive multiples of {unit} for this model")
        factor = self.pipeline.vae_scale_factor
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

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditions:
        new = [text for text in dict.fromkeys(prompts) if text not in self._store]
        if new:
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=new, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )  # fmt: skip
            self.encoded += len(new)
            whole = Conditions({"embeds": embeds, "pooled": pooled})
            self._store |= {text: whole.rows(torch.tensor([row])) for row, text in enumerate(new)}
        return Conditions.cat([self._store[text] for text in prompts])

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
        velocity = self._network(
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

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        return [(name, p) for name, p in self.transformer.named_parameters() if p.requires_grad]

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        if name not in ("policy", "reference"):
            raise ValueError(f"role {name!r} came; expected 'policy' or 'reference'")
        if name == "policy":
            yield
        elif self._has_lora():
            with adapters_off(self.transformer):
                yield
        elif self._frozen is None:
            raise ValueError(
                "full weights are trained and no frozen copy was kept, so there is no reference: set kl.beta=0, or "
                "policy.reference_copy=true (it doubles the memory of the transformer)"
            )
        else:
            before, self._network = self._network, self._frozen
            try:
                yield
            finally:
                self._network = before

    def _has_lora(self) -> bool:
        return bool(self.transformer._hf_peft_config_loaded)

    def save_lora(self, folder: Path) -> None:
        """pytorch_lora_weights.safetensors with its alpha (for `pipe.load_lora_weights`) and a PEFT folder beside it."""
        if not self._has_lora():
            raise ValueError("the policy trains full weights and has no LoRA to save; save the transformer instead")
        folder.mkdir(parents=True, exist_ok=True)
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=adapter_state(self.transformer),
            transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),
        )
        save_peft(self.transformer, folder)
