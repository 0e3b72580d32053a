"""Stable Diffusion 3 and 3.5: a StableDiffusion3Pipeline as a model, sampled by the Euler steps of its own scheduler.

In fp32 on the CPU the deterministic rollout equals the pipeline's call exactly if the network calls have equal batches and
the prompts were encoded in equal batches (text encoders round by batch size). Timesteps 0…1000 are used only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from flowalign.data import PromptRecord
from flowalign.models import scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Family, check_image, prompts_and_negatives, vae_reduction
from flowalign.models.flow_match import flow_match_call, flow_match_path, flow_match_sigmas
from flowalign.models.guidance import classifier_free, classifier_free_rows
from samplers import ODE, RectifiedFlow

TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


class SD3Model:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself.

    max_sequence_length: of the T5 part; None = 256, and 0 for a pipeline without T5."""

    path = RectifiedFlow()

    def __init__(self, pipeline: StableDiffusion3Pipeline, max_sequence_length: int | None = None) -> None:
        flow_match_path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        self.encoders = [encoder for encoder in encoders if encoder is not None]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        length = 0 if pipeline.text_encoder_3 is None else 256
        self.max_sequence_length = length if max_sequence_length is None else max_sequence_length

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        scheduler, patch = self.pipeline.scheduler, self.pipeline.transformer.config.patch_size
        settings, tokens = scheduler.config, (latent_shape[-2] // patch) * (latent_shape[-1] // patch)
        mu = calculate_shift(
            tokens, settings.base_image_seq_len, settings.max_image_seq_len, settings.base_shift, settings.max_shift
        )
        return flow_match_sigmas(scheduler, num_inference_steps, mu=mu, linear=False)

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
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
        return scaled_vae.decode(self.vae, latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return scaled_vae.encode(self.vae, images)

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt, "max_sequence_length": self.max_sequence_length,
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
        return flow_match_call(sigmas)


def _absent(index: Mapping[str, Any]) -> dict[str, Any]:
    """T5 may be missing; diffusers wants to be told."""
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor, transformer = vae_reduction(configs["vae"]), configs["transformer"]
    check_image(size, factor * transformer["patch_size"])
    return (transformer["in_channels"], size.height // factor, size.width // factor)


CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16,
    "hidden_act": "gelu",
}  # fmt: skip
TINY = {
    "transformer": (SD3Transformer2DModel, {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 8, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
        "pos_embed_max_size": 16, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }),
    "vae": (AutoencoderKL, {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 1.5305,
        "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
    }),
    "text_encoder": (CLIPTextModelWithProjection, CLIP), "tokenizer": (CLIPTokenizer, {}),
    "text_encoder_2": (CLIPTextModelWithProjection, CLIP), "tokenizer_2": (CLIPTokenizer, {}),
    "text_encoder_3": (T5EncoderModel, {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
    "tokenizer_3": (T5Tokenizer, {}),
    "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}  # fmt: skip

FAMILY = Family(
    pipeline=StableDiffusion3Pipeline,
    model=SD3Model,
    networks={"transformer": SD3Transformer2DModel},
    targets=TARGETS,
    path=flow_match_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    load_arguments=_absent,
    tiny={"sd3": TINY},
)
