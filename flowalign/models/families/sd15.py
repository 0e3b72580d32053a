"""Stable Diffusion 1.x and 2.x: a StableDiffusionPipeline (ε- or v-prediction UNet) as a model, sampled by DDIM.

The released scheduler, PNDM, is a multistep solver with no density. As in ddpo-pytorch, rollouts and evaluation use
DDIMScheduler.from_config(pipe.scheduler.config): the same levels and the same spacing. Not kept: the images of the PNDM
call, and the last bits of the DDIM call (the step is one affine map in place of x̂0 and ε̂: in fp32 latents agree to 1e-6
of their norm, for v-prediction to 2e-6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from flowalign.data import PromptRecord
from flowalign.models import discrete, scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Family, no_levels, prompts_and_negatives
from flowalign.models.guidance import classifier_free, classifier_free_rows
from samplers import ODE, VariancePreserving

SCHEDULERS = ("DDIMScheduler", "PNDMScheduler")


class SD15Model:
    """Satisfies `flowalign.models.base.Model`, without the pipeline's safety checker.

    The network's ε or v becomes the velocity √ᾱ·ε - √(1-ᾱ)·x0 of `path` after guidance. max_sequence_length must be
    None: CLIP reads its own number of tokens (77) and cuts longer prompts."""

    def __init__(self, pipeline: StableDiffusionPipeline, max_sequence_length: int | None = None) -> None:
        discrete.check_unet(pipeline.unet, pipeline.tokenizer.model_max_length, max_sequence_length)
        self.pipeline = pipeline
        self.networks = {"unet": pipeline.unet}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder]
        self.dtype: torch.dtype = pipeline.unet.dtype
        self.scheduler = ddim({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        self.path = VariancePreserving(self.scheduler.alphas_cumprod)

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        """The last level is timestep 0 (σ = 0.001) where the scheduler says set_alpha_to_one=false, as SD1.5's does."""
        known, settings = len(self.path.alphas_cumprod), self.scheduler.config
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        timesteps: list[int] = self.scheduler.timesteps.tolist()
        # DDIMScheduler.step goes from t to t - K//T, whatever the spacing; below 0 it takes final_alpha_cumprod
        arrivals = [t - known // num_inference_steps for t in timesteps]
        if arrivals[-1] < 0:
            arrivals[-1] = -1 if settings.set_alpha_to_one else 0
        if arrivals[:-1] != timesteps[1:] or arrivals[-1] >= timesteps[-1] or timesteps[0] >= known:
            raise ValueError(
                f"got num_inference_steps={num_inference_steps} with timestep_spacing={settings.timestep_spacing}, "
                f"steps_offset={settings.steps_offset}, set_alpha_to_one={settings.set_alpha_to_one}, hence timesteps "
                f"{timesteps[:3]} … {timesteps[-2:]}; expected strictly decreasing ones whose steps are all "
                f"{known}//{num_inference_steps}: take a divisor of {known} below {known}, and a steps_offset of 1"
            )
        return discrete.levels([*timesteps, arrivals[-1]], known)

    def solver(self) -> ODE:
        """On this path the ODE's step is DDIM with η = 0."""
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        embeds, _ = self.pipeline.encode_prompt(
            [record.prompt for record in records], self.encoders[0].device, num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        return Conditions({"embeds": embeds})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        predict = partial(self._predict, networks["unet"])
        prediction = classifier_free(predict, x, sigma, conditions, negative, guidance_scale, detach_uncond)
        return discrete.velocity_of(self.path, x, prediction, sigma, self.scheduler)

    def _predict(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        prediction: Tensor = network(
            x.to(self.dtype),
            discrete.timestep(sigma, len(self.path.alphas_cumprod)).to(x.device),
            encoder_hidden_states=conditions.tensors["embeds"].to(x.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction

    def decode(self, latents: Tensor) -> Tensor:
        return scaled_vae.decode(self.vae, latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return scaled_vae.encode(self.vae, images)

    def pipeline_setup(self) -> list[str]:
        return [
            "from diffusers import DDIMScheduler",
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # the sampler of the run",
            "pipe.safety_checker = None  # the run had none",
        ]

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        return prompts_and_negatives(records, negatives)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return no_levels(sigmas)


def ddim(config: dict[str, Any]) -> DDIMScheduler:
    """The DDIM scheduler of a pipeline's scheduler config; ValueError if its step is not affine in the prediction."""
    discrete.check_scheduler(config, SCHEDULERS, "DDIMScheduler")
    scheduler = DDIMScheduler.from_config(config)
    settings = scheduler.config
    if settings.clip_sample or settings.thresholding:
        raise ValueError(
            f"got a scheduler with clip_sample={settings.clip_sample}, thresholding={settings.thresholding} (a missing "
            "clip_sample means true to DDIM); expected both false, or the step that is scored is not the step that was "
            "sampled: set them in the pipeline's scheduler_config.json"
        )
    discrete.check_prediction(scheduler)
    return scheduler


def _path(scheduler: dict[str, Any]) -> VariancePreserving:
    return VariancePreserving(ddim(scheduler).alphas_cumprod)


def _load_arguments(index: Mapping[str, Any]) -> dict[str, Any]:
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "clip_sample": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip
UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip
TINY = {
    "unet": (UNet2DConditionModel, UNET),
    "vae": (AutoencoderKL, {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 0.18215,
    }),
    "text_encoder": (CLIPTextModel, {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    }),
    "tokenizer": (CLIPTokenizer, {}),
    "scheduler": (PNDMScheduler, SCHEDULE),
    "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
}  # fmt: skip
# stabilityai/stable-diffusion-2-1: v-prediction, heads counted per level, linear projections around the attention
TINY_21 = {
    **TINY,
    "unet": (UNet2DConditionModel, {**UNET, "attention_head_dim": (2, 4), "use_linear_projection": True}),
    "scheduler": (DDIMScheduler, {**SCHEDULE, "prediction_type": "v_prediction"}),
}

FAMILY = Family(
    pipeline=StableDiffusionPipeline,
    model=SD15Model,
    networks={"unet": UNet2DConditionModel},
    targets=discrete.TARGETS,
    path=_path,
    latent_shape=discrete.latent_shape,
    rows_per_state=classifier_free_rows,
    load_arguments=_load_arguments,
    tiny={"sd15": TINY, "sd21": TINY_21},
)
