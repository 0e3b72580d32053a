"""FLUX.2 klein: a Flux2KleinPipeline as a model, sampled by the Euler steps of its own scheduler. Text to image only: its reference
images are not read.

In fp32 on the CPU the deterministic rollout equals the pipeline's call exactly if the network calls have equal batches and
the prompts were encoded in equal batches. Two kinds of checkpoint, told apart by `is_distilled` in model_index.json: the base models
are guided from the prompt "", and the pipeline takes no other; the distilled ones ignore the guidance scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from flowalign.data import PromptRecord
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Distilled, Family, check_image, vae_reduction
from flowalign.models.flow_match import flow_match_call, flow_match_path, flow_match_sigmas
from flowalign.models.guidance import classifier_free_apart, classifier_free_rows
from samplers import ODE, RectifiedFlow

# as in diffusers' train_dreambooth_lora_flux2_klein.py; `attn.to_out` is that of the single blocks alone, a linear layer only there
TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj", "attn.to_out",
)  # fmt: skip


class Flux2KleinModel:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself, of latents in patches of 2×2 that are
    normalized by the running statistics of the VAE's batch norm; here they are unpacked, [n, C, H/8, W/8].

    max_sequence_length: of the prompts, which are padded to it and not masked."""

    path = RectifiedFlow()

    def __init__(self, pipeline: Flux2KleinPipeline, max_sequence_length: int = 512) -> None:
        flow_match_path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = max_sequence_length

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        tokens = (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
        mu = compute_empirical_mu(tokens, num_inference_steps)
        return flow_match_sigmas(self.pipeline.scheduler, num_inference_steps, mu=mu, linear=True)

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[record.prompt for record in records], device=self.encoders[0].device,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditions({"embeds": embeds})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        predict = partial(self._predict, networks["transformer"])
        scale = 1.0 if self.pipeline.config.is_distilled else guidance_scale
        return classifier_free_apart(predict, x, sigma, conditions, negative, scale, detach_uncond)

    def _predict(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        patches = self.to_pipeline(x)
        embeds = conditions.tensors["embeds"].to(x.device, self.dtype)
        height, width = patches.shape[-2:]
        timestep = sigma.to(x.device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps
        velocity: Tensor = network(
            hidden_states=patches.flatten(2).mT.to(self.dtype),
            timestep=timestep.to(self.dtype) / 1000,  # rounds twice, as the pipeline's call
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=_positions(1, 1, embeds.shape[1], x.device),
            img_ids=_positions(height, width, 1, x.device),
            return_dict=False,
        )[0]
        return _unpacked(velocity, height, width)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        mean, std = self._statistics()
        patches = self.to_pipeline(latents.to(vae.device, vae.dtype)) * std + mean
        image: Tensor = vae.decode(pixel_shuffle(patches, 2), return_dict=False)[0]
        return image

    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.vae
        mean, std = self._statistics()
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return pixel_shuffle((self.to_pipeline(latents) - mean) / std, 2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) [1, 4C, 1, 1] of the channels of a patch."""
        norm = self.vae.bn
        std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)
        return norm.running_mean.view(1, -1, 1, 1).to(self.vae.dtype), std.to(self.vae.dtype)

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "guidance_scale": guidance_scale,
            "max_sequence_length": self.max_sequence_length,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        return {"prompt": [record.prompt for record in records]}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pixel_unshuffle(latents, 2)

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        unit = 2 * self.pipeline.vae_scale_factor
        return _unpacked(latents, size.height // unit, size.width // unit)

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return flow_match_call(sigmas)


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """[n, C, 2·height, 2·width] of tokens [n, height·width, 4C]."""
    return pixel_shuffle(tokens.mT.unflatten(2, (height, width)), 2)


def _positions(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """[height·width·length, 4]: (time, row, column, place in the text) of the tokens of an image (length 1) or a text."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width, length)))


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor = vae_reduction(configs["vae"])
    check_image(size, 2 * factor)
    return (configs["transformer"]["in_channels"] // 4, size.height // factor, size.width // factor)


def _variant(index: Mapping[str, Any]) -> dict[str, Any]:
    """Of a distilled checkpoint, which is never guided; 4 steps, says its card."""
    if not index.get("is_distilled"):
        return {}
    distilled = Distilled(4, ignores_guidance=True)
    return {"rows_per_state": lambda guidance_scale: 1, "distilled": lambda configs: distilled}


# released: "chat_template" of Qwen3, whose thinking is switched off by an empty one
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
TINY = {
    "transformer": (Flux2Transformer2DModel, {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 24, "timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False,
    }),
    "vae": (AutoencoderKLFlux2, {
        "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "latent_channels": 4,
    }),
    "text_encoder": (Qwen3ForCausalLM, {
        # the pipeline reads hidden states 9, 18 and 27
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 28, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 8, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }),
    "tokenizer": (Qwen2TokenizerFast, {
        "chat_template": CHAT, "special_tokens": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    }),
    "scheduler": (FlowMatchEulerDiscreteScheduler, {
        "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "time_shift_type": "exponential",
    }),
}  # fmt: skip

FAMILY = Family(
    pipeline=Flux2KleinPipeline,
    model=Flux2KleinModel,
    networks={"transformer": Flux2Transformer2DModel},
    targets=TARGETS,
    path=flow_match_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    negative_prompts=False,
    variant=_variant,
    tiny={"flux2_klein": {**TINY, "is_distilled": True}, "flux2_klein_base": TINY},
)
