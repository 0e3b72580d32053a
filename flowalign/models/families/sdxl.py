"""Stable Diffusion XL and XL-Turbo: a StableDiffusionXLPipeline (ε- or v-prediction UNet) as a model, sampled by Euler steps.

The released schedulers step in x/√ᾱ; divided by √(1+σ²) there, an Euler step is DDIM's with η = 0 on the variance-preserving
path, from the scheduler's own timesteps to clean data. Turbo's is ancestral: it adds noise in all steps but the last, so the
deterministic rollout is that of EulerDiscreteScheduler.from_config, which for one step gives the ancestral call's images.
Not kept: the last bits (in fp32 latents agree to 1e-6 of their norm), and with timestep_spacing=trailing the pipeline's start,
which is √(1-ᾱ) of the noise (0.998 of it), where this starts from all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flowalign.data import PromptRecord
from flowalign.models import discrete, scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Distilled, Family, no_levels, prompts_and_negatives, vae_reduction
from flowalign.models.guidance import classifier_free, classifier_free_rows
from samplers import ODE, VariancePreserving

SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
# options of EulerDiscreteScheduler whose levels lie between the timesteps, or end before clean data: the values that are followed
FOLLOWED = {
    "interpolation_type": "linear", "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "timestep_type": "discrete", "final_sigmas_type": "zero",
}  # fmt: skip


class SDXLModel:
    """Satisfies `flowalign.models.base.Model`, without the pipeline's watermark.

    The network's ε or v becomes the velocity √ᾱ·ε - √(1-ᾱ)·x0 of `path` after guidance. Its sizes are those of a whole image:
    original and target size are what is generated, nothing is cropped. Guidance from the negative prompt "" starts from zeros, where
    the checkpoint says force_zeros_for_empty_prompt (as the pipeline's call without a negative prompt); other texts are encoded.
    max_sequence_length must be None: CLIP reads its own number of tokens (77) and cuts longer prompts."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, max_sequence_length: int | None = None) -> None:
        discrete.check_unet(pipeline.unet, pipeline.tokenizer.model_max_length, max_sequence_length)
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            raise ValueError(
                "got a VAE in fp16 whose force_upcast says that it overflows there; expected fp32 or bf16, as the pipeline's call decodes in "
                "fp32: pipe.vae.to(torch.float32)"
            )
        self.pipeline = pipeline
        self.networks = {"unet": pipeline.unet}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        self.dtype: torch.dtype = pipeline.unet.dtype
        self.scheduler = euler({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        self.path = VariancePreserving(self.scheduler.alphas_cumprod)
        highest = self.scheduler.sigmas.max()
        self._start = float((highest**2 + 1) ** 0.5 / self.scheduler.init_noise_sigma)

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        known, settings = len(self.path.alphas_cumprod), self.scheduler.config
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        timesteps = self.scheduler.timesteps
        whole = bool((timesteps == timesteps.round()).all())
        if (
            not whole
            or bool((timesteps.diff() >= 0).any())
            or not 0 <= float(timesteps[-1]) <= float(timesteps[0]) < known
        ):
            raise ValueError(
                f"got num_inference_steps={num_inference_steps} with timestep_spacing={settings.timestep_spacing}, "
                f"steps_offset={settings.steps_offset}, hence timesteps {timesteps[:3].tolist()} … "
                f"{timesteps[-2:].tolist()}; expected whole and strictly decreasing ones below {known}: take fewer steps, or "
                "the spacing 'leading' or 'trailing'"
            )
        return discrete.levels([*timesteps.long().tolist(), -1], known)

    def solver(self) -> ODE:
        """On this path the ODE's step is DDIM with η = 0."""
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        prompts, zeros = [record.prompt for record in records], self.pipeline.config.force_zeros_for_empty_prompt
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.encoders[0].device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        zero = torch.tensor([negative and zeros and not prompt for prompt in prompts], device=embeds.device)
        embeds, pooled = embeds.masked_fill(zero[:, None, None], 0), pooled.masked_fill(zero[:, None], 0)
        return Conditions({"embeds": embeds, "pooled": pooled})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        predict = partial(self._predict, networks["unet"])
        prediction = classifier_free(predict, x, sigma, conditions, negative, guidance_scale, detach_uncond)
        return discrete.velocity_of(self.path, x, prediction, sigma, self.scheduler)

    def _predict(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        embeds = conditions.tensors["embeds"].to(x.device, self.dtype)
        factor = vae_reduction(self.vae.config)
        height, width = x.shape[-2] * factor, x.shape[-1] * factor
        # filled on the device: a copy of a list would make the host wait
        sizes = [embeds.new_full((len(x),), number) for number in (height, width, 0, 0, height, width)]
        prediction: Tensor = network(
            x.to(self.dtype),
            discrete.timestep(sigma, len(self.path.alphas_cumprod)).to(x.device),
            encoder_hidden_states=embeds,
            added_cond_kwargs={
                "text_embeds": conditions.tensors["pooled"].to(x.device, self.dtype), "time_ids": torch.stack(sizes, 1),
            },
            return_dict=False,
        )[0]  # fmt: skip
        return prediction

    def decode(self, latents: Tensor) -> Tensor:
        return scaled_vae.decode(self.vae, latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return scaled_vae.encode(self.vae, images)

    def pipeline_setup(self) -> list[str]:
        return [
            "from diffusers import EulerDiscreteScheduler",
            "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # the sampler of the run",
            "pipe.watermark = None  # the run had none",
        ]

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt or self._empty,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        inputs, texts = prompts_and_negatives(records, negatives), {record.prompt for record in negatives or ()}
        if self._empty is None and texts == {""}:
            return {**inputs, "negative_prompt": None}
        if self._empty is None and "" in texts:
            raise ValueError('got negative prompts "" beside others; expected one kind, since one call of the pipeline cannot start from '
                             "zeros for some: call it for them apart")  # fmt: skip
        return inputs

    @property
    def _empty(self) -> str | None:
        """What the pipeline's call takes for the negative prompt ""."""
        return None if self.pipeline.config.force_zeros_for_empty_prompt else ""

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """The start noise, which the pipeline multiplies by init_noise_sigma."""
        return latents * self._start

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return no_levels(sigmas)


def euler(config: dict[str, Any]) -> EulerDiscreteScheduler:
    """The Euler scheduler of a pipeline's scheduler config; ValueError if its levels are not timesteps."""
    discrete.check_scheduler(config, SCHEDULERS, "EulerDiscreteScheduler")
    scheduler = EulerDiscreteScheduler.from_config(config)
    for option, followed in FOLLOWED.items():
        if scheduler.config[option] != followed:
            raise ValueError(
                f"got a scheduler with {option}={scheduler.config[option]}; expected {followed}, or the steps end at levels that the network "
                "does not know: set it in the pipeline's scheduler_config.json"
            )
    discrete.check_prediction(scheduler)
    return scheduler


def _path(scheduler: dict[str, Any]) -> VariancePreserving:
    return VariancePreserving(euler(scheduler).alphas_cumprod)


def _distilled(configs: Configs) -> Distilled:
    """Of the two that are released only sdxl-turbo has an ancestral scheduler with trailing steps; 1 to 4 of them (2311.17042)."""
    scheduler = configs["scheduler"]
    turbo = "Ancestral" in scheduler["_class_name"] and scheduler.get("timestep_spacing") == "trailing"
    return Distilled(4 if turbo else None)


# the released scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0; of stabilityai/sdxl-turbo with another spacing
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "clip_sample": False, "skip_prk_steps": True, "steps_offset": 1, "sample_max_value": 1.0,
    "interpolation_type": "linear", "use_karras_sigmas": False, "prediction_type": "epsilon", "trained_betas": None,
    "timestep_spacing": "leading",
}  # fmt: skip
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
TINY = {
    "unet": (UNet2DConditionModel, {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4), "norm_num_groups": 4, "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }),
    "vae": (AutoencoderKL, {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 0.13025,
    }),
    "text_encoder": (CLIPTextModel, CLIP), "tokenizer": (CLIPTokenizer, {}),
    "text_encoder_2": (CLIPTextModelWithProjection, {**CLIP, "hidden_act": "gelu"}), "tokenizer_2": (CLIPTokenizer, {}),
    "scheduler": (EulerDiscreteScheduler, SCHEDULE),
    "add_watermarker": False,
}  # fmt: skip
TINY_TURBO = {**TINY, "scheduler": (EulerAncestralDiscreteScheduler, {**SCHEDULE, "timestep_spacing": "trailing"})}

FAMILY = Family(
    pipeline=StableDiffusionXLPipeline,
    model=SDXLModel,
    networks={"unet": UNet2DConditionModel},
    targets=discrete.TARGETS,
    path=_path,
    latent_shape=discrete.latent_shape,
    rows_per_state=classifier_free_rows,
    distilled=_distilled,
    load_arguments=lambda index: {"add_watermarker": False},
    tiny={"sdxl": TINY, "sdxl_turbo": TINY_TURBO},
)
