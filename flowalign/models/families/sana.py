"""SANA (arXiv:2410.10629): a SanaPipeline as a model, sampled by the DPM-Solver++(2M) of its own scheduler.

As in the pipeline's call, a prompt follows an instruction that asks the text encoder for an enhanced prompt (section 2.3 of the
paper) and a negative prompt does not; images are of the very size that is asked for, without the pipeline's bins of sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from flowalign.data import PromptRecord
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Family, check_image, no_levels, prompts_and_negatives
from flowalign.models.flow_multistep import (
    flow_multistep_path,
    flow_multistep_sigmas,
    flow_multistep_timestep,
)
from flowalign.models.guidance import classifier_free, classifier_free_rows
from samplers import DPMSolver2M, RectifiedFlow

# those of diffusers' train_dreambooth_lora_sana.py
TARGETS = ("to_k", "to_q", "to_v")
INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaModel:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself.

    max_sequence_length: tokens of the prompt; None = 300. instruction: whether prompts follow the pipeline's own one."""

    path = RectifiedFlow()

    def __init__(
        self, pipeline: SanaPipeline, max_sequence_length: int | None = None, instruction: bool = True
    ) -> None:
        _path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        settings = pipeline.transformer.config
        if settings.out_channels != settings.in_channels:
            raise ValueError(
                f"got a transformer of {settings.in_channels} channels that predicts {settings.out_channels}; expected as many, a "
                "velocity: take a checkpoint without learned variances"
            )
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = 300 if max_sequence_length is None else max_sequence_length
        self.instruction = INSTRUCTION if instruction else None

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return flow_multistep_sigmas(self.pipeline.scheduler, num_inference_steps)

    def solver(self) -> DPMSolver2M:
        return DPMSolver2M()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            [record.prompt for record in records], do_classifier_free_guidance=False, device=self.encoders[0].device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=None if negative else self.instruction,
        )  # fmt: skip
        return Conditions({"embeds": embeds, "mask": mask})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        predict = partial(self._predict, networks["transformer"])
        return classifier_free(predict, x, sigma, conditions, negative, guidance_scale, detach_uncond)

    def _predict(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        velocity: Tensor = network(
            x.to(self.dtype),
            encoder_hidden_states=conditions.tensors["embeds"].to(x.device, self.dtype),
            encoder_attention_mask=conditions.tensors["mask"].to(x.device),
            timestep=flow_multistep_timestep(sigma).to(x.device) * self.pipeline.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        image: Tensor = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return image

    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.vae
        latents: Tensor = vae.encode(images.to(vae.device, vae.dtype), return_dict=False)[0]  # it has no noise
        return latents * vae.config.scaling_factor

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt, "max_sequence_length": self.max_sequence_length,
            "use_resolution_binning": False,
            **({} if self.instruction else {"complex_human_instruction": None}),
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


def _path(scheduler: Mapping[str, Any]) -> RectifiedFlow:
    own = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
    return flow_multistep_path(scheduler, "DPMSolverMultistepScheduler", own)


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor = 2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1)
    check_image(size, factor * configs["transformer"]["patch_size"])
    return (configs["transformer"]["in_channels"], size.height // factor, size.width // factor)


TINY = {
    "transformer": (SanaTransformer2DModel, {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16,
        "sample_size": 2, "patch_size": 1,
    }),
    "vae": (AutoencoderDC, {
        "latent_channels": 4, "attention_head_dim": 4, "encoder_block_out_channels": (8,) * 6, "decoder_block_out_channels": (8,) * 6,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6, "scaling_factor": 0.41407,
        "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)), "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    }),
    "text_encoder": (Gemma2Model, {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8,
    }),
    "tokenizer": (GemmaTokenizer, {}),
    "scheduler": (DPMSolverMultistepScheduler, {  # of Efficient-Large-Model/Sana_1600M_1024px_diffusers
        "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "euler_at_final": False,
        "final_sigmas_type": "zero", "flow_shift": 3.0, "lower_order_final": True, "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction", "solver_order": 2, "solver_type": "midpoint", "thresholding": False,
        "timestep_spacing": "linspace", "use_flow_sigmas": True,
    }),
}  # fmt: skip

FAMILY = Family(
    pipeline=SanaPipeline,
    model=SanaModel,
    networks={"transformer": SanaTransformer2DModel},
    targets=TARGETS,
    path=_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    takes_levels=False,
    tiny={"sana": TINY},
)
