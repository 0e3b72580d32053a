"""Wan 2.1 and 2.2: a WanPipeline (text to video) or a WanImageToVideoPipeline as a model, sampled by UniPC as its scheduler steps.

Wan 2.2 has two networks: `transformer` takes the timesteps from boundary_ratio·1000 up, `transformer_2` those below. In fp32 on the
CPU the deterministic rollout equals the pipeline's call exactly if the network calls have equal batches. Not kept: the rounding of
guidance and of the solver's first product where the network is bf16, which the pipeline does in bf16 and the rollout in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel, T5Tokenizer, UMT5EncoderModel

from flowalign.data import PromptRecord
from flowalign.models import scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Family, check_video, no_levels, prompts_and_negatives
from flowalign.models.flow_multistep import (
    flow_multistep_path,
    flow_multistep_sigmas,
    flow_multistep_timestep,
)
from flowalign.models.guidance import classifier_free_apart, classifier_free_rows
from flowalign.models.noise_networks import dealt
from flowalign.models.source_images import fitted_images
from samplers import RectifiedFlow, UniPC, send

NETWORKS = ("transformer", "transformer_2")  # of high noise, of low noise
# of both attentions: finetrainers' default, and what of flow_grpo's list text to video has
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
IMAGE_TARGETS = ("add_k_proj", "add_v_proj")  # Wan 2.1's attention to the CLIP image, in flow_grpo's list too
UNIPC = {
    "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None, "use_dynamic_shifting": False,
    "num_train_timesteps": 1000,
}  # fmt: skip


class WanModel:
    """Satisfies `flowalign.models.base.Model`. The networks predict the velocity itself.

    max_sequence_length: of UMT5; None = 512. guidance_scale_2: the scale below the boundary of Wan 2.2, above 1; None: the one
    scale everywhere. As in the pipeline's call it is of use only where the guidance scale itself is above 1: two rows per state
    then, at all levels.

    A source image is the first frame: fitted to the size of what is generated, stretched where its sides have another ratio."""

    path = RectifiedFlow()

    def __init__(
        self, pipeline: Any, max_sequence_length: int | None = None, guidance_scale_2: float | None = None
    ) -> None:
        _path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        parts = pipeline.components
        self.pipeline = pipeline
        self.networks = {name: parts[name] for name in NETWORKS if parts[name] is not None}
        self.vae = pipeline.vae
        encoders = (pipeline.text_encoder, parts.get("image_encoder"))
        self.encoders = [encoder for encoder in encoders if encoder is not None]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = 512 if max_sequence_length is None else max_sequence_length
        self.guidance_scale_2 = guidance_scale_2
        if guidance_scale_2 is not None and (len(self.networks) == 1 or not 1 < guidance_scale_2 < math.inf):
            raise ValueError(
                f"got guidance_scale_2={guidance_scale_2} for {len(self.networks)} networks; expected a number above 1 for the second "
                "of two, or null for the one scale of both: change policy.options"
            )
        if pipeline.transformer.config.pos_embed_seq_len is not None:
            raise ValueError(
                "got a network that reads a first and a last frame (pos_embed_seq_len); expected one that reads a first frame: take "
                "an image-to-video checkpoint"
            )

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return flow_multistep_sigmas(self.pipeline.scheduler, num_inference_steps)

    def solver(self) -> UniPC:
        return UniPC()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        """embeds [n, max_sequence_length, *], 0 beyond the text. With source images also first_frame [n, 4 + C, F', h, w], a mask and the
        latents of a video that is gray after it, and with a CLIP encoder image [n, tokens, *]; `velocity` takes those of a negative
        row from the row that it belongs to."""
        embeds, _ = self.pipeline.encode_prompt(
            [record.prompt for record in records], do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length, device=self.encoders[0].device,
        )  # fmt: skip
        tensors = {"embeds": embeds}
        if records[0].images and not negative:
            images = fitted_images(records, size)
            tensors["first_frame"] = torch.cat([self._first_frame(image, size) for image in images])
            if len(self.encoders) > 1:
                tensors["image"] = torch.cat([self.pipeline.encode_image(image, embeds.device) for image in images])
        return Conditions({name: tensor.to(self.dtype) for name, tensor in tensors.items()})

    def _first_frame(self, image: Any, size: Any) -> Tensor:
        pipeline, device = self.pipeline, self.encoders[0].device
        pixels = pipeline.video_processor.preprocess(image, height=size.height, width=size.width)
        found: Tensor = pipeline.prepare_latents(
            pixels.to(device, torch.float32), 1, height=size.height, width=size.width, num_frames=size.frames,
            dtype=torch.float32, device=device, latents=pixels.new_empty(0),  # else it draws some
        )[1]  # fmt: skip
        return found

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        if negative is not None:
            negative = Conditions({**conditions.tensors, **negative.tensors})
        scale = guidance_scale if guidance_scale == 1 or self.guidance_scale_2 is None else self.guidance_scale_2

        def guided(name: str, w: float, x: Tensor, sigma: Tensor, own: Conditions, none: Conditions | None) -> Tensor:
            return classifier_free_apart(partial(self._predict, networks[name]), x, sigma, own, none, w, detach_uncond)

        high = partial(guided, "transformer", guidance_scale)
        if len(networks) == 1:
            return high(x, sigma, conditions, negative)
        # a sigma on a device is waited for: milliseconds beside a call of 14B
        is_high = flow_multistep_timestep(sigma.cpu()) >= self.pipeline.config.boundary_ratio * 1000
        return dealt(is_high, high, partial(guided, "transformer_2", scale), x, sigma, conditions, negative)

    def _predict(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        own = {name: tensor.to(x.device, self.dtype) for name, tensor in conditions.tensors.items()}
        states = x.to(self.dtype)
        if "first_frame" in own:
            states = torch.cat([states, own["first_frame"]], 1)
        (timestep,) = send(x.device, flow_multistep_timestep(sigma))
        if self.pipeline.config.expand_timesteps:  # Wan 2.2's 5B takes one for each token, here all equal
            frames, height, width = states.shape[-3:]
            timestep = timestep[:, None].float().expand(-1, frames * math.ceil(height / 2) * math.ceil(width / 2))
        prediction: Tensor = network(states, timestep, own["embeds"], own.get("image"), return_dict=False)[0]
        return prediction

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE itself clamps to [-1, 1]: no gradient passes where it does."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        mean, std = scaled_vae.channel_statistics(self.vae, latents)
        video: Tensor = self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return video.transpose(1, 2)

    def encode_images(self, images: Tensor) -> Tensor:
        videos = images if images.ndim == 5 else images[:, None]  # an image is a video of one frame
        mode: Tensor = self.vae.encode(videos.transpose(1, 2).to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        mean, std = scaled_vae.channel_statistics(self.vae, mode)
        return (mode - mean) / std

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        second = {} if self.guidance_scale_2 is None else {"guidance_scale_2": self.guidance_scale_2}
        return {
            "height": size.height, "width": size.width, "num_frames": size.frames, "guidance_scale": guidance_scale,
            **second, "negative_prompt": negative_prompt, "max_sequence_length": self.max_sequence_length,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        prompts = prompts_and_negatives(records, negatives)
        if not records[0].images:
            return prompts
        if len(records) > 1:
            raise ValueError(
                f"got {len(records)} prompts with source images; expected one, since the pipeline's call takes one image: call it for "
                "each"
            )
        return {**prompts, "image": fitted_images(records, size)[0]}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return no_levels(sigmas)


def _path(scheduler: Mapping[str, Any]) -> RectifiedFlow:
    settings = UniPCMultistepScheduler.from_config(dict(scheduler)).config  # with the defaults of absent options
    return flow_multistep_path({**settings, "_class_name": scheduler["_class_name"]}, "UniPCMultistepScheduler", UNIPC)


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    vae, transformer = configs["vae"], configs["transformer"]
    space, time = vae["scale_factor_spatial"], vae["scale_factor_temporal"]
    check_video(size, math.lcm(16, space * transformer["patch_size"][1]), time)  # the pipelines ask for multiples of 16
    return (vae["z_dim"], (size.frames - 1) // time + 1, size.height // space, size.width // space)


def _variant(index: Mapping[str, Any]) -> dict[str, Any]:
    """Its networks, and what follows from them; checkpoints of Wan 2.1 do not mention a second one. ValueError for two without a
    boundary, or a boundary without two."""
    names = [name for name in NETWORKS if index.get(name, (None,))[0] is not None]
    boundary = index.get("boundary_ratio")
    if names[:1] != ["transformer"] or (len(names) == 2) != (boundary is not None):
        raise ValueError(
            f"got a checkpoint of Wan with {' and '.join(names) or 'no network'} and boundary_ratio={boundary}; expected a transformer "
            "alone without a boundary, or transformer and transformer_2 with one: see its model_index.json"
        )
    networks = dict.fromkeys(names, WanTransformer3DModel)
    return {"networks": networks, "load_lora": _load_both} if len(names) == 2 else {"networks": networks}


def _load_both(folder: str) -> list[str]:
    return [
        f"pipe.load_lora_weights({folder})",
        f'pipe.transformer_2.load_lora_adapter({folder}, prefix="transformer_2", use_safetensors=True)',
    ]


def _image_variant(index: Mapping[str, Any]) -> dict[str, Any]:
    if index.get("expand_timesteps"):
        raise ValueError(
            "got an image-to-video checkpoint of Wan with expand_timesteps=true (2.2, 5B), which keeps its first frame clean at every "
            "step; expected one whose latents all have one level: load it as a WanPipeline (text to video), or take another"
        )
    targets = TARGETS if index.get("image_encoder", (None,))[0] is None else (*TARGETS, *IMAGE_TARGETS)
    return {**_variant(index), "targets": targets}


TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip
VAE = {"base_dim": 8, "num_res_blocks": 1}
# of Wan 2.2's 5B: 16 pixels per latent in each direction
WIDE_VAE = {
    **VAE, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
}  # fmt: skip
CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip


def _tiny(second: bool = False, vae: Mapping[str, Any] = VAE, **transformer: Any) -> dict[str, Any]:
    network = (WanTransformer3DModel, {**TRANSFORMER, **transformer})
    return {
        "transformer": network, "transformer_2": network if second else None, "vae": (AutoencoderKLWan, vae),
        "text_encoder": (UMT5EncoderModel, {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
        "tokenizer": (T5Tokenizer, {}),
        "scheduler": (UniPCMultistepScheduler, {
            "flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "num_train_timesteps": 1000,
        }),
    }  # fmt: skip


FAMILY = Family(
    pipeline=WanPipeline,
    model=WanModel,
    networks=dict.fromkeys(NETWORKS, WanTransformer3DModel),
    targets=TARGETS,
    path=_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    variant=_variant,
    takes_levels=False,
    tiny={
        "wan21": _tiny(),
        "wan22": {**_tiny(True), "boundary_ratio": 0.875},  # as Wan2.2-T2V-A14B
        "wan22_5b": {**_tiny(vae=WIDE_VAE), "expand_timesteps": True},
    },
)
IMAGE_TO_VIDEO = replace(
    FAMILY,
    pipeline=WanImageToVideoPipeline,
    source_images=(1, 1),
    variant=_image_variant,
    tiny={
        "wan21_i2v": {
            **_tiny(in_channels=36, image_dim=16, added_kv_proj_dim=24), "image_encoder": (CLIPVisionModel, CLIP),
            "image_processor": (CLIPImageProcessor, {"size": {"shortest_edge": 32}, "crop_size": 32}),
        },
        "wan22_i2v": {**_tiny(True, in_channels=36), "boundary_ratio": 0.9},  # as Wan2.2-I2V-A14B
    },
)  # fmt: skip
