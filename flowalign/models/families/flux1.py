"""FLUX.1 dev, schnell and Kontext: a FluxPipeline or FluxKontextPipeline as a model, sampled by the Euler steps of its own
scheduler.

The guidance scale is an input of the network (dev, Kontext), or ignored (schnell, distilled to few steps): one row per state, and
negative prompts are not read; the pipelines' `true_cfg_scale` is not offered. In fp32 on the CPU the deterministic rollout
equals the pipeline's call exactly, as for SD3. Tokens, their positions and timesteps 0…1 are used only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from flowalign.data import PromptRecord
from flowalign.models import scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Distilled, Family, check_image, vae_reduction
from flowalign.models.flow_match import flow_match_call, flow_match_path, flow_match_sigmas
from flowalign.models.packing import pack_2x2, unpack_2x2
from flowalign.models.source_images import fitted_images
from samplers import ODE, RectifiedFlow

# of flow_grpo's scripts/train_flux.py and diffusers' train_dreambooth_lora_flux.py; attention also of the single blocks
TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
LONGEST_PROMPT = {
    True: 512,
    False: 256,
}  # tokens of T5 that dev and Kontext (guidance_embeds) and schnell were trained with


class FluxModel:
    """Satisfies `flowalign.models.base.Model`. The network predicts the velocity itself.

    A source image (Kontext alone) is fitted to the size of what is generated, stretched where its sides have another ratio; its
    tokens follow those of the state. max_sequence_length: of the T5 part; None = 512, of schnell 256, which is also the most."""

    path = RectifiedFlow()

    def __init__(self, pipeline: FluxPipeline | FluxKontextPipeline, max_sequence_length: int | None = None) -> None:
        flow_match_path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        self.guided: bool = pipeline.transformer.config.guidance_embeds
        longest = LONGEST_PROMPT[self.guided]
        length = longest if max_sequence_length is None else max_sequence_length
        if not 1 <= length <= longest:
            raise ValueError(
                f"got max_sequence_length={length}; expected 1 to {longest}, which this FLUX.1 was trained with: leave it out"
            )
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = length

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        scheduler, tokens = self.pipeline.scheduler, (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
        settings = scheduler.config
        mu = calculate_shift(
            tokens, settings.base_image_seq_len, settings.max_image_seq_len, settings.base_shift, settings.max_shift
        )
        return flow_match_sigmas(scheduler, num_inference_steps, mu=mu, linear=True)

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=[record.prompt for record in records], device=self.encoders[0].device,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        tensors = {"embeds": embeds, "pooled": pooled}
        if records[0].images:
            pixels = self.pipeline.image_processor.preprocess(fitted_images(records, size))
            # in the dtype of the texts first, as the pipeline's
            tensors["source"] = self.encode_images(pixels.to(embeds.dtype)).to(embeds.device)
        return Conditions(tensors)

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        height, width = x.shape[-2:]
        own = {name: tensor.to(x.device, self.dtype) for name, tensor in conditions.tensors.items()}
        # positions are rounded to the network's dtype, and levels too, as by the pipelines
        tokens, places = pack_2x2(x.to(self.dtype)), [_positions(0, height, width, x.device)]
        if "source" in own:
            tokens = torch.cat([tokens, pack_2x2(own["source"])], 1)
            places.append(_positions(1, height, width, x.device))
        timesteps = sigma.to(x.device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps
        scale = torch.full([len(x)], guidance_scale, dtype=torch.float32, device=x.device) if self.guided else None
        velocity: Tensor = networks["transformer"](
            hidden_states=tokens,
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=scale,
            pooled_projections=own["pooled"],
            encoder_hidden_states=own["embeds"],
            txt_ids=torch.zeros(own["embeds"].shape[1], 3, dtype=self.dtype, device=x.device),
            img_ids=torch.cat(places).to(self.dtype),
            return_dict=False,
        )[0]
        return unpack_2x2(velocity[:, : height * width // 4], height, width).float()

    def decode(self, latents: Tensor) -> Tensor:
        return scaled_vae.decode(self.vae, latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return scaled_vae.encode(self.vae, images)

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        arguments = {
            "height": size.height, "width": size.width, "guidance_scale": guidance_scale,
            "max_sequence_length": self.max_sequence_length,
        }  # fmt: skip
        if type(self.pipeline) is not FluxKontextPipeline:
            return arguments
        # left alone, Kontext generates about 1024² pixels, and makes the source image one of 17 sizes
        return {**arguments, "max_area": size.height * size.width, "_auto_resize": False}

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        prompts: dict[str, Any] = {"prompt": [record.prompt for record in records]}
        return {**prompts, "image": fitted_images(records, size)} if records[0].images else prompts

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack_2x2(latents)

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        factor = vae_reduction(self.vae.config)
        return unpack_2x2(latents, size.height // factor, size.width // factor)

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return flow_match_call(sigmas)


def _positions(image: int, height: int, width: int, device: torch.device) -> Tensor:
    """[tokens, 3]: number of the image (0 is the state, 1 its source), row and column of each patch of its latents."""
    number = torch.full((1,), image, device=device)
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    return torch.cartesian_prod(number, rows, columns)


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor, transformer = vae_reduction(configs["vae"]), configs["transformer"]
    check_image(size, 2 * factor)
    return (transformer["in_channels"] // 4, size.height // factor, size.width // factor)


def _distilled(configs: Configs) -> Distilled:
    """schnell is the one without an input for the scale; 1 to 4 steps, says its card."""
    return Distilled() if configs["transformer"]["guidance_embeds"] else Distilled(4, ignores_guidance=True)


def _tiny(guided: bool, **scheduler: Any) -> dict[str, Any]:
    return {
        "transformer": (FluxTransformer2DModel, {
            "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": guided, "axes_dims_rope": (4, 6, 6),
        }),
        "vae": (AutoencoderKL, {
            "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 0.3611,
            "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
        }),
        "text_encoder": (CLIPTextModel, {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        }),
        "tokenizer": (CLIPTokenizer, {}),
        "text_encoder_2": (T5EncoderModel, {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
        "tokenizer_2": (T5Tokenizer, {}),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {
            "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15, **scheduler,
        }),
    }  # fmt: skip


# scheduler_config.json of black-forest-labs/FLUX.1-dev, which FLUX.1-Kontext-dev has too
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}

FAMILY = Family(
    pipeline=FluxPipeline,
    model=FluxModel,
    networks={"transformer": FluxTransformer2DModel},
    targets=TARGETS,
    path=flow_match_path,
    latent_shape=_latent_shape,
    rows_per_state=lambda guidance_scale: 1,
    distilled=_distilled,
    tiny={
        "flux1_dev": _tiny(True, **DYNAMIC),
        "flux1_schnell": _tiny(False, shift=1.0, use_dynamic_shifting=False),
    },
)
KONTEXT = replace(
    FAMILY, pipeline=FluxKontextPipeline, source_images=(1, 1), tiny={"flux1_kontext": _tiny(True, **DYNAMIC)}
)
