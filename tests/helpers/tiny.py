"""Very small random pipelines of the real classes, for 24×48 pixels: SD3 (patch 4, 16 tokens, no T5) and SD1.5."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from flowalign.glyphs import parts


def tiny_sd3(folder: Path, seed: int = 0) -> Path:
    """Saves the pipeline (fp32, two layers, 32 wide) into `folder` and returns it."""
    torch.manual_seed(seed)
    pipeline = parts.build_pipeline()
    pipeline.register_modules(transformer=tiny_transformer())
    pipeline.vae.register_to_config(shift_factor=0.1, scaling_factor=0.9)
    pipeline.save_pretrained(folder)
    return folder


def tiny_transformer() -> SD3Transformer2DModel:
    """Two layers, 32 wide, drawn from torch's generator."""
    transformer = parts.build_transformer(layers=2, heads=2, head_width=16)
    for parameter in transformer.parameters():  # SD3 starts its last layer at 0; here it has to matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    return transformer


def tiny_sd15(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Saves an SD1.5 pipeline (UNet of two levels, latents 4×12×24) with the released scheduler's configuration, in
    which `scheduler` changes entries, into `folder` and returns it."""
    torch.manual_seed(seed)
    tokenizer = parts.build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=parts.TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=(12, 24), in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, sample_size=48, scaling_factor=0.9,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=PNDMScheduler(**SD15_SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    file = folder / "scheduler" / "scheduler_config.json"
    released = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False, **SD15_SCHEDULER}
    file.write_text(json.dumps({**released, **scheduler}))
    return folder


SD15_SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip

# module in flowalign/models/families -> what saves its tiny pipeline into a folder
PIPELINES: dict[str, Callable[[Path], Path]] = {"sd3": tiny_sd3, "sd15": tiny_sd15}
