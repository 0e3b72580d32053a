"""Stable Diffusion 1.x and 2.x: a StableDiffusionPipeline (ε- or v-prediction UNet) as a policy, sampled by DDIM.

The released scheduler, PNDM, is a multistep solver with no density. As in ddpo-pytorch, rollouts and evaluation use
DDIMScheduler.from_config(pipe.scheduler.config): the same levels and the same spacing. Not kept: the images of the PNDM
call. Timesteps 0…999 live only here: the level σ = (t+1)/1000 is timestep t, and σ = 0 is clean data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import Parameter

from flowalign.models.base import Conditions, Family, check_size
from flowalign.models.lora import ADAPTER, UNET_TARGETS, adapter_state, save_peft
from flowalign.models.parts import PromptStore, TrainedNetwork
from flowalign.models.roles import Role
from samplers import VariancePreserving

SCHEDULERS = ("DDIMScheduler", "PNDMScheduler")
PREDICTIONS = ("epsilon", "v_prediction")


class SD15Policy:
    """The policy of an SD1.5-family pipeline, without its safety checker. Satisfies `flowalign.models.base.Policy`.

    The network's ε or v becomes the velocity √ᾱ·ε - √(1-ᾱ)·x0 of `path` after guidance. Trained: the LoRA if the UNet
    has one, else all its weights; then "reference" needs `frozen`, a copy. max_sequence_length must be None: CLIP reads
    its own number of tokens (77) and cuts longer prompts."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        negative_prompt: str = "",
        max_sequence_length: int | None = None,
        frozen: nn.Module | None = None,
    ) -> None:
        if max_sequence_length is not None:
            raise ValueError(
                f"max_sequence_length={max_sequence_length} came; expected null, since the CLIP text encoder of this "
                f"family always reads {pipeline.tokenizer.model_max_length} tokens"
            )
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ValueError("a UNet that takes the guidance scale as an input (time_cond_proj_dim, LCM) came; expected "
                             "one of Stable Diffusion 1.x or 2.x: train an undistilled checkpoint")  # fmt: skip
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.dtype: torch.dtype = pipeline.vae.dtype
        self.negative_prompt = negative_prompt
        self.scheduler = ddim({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        self.path = VariancePreserving(self.scheduler.alphas_cumprod)
        self.evaluations = 0
        self._trained = TrainedNetwork(self.unet, frozen)
        self._prompts = PromptStore(self._encode)

    # ------------------------------------------------------------------------------------------ shapes and grids

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        check_size(height, width, _unit(self.unet.config, factor))
        return (self.unet.config.in_channels, height // factor, width // factor)

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """The last level is timestep 0 (σ = 0.001) where the scheduler says set_alpha_to_one=false, as SD1.5's does."""
        known, settings = len(self.path.alphas_cumprod), self.scheduler.config
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        timesteps: list[int] = self.scheduler.timesteps.tolist()
        # DDIMScheduler.step goes from t to t - K//T, whatever the spacing; below 0 stands its final_alpha_cumprod
        arrivals = [t - known // num_inference_steps for t in timesteps]
        if arrivals[-1] < 0:
            arrivals[-1] = -1 if settings.set_alpha_to_one else 0
        if arrivals[:-1] != timesteps[1:] or arrivals[-1] >= timesteps[-1] or timesteps[0] >= known:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} with timestep_spacing={settings.timestep_spacing}, "
                f"steps_offset={settings.steps_offset}, set_alpha_to_one={settings.set_alpha_to_one} came, timesteps "
                f"{timesteps[:3]} … {timesteps[-2:]}; expected a strictly falling chain whose steps are all "
                f"{known}//{num_inference_steps}: take a divisor of {known} below {known}, and a steps_offset of 1"
            )
        return (torch.tensor([*timesteps, arrivals[-1]], dtype=torch.float64) + 1).div(known).float()

    def start(self, noise: Tensor) -> Tensor:
        return noise.to(self.unet.device, torch.float32)

    # ------------------------------------------------------------------------------------------ prompts

    @property
    def encoded(self) -> int:
        return self._prompts.encoded

    def encode(self, prompts: Sequence[str]) -> Conditions:
        return self._prompts.conditions(prompts)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Conditions:
        embeds, _ = self.pipeline.encode_prompt(
            texts, self.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditions({"embeds": embeds})

    # ------------------------------------------------------------------------------------------ the network

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0) -> Tensor:
        x = x.to(self.unet.device, torch.float32)
        if guidance_scale == 1.0:
            return self._to_velocity(self._predict(x, sigma, conditions), x, sigma)
        negative = self.encode([self.negative_prompt]).rows(torch.zeros(len(x), dtype=torch.int64))
        # the pipeline's own order: unconditional rows first, one call; guidance on what the network predicts
        both = self._predict(torch.cat([x, x]), torch.cat([sigma, sigma]), Conditions.cat([negative, conditions]))
        unconditional, conditional = both.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        return self._to_velocity(guided, x, sigma)

    def _predict(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """What the UNet predicts, fp32."""
        self.evaluations += len(x)
        timestep = (sigma.double() * len(self.path.alphas_cumprod)).round().long() - 1
        prediction = self._trained.active(
            x.to(self.dtype),
            timestep.to(x.device),
            encoder_hidden_states=conditions.tensors["embeds"].to(x.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction.float()

    def _to_velocity(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        if self.scheduler.config.prediction_type == "v_prediction":
            return prediction
        return self.path.velocity_from_noise(x, prediction, sigma)

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        vae = self.pipeline.vae
        with nullcontext() if grad else torch.no_grad():
            image = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (image.float() * 0.5 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------ training

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

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
        return [
            "from diffusers import DDIMScheduler",
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # the sampler of the run",
            "pipe.safety_checker = None  # the run had none",
        ]

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"negative_prompt": self.negative_prompt}

    def save_lora(self, folder: Path) -> None:
        """pytorch_lora_weights.safetensors with its alpha (for `pipe.load_lora_weights`) and a PEFT folder beside it."""
        if not self._trained.has_lora:
            raise ValueError("the policy trains full weights and has no LoRA to save; save the unet instead")
        folder.mkdir(parents=True, exist_ok=True)
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=adapter_state(self.unet),
            unet_lora_adapter_metadata=self.unet.peft_config[ADAPTER].to_dict(),
        )
        save_peft(self.unet, folder)


def ddim(config: dict[str, Any]) -> DDIMScheduler:
    """The DDIM scheduler of a pipeline's scheduler config; ValueError if its step is not affine in the prediction."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(
            f"scheduler {name} came; expected one of {', '.join(SCHEDULERS)}: save the pipeline with "
            "DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    scheduler = DDIMScheduler.from_config(config)
    settings = scheduler.config
    if settings.clip_sample or settings.thresholding:
        raise ValueError(
            f"a scheduler with clip_sample={settings.clip_sample}, thresholding={settings.thresholding} came (a missing "
            "clip_sample means true to DDIM); expected both false, or the step that is scored is not the step that was "
            "sampled: set them in the pipeline's scheduler_config.json"
        )
    if settings.prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type={settings.prediction_type} came; expected one of {', '.join(PREDICTIONS)}")
    if settings.prediction_type == "epsilon" and float(scheduler.alphas_cumprod.min()) == 0:
        raise ValueError("ε-prediction with a level of ᾱ = 0 (rescale_betas_zero_snr) came; at pure noise ε says nothing "
                         "of the data: set rescale_betas_zero_snr=false, or use a v-prediction model")  # fmt: skip
    return scheduler


def _path(scheduler: dict[str, Any]) -> VariancePreserving:
    return VariancePreserving(ddim(scheduler).alphas_cumprod)


def _load_arguments(index: dict[str, Any]) -> dict[str, Any]:
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _unit(unet: dict[str, Any], factor: int) -> int:
    return math.lcm(8, factor)  # the pipeline itself asks for multiples of 8


FAMILY = Family(
    policy=SD15Policy,
    part="unet",
    network=UNet2DConditionModel,
    targets=UNET_TARGETS,
    path=_path,
    unit=_unit,
    load_arguments=_load_arguments,
)
