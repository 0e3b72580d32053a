"""Qwen-Image (2508.02324): a QwenImagePipeline as a model, sampled by the Euler steps of its own scheduler.

In fp32 on the CPU the deterministic rollout equals the pipeline's call exactly if the network calls have equal batches and
the prompts were encoded in equal batches. Timesteps 0…1000 are used only here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from flowalign.data import PromptRecord
from flowalign.models import scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Family, check_image, prompts_and_negatives
from flowalign.models.flow_match import flow_match_call, flow_match_path, flow_match_sigmas
from flowalign.models.guidance import classifier_free_apart, classifier_free_rows
from flowalign.models.packing import pack_2x2, unpack_2x2
from flowalign.models.padding import masked, padded, unpadded
from samplers import ODE, RectifiedFlow

# those of flow_grpo's scripts/train_qwenimage.py
TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip
LONGEST = 1024  # tokens of a prompt that the pipeline takes
# how an edit pipeline fits source images -> (those that the text encoder sees, pixels [1, 3, h, w] in [-1, 1] for the VAE of each)
Fit = Callable[[VaeImageProcessor, list[Image.Image]], tuple[list[Image.Image], list[Tensor]]]


class QwenImageModel:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself, of packed latents.

    max_sequence_length: tokens of a prompt, behind the part of the template that is dropped; None = 512. Of an edit those of its images
    come on top, and a longer prompt is refused, where the pipeline of text alone cuts it.
    fixed_length: texts stay padded, with a mask: one shape whatever the prompts, and no wait for the device. Velocities are then the
    pipeline's to rounding, and cost more.
    fit: what an edit pipeline makes of source images; None: there are none."""

    path = RectifiedFlow()

    def __init__(
        self,
        pipeline: Any,
        max_sequence_length: int | None = None,
        *,
        fixed_length: bool = False,
        fit: Fit | None = None,
    ) -> None:
        flow_match_path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        if pipeline.transformer.config.guidance_embeds:
            raise ValueError("got a transformer that takes the guidance scale as an input (guidance_embeds); expected one of "
                             "Qwen-Image: take a checkpoint that is not distilled")  # fmt: skip
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = 512 if max_sequence_length is None else max_sequence_length
        if not 1 <= self.max_sequence_length <= LONGEST:
            raise ValueError(
                f"got max_sequence_length={max_sequence_length}; expected 1 to {LONGEST}, as the pipeline takes"
            )
        self._texts = masked if fixed_length else unpadded
        self._fit = fit

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        scheduler = self.pipeline.scheduler
        tokens = (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
        # what the configuration does not say is as the pipeline's call has it
        mu = calculate_shift(
            tokens, scheduler.config.get("base_image_seq_len", 256), scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5), scheduler.config.get("max_shift", 1.15),
        )  # fmt: skip
        return flow_match_sigmas(scheduler, num_inference_steps, mu=mu, linear=True)

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        if self._fit is not None:  # the pipeline takes one record
            return Conditions.cat([self._encode_edit(self._fit, record) for record in records])
        embeds, mask = self.pipeline.encode_prompt(
            [record.prompt for record in records], self.encoders[0].device,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        lengths = torch.full((len(embeds),), embeds.shape[1], device=embeds.device) if mask is None else mask.sum(1)
        return Conditions({"embeds": padded(embeds, self.max_sequence_length), "lengths": lengths})

    def _encode_edit(self, fit: Fit, record: PromptRecord) -> Conditions:
        """source_0, …: latents of the images, in the shape into which they are fitted."""
        seen, pixels = fit(self.pipeline.image_processor, [image.open() for image in record.images])
        embeds, _ = self.pipeline.encode_prompt([record.prompt], seen, self.encoders[0].device)
        processor = self.pipeline.processor.image_processor
        patches = sum(processor.get_number_of_image_patches(image.height, image.width) for image in seen)
        of_images, length = patches // processor.merge_size**2, embeds.shape[1]
        if length - of_images > self.max_sequence_length:
            raise ValueError(
                f"got a prompt of {length - of_images} tokens beside those of its images, {record.prompt[:40]!r}…; expected at most "
                f"{self.max_sequence_length}: shorten it, or set policy.max_sequence_length"
            )
        sources = {f"source_{number}": self.encode_images(image) for number, image in enumerate(pixels)}
        lengths = torch.tensor([length], device=embeds.device)
        return Conditions(
            {"embeds": padded(embeds, of_images + self.max_sequence_length), "lengths": lengths, **sources}
        )

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        height, width = x.shape[-2:]
        predict = partial(self._predict, networks["transformer"], (height, width))
        guided = classifier_free_apart(
            predict, pack_2x2(x), sigma, conditions, negative, guidance_scale, detach_uncond, keep_norm=True
        )
        return unpack_2x2(guided, height, width)

    def _predict(
        self, network: Network, sides: tuple[int, int], tokens: Tensor, sigma: Tensor, conditions: Conditions
    ) -> Tensor:
        own = conditions.to(tokens.device).tensors
        sources = [tensor for name, tensor in own.items() if name.startswith("source_")]
        embeds, mask = self._texts(own["embeds"], own["lengths"])
        timestep = sigma.to(tokens.device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps
        grids = [(1, height // 2, width // 2) for height, width in (sides, *(source.shape[-2:] for source in sources))]
        velocity: Tensor = network(
            hidden_states=torch.cat([tokens, *map(pack_2x2, sources)], dim=1).to(self.dtype),
            timestep=timestep.to(self.dtype) / 1000,  # rounds twice, as the pipeline's call
            encoder_hidden_states=embeds.to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[grids] * len(tokens),
            return_dict=False,
        )[0]
        return velocity[:, : tokens.shape[1]]

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, self.vae.dtype)[:, :, None]
        mean, std = scaled_vae.channel_statistics(self.vae, latents)
        image: Tensor = self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        return image

    def encode_images(self, images: Tensor) -> Tensor:
        found = self.vae.encode(images.to(self.vae.device, self.vae.dtype)[:, :, None]).latent_dist.mode()
        mean, std = scaled_vae.channel_statistics(self.vae, found)
        latents: Tensor = ((found - mean) / std)[:, :, 0]
        return latents

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        guided = {} if guidance_scale == 1.0 else {"negative_prompt": negative_prompt}
        return {
            "height": size.height, "width": size.width, "true_cfg_scale": guidance_scale, **guided,
            "max_sequence_length": self.max_sequence_length,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        if self._fit is None:
            return prompts_and_negatives(records, negatives)
        if len(records) != 1:
            raise ValueError(f"got {len(records)} records for a {type(self.pipeline).__name__}; expected one in a call")
        images = [image.open() for image in records[0].images]
        return {**prompts_and_negatives(records, negatives), "image": images if len(images) > 1 else images[0]}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack_2x2(latents)

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        factor = 2 ** len(self.vae.config.temperal_downsample)
        return unpack_2x2(latents, size.height // factor, size.width // factor)

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return flow_match_call(sigmas)


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor = 2 ** len(configs["vae"]["temperal_downsample"])
    check_image(size, 2 * factor)
    return (configs["transformer"]["in_channels"] // 4, size.height // factor, size.width // factor)


TEXT_ENCODER = {
    "text_config": {
        "bos_token_id": None,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    },
    "vision_config": {
        "depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [0],
    },
}  # fmt: skip
TINY = {
    "transformer": (QwenImageTransformer2DModel, {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 4, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
    }),
    "vae": (AutoencoderKLQwenImage, {"base_dim": 4, "num_res_blocks": 1}),
    "text_encoder": (Qwen2_5_VLForConditionalGeneration, TEXT_ENCODER),
    "tokenizer": (Qwen2Tokenizer, {"special_tokens": ("<|im_start|>", "<|im_end|>")}),
    # scheduler/scheduler_config.json of Qwen/Qwen-Image
    "scheduler": (FlowMatchEulerDiscreteScheduler, {
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9,
        "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    }),
}  # fmt: skip


def model(
    pipeline: QwenImagePipeline, max_sequence_length: int | None = None, fixed_length: bool = False
) -> QwenImageModel:
    """Of text alone."""
    return QwenImageModel(pipeline, max_sequence_length, fixed_length=fixed_length)


FAMILY = Family(
    pipeline=QwenImagePipeline,
    model=model,
    networks={"transformer": QwenImageTransformer2DModel},
    targets=TARGETS,
    path=flow_match_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    tiny={"qwen_image": TINY},
)
