"""Stable Diffusion 3 and 3.5: a StableDiffusion3Pipeline as a model, sampled by the Euler steps of its own scheduler.

In fp32 on the CPU the deterministic rollout equals the pipeline's call exactly if the network calls have equal batches and
the prompts were encoded in equal batches (text encoders round by batch size). Timesteps 0…1000 are used only here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.base import Configs, Family, Network, Size, check_image, vae_reduction
from flowalign.models.conditions import Conditions
from flowalign.models.guidance import classifier_free, classifier_free_rows
from samplers import ODE, RectifiedFlow

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
# option of the scheduler -> what the pipeline would do that the rollout does not
NOT_FOLLOWED = {
    "stochastic_sampling": "every step of the pipeline would add fresh noise",
    "invert_sigmas": "the levels would rise from 0 to 1",
}
# options of the scheduler under which its set_timesteps(sigmas=...) keeps the levels bit for bit
UNCHANGED_LEVELS = {
    "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip


class SD3Model:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself.

    max_sequence_length: of the T5 part; None = 256, and 0 for a pipeline without T5."""

    path = RectifiedFlow()

    def __init__(self, pipeline: StableDiffusion3Pipeline, max_sequence_length: int | None = None) -> None:
        _path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        self.encoders = [encoder for encoder in encoders if encoder is not None]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        length = 0 if pipeline.text_encoder_3 is None else 256
        self.max_sequence_length = length if max_sequence_length is None else max_sequence_length

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        scheduler, shift = copy.deepcopy(self.pipeline.scheduler), {}
        if scheduler.config.use_dynamic_shifting:
            settings, patch = scheduler.config, self.pipeline.transformer.config.patch_size
            tokens = (latent_shape[-2] // patch) * (latent_shape[-1] // patch)
            shift["mu"] = calculate_shift(
                tokens, settings.base_image_seq_len, settings.max_image_seq_len, settings.base_shift, settings.max_shift
            )
        scheduler.set_timesteps(num_inference_steps, device="cpu", **shift)
        return scheduler.sigmas.float().clone()

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord]) -> Conditions:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[record.prompt for record in records], prompt_2=None, prompt_3=None, device=self.encoders[0].device,
            do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditions({"embeds": embeds, "pooled": pooled})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        predict = partial(self._predict, networks["transformer"])
        return classifier_free(predict, x, sigma, conditions, negative, guidance_scale, detach_uncond)

    def _predict(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        velocity: Tensor = network(
            hidden_states=x.to(self.dtype),
            timestep=sigma.to(x.device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditions.tensors["embeds"].to(x.device, self.dtype),
            pooled_projections=conditions.tensors["pooled"].to(x.device, self.dtype),
            return_dict=False,
        )[0]
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image: Tensor = vae.decode(latents, return_dict=False)[0]
        return image

    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.vae
        mean: Tensor = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return (mean - vae.config.shift_factor) * vae.config.scaling_factor

    def save_lora(
        self, folder: Path, layers: Mapping[str, dict[str, Tensor]], metadata: Mapping[str, dict[str, Any]]
    ) -> None:
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=layers["transformer"],
            transformer_lora_adapter_metadata=metadata["transformer"],
        )  # fmt: skip

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        """The scheduler would shift the levels it is given again, so its shift is set to 1."""
        options = ", ".join(f"{name}={value}" for name, value in UNCHANGED_LEVELS.items())
        setup = f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, {options})  # takes `sigmas` as they are"
        return [setup], {
            "sigmas": [float(str(level)) for level in sigmas[:-1].numpy()]
        }  # str: the shortest exact digits


def _absent(index: dict[str, Any]) -> dict[str, Any]:
    """T5 may be missing; diffusers wants to be told."""
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}


def _path(scheduler: dict[str, Any]) -> RectifiedFlow:
    """The path of a scheduler's config; ValueError if the scheduler's step is not the Euler step of the rollout. Options
    that only move the levels (shifts, Karras, exponential) are followed, since `sigmas` asks the scheduler."""
    name = scheduler.get("_class_name")
    if name != SCHEDULER:
        raise ValueError(
            f"got scheduler {name}; expected {SCHEDULER}, whose step is the Euler step of the rollout: save the "
            "pipeline with that one"
        )
    for option, effect in NOT_FOLLOWED.items():
        if scheduler.get(option):
            raise ValueError(
                f"got a scheduler with {option}=true; expected false, since {effect} and the rollout would not: set it "
                "to false in the pipeline's scheduler_config.json"
            )
    return RectifiedFlow()


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor, transformer = vae_reduction(configs["vae"]), configs["transformer"]
    check_image(size, factor * transformer["patch_size"])
    return (transformer["in_channels"], size.height // factor, size.width // factor)


FAMILY = Family(
    pipeline=StableDiffusion3Pipeline,
    model=SD3Model,
    networks={"transformer": SD3Transformer2DModel},
    targets=TARGETS,
    path=_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    load_arguments=_absent,
)
