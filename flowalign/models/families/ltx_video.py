"""LTX-Video, text to video: an LTXPipeline as a model, sampled by the Euler steps of its own scheduler.

In fp32 on the CPU the deterministic rollout equals the pipeline's call exactly. Tokens and their positions in seconds and pixels are
used only here. Not offered: guidance_rescale, and a decoder that draws noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from flowalign.data import PromptRecord
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Family, check_video, no_levels, prompts_and_negatives
from flowalign.models.flow_match import flow_match_path, flow_match_sigmas
from flowalign.models.guidance import classifier_free, classifier_free_rows
from samplers import ODE, RectifiedFlow

# of both attentions, as finetrainers' default
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LTXVideoModel:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself.

    max_sequence_length: of T5; None = 128. frame_rate: frames per second, above 0, by which the network places frames in time; what is
    generated is to be seen at that rate."""

    path = RectifiedFlow()

    def __init__(self, pipeline: LTXPipeline, max_sequence_length: int | None = None, frame_rate: float = 25) -> None:
        flow_match_path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        _check_networks({"transformer": pipeline.transformer.config, "vae": pipeline.vae.config})
        if not 0 < frame_rate < math.inf:
            raise ValueError(f"got frame_rate={frame_rate}; expected frames per second above 0: change policy.options")
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = 128 if max_sequence_length is None else max_sequence_length
        self.frame_rate = frame_rate

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        settings, tokens = self.pipeline.scheduler.config, math.prod(latent_shape[-3:])
        mu = calculate_shift(
            tokens, settings.base_image_seq_len, settings.max_image_seq_len, settings.base_shift, settings.max_shift
        )
        return flow_match_sigmas(self.pipeline.scheduler, num_inference_steps, mu=mu, linear=True)

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            [record.prompt for record in records], do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length, device=self.encoders[0].device,
        )  # fmt: skip
        return Conditions({"embeds": embeds, "mask": mask})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        frames, height, width = x.shape[-3:]
        space, time = self.vae.spatial_compression_ratio, self.vae.temporal_compression_ratio

        def predict(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
            velocity: Tensor = networks["transformer"](
                hidden_states=_pack(x.to(self.dtype)),
                encoder_hidden_states=conditions.tensors["embeds"].to(x.device, self.dtype),
                timestep=sigma.to(x.device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps,
                encoder_attention_mask=conditions.tensors["mask"].to(x.device),
                num_frames=frames,
                height=height,
                width=width,
                rope_interpolation_scale=(time / self.frame_rate, space, space),
                return_dict=False,
            )[0]
            return _unpack(velocity, frames, height, width)

        return classifier_free(predict, x, sigma, conditions, negative, guidance_scale, detach_uncond)

    def decode(self, latents: Tensor) -> Tensor:
        """A VAE that reads a timestep (0.9.5) reads 0, as by default in the pipeline's call, which then adds no noise either."""
        vae = self.vae
        mean, std = _statistics(vae, latents.to(vae.device))
        plain = (latents.to(vae.device) * std / vae.config.scaling_factor + mean).to(vae.dtype)
        timestep = plain.new_zeros(len(plain)) if vae.config.timestep_conditioning else None
        video: Tensor = vae.decode(plain, timestep, return_dict=False)[0]
        return video.transpose(1, 2)

    def encode_images(self, images: Tensor) -> Tensor:
        videos = images if images.ndim == 5 else images.unsqueeze(1)
        mode: Tensor = self.vae.encode(videos.transpose(1, 2).to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        mean, std = _statistics(self.vae, mode)
        return (mode - mean) * self.vae.config.scaling_factor / std

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "num_frames": size.frames, "frame_rate": self.frame_rate,
            "guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "max_sequence_length": self.max_sequence_length,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        return prompts_and_negatives(records, negatives)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return _pack(latents)

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        space, time = self.vae.spatial_compression_ratio, self.vae.temporal_compression_ratio
        return _unpack(latents, (size.frames - 1) // time + 1, size.height // space, size.width // space)

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return no_levels(sigmas)


def _pack(latents: Tensor) -> Tensor:
    """Tokens [n, F·h·w, C] of latents [n, C, F, h, w]."""
    return latents.flatten(2).transpose(1, 2).contiguous()


def _unpack(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (frames, height, width)).contiguous()


def _statistics(vae: AutoencoderKLLTXVideo, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels, [C, 1, 1, 1] beside `like`: weights of the VAE."""
    mean, std = (kept.view(-1, 1, 1, 1).to(like.device, like.dtype) for kept in (vae.latents_mean, vae.latents_std))
    return mean, std


def _check_networks(configs: Configs) -> None:
    """ValueError for a decoder that draws noise (0.9.1), and for tokens of several latents, of which no released network is."""
    transformer, noise = configs["transformer"], configs["vae"]["decoder_inject_noise"]
    if any(noise):
        raise ValueError(
            f"got a VAE of LTX-Video with decoder_inject_noise={list(noise)}; expected false everywhere, since one latent would be other "
            "pixels, and rewards, at each decoding: take a checkpoint whose decoder draws none, such as Lightricks/LTX-Video"
        )
    patches = transformer["patch_size"], transformer["patch_size_t"]
    if patches != (1, 1):
        raise ValueError(
            f"got an LTX-Video transformer with patches of {patches}; expected (1, 1): take a released one"
        )


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    _check_networks(configs)
    vae = configs["vae"]
    halvings = 2 ** sum(vae["spatio_temporal_scaling"])
    space = vae["spatial_compression_ratio"] or vae["patch_size"] * halvings
    time = vae["temporal_compression_ratio"] or vae["patch_size_t"] * halvings
    check_video(size, math.lcm(32, space), time)  # the pipeline asks for multiples of 32
    frames = (size.frames - 1) // time + 1
    return (configs["transformer"]["in_channels"], frames, size.height // space, size.width // space)


TINY = {
    "transformer": (LTXVideoTransformer3DModel, {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
        "num_layers": 2, "caption_channels": 32,
    }),
    "vae": (AutoencoderKLLTXVideo, {
        "latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
    }),
    "text_encoder": (T5EncoderModel, {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
    "tokenizer": (T5Tokenizer, {"model_max_length": 128}),
    "scheduler": (FlowMatchEulerDiscreteScheduler, {  # scripts/convert_ltx_to_diffusers.py of diffusers
        "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
        "max_image_seq_len": 4096, "shift_terminal": 0.1,
    }),
}  # fmt: skip

FAMILY = Family(
    pipeline=LTXPipeline,
    model=LTXVideoModel,
    networks={"transformer": LTXVideoTransformer3DModel},
    targets=TARGETS,
    path=flow_match_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    takes_levels=False,  # the call hands its own to the scheduler, and has an error for timesteps beside them
    tiny={"ltx_video": TINY},
)
