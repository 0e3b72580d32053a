"""HunyuanVideo: a HunyuanVideoPipeline as a model, sampled by the Euler steps of its own scheduler.

The guidance scale is an input of the network (distilled), so a state is one row at any scale and no negative prompt is read. Not
offered: the pipeline's true_cfg_scale beside it, and HunyuanVideo of images (another pipeline).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, LlamaTokenizerFast

from flowalign.data import PromptRecord
from flowalign.models import scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Family, check_video
from flowalign.models.flow_match import flow_match_call, flow_match_path, flow_match_sigmas
from samplers import ODE, RectifiedFlow

# of both kinds of blocks, as finetrainers' example for this model; the text refiner's attention is named so too
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


class HunyuanVideoModel:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself.

    Llama reads the pipeline's own template around the prompt; the template's tokens are cropped from what it gives.
    max_sequence_length: tokens of the prompt that Llama reads; None = 256."""

    path = RectifiedFlow()

    def __init__(self, pipeline: HunyuanVideoPipeline, max_sequence_length: int | None = None) -> None:
        flow_match_path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        _check_transformer(pipeline.transformer.config)
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = 256 if max_sequence_length is None else max_sequence_length

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return flow_match_sigmas(self.pipeline.scheduler, num_inference_steps, mu=None, linear=True)

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        embeds, pooled, mask = self.pipeline.encode_prompt(
            [record.prompt for record in records], device=self.encoders[0].device,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditions({"embeds": embeds, "mask": mask, "pooled": pooled})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        tensors = {name: tensor.to(x.device, self.dtype) for name, tensor in conditions.tensors.items()}
        velocity: Tensor = networks["transformer"](
            hidden_states=x.to(self.dtype),
            timestep=sigma.to(x.device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=tensors["embeds"],
            encoder_attention_mask=tensors["mask"],
            pooled_projections=tensors["pooled"],
            guidance=torch.full((len(x),), guidance_scale, dtype=self.dtype, device=x.device) * 1000.0,
            return_dict=False,
        )[0]
        return velocity.float()

    def decode(self, latents: Tensor) -> Tensor:
        return scaled_vae.decode(self.vae, latents).transpose(1, 2)

    def encode_images(self, images: Tensor) -> Tensor:
        videos = images if images.ndim == 5 else images.unsqueeze(1)
        return scaled_vae.encode(self.vae, videos.transpose(1, 2))

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "num_frames": size.frames, "guidance_scale": guidance_scale,
            "max_sequence_length": self.max_sequence_length,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        return {"prompt": [record.prompt for record in records]}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return flow_match_call(sigmas)


def _check_transformer(config: Mapping[str, Any]) -> None:
    """ValueError for a network that does not read the guidance scale, such as SkyReels', which the pipeline guides by two calls, or
    one that reads an image."""
    if not config["guidance_embeds"] or config.get("image_condition_type") is not None:
        raise ValueError(
            f"got a HunyuanVideo transformer with guidance_embeds={config['guidance_embeds']}, "
            f"image_condition_type={config.get('image_condition_type')}; expected true and null: take a checkpoint of text to video whose "
            "guidance is distilled, such as hunyuanvideo-community/HunyuanVideo"
        )


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    transformer, vae = configs["transformer"], configs["vae"]
    _check_transformer(transformer)
    space, time = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
    check_video(size, space * transformer["patch_size"], time)
    frames = (size.frames - 1) // time + 1
    return (transformer["in_channels"], frames, size.height // space, size.width // space)


def _template_tokens() -> list[str]:
    """The template before the prompt in about as many pieces as the pipeline crops tokens, so that the prompt is what is left."""
    text, count = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    cuts = [number * len(text) // count for number in range(count + 1)]
    return [text[start:end] for start, end in pairwise(cuts)]


TINY = {
    "transformer": (HunyuanVideoTransformer3DModel, {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16, "pooled_projection_dim": 16,
        "rope_axes_dim": (4, 4, 4),
    }),
    "vae": (AutoencoderKLHunyuanVideo, {
        "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 16,
        "scaling_factor": 0.476986,
    }),
    "text_encoder": (LlamaModel, {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    }),
    "tokenizer": (LlamaTokenizerFast, {
        "padding_side": "right", "pad_token": "<pad>", "special_tokens": (*_template_tokens(), "<|eot_id|>"),
    }),
    "text_encoder_2": (CLIPTextModel, {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    }),
    "tokenizer_2": (CLIPTokenizer, {}),
    "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 7.0}),  # hunyuanvideo-community/HunyuanVideo
}  # fmt: skip

FAMILY = Family(
    pipeline=HunyuanVideoPipeline,
    model=HunyuanVideoModel,
    networks={"transformer": HunyuanVideoTransformer3DModel},
    targets=TARGETS,
    path=flow_match_path,
    latent_shape=_latent_shape,
    rows_per_state=lambda guidance_scale: 1,
    tiny={"hunyuan_video": TINY},
)
