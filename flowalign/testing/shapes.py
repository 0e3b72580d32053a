"""Checkpoint folders of released models with every configuration and no weights: what a forecast of memory reads, offline.

Values are those of each component's released config.json, so far as they differ from the defaults of its class; where the source is the code
of the conversion or of the class itself, it is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from flowalign.models.checkpoint_files import PICKLES
from flowalign.testing.tiny_pipeline import tiny_pipeline

Config = Mapping[str, Any]

CLIP_L = {  # openai/clip-vit-large-patch14
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "max_position_embeddings": 77,
}  # fmt: skip
CLIP_H = {  # stabilityai/stable-diffusion-2-1: OpenCLIP ViT-H without its last layer
    "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu", "max_position_embeddings": 77,
}  # fmt: skip
CLIP_G = {  # OpenCLIP ViT-bigG, in SDXL and SD3
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu", "max_position_embeddings": 77,
}  # fmt: skip
CLIP_H_IMAGES = {  # Wan-AI/Wan2.1-I2V-14B-480P-Diffusers: OpenCLIP ViT-H of images
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "projection_dim": 1024,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL = {  # google/t5-v1_1-xxl
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}  # fmt: skip
UMT5_XXL = {**T5_XXL, "vocab_size": 256384}  # google/umt5-xxl
QWEN3_4B = {  # Qwen/Qwen3-4B
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
QWEN25_VL_7B = {  # Qwen/Qwen2.5-VL-7B-Instruct
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": False,
}  # fmt: skip
PIXELS = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}  # of its images
SQUARE_224 = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}  # of CLIP's
GEMMA2_2B = {  # google/gemma-2-2b-it, in SANA
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
LLAMA3_8B = {  # hunyuanvideo-community/HunyuanVideo: of xtuner/llava-llama-3-8b-v1_1
    "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip

KL = {  # the autoencoder of Stable Diffusion 1 and 2
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "sample_size": 512, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
KL_16 = {  # of SD3 and FLUX.1
    **KL, "latent_channels": 16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
KL_FLUX = {**KL_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
DC_32 = {  # mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers
    "latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.41407,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv", "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}  # fmt: skip

SD3_MEDIUM = {  # stabilityai/stable-diffusion-3.5-medium
    "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "patch_size": 2, "in_channels": 16,
    "out_channels": 16, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # else the defaults of UNet2DConditionModel
SD21 = {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
}  # fmt: skip
SDXL = {  # stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SANA_1600M = {  # Efficient-Large-Model/Sana_1600M_1024px_diffusers
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "caption_channels": 2304,
    "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1,
}  # fmt: skip
FLUX_1 = {
    "num_layers": 19,
    "num_single_layers": 38,
    "guidance_embeds": True,
}  # else the defaults of FluxTransformer2DModel
HUNYUAN = {
    "num_layers": 20,
    "num_single_layers": 40,
    "guidance_embeds": True,
}  # else those of HunyuanVideoTransformer3DModel
KLEIN_4B = {  # scripts/convert_flux2_to_diffusers.py of diffusers: klein 4b
    "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
Z_IMAGE = {  # Tongyi-MAI/Z-Image-Turbo, of the same size
    "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560, "in_channels": 16,
    "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
}  # fmt: skip
QWEN_IMAGE = {  # Qwen/Qwen-Image
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
WAN_1_3B = {  # Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096,
}  # fmt: skip
WAN_14B = {  # Wan-AI/Wan2.1-T2V-14B-Diffusers, and both networks of Wan2.2-T2V-A14B
    "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096,
}  # fmt: skip
WAN_5B = {  # Wan-AI/Wan2.2-TI2V-5B-Diffusers
    "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30,
    "text_dim": 4096,
}  # fmt: skip
WAN_5B_VAE = {  # the same; latents are shifted and scaled by numbers of its own, of which the shapes need only how many there are
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
WAN_I2V = {**WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}  # Wan2.1-I2V-14B-480P


@dataclass(frozen=True)
class Shape:
    """A released model: the tiny pipeline of its family, whose tokenizers, scheduler and model_index.json stand in for its own, and the
    configurations of its networks by component; and what the processor of source images has of its own."""

    tiny: str
    configs: Mapping[str, Config]
    image_processor: Config = field(default_factory=dict)


def _flux(tiny: str, **transformer: Any) -> Shape:
    return Shape(
        tiny, {"transformer": FLUX_1 | transformer, "vae": KL_FLUX, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
    )


def _sdxl(tiny: str) -> Shape:
    return Shape(
        tiny, {"unet": SDXL, "vae": {**KL, "sample_size": 1024}, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
    )


def _qwen(tiny: str, **image_processor: Any) -> Shape:
    return Shape(tiny, {"transformer": QWEN_IMAGE, "vae": {}, "text_encoder": QWEN25_VL_7B}, image_processor)


def _wan(tiny: str, transformer: Config, **others: Config) -> Shape:
    return Shape(tiny, {"transformer": transformer, "vae": {}, "text_encoder": UMT5_XXL} | others)


# by the name of the layer in configs/models
SHAPES = {
    "flux1_dev": _flux("flux1_dev"),
    "flux1_kontext": _flux("flux1_kontext"),
    "flux1_schnell": _flux("flux1_schnell", guidance_embeds=False),
    "flux2_klein": Shape("flux2_klein_base", {"transformer": KLEIN_4B, "vae": {}, "text_encoder": QWEN3_4B}),
    "hunyuan_video": Shape(
        "hunyuan_video", {"transformer": HUNYUAN, "vae": {}, "text_encoder": LLAMA3_8B, "text_encoder_2": CLIP_L}
    ),
    "ltx_video": Shape(  # 0.9: the defaults of the classes, as scripts/convert_ltx_to_diffusers.py of diffusers has them
        "ltx_video", {"transformer": {"num_layers": 28}, "vae": {}, "text_encoder": T5_XXL}
    ),
    "qwen_image": _qwen("qwen_image"),
    "qwen_image_edit": _qwen("qwen_image_edit", size=PIXELS),
    "qwen_image_edit_plus": _qwen("qwen_image_edit_plus", size=PIXELS),
    "sana_1600m": Shape("sana", {"transformer": SANA_1600M, "vae": DC_32, "text_encoder": GEMMA2_2B}),
    "sd15": Shape("sd15", {"unet": SD15, "vae": KL, "text_encoder": CLIP_L}),
    "sd21": Shape("sd21", {"unet": SD21, "vae": {**KL, "sample_size": 768}, "text_encoder": CLIP_H}),
    "sd35_medium": Shape(
        "sd3", {"transformer": SD3_MEDIUM, "vae": KL_16, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
    ),
    "sdxl": _sdxl("sdxl"),
    "sdxl_turbo": _sdxl("sdxl_turbo"),
    "wan21_14b": _wan("wan21", WAN_14B),
    "wan21_1_3b": _wan("wan21", WAN_1_3B),
    "wan21_i2v": replace(_wan("wan21_i2v", WAN_I2V, image_encoder=CLIP_H_IMAGES), image_processor=SQUARE_224),
    "wan22": _wan("wan22", WAN_14B, transformer_2=WAN_14B),
    "wan22_5b": _wan("wan22_5b", WAN_5B, vae=WAN_5B_VAE),
    "wan22_i2v": _wan("wan22_i2v", {**WAN_14B, "in_channels": 36}, transformer_2={**WAN_14B, "in_channels": 36}),
    "z_image": Shape("z_image", {"transformer": Z_IMAGE, "vae": KL_FLUX, "text_encoder": QWEN3_4B}),
}  # fmt: skip
DEPTH = ("num_layers", "num_single_layers", "n_layers")  # of networks, and of T5


def shapes_folder(name: str, folder: Path, depth: int | None = None) -> Path:
    """A checkpoint folder of the model of configs/models/`name`.yaml without its numbers: `policy.path` of `flowalign forecast`. Its
    tokenizers spell, so that a prompt has more tokens than with its own.

    depth: blocks of each kind in the networks and in T5, in place of the released numbers: for a test of what is built, in a second."""
    shape = SHAPES[name]
    pipeline = tiny_pipeline(shape.tiny)
    images = pipeline.components.get("image_processor") or getattr(
        pipeline.components.get("processor"), "image_processor", None
    )
    for key, value in shape.image_processor.items():
        setattr(images, key, value)
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/*.safetensors*"):
        file.unlink()
    for part, config in shape.configs.items():
        settings = {**config, **({} if depth is None else _shallow(config, depth))}
        network = pipeline.components[part]
        if isinstance(network, ModelMixin):
            with torch.device("meta"):
                type(network).from_config(settings).save_config(folder / part)  # with the defaults of its class
        else:
            ids = _token_ids(network.config.to_dict(), settings)
            type(network.config)(**ids).save_pretrained(folder / part)
        # a file of pickles is not read before it is loaded, so this passes for weights
        (folder / part / PICKLES["diffusers" if isinstance(network, ModelMixin) else "transformers"]).touch()
    return folder


def _shallow(config: Config, depth: int) -> dict[str, Any]:
    fewer: dict[str, Any] = {key: depth for key in DEPTH if key in config}
    return fewer | ({"dual_attention_layers": [0]} if "dual_attention_layers" in config else {})


def _token_ids(tiny: Config, released: Config) -> dict[str, Any]:
    """The released settings with the numbers of special tokens in the tiny tokenizer."""
    ids = {key: value for key, value in tiny.items() if key.endswith("_token_id")}
    text = (
        {"text_config": _token_ids(tiny["text_config"], released["text_config"])} if "text_config" in released else {}
    )
    return {**released, **ids, **text}
